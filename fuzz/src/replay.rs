//! Fuzzing without libFuzzer, for every run of the tests: the seeds, then mutations of them for some seconds.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest input; libFuzzer's default.
const LONGEST: usize = 4096;

/// Where the seeds of a target are.
pub fn seeds_of(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/seeds")
        .join(target)
}

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

/// A small generator: whatever it gives is as good as anything else, and a seed repeats it.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % bound.max(1) as u64) as usize
    }
}

/// Runs `law` over the seeds of `target` and over mutations of them, the same ones in every run: who lands a change is
/// not to stumble over somebody else's. `TREEBOOT_SEED` gives others and `TREEBOOT_FUZZ_SECONDS` more of them. An input that breaks the law is printed in hexadecimal.
pub fn replay(target: &str, law: fn(&[u8])) {
    let seeds = seeds_of(target);
    let mut inputs = Vec::new();
    let listing = std::fs::read_dir(&seeds).unwrap_or_else(|error| panic!("{}: {error}", seeds.display()));
    for entry in listing {
        inputs.push(std::fs::read(entry.expect("an entry").path()).expect("a seed"));
    }
    inputs.sort();
    assert!(!inputs.is_empty(), "no seeds in {}", seeds.display());
    let seed = number("TREEBOOT_SEED").unwrap_or(0x5eed);
    let end = Instant::now() + Duration::from_secs(number("TREEBOOT_FUZZ_SECONDS").unwrap_or(7));
    for input in &inputs {
        run(target, seed, input, law);
    }
    let mut random = Random(seed);
    let mut count = 0u64;
    while Instant::now() < end {
        let mut input = inputs[random.below(inputs.len())].clone();
        for _ in 0..=random.below(6) {
            let other = random.below(inputs.len());
            mutate(&mut input, &inputs[other], &mut random);
        }
        input.truncate(LONGEST);
        run(target, seed, &input, law);
        count += 1;
    }
    println!(
        "{target}: {} seeds, {count} mutations (TREEBOOT_SEED={seed} repeats them)",
        inputs.len()
    );
}

fn run(target: &str, seed: u64, input: &[u8], law: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| law(input))) {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        println!("{target}: TREEBOOT_SEED={seed}; the input that breaks the law, in hexadecimal: {hex}");
        std::panic::resume_unwind(panic);
    }
}

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(input.len());
    match random.below(8) {
        0 if !input.is_empty() => input[at] ^= 1 << random.below(8),
        1 if !input.is_empty() => {
            input[at] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)]
        }
        2 => {
            let end = (at + random.below(64)).min(input.len());
            input.drain(at..end);
        }
        3 => {
            let end = (at + random.below(200)).min(input.len());
            let piece = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, piece);
        }
        4 => {
            let from = random.below(other.len());
            let piece = &other[from..(from + random.below(200)).min(other.len())];
            let to = random.below(input.len() + 1);
            input.splice(to..to, piece.iter().copied());
        }
        5 if input.len() >= 4 => {
            let at = random.below(input.len() - 3);
            let value = [0, 1, u32::MAX, 1 << 31, 512, random.below(1 << 32) as u32][random.below(6)];
            input[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        6 => input.truncate(at.max(1)),
        _ => {
            let byte = random.below(256) as u8;
            input.insert(at, byte);
        }
    }
}

//! What was asked for and answered, block by block, and whether any order of it explains every answer.
//!
//! Each block is a register of its own. A write that was acknowledged took effect at one moment between its command and
//! its answer; one whose connection was lost did so before its session was over, or never. A read saw the value of one
//! moment. Values are unique, so a state of the search is a value and the set of open operations that have happened.

use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const BLOCK: usize = 512;

/// What a block holds: 0 for zeroes, otherwise the operation and the block's place in it.
pub(crate) type Value = u64;

/// The bytes of a value. Every word differs, so that bytes that are moved within a block are found too.
pub(crate) fn bytes_of(value: Value) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    if value != 0 {
        for (at, word) in block.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(value ^ (at as u64) << 56).to_be_bytes());
        }
    }
    block
}

/// The value of bytes; `None`: the block is torn.
pub(crate) fn value_of(block: &[u8]) -> Option<Value> {
    let value = u64::from_be_bytes(*block.first_chunk()?);
    (block == bytes_of(value)).then_some(value)
}

/// What an operation is to one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Sees(Value),
    SeesNot(Value),
    Sets(Value),
    /// Sets the second where it finds the first.
    Swaps(Value, Value),
}

#[derive(Debug, Clone, Copy)]
struct Step {
    from: u64,
    to: u64,
    /// It was answered, so it happened.
    certain: bool,
    effect: Effect,
    #[expect(dead_code, reason = "for whoever reads a failure")]
    who: usize,
}

#[derive(Debug, Default)]
pub(crate) struct History {
    clock: AtomicU64,
    blocks: Mutex<BTreeMap<u64, Vec<Step>>>,
}

impl History {
    /// A moment; each is later than the one before.
    pub(crate) fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// An operation that began at `from` and is over now.
    pub(crate) fn over(&self, who: usize, from: u64, certain: bool, effects: &[(u64, Effect)]) {
        let to = self.now();
        let mut blocks = self.blocks.lock().unwrap();
        for &(lba, effect) in effects {
            blocks.entry(lba).or_default().push(Step {
                from,
                to,
                certain,
                effect,
                who,
            });
        }
    }

    /// Takes all that happened, from `first` to `last`, the contents before and after; gives the steps checked.
    pub(crate) fn check(&self, first: &[u8], last: &[u8]) -> Result<usize, String> {
        let mut checked = 0;
        for (lba, mut steps) in std::mem::take(&mut *self.blocks.lock().unwrap()) {
            let at = lba as usize * BLOCK;
            let value = |whole: &[u8]| value_of(&whole[at..at + BLOCK]);
            let begins = value(first).ok_or(format!("block {lba} was torn before"))?;
            let ends = value(last).ok_or(format!("block {lba} is torn on the device"))?;
            let now = self.now();
            steps.push(Step {
                from: now,
                to: self.now(),
                certain: true,
                effect: Effect::Sees(ends),
                who: usize::MAX,
            });
            checked += steps.len();
            explain(begins, &steps).map_err(|why| format!("block {lba}: {why}"))?;
        }
        Ok(checked)
    }
}

/// A value, and which of the open steps have happened.
type State = (Value, u64);

fn explain(begins: Value, steps: &[Step]) -> Result<(), String> {
    let mut moments: Vec<(u64, usize)> = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        moments.extend([(step.from, index), (step.to, index)]);
    }
    moments.sort_unstable();
    let mut slots: Vec<Option<usize>> = Vec::new();
    let mut states = HashSet::from([(begins, 0)]);
    for (moment, index) in moments {
        let step = &steps[index];
        if moment == step.from {
            let free = slots.iter().position(Option::is_none).unwrap_or_else(|| {
                slots.push(None);
                slots.len() - 1
            });
            assert!(free < 64, "too many operations on one block at a time");
            slots[free] = Some(index);
            continue;
        }
        states = closure(&states, &slots, steps);
        let slot = slots
            .iter()
            .position(|slot| *slot == Some(index))
            .expect("a step that ends has begun");
        slots[slot] = None;
        let bit = 1 << slot;
        states = states
            .into_iter()
            .filter(|(_, done)| !step.certain || done & bit != 0)
            .map(|(value, done)| (value, done & !bit))
            .collect();
        if states.is_empty() {
            let near = |other: &&Step| other.to + 400 > step.from && other.from < step.to;
            let near: Vec<_> = steps.iter().filter(near).collect();
            return Err(format!(
                "no order explains {step:x?}; what was near it: {near:#x?}"
            ));
        }
    }
    Ok(())
}

/// All states that the open steps can lead to.
fn closure(from: &HashSet<State>, slots: &[Option<usize>], steps: &[Step]) -> HashSet<State> {
    let mut found = HashSet::new();
    let mut todo: Vec<State> = from.iter().copied().collect();
    while let Some((value, mut done)) = todo.pop() {
        let open = |done: u64| {
            let open = slots.iter().enumerate();
            open.filter_map(move |(slot, index)| Some((1u64 << slot, (*index)?)))
                .filter(move |(bit, _)| done & bit == 0)
        };
        // To look changes nothing, so who may look does.
        for (bit, index) in open(done).collect::<Vec<_>>() {
            let sees = match steps[index].effect {
                Effect::Sees(seen) => seen == value,
                Effect::SeesNot(seen) => seen != value,
                _ => false,
            };
            if sees {
                done |= bit;
            }
        }
        if !found.insert((value, done)) {
            continue;
        }
        for (bit, index) in open(done) {
            match steps[index].effect {
                Effect::Sets(new) => todo.push((new, done | bit)),
                Effect::Swaps(old, new) if old == value => todo.push((new, done | bit)),
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(from: u64, to: u64, certain: bool, effect: Effect) -> Step {
        Step {
            from,
            to,
            certain,
            effect,
            who: 0,
        }
    }

    #[test]
    fn the_check_finds_what_it_is_for() {
        use Effect::*;
        let write = step(1, 4, true, Sets(7));
        let good = [
            vec![write, step(2, 3, true, Sees(0)), step(5, 6, true, Sees(7))],
            // Two at once may come in any order, and who reads during them sees either.
            vec![
                write,
                step(2, 5, true, Sets(8)),
                step(3, 6, true, Sees(7)),
                step(7, 8, true, Sees(8)),
            ],
            // A lost one happened or did not.
            vec![step(1, 4, false, Sets(7)), step(5, 6, true, Sees(0))],
            vec![step(1, 4, false, Sets(7)), step(5, 6, true, Sees(7))],
            vec![write, step(5, 6, true, Swaps(7, 9)), step(7, 8, true, Sees(9))],
            vec![write, step(5, 6, true, SeesNot(8))],
        ];
        for steps in good {
            assert_eq!(explain(0, &steps), Ok(()), "{steps:?}");
        }
        let bad = [
            // Lost though acknowledged.
            vec![write, step(5, 6, true, Sees(0))],
            // A value out of nowhere.
            vec![write, step(2, 3, true, Sees(9))],
            // New, then old.
            vec![write, step(2, 3, true, Sees(7)), step(5, 6, true, Sees(0))],
            vec![
                step(1, 9, true, Sets(7)),
                step(2, 3, true, Sees(7)),
                step(4, 5, true, Sees(0)),
            ],
            // A lost one that happens after its session was over.
            vec![
                step(1, 4, false, Sets(7)),
                step(5, 6, true, Sees(0)),
                step(7, 8, true, Sees(7)),
            ],
            vec![write, step(5, 6, true, Swaps(3, 9))],
            vec![write, step(5, 6, true, SeesNot(7))],
        ];
        for steps in bad {
            assert!(explain(0, &steps).is_err(), "{steps:?}");
        }
        let mut torn = bytes_of(5);
        torn[256..].copy_from_slice(&bytes_of(6)[256..]);
        assert_eq!(
            (value_of(&torn), value_of(&bytes_of(5)), value_of(&[0; BLOCK])),
            (None, Some(5), Some(0))
        );
    }
}

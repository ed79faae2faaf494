//! `treeboot-kernel-cases GROUP [CASE…]`: cases that need a real kernel of their own, run inside of a guest, where they load
//! modules, make devices, targets and sessions, and start daemons. `tests/tests/kernel/` runs each group in a guest.
//!
//! Prints one line for each case, `CASE name ok` or `CASE name FAILED why`, and ends with 1 if one failed. A group is a table
//! of cases and of helpers, which a case starts as processes of their own, to kill or stop them
//! (`treeboot-kernel-cases helper GROUP HELPER [ARGUMENT…]`).

#![forbid(unsafe_code)]

mod cache;
mod devices;
mod dm;
mod iscsi;
mod measure;
mod plane;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

/// A case that takes longer hangs: the longest takes a quarter of this on a busy machine.
const CASE_ENDS_WITHIN: Duration = Duration::from_secs(400);
/// Says otherwise, in seconds, for groups whose cases are long.
const LIMIT: &str = "TREEBOOT_CASE_SECONDS";

/// What a case or a helper is.
type Case = fn() -> Result<()>;
type Helper = fn(&[String]) -> Result<()>;

/// Cases that need the same.
struct Group {
    name: &'static str,
    /// By the laws that they show, in the order in which they run.
    cases: &'static [(&'static str, Case)],
    helpers: &'static [(&'static str, Helper)],
    /// Removes what a case left, so that the next begins on an empty kernel.
    sweep: fn(),
}

const GROUPS: &[Group] = &[
    dm::GROUP,
    cache::GROUP,
    cache::FAULTS,
    iscsi::GROUP,
    plane::GROUP,
    plane::CACHING,
    plane::STEPS,
    plane::FAULTS,
    measure::GROUP,
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("treeboot-kernel-cases: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether all cases passed.
fn run(args: &[String]) -> Result<bool> {
    match args {
        [word, group, helper, rest @ ..] if word == "helper" => {
            let group = find(group)?;
            let Some((_, helper)) = group.helpers.iter().find(|(name, _)| name == helper) else {
                bail!("the group {} has no helper '{helper}'", group.name);
            };
            helper(rest)?;
            Ok(true)
        }
        [group, names @ ..] => {
            let group = find(group)?;
            refuse_outside_a_guest()?;
            cases(group, names)
        }
        [] => bail!("which group? {}", names(GROUPS.iter().map(|group| group.name))),
    }
}

fn cases(group: &Group, wanted: &[String]) -> Result<bool> {
    if let Some(unknown) = wanted
        .iter()
        .find(|name| !group.cases.iter().any(|(case, _)| case == name))
    {
        let all = names(group.cases.iter().map(|(name, _)| *name));
        bail!("the group {} has no case '{unknown}': {all}", group.name);
    }
    let mut passed = true;
    for (name, case) in group.cases {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        let began = Instant::now();
        let (ended, outcome) = watched(*case);
        let seconds = began.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => println!("CASE {name} ok {seconds:.1} s"),
            Err(error) => {
                passed = false;
                // One line, whatever the error holds.
                println!("CASE {name} FAILED {}", format!("{error:#}").replace('\n', " | "));
            }
        }
        if !ended {
            // It still holds its devices; the cases behind it would fail for that.
            break;
        }
        (group.sweep)();
    }
    Ok(passed)
}

/// Runs a case with a time limit; says whether it ended.
fn watched(case: Case) -> (bool, Result<()>) {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("panicked: {}", text.unwrap_or("without a text")))
        });
        // Nobody waits any longer for a case that took too long.
        let _ = send.send(outcome);
    });
    let limit = std::env::var(LIMIT).ok().and_then(|seconds| seconds.parse().ok());
    let limit = limit.map_or(CASE_ENDS_WITHIN, Duration::from_secs);
    match receive.recv_timeout(limit) {
        Ok(outcome) => (true, outcome),
        Err(_) => (false, Err(anyhow!("it did not end within {} s", limit.as_secs()))),
    }
}

fn find(name: &str) -> Result<&'static Group> {
    match GROUPS.iter().find(|group| group.name == name) {
        Some(group) => Ok(group),
        None => bail!(
            "no group '{name}': {}",
            names(GROUPS.iter().map(|group| group.name))
        ),
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

/// The cases take the machine for their own.
fn refuse_outside_a_guest() -> Result<()> {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if processor.contains("User Mode Linux") || std::env::var_os("TREEBOOT_IN_A_GUEST").is_some() {
        return Ok(());
    }
    bail!(
        "these cases load modules and make and remove targets and devices; they run in a guest only (set TREEBOOT_IN_A_GUEST in a \
         virtual machine that may break)"
    );
}

//! Cases on a real kernel: each group of `treeboot-kernel-cases` runs inside a user-mode Linux guest of its own, whose kernel no other test
//! shares. The cases themselves are in `tests/src/bin/treeboot-kernel-cases/`; this is the side of the machine.
//!
//! `TREEBOOT_CASES='name name'` runs these alone.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, bail};
use treeboot_tests::binaries::{BIN_DIR, Binaries};
use treeboot_tests::need::{Need, require};
use treeboot_tests::network::Network;
use treeboot_tests::scratch::Scratch;
use treeboot_tests::steps::KERNEL_PLANE;
use treeboot_tests::uml::{self, DISK_MOUNT, Guest, GuestSpec};

/// For a group as a whole; on an idle machine the longest, plane, takes three minutes.
const GROUP_LIMIT: Duration = Duration::from_secs(900);
/// Sparse, for files behind loop devices.
const DISK_BYTES: u64 = 8 << 30;
/// Agents, fio and the kernel's caches of them.
const MEMORY_MIB: u32 = 384;
/// What cases need besides the kernel.
const PROGRAMS: [Need; 3] = [
    Need::Program("iscsiadm", "open-iscsi"),
    Need::Program("dmsetup", "dmsetup"),
    Need::Program("fio", "fio"),
];
/// Loaded for all groups, so that a case tells a kernel that lacks something from a module that was not asked for.
const MODULES: [&str; 24] = [
    "loop",
    "dm_mod",
    "dm_multipath",
    "dm_round_robin",
    "dm_service_time",
    "dm_queue_length",
    "dm_switch",
    "dm_verity",
    "dm_snapshot",
    "dm_cache",
    "dm_cache_smq",
    "dm_flakey",
    "dm_log_writes",
    "bcache",
    "configfs",
    "iscsi_tcp",
    "sd_mod",
    "target_core_mod",
    "target_core_iblock",
    "target_core_file",
    "iscsi_target_mod",
    "sha256_generic",
    "md5",
    "crc32c_generic",
];

/// One line `CASE name ok`, which how long it took may follow, or `CASE name FAILED why`.
#[derive(Debug, PartialEq, Eq)]
struct Case {
    name: String,
    failed: Option<String>,
}

fn cases(output: &str) -> Vec<Case> {
    let lines = output
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("CASE "));
    lines
        .filter_map(|line| {
            let (name, outcome) = line.split_once(' ')?;
            let failed = match outcome.strip_prefix("FAILED") {
                Some(why) => Some(why.trim().to_owned()),
                None if outcome == "ok" || outcome.starts_with("ok ") => None,
                None => Some(format!("an outcome that is not understood: {outcome}")),
            };
            Some(Case {
                name: name.to_owned(),
                failed,
            })
        })
        .collect()
}

fn group(name: &'static str) -> Result<()> {
    group_within(name, GROUP_LIMIT, "")
}

/// As [`group`], with a limit and with more of an environment.
fn group_within(group: &'static str, limit: Duration, environment: &str) -> Result<()> {
    if !(require(&uml::NEEDS) && require(&PROGRAMS)) {
        return Ok(());
    }
    let binaries = Binaries::locate()?;
    let program = binaries.test_program("treeboot-kernel-cases")?;
    let scratch = Scratch::new(binaries.evidence().join(format!("kernel-{group}")))?;
    let network = Network::new(&scratch, 0)?;
    let chosen = std::env::var("TREEBOOT_CASES").unwrap_or_default();
    // LIO and open-iscsi keep state below these; the guest's own, not the machine's. What the kernel says of devices that are made to fail
    // is megabytes, and the console is the guest's one processor's work; panics are shown all the same.
    let script = format!(
        "mount -t configfs configfs /sys/kernel/config\nmkdir -p /etc/target /var/target /etc/iscsi\n\
         rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets\n\
         export TREEBOOT_CASES_DIR={DISK_MOUNT}/cases\nmkdir -p $TREEBOOT_CASES_DIR\nexport TMPDIR=$TREEBOOT_CASES_DIR {BIN_DIR}={}\n\
         dmesg --console-level 1\n{environment} RUST_BACKTRACE=1 {} {group} {chosen}\n",
        binaries.folder().display(),
        program.display()
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let spec = GuestSpec {
            name: group,
            memory_mib: MEMORY_MIB,
            modules: &MODULES,
            disk_bytes: Some(DISK_BYTES),
            script: &script,
        };
        let guest = Guest::start(&scratch, &network, &spec).await?;
        anyhow::Ok(guest.end(limit).await)
    })?;
    let cases = cases(&ended.output);
    let is_count = |line: &&str| line.ends_with(" faults") || line.contains(" kills, ");
    for line in ended.output.lines().filter(is_count) {
        println!("{group}: {line}");
    }
    for case in &cases {
        match &case.failed {
            None => println!("{group}: {} ok", case.name),
            Some(why) => println!("{group}: {} FAILED {why}", case.name),
        }
    }
    let failed: Vec<&str> = cases
        .iter()
        .filter(|case| case.failed.is_some())
        .map(|case| case.name.as_str())
        .collect();
    let problem = match ended.code {
        None => Some(format!("the guest did not reach its end within {limit:?}")),
        Some(_) if !failed.is_empty() => Some(format!("failed: {}", failed.join(", "))),
        Some(0) if cases.is_empty() => Some("no case ran".to_owned()),
        Some(0) => None,
        Some(code) => Some(format!("treeboot-kernel-cases ended with {code}")),
    };
    if let Some(problem) = problem {
        let lines: Vec<&str> = ended.output.lines().collect();
        bail!(
            "{group}: {problem}; the guest's console ends with:\n{}",
            lines[lines.len().saturating_sub(80)..].join("\n")
        );
    }
    scratch.pass();
    Ok(())
}

#[test]
fn dm() -> Result<()> {
    group("dm")
}

#[test]
fn cache() -> Result<()> {
    group("cache")
}

#[test]
fn cache_faults() -> Result<()> {
    group("cache-faults")
}

#[test]
fn iscsi() -> Result<()> {
    group("iscsi")
}

#[test]
fn plane() -> Result<()> {
    group("plane")
}

#[test]
fn plane_cache() -> Result<()> {
    group("plane-cache")
}

/// At a part of the moments, which `TREEBOOT_SEED` chooses; where `TREEBOOT_STEPS` names a verb, at all of its own.
#[test]
fn agents_killed_at_steps() -> Result<()> {
    let mut environment = String::from("TREEBOOT_CASE_SECONDS=800");
    for name in ["TREEBOOT_STEPS", "TREEBOOT_SEED"] {
        if let Ok(value) = std::env::var(name) {
            environment.push_str(&format!(" {name}={value}"));
        }
    }
    group_within("plane-steps", GROUP_LIMIT, &environment)
}

/// All moments of each verb, each verb in a guest of its own.
#[test]
#[ignore = "takes long: cargo xtask soak kernel"]
fn agents_killed_at_all_steps() -> Result<()> {
    for (verb, _) in KERNEL_PLANE {
        let environment = format!("TREEBOOT_CASE_SECONDS=1800 TREEBOOT_STEPS={verb:?}");
        group_within("plane-steps", Duration::from_secs(1900), &environment)?;
    }
    Ok(())
}

/// Each step of building and removing, failed and cut off, and kills: an hour on a busy machine. Each case has half of it at most.
#[test]
#[ignore = "takes long: cargo xtask soak kernel"]
fn plane_faults() -> Result<()> {
    group_within(
        "plane-faults",
        Duration::from_secs(3600),
        "TREEBOOT_CASE_SECONDS=1800",
    )
}

#[test]
fn a_line_that_is_neither_ok_nor_failed_is_a_failure() {
    let output = "CASE one ok\r\nnoise\nCASE two FAILED it said: no\nCASE three oka\n";
    let failed: Vec<_> = cases(output)
        .into_iter()
        .map(|case| (case.name, case.failed))
        .collect();
    assert_eq!(failed[0], ("one".into(), None));
    assert_eq!(failed[1], ("two".into(), Some("it said: no".into())));
    assert!(failed[2].1.is_some());
}

//! Boots a raw disk image or an `iscsi://` LUN, which it writes to, and prints what that took: the way the figures of `docs/guests.md` were made.
//!
//! ```text
//! cp --sparse=always "$(cargo xtask guest path busybox)" /tmp/disk.raw
//! cargo run -p treeboot-hypervisor --example boot -- /tmp/disk.raw vm-1 [until=TEXT] [KEY=VALUE of the seed]...
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use treeboot_hypervisor::{
    DiskSource, Instance, Readiness, Seed, StopMode, VmSpec, io_errors, probe, ready_line, start,
};
use treeboot_types::{Iqn, VmName};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let (Some(disk), Some(name)) = (words.next(), words.next()) else {
        return Err("give a disk and a name".into());
    };
    let name = VmName::new(&name)?;
    let settings: Vec<(String, String)> = words
        .filter_map(|word| {
            word.split_once('=')
                .map(|(key, value)| (key.into(), value.into()))
        })
        .collect();
    let mut texts = vec![ready_line(&name)];
    if let Some((_, until)) = settings.iter().find(|(key, _)| key == "until") {
        texts = vec![until.clone()];
    }
    let dir = std::env::temp_dir().join(format!("treeboot-boot-{}", std::process::id()));
    let hypervisor = probe(&std::env::temp_dir().join("treeboot-probe")).await?;
    let mut instance = [0x5e; 16];
    for (to, from) in instance.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    let spec = VmSpec {
        name,
        instance: Instance(instance),
        disk: if disk.starts_with("iscsi://") {
            DiskSource::Iscsi {
                url: disk.parse()?,
                initiator: Iqn::new("iqn.2026-11.dev.treeboot:boot-example")?,
                secret_file: None,
            }
        } else {
            DiskSource::Raw {
                path: Path::new(&disk).canonicalize()?,
            }
        },
        memory_mib: 256,
        cpus: 1,
        seed: Some(Seed {
            settings,
            ..Seed::default()
        }),
        ready: Readiness::Console { any_of: texts },
        network: false,
        run_dir: dir.clone(),
    };
    let begin = Instant::now();
    let vm = start(&hypervisor, spec).await?;
    let started = begin.elapsed();
    let ready = vm.wait_ready(Duration::from_secs(300)).await;
    let took = begin.elapsed();
    let stats = vm.block_stats().await?;
    let cpu_ms = cpu_ms(vm.pid());
    let begin = Instant::now();
    let stopped = vm
        .stop(StopMode::Graceful {
            limit: Duration::from_secs(20),
        })
        .await?;
    let stop_time = begin.elapsed();
    print!("{}", std::fs::read_to_string(vm.console()).unwrap_or_default());
    println!("disk errors: {:?}", io_errors(&vm.console())?);
    std::fs::remove_dir_all(&dir)?;
    println!("{}", ready?);
    println!(
        "QEMU started after {started:.2?}, ready after {took:.2?} and {cpu_ms} ms of processor time, stopped ({stopped:?}) in {stop_time:.2?}"
    );
    println!("{stats:?}");
    Ok(())
}

/// User and system time of a process so far, in ms (`proc_pid_stat(5)`; a tick is 10 ms). What a busy machine does not change.
fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum::<u64>()
        * 10
}

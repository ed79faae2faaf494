//! A block device of 4 KiB blocks, as the kernel plane's disks are, under a guest whose image counts in blocks of 512 bytes.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use treeboot_hypervisor::{DiskSource, Instance, Readiness, Seed, StopMode, VmSpec, io_errors, probe, start};
use treeboot_tests::binaries::Binaries;
use treeboot_tests::guest;
use treeboot_tests::need::{Need, require};
use treeboot_tests::scratch::Scratch;

use crate::support::{Machine, on_own_thread};

const NEEDS: [Need; 2] = [Need::Root, Need::Program("losetup", "mount")];
/// A boot takes 6 s under emulation on a machine that does nothing else.
const UP_WITHIN: Duration = Duration::from_secs(150);
const STOPS_WITHIN: Duration = Duration::from_secs(20);

/// A loop device, detached at the end.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, sector: &str) -> Result<Self> {
        let output = Command::new("losetup")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .args(["--find", "--show", "--sector-size", sector])
            .arg(file)
            .output()?;
        ensure!(
            output.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Self(String::from_utf8(output.stdout)?.trim().into()))
    }

    fn block_bytes(&self) -> Result<String> {
        let name = self.0.file_name().context("a device has a name")?;
        let file = Path::new("/sys/block")
            .join(name)
            .join("queue/logical_block_size");
        Ok(std::fs::read_to_string(file)?.trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

/// GRUB, partition table and file system count in 512 bytes; the guest boots, writes what it reads back from the disk, and finds no error.
#[test]
fn a_partitioned_image_boots_from_a_device_of_4_kib_blocks() -> Result<()> {
    if !require(&NEEDS) {
        return Ok(());
    }
    let Some(image) = guest::busybox() else {
        return Ok(());
    };
    on_own_thread(Machine::Alone, async move || {
        let scratch = Scratch::new(Binaries::locate()?.evidence().join("sectors"))?;
        let disk = scratch.path().join("disk.raw");
        std::fs::copy(&image, &disk)?;
        let device = Loop::over(&disk, "4096")?;
        ensure!(device.block_bytes()? == "4096", "{}", device.block_bytes()?);
        let hypervisor = probe(scratch.path()).await?;
        let spec = VmSpec {
            name: "vm-1".parse()?,
            instance: Instance([0x42; 16]),
            disk: DiskSource::Device {
                path: device.0.clone(),
            },
            memory_mib: 96,
            cpus: 1,
            seed: Some(Seed {
                settings: vec![("write_mb".into(), "4".into())],
                ..Seed::default()
            }),
            ready: Readiness::Console {
                any_of: vec![guest::JOBS_DONE.into()],
            },
            network: false,
            run_dir: scratch.path().join("vm"),
        };
        let vm = start(&hypervisor, spec).await?;
        let ready = vm.wait_ready(UP_WITHIN).await;
        let console = std::fs::read_to_string(vm.console()).unwrap_or_default();
        let errors = io_errors(&vm.console())?;
        vm.stop(StopMode::Graceful { limit: STOPS_WITHIN }).await?;
        ready.with_context(|| format!("the console says:\n{console}"))?;
        ensure!(console.contains(" wrote 4 MiB"), "{console}");
        ensure!(errors.is_empty(), "{errors:?}");
        scratch.pass();
        Ok(())
    })
}

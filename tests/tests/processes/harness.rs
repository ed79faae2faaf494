//! The harness itself: what it starts ends with it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::network::Network;
use treeboot_tests::scratch::Scratch;
use treeboot_tests::tgt::Tgt;
use treeboot_tests::wait::wait_until;

use crate::support::{Machine, on_own_thread};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn what_a_scratch_folder_started_ends_with_it_grandchildren_too() -> Result<()> {
    let scratch = Scratch::new(std::env::temp_dir().join("no-evidence"))?;
    let folder = scratch.path().to_path_buf();
    // The shell's child outlives the shell, as a guest outlives its agent.
    let mut shell = scratch
        .command("sh")
        .args(["-c", "sleep 1000 & sleep 1000 & exit 0"])
        .spawn()?;
    shell.wait()?;
    // One that is just becoming its program shows no environment.
    let deadline = Instant::now() + SOON;
    while scratch.processes().len() != 2 {
        ensure!(
            Instant::now() < deadline,
            "not two, but {:?}",
            scratch.processes()
        );
        std::thread::park_timeout(Duration::from_millis(5));
    }
    scratch.pass();
    assert!(!folder.exists());
    let left = std::fs::read_dir("/proc")?.flatten().filter(|entry| {
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&*folder.to_string_lossy())
    });
    assert_eq!(left.count(), 0);
    Ok(())
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_mended_and_its_bytes_are_counted() -> Result<()> {
    if !require(&[Need::Root, Need::Program("ip", "iproute2")]) {
        return Ok(());
    }
    // A thread of its own, because it does not come back from the namespace.
    std::thread::spawn(|| -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let scratch = Scratch::new(std::env::temp_dir().join("no-evidence"))?;
            let network = Network::new(&scratch, 2)?;
            network.enter()?;
            let address = std::net::SocketAddr::new(network.address(1), 9);
            // Nobody listens: a living host refuses at once, a cut off one says nothing.
            let refused = || async {
                let attempt = tokio::net::TcpStream::connect(address);
                let answer = tokio::time::timeout(Duration::from_millis(300), attempt).await;
                Ok(
                    matches!(answer, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused)
                        .then_some(()),
                )
            };
            wait_until(SOON, "the host's answer", refused).await?;
            assert!(network.link_bytes(1)?.received > 0);
            network.cut(1)?;
            assert!(refused().await?.is_none());
            network.mend(1)?;
            wait_until(SOON, "the host's answer after mending", refused).await?;
            scratch.pass();
            Ok(())
        })
    })
    .join()
    .expect("the thread does not panic")
}

#[test]
fn tgtd_serves_a_file_which_qemu_img_reads_whole() -> Result<()> {
    let needs = [
        Need::Root,
        Need::Program("tgtd", "tgt"),
        Need::Program("qemu-img", "qemu-utils qemu-block-extra"),
    ];
    if !require(&needs) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async || {
        let scratch = Scratch::new(std::env::temp_dir().join("no-evidence"))?;
        let file = scratch.path().join("disk.raw");
        Pattern {
            seed: 3,
            bytes: 1 << 20,
        }
        .write(&file)?;
        let address = "127.0.0.1".parse()?;
        let tgt = Tgt::serve(&scratch, "tgt", address, &file, true).await?;
        let compared = scratch
            .command("qemu-img")
            .args(["compare", "-f", "raw", "-F", "raw"])
            .arg(&file)
            .arg(tgt.url())
            .status()?;
        assert!(compared.success());
        tgt.kill()?;
        scratch.pass();
        Ok(())
    })
}

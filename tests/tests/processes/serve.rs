//! `treeboot serve` as foreign initiators see it: several images, redirections, IPv6, what it refuses, its end.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use treeboot_iscsi::initiator::{CommandError, Session, SessionEnd, SessionOptions, SessionTimeouts};
use treeboot_tests::binaries::Binaries;
use treeboot_tests::image::Pattern;
use treeboot_tests::need::{Need, require};
use treeboot_tests::scratch::Scratch;
use treeboot_tests::wait::wait_until;
use treeboot_types::{Iqn, IscsiUrl};

use crate::support::{Machine, on_own_thread};

const BYTES: u64 = 1 << 20;
const TARGET: &str = "iqn.2026-11.org.example:disk";
/// For a start or an end on a busy machine; a healthy one takes milliseconds, or the 3 s that initiators have to log out.
const SOON: Duration = Duration::from_secs(60);

const NEEDS: [Need; 3] = [
    Need::Program("iscsi-ls", "libiscsi-bin"),
    Need::Program("iscsi-inq", "libiscsi-bin"),
    Need::Program("qemu-img", "qemu-utils qemu-block-extra"),
];

/// The process, and what its ready file says.
struct Serve {
    child: Child,
    ready: PathBuf,
    said: PathBuf,
    portal: String,
    urls: Vec<String>,
}

impl Serve {
    async fn start(scratch: &Scratch, name: &str, args: &[OsString]) -> Result<Self> {
        let ready = scratch.path().join(format!("{name}.json"));
        let said = scratch.path().join(format!("{name}.out"));
        let mut child = scratch
            .command(Binaries::locate()?.cli())
            .arg("serve")
            .args(args)
            .arg("--ready-file")
            .arg(&ready)
            .stdout(fs::File::create(&said)?)
            .spawn()
            .context("could not start treeboot")?;
        let told: serde_json::Value = wait_until(SOON, "treeboot serve to be ready", async || {
            if let Some(status) = child.try_wait()? {
                bail!("treeboot serve ended with {status}");
            }
            match fs::read(&ready) {
                Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
                Err(_) => Ok(None),
            }
        })
        .await?;
        let urls = told["urls"].as_array().context("no urls")?.iter();
        Ok(Self {
            portal: told["portal"].as_str().context("no portal")?.to_owned(),
            urls: urls.filter_map(|url| url.as_str().map(str::to_owned)).collect(),
            child,
            ready,
            said,
        })
    }

    /// Its orderly end; what it said.
    async fn end(mut self) -> Result<String> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let child = &mut self.child;
        let status = wait_until(SOON, "the end of treeboot serve", async || Ok(child.try_wait()?)).await?;
        ensure!(status.success(), "treeboot serve ended with {status}");
        ensure!(!self.ready.exists(), "the ready file is left behind");
        Ok(fs::read_to_string(&self.said)?)
    }
}

fn args(texts: &[&str]) -> Vec<OsString> {
    texts.iter().map(OsString::from).collect()
}

/// Two different images.
fn images(scratch: &Scratch) -> Result<[PathBuf; 2]> {
    let paths = ["first.raw", "second.raw"].map(|name| scratch.path().join(name));
    for (seed, path) in (1..).zip(&paths) {
        Pattern { seed, bytes: BYTES }.write(path)?;
    }
    Ok(paths)
}

/// A foreign program that must end well; what it says.
fn say(scratch: &Scratch, program: &str, args: &[&str]) -> Result<String> {
    let output = scratch
        .command(program)
        .args(args)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{program} {args:?}: {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

fn compare(scratch: &Scratch, file: &Path, url: &str) -> Result<()> {
    let file = file.to_str().context("a path in UTF-8")?;
    say(
        scratch,
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", file, url],
    )
    .map(drop)
}

async fn session(portal: &str) -> Result<Session> {
    let options = SessionOptions {
        portal: portal.to_owned(),
        target: Iqn::new(TARGET)?,
        initiator: Iqn::new("iqn.2026-11.org.example:me")?,
        chap: None,
        digests: Default::default(),
        timeouts: SessionTimeouts {
            connect_ms: 60_000,
            ..SessionTimeouts::default()
        },
    };
    Ok(Session::connect(options).await?)
}

fn on_scratch<T>(test: T) -> Result<()>
where
    T: AsyncFnOnce(&Scratch) -> Result<()> + Send + 'static,
{
    if !require(&NEEDS) {
        return Ok(());
    }
    on_own_thread(Machine::Shared, async || {
        let scratch = Scratch::new(std::env::temp_dir().join("treeboot-serve-evidence"))?;
        test(&scratch).await?;
        scratch.pass();
        Ok(())
    })
}

#[test]
fn several_images_are_the_luns_of_one_target() -> Result<()> {
    on_scratch(async |scratch| {
        let images = images(scratch)?;
        let mut options = images.clone().map(OsString::from).to_vec();
        options.extend(args(&["--name", TARGET, "--portal", "127.0.0.1:0"]));
        let serve = Serve::start(scratch, "both", &options).await?;
        ensure!(serve.urls.len() == 2, "{:?}", serve.urls);
        for (lun, (image, url)) in images.iter().zip(&serve.urls).enumerate() {
            ensure!(url.ends_with(&format!("/{TARGET}/{lun}")), "{url}");
            compare(scratch, image, url)?;
        }
        let listed = say(scratch, "iscsi-ls", &["-s", &format!("iscsi://{}", serve.portal)])?;
        for lun in 0..2 {
            ensure!(listed.contains(&format!("Lun:{lun} ")), "{listed}");
        }
        // Each is a disk of its own: multipath software must not take one for the other.
        let serial = |url: &String| say(scratch, "iscsi-inq", &["-e", "1", "-c", "128", url]);
        ensure!(
            serial(&serve.urls[0])? != serial(&serve.urls[1])?,
            "one serial number"
        );
        let said = serve.end().await?;
        ensure!(
            said.contains("LUN 0") && said.contains("LUN 1") && said.contains("second.raw"),
            "{said}"
        );
        Ok(())
    })
}

#[test]
fn foreign_initiators_and_ours_follow_a_redirection() -> Result<()> {
    on_scratch(async |scratch| {
        let [image, _] = images(scratch)?;
        // Over IPv6 as well, where the machine has it.
        let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        let hosts = if has_ipv6 {
            &["127.0.0.1", "[::1]"][..]
        } else {
            &["127.0.0.1"]
        };
        for host in hosts {
            let here = format!("{host}:0");
            let mut options = vec![OsString::from(&image)];
            options.extend(args(&["--name", TARGET, "--portal", &here]));
            let real = Serve::start(scratch, "real", &options).await?;
            compare(scratch, &image, &real.urls[0])?;
            for option in ["--redirect", "--redirect-for-good"] {
                let to = format!("{TARGET}={}", real.portal);
                let moved = Serve::start(scratch, "moved", &args(&["--portal", &here, option, &to])).await?;
                ensure!(moved.urls.is_empty(), "{:?}", moved.urls);
                let url = real.urls[0].replace(&real.portal, &moved.portal);
                ensure!(url.parse::<IscsiUrl>()?.portal() == moved.portal, "{url}");
                // libiscsi, and QEMU with it, do not know the status that says "for good".
                if option == "--redirect" {
                    compare(scratch, &image, &url).context(option)?;
                    let inquiry = say(scratch, "iscsi-inq", &[&url])?;
                    ensure!(inquiry.contains("treeboot image"), "{inquiry}");
                    let listed = say(scratch, "iscsi-ls", &["-s", &format!("iscsi://{}", moved.portal)])?;
                    ensure!(listed.contains(TARGET) && listed.contains("Lun:0 "), "{listed}");
                }
                let session = session(&moved.portal).await?;
                ensure!(session.peer().to_string() == real.portal, "{}", session.peer());
                let read = session.read(0, 0, 4096).await?;
                ensure!(read == fs::read(&image)?[..4096], "other bytes");
                drop(session);
                let said = moved.end().await?;
                ensure!(said.contains(&format!("sent to {}", real.portal)), "{said}");
            }
            real.end().await?;
        }
        Ok(())
    })
}

#[test]
fn an_end_in_order_asks_initiators_to_log_out_first() -> Result<()> {
    on_scratch(async |scratch| {
        let [image, _] = images(scratch)?;
        let mut options = vec![OsString::from(&image)];
        options.extend(args(&["--name", TARGET, "--portal", "127.0.0.1:0", "--writable"]));
        let serve = Serve::start(scratch, "ends", &options).await?;
        let session = session(&serve.portal).await?;
        session.write(0, 4096, vec![7; 4096].into()).await?;
        let said = serve.end().await?;
        // Ours logs out when it is asked; a connection that were cut would say so.
        let why = session.ended().await;
        ensure!(matches!(why, SessionEnd::Dismissed), "{why:?}");
        let refused = session.read(0, 0, 512).await;
        ensure!(matches!(refused, Err(CommandError::Lost(_))), "{refused:?}");
        ensure!(said.contains("4.00 KiB written"), "{said}");
        ensure!(
            fs::read(&image)?[4096..8192] == [7; 4096],
            "the write is not in the file"
        );
        Ok(())
    })
}

#[test]
fn what_cannot_be_served_is_refused_by_name() -> Result<()> {
    on_scratch(async |scratch| {
        let [first, second] = images(scratch)?.map(|path| path.display().to_string());
        let reservations = scratch.path().join("kept").display().to_string();
        let here = ["--portal", "127.0.0.1:0"];
        for (command, code, words) in [
            (vec![], 2, "IMAGE"),
            (
                vec!["--redirect", "iqn.2026-11.org.example:disk"],
                2,
                "--redirect",
            ),
            (vec!["--redirect", "disk=192.0.2.7"], 2, "disk"),
            (
                vec!["--redirect", "iqn.2026-11.org.example:disk=192.0.2.7:99999"],
                2,
                "192.0.2.7:99999",
            ),
            (
                vec!["--redirect-for-good", "iqn.2026-11.org.example:disk=::1"],
                2,
                "'::1' is not HOST",
            ),
            (
                vec![
                    &first,
                    "--name",
                    TARGET,
                    "--redirect",
                    "iqn.2026-11.org.example:disk=192.0.2.7",
                ],
                2,
                "is served here",
            ),
            (
                vec![
                    "--redirect",
                    "iqn.2026-11.org.example:disk=192.0.2.7",
                    "--redirect",
                    "iqn.2026-11.org.example:disk=192.0.2.8",
                ],
                2,
                "is redirected twice",
            ),
            (
                vec![
                    "--redirect",
                    "iqn.2026-11.org.example:disk=192.0.2.7",
                    "--writable",
                ],
                2,
                "IMAGE",
            ),
            (vec![&first, &second, "/no/such/image"], 3, "/no/such/image"),
            (
                vec![&first, "--reservations", &reservations, "--reservations", &second],
                2,
                "second.raw",
            ),
            (vec![&first, &first, "--writable"], 7, "first.raw"),
        ] {
            let Output { status, stderr, .. } = scratch
                .command(Binaries::locate()?.cli())
                .arg("serve")
                .args(here)
                .args(&command)
                .stdin(Stdio::null())
                .output()?;
            let said = String::from_utf8_lossy(&stderr);
            ensure!(
                status.code() == Some(code) && said.contains(words),
                "{command:?}: {status}: {said}"
            );
        }
        Ok(())
    })
}

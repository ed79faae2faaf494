//! What the lab's tests share: a thread and a lab for each, one after the other.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use treeboot_tests::lab::{HostSpec, Lab, LabSpec, NEEDS, Plane};
use treeboot_tests::need::require;
use treeboot_tests::wait::within;

/// Guests want the machine's memory and both of its cores.
static MACHINE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// Runs a scenario in a lab of its own, with hosts of these planes.
pub(crate) fn with_lab<T>(label: &str, planes: &[Plane], limit: Duration, scenario: T) -> Result<()>
where
    T: AsyncFnOnce(&Lab) -> Result<()> + Send + 'static,
{
    let spec = LabSpec {
        hosts: planes.iter().copied().map(HostSpec::of).collect(),
        ..LabSpec::default()
    };
    with_spec(label, spec, limit, scenario)
}

/// Runs a scenario in a lab of its own; on a thread of its own, because one that entered a network namespace does not come back.
pub(crate) fn with_spec<T>(label: &str, spec: LabSpec, limit: Duration, scenario: T) -> Result<()>
where
    T: AsyncFnOnce(&Lab) -> Result<()> + Send + 'static,
{
    if !require(&NEEDS) {
        return Ok(());
    }
    let label = label.to_owned();
    let thread = std::thread::spawn(move || {
        let _alone = MACHINE.lock();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("no runtime")?;
        runtime.block_on(async {
            let began = std::time::Instant::now();
            let lab = Lab::start(&label, &spec).await?;
            println!(
                "{label}: {} hosts up after {:.1} s",
                lab.hosts.len(),
                began.elapsed().as_secs_f64()
            );
            within(limit, &label, scenario(&lab)).await??;
            println!("{label}: done after {:.1} s", began.elapsed().as_secs_f64());
            lab.pass();
            Ok(())
        })
    });
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// A command of this machine; gives what it printed.
pub(crate) fn local(program: &str, args: &[&str]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(args)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .with_context(|| format!("could not start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// As `sha256sum` says it.
pub(crate) fn sha256(file: &Path) -> Result<String> {
    let text = local("sha256sum", &[&file.display().to_string()])?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// Imports a file as an image, at the origin.
pub(crate) async fn import(lab: &Lab, file: &Path, name: &str) -> Result<()> {
    lab.treeboot(&["image", "import", &file.display().to_string(), name])
        .await?;
    Ok(())
}

//! Power cuts: a host is killed whole at random moments while a VM's disk is written; what was flushed is there afterwards.
//!
//! The kill takes the guest's page cache and all of its processes, not what its disk file was given: that is what a power cut leaves of a
//! disk without a volatile cache. `TREEBOOT_POWER_CUTS` says how many, `TREEBOOT_SEED` chooses other moments.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;
use treeboot_tests::image::Pattern;
use treeboot_tests::lab::model::{Model, Ops, Stamp};
use treeboot_tests::lab::{Lab, LabHost, Plane};

use crate::support::{import, with_lab};

const IMAGE: Pattern = Pattern {
    seed: 21,
    bytes: 32 << 20,
};
/// The part of the disk that is written, in blocks: small enough that writes meet, and larger than any queue on their way.
const BLOCKS: u64 = 2048;
/// Cuts where nobody says otherwise.
const CUTS: u32 = 3;
/// Where nobody says otherwise: the same moments in every run.
const SEED: u64 = 40;
/// For one cut and the boot after it; 8 s on two busy cores.
const CUT_WITHIN: Duration = Duration::from_secs(90);
/// The longest that a writer runs before the cut.
const LONGEST_MS: u64 = 2500;

fn setting<T: std::str::FromStr>(variable: &str) -> Option<T> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Writes until a moment that chance chose; gives the last write that was known to be flushed.
async fn write_and_cut(lab: &Lab, host: &LabHost, disk: &str, seed: u64, round: u32) -> Result<u64> {
    let program = lab.lab_program()?;
    let mut writer = host
        .start(&format!(
            "exec {} write '{disk}' --seed {seed} --round {round} --blocks {BLOCKS}",
            program.display()
        ))
        .await?;
    anyhow::ensure!(
        writer.next_line().await?.as_deref() == Some("BEGIN"),
        "the writer did not begin"
    );
    let runs = Duration::from_millis(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) % LONGEST_MS);
    let began = Instant::now();
    let mut flushed = 0;
    // The moment of the cut must not depend on what the writer does, so it is one of the clock.
    while let Ok(line) = tokio::time::timeout(runs.saturating_sub(began.elapsed()), writer.next_line()).await
    {
        let line = line?.context("the writer ended by itself")?;
        let number = line.strip_prefix("F ").context("not the writer's words")?;
        flushed = number.parse()?;
    }
    host.kill();
    Ok(flushed)
}

async fn found(lab: &Lab, host: &LabHost, disk: &str) -> Result<Vec<Stamp>> {
    let program = lab.lab_program()?;
    let text = host
        .sh(&format!(
            "{} stamps '{disk}' --blocks {BLOCKS} --image-seed {} --image-bytes {}",
            program.display(),
            IMAGE.seed,
            IMAGE.bytes
        ))
        .await?;
    text.lines().map(str::parse).collect()
}

async fn scenario(lab: &Lab, host: &LabHost, cuts: u32, seed: u64) -> Result<()> {
    let vm = format!("vm-{}", host.plane().name());
    lab.create_disk(host, &vm, "image").await?;
    let mut model = Model::new(BLOCKS);
    let (mut writes, mut flushes) = (0, 0);
    for round in 1..=cuts {
        let seed = seed.wrapping_add(u64::from(round));
        let disk = lab.disk(host, &vm).await?;
        let flushed = write_and_cut(lab, host, &disk, seed, round).await?;
        writes += flushed;
        flushes += Ops::new(seed, BLOCKS)
            .take_while(|op| op.number <= flushed)
            .filter(|op| op.flush)
            .count();
        host.boot(lab.scratch())?;
        host.wait_up().await?;
        lab.wait_host_known(host).await?;
        let disk = lab.disk(host, &vm).await?;
        let found = found(lab, host, &disk).await?;
        model
            .after_cut(seed, round, flushed, found)
            .with_context(|| format!("cut {round} of {cuts} on the {} plane", host.plane().name()))?;
    }
    println!(
        "{}: {cuts} cuts, {writes} writes known to be flushed by {flushes} flushes, all there",
        host.plane().name()
    );
    Ok(())
}

/// Both hosts read from the origin, and are cut at moments that have nothing to do with each other's.
#[test]
fn power_cuts_of_a_host_lose_nothing_that_was_flushed_on_either_plane() -> Result<()> {
    let cuts = setting("TREEBOOT_POWER_CUTS").unwrap_or(CUTS);
    let seed = setting("TREEBOOT_SEED").unwrap_or(SEED);
    println!("power cuts: TREEBOOT_SEED={seed}");
    let limit = 2 * CUT_WITHIN * (cuts + 1);
    with_lab(
        "lab-power",
        &[Plane::User, Plane::Kernel],
        limit,
        async move |lab| {
            let file = lab.scratch().path().join("image.raw");
            IMAGE.write(&file)?;
            import(lab, &file, "image").await?;
            let each = (0..).zip(&lab.hosts);
            // Seeds of their own: else both would write the same, and be cut together.
            try_join_all(each.map(|(number, host)| scenario(lab, host, cuts, seed + 1_000_000 * number)))
                .await?;
            Ok(())
        },
    )
}

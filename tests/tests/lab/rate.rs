//! Links of the speed that was asked for (`lab up --rate`): what a host reads comes no faster, and not much slower.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use treeboot_tests::image::Pattern;
use treeboot_tests::lab::Lab;

use crate::support::{import, sha256};

const RATE_MBIT: u32 = 20;
const IMAGE_BYTES: u64 = 8 << 20;
/// Of the rate: a link's burst passes at once, which is 128 KiB here.
const FASTEST: f64 = 1.1;
/// Of the rate. What a host does besides reading (the attachment takes seconds on a machine with a load of 20) is in the time too.
const SLOWEST: f64 = 0.1;

/// Reads an image on each host in turn, the second one's from the origin too; gives the links back as they were.
pub(crate) async fn check(lab: &Lab) -> Result<()> {
    let file = lab.scratch().path().join("paced.raw");
    Pattern {
        seed: 31,
        bytes: IMAGE_BYTES,
    }
    .write(&file)?;
    import(lab, &file, "paced").await?;
    let expected = sha256(&file)?;
    lab.shape(RATE_MBIT).await?;
    for host in &lab.hosts {
        let vm = format!("paced-{}", host.name());
        // From before the attachment on: a kernel-plane host begins to bring the image in at once.
        let began = Instant::now();
        let disk = lab.create_disk(host, &vm, "paced").await?;
        let read = host
            .sh_within(&format!("sha256sum < '{disk}'"), Duration::from_secs(60))
            .await?;
        let took = began.elapsed().as_secs_f64();
        ensure!(read.starts_with(&expected), "{vm} has other bytes");
        let rate = IMAGE_BYTES as f64 * 8.0 / 1e6 / took;
        println!(
            "{}: {:.0} MiB in {took:.1} s over a link of {RATE_MBIT} Mbit/s: {rate:.1} Mbit/s",
            host.name(),
            IMAGE_BYTES as f64 / f64::from(1 << 20)
        );
        let asked = f64::from(RATE_MBIT);
        ensure!(
            rate > SLOWEST * asked && rate < FASTEST * asked,
            "{} read {rate:.1} Mbit/s over a link of {asked} Mbit/s",
            host.name()
        );
        lab.release_disk(host, &vm).await?;
        lab.treeboot(&["vm", "destroy", &vm]).await?;
    }
    lab.unshape().await
}

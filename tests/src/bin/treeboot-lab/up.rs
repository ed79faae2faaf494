//! `up`: a lab that stays.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use treeboot_tests::lab::{HostSpec, Lab, LabSpec, MAX_HOSTS, Plane};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The lab's folder
    #[arg(long)]
    state: PathBuf,
    /// Hosts besides the origin
    #[arg(long, default_value_t = 6)]
    hosts: usize,
    /// Speed of every link in Mbit/s
    #[arg(long)]
    rate: Option<u32>,
    /// How blocks move on the hosts
    #[arg(long, value_enum, default_value_t = Plane::User)]
    plane: Plane,
    /// Memory of a host in MiB
    #[arg(long, default_value_t = 160)]
    memory_mib: u32,
    /// Children a host, in trees of one stripe; without it two stripes
    #[arg(long)]
    fan_out: Option<u32>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    anyhow::ensure!(
        (1..=MAX_HOSTS).contains(&options.hosts),
        "--hosts {} is not from 1 to {MAX_HOSTS}",
        options.hosts
    );
    let began = Instant::now();
    let mut say = |what: &str| eprintln!("lab: {:>5.1} s  {what}", began.elapsed().as_secs_f64());
    let host = HostSpec {
        memory_mib: options.memory_mib,
        ..HostSpec::of(options.plane)
    };
    let spec = LabSpec {
        hosts: vec![host; options.hosts],
        fan_out: options.fan_out,
        rate_mbit: options.rate,
        ..LabSpec::default()
    };
    // One thread, because a namespace is a thread's.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Guests read files below it, and have another working directory.
    let state = std::path::absolute(&options.state)?;
    let lab = runtime.block_on(Lab::up(&state, &spec, &mut say))?;
    say(&format!("up: coordinator, origin, h1 to h{}", options.hosts));
    lab.leave();
    eprintln!(
        "\n  cargo xtask lab shell h1                      a shell on a host; the programs are on its PATH\n  \
         cargo xtask lab shell h1 -- treeboot host list\n  \
         cargo xtask lab down                          ends all of it"
    );
    Ok(())
}

//! Medians of the rounds, the goals they are held against, and both as tables for people.

use anyhow::{Context as _, Result};
use serde::Serialize;
use treeboot_tests::stats::Median;
use treeboot_tests::table::draw;

use super::idle::Idle;
use super::load::{Carried, Load, Sample};
use super::{Options, Pair};

/// A client that has so much of a processor asks for all that it can.
const CLIENT_IS_THE_LIMIT: f64 = 0.95;
/// What of the machine's processors has to be free of other people's work for a machine to count as quiet.
const QUIET: f64 = 0.1;

/// Everything that was measured; what `--json` writes.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    conditions: Conditions,
    loads: Vec<LoadReport>,
    /// MB/s of plain TCP, one stream and four.
    iperf3_one_stream: Median,
    iperf3_four_streams: Median,
    idle_sessions: Option<Idle>,
    goals: Vec<Goal>,
}

/// How it was measured.
#[derive(Debug, Serialize)]
pub(super) struct Conditions {
    rounds: u32,
    seconds: u32,
    disk_mib: u32,
    processor: String,
    processors: usize,
    kernel: String,
    /// How the intervals are made.
    interval: &'static str,
}

impl Conditions {
    pub(super) fn of(options: &Options) -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
        Ok(Self {
            rounds: options.rounds,
            seconds: options.seconds,
            disk_mib: options.disk_mib,
            processor: model.unwrap_or_else(|| "unknown".to_owned()),
            processors: std::thread::available_parallelism()?.get(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            interval: "of the median, from order statistics (sign test), at least 95 % where there are six rounds or more",
        })
    }
}

/// One load: both targets' medians, and those of each round's own ratio.
#[derive(Debug, Serialize)]
struct LoadReport {
    name: String,
    load: Load,
    treeboot: Side,
    tgt: Side,
    iops_by_tgt: Median,
    server_us_by_tgt: Median,
    rounds: Vec<Pair>,
}

#[derive(Debug, Serialize)]
struct Side {
    iops: Median,
    mb_per_s: Median,
    server_us: Median,
    client_busy: Median,
    others_busy: Median,
}

impl Side {
    fn of(samples: &[Sample]) -> Result<Self> {
        let of = |value: fn(&Sample) -> f64| median(samples.iter().map(value));
        Ok(Self {
            iops: of(|sample| sample.iops)?,
            mb_per_s: of(|sample| sample.mb_per_s)?,
            server_us: of(|sample| sample.server_us)?,
            client_busy: of(|sample| sample.client_busy)?,
            others_busy: of(|sample| sample.others_busy)?,
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> Result<Median> {
    let sample: Vec<f64> = values.collect();
    Median::of(&sample).context("no round was measured")
}

/// What is to be reached, and whether it was.
#[derive(Debug, Serialize)]
struct Goal {
    what: String,
    wanted: f64,
    /// The median of the rounds' ratios.
    measured: f64,
    reached: bool,
    /// Why it counts as reached although the ratio is not.
    limit: Option<String>,
}

impl Report {
    pub(super) fn new(
        conditions: Conditions,
        loads: &[Load],
        pairs: Vec<Vec<Pair>>,
        loopback: &[Carried],
        idle_sessions: Option<Idle>,
    ) -> Result<Self> {
        let loads = loads
            .iter()
            .zip(pairs)
            .map(|(load, rounds)| LoadReport::new(*load, rounds))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            conditions,
            goals: loads.iter().flat_map(goals).collect(),
            loads,
            iperf3_one_stream: median(loopback.iter().map(|carried| carried.one_stream))?,
            iperf3_four_streams: median(loopback.iter().map(|carried| carried.four_streams))?,
            idle_sessions,
        })
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let Conditions {
            rounds,
            seconds,
            processors,
            processor,
            kernel,
            ..
        } = &self.conditions;
        text.push_str(&format!(
            "{rounds} rounds of {seconds} s on {processors} × {processor}, Linux {kernel}; medians, and in brackets the interval of\n\
             the median of each round's own ratio\n\n"
        ));
        text.push_str(&self.rates());
        text.push('\n');
        text.push_str(&self.costs());
        text.push_str(&format!(
            "\nThe loopback carries {:.0} MB/s with one stream, {:.0} MB/s with four (iperf3)\n",
            self.iperf3_one_stream.median, self.iperf3_four_streams.median
        ));
        let others = self
            .loads
            .iter()
            .flat_map(|load| [load.treeboot.others_busy.median, load.tgt.others_busy.median])
            .fold(0.0, f64::max);
        let verdict = if others < QUIET { "quiet" } else { "not quiet" };
        text.push_str(&format!(
            "The machine was {verdict}: other programs had up to {others:.2} processors\n"
        ));
        if let Some(idle) = &self.idle_sessions {
            text.push('\n');
            text.push_str(&idle.text());
        }
        text.push_str("\nTo reach\n");
        for goal in &self.goals {
            let Goal {
                what,
                wanted,
                measured,
                ..
            } = goal;
            let reached = if goal.reached { "reached" } else { "NOT reached" };
            let limit = goal
                .limit
                .as_ref()
                .map_or(String::new(), |limit| format!(" ({limit})"));
            text.push_str(&format!(
                "  {reached}: {what} {wanted} × tgt's: {measured:.2}{limit}\n"
            ));
        }
        text
    }

    fn rates(&self) -> String {
        let rows: Vec<_> = self
            .loads
            .iter()
            .map(|load| {
                vec![
                    load.name.clone(),
                    format!("{:.0}", load.treeboot.iops.median),
                    format!("{:.0}", load.tgt.iops.median),
                    ratio(&load.iops_by_tgt),
                    format!("{:.0}", load.treeboot.mb_per_s.median),
                    format!("{:.0}", load.tgt.mb_per_s.median),
                ]
            })
            .collect();
        draw(&["reads", "IOPS", "tgt", "by tgt's", "MB/s", "tgt"], &rows)
    }

    fn costs(&self) -> String {
        let percent = |busy: &Median| format!("{:.0} %", busy.median * 100.0);
        let rows: Vec<_> = self
            .loads
            .iter()
            .map(|load| {
                vec![
                    load.name.clone(),
                    format!("{:.1}", load.treeboot.server_us.median),
                    format!("{:.1}", load.tgt.server_us.median),
                    ratio(&load.server_us_by_tgt),
                    percent(&load.treeboot.client_busy),
                    percent(&load.tgt.client_busy),
                ]
            })
            .collect();
        draw(
            &[
                "server's processor time a read, µs",
                "treeboot",
                "tgt",
                "by tgt's",
                "a client's processor",
                "with tgt",
            ],
            &rows,
        )
    }
}

fn ratio(median: &Median) -> String {
    format!("{:.2} ({:.2} to {:.2})", median.median, median.low, median.high)
}

impl LoadReport {
    fn new(load: Load, rounds: Vec<Pair>) -> Result<Self> {
        let side = |of: fn(&Pair) -> Sample| Side::of(&rounds.iter().map(of).collect::<Vec<_>>());
        Ok(Self {
            name: load.name(),
            load,
            treeboot: side(|pair| pair.treeboot)?,
            tgt: side(|pair| pair.tgt)?,
            iops_by_tgt: median(rounds.iter().map(|pair| pair.treeboot.iops / pair.tgt.iops))?,
            server_us_by_tgt: median(
                rounds
                    .iter()
                    .map(|pair| pair.treeboot.server_us / pair.tgt.server_us),
            )?,
            rounds,
        })
    }
}

/// What issue 6 asks for under this load.
fn goals(report: &LoadReport) -> Vec<Goal> {
    let Load { bytes, depth, .. } = report.load;
    let name = &report.name;
    let rate = |wanted: f64| {
        let measured = report.iops_by_tgt.median;
        let busy = report.treeboot.client_busy.median;
        let limited = measured < wanted && busy >= CLIENT_IS_THE_LIMIT;
        Goal {
            what: format!("{name}: IOPS at least"),
            wanted,
            measured,
            reached: measured >= wanted || limited,
            limit: limited.then(|| {
                format!(
                    "the client's own limit: it has {:.0} % of a processor",
                    busy * 100.0
                )
            }),
        }
    };
    let cost = |wanted: f64| Goal {
        what: format!("{name}: the server's processor time at most"),
        wanted,
        measured: report.server_us_by_tgt.median,
        reached: report.server_us_by_tgt.median <= wanted,
        limit: None,
    };
    match (bytes >> 10, depth) {
        (4, 1) => vec![rate(1.2)],
        (4, 32) => vec![rate(1.3), cost(0.5)],
        (512, _) => vec![rate(0.95)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ours: f64, theirs: f64, client_busy: f64) -> Report {
        let sample = |iops: f64, server_us: f64| Sample {
            iops,
            mb_per_s: iops * 4096.0 / 1e6,
            server_us,
            client_busy,
            others_busy: 0.0,
        };
        let pair = Pair {
            treeboot: sample(ours, 5.0),
            tgt: sample(theirs, 20.0),
        };
        let load = Load {
            bytes: 4096,
            depth: 32,
            clients: 1,
            random: true,
        };
        let conditions = Conditions {
            rounds: 1,
            seconds: 1,
            disk_mib: 16,
            processor: String::new(),
            processors: 2,
            kernel: String::new(),
            interval: "",
        };
        let carried = Carried {
            one_stream: 1.0,
            four_streams: 1.0,
        };
        Report::new(conditions, &[load], vec![vec![pair]], &[carried], None).expect("a round")
    }

    #[test]
    fn a_rate_counts_by_its_ratio_or_when_the_client_can_do_no_more() {
        for (ours, client_busy, reached) in [(140.0, 0.5, true), (110.0, 0.5, false), (110.0, 0.99, true)] {
            let report = report(ours, 100.0, client_busy);
            let goal = report.goals.first().expect("a goal for the rate");
            assert_eq!(goal.reached, reached, "{goal:?}");
            assert_eq!(goal.limit.is_some(), ours < 130.0 && reached);
            assert!(report.goals[1].reached, "5 µs are less than half of 20");
            assert!(report.text().contains("4K random, depth 32, 1 client"));
        }
    }
}

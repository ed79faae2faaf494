//! `treeboot doctor`: what of treeboot's is on each host against what should be, and the mending of it.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageId};

use crate::client::{Agent, Coordinator, Options, host_name};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table, parse_duration, printable};

/// Show what of treeboot's is on hosts: used, orphaned, half-built or missing
///
/// The agent itself mends what it finds when it starts; this shows what is there now. What is not treeboot's is never shown or
/// touched. Orphaned is what nobody claims, everybody having been asked; where one of them is silent nothing is called so. Exit code 6:
/// something is left to mend, or not known.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot doctor\n  treeboot doctor --host host-1 --fix\n  treeboot doctor --fix --grace 1h"
)]
pub(crate) struct DoctorArgs {
    /// This host only
    #[arg(long, value_name = "HOST")]
    host: Option<HostName>,
    /// Mend: remove what is half-built, and what has been orphaned for the grace period; make what is missing
    #[arg(long)]
    fix: bool,
    /// For how long nobody must have claimed what is removed (30s, 10m, 2h)
    #[arg(long, default_value = "10m", value_parser = parse_duration, value_name = "TIME")]
    grace: Duration,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct FindingJson {
    host: String,
    condition: String,
    kind: String,
    name: String,
    why: Option<String>,
    mendable: bool,
    /// What `--fix` does with what is orphaned, for how long nobody has claimed it, and when `--fix` does it.
    fix: Option<String>,
    unclaimed_ms: Option<u64>,
    removable_in_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct DoctorJson {
    findings: Vec<FindingJson>,
    /// What could not be mended or not be known, or which host could not be asked.
    failures: Vec<String>,
}

/// Runs it.
pub(crate) async fn run(options: &Options, args: DoctorArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let hosts = match &args.host {
        Some(host) => vec![coordinator.host(host).await?],
        None => coordinator.hosts().await?,
    };
    let mut report = DoctorJson {
        findings: Vec::new(),
        failures: Vec::new(),
    };
    for record in &hosts {
        match ask(options, record, &args).await {
            Ok(answer) => report.add(host_name(record), answer),
            // One host alone: its failure is the answer.
            Err(failure) if args.host.is_some() => return Err(failure),
            Err(failure) => report.failures.push(failure.to_string()),
        }
    }
    if args.fix {
        report.remove_records(&coordinator).await;
    }
    if args.json.json {
        output::print_json(&report)?;
    } else {
        output::print_text(&report.render())?;
    }
    let left = report.findings.iter().filter(|finding| finding.mendable).count();
    if left == 0 && report.failures.is_empty() {
        return Ok(());
    }
    let failure = Failure::new(
        Exit::Partly,
        format!("{left} things to mend, {} failures", report.failures.len()),
    );
    Err(if args.fix {
        failure
    } else {
        failure.advice("mend them: treeboot doctor --fix")
    })
}

async fn ask(
    options: &Options,
    record: &v1::HostRecord,
    args: &DoctorArgs,
) -> Result<v1::DoctorResponse, Failure> {
    let agent = Agent::connect(record, options.timeout).await?;
    let doing = format!("look at the host '{}'", agent.host);
    let request = v1::DoctorRequest {
        fix: args.fix,
        grace_ms: Some(u64::try_from(args.grace.as_millis()).unwrap_or(u64::MAX)),
    };
    agent.call(&doing, agent.client.clone().doctor(request)).await
}

impl FindingJson {
    /// Why, and what is done about it from when on.
    fn words(&self) -> String {
        let why = self.why.as_deref().unwrap_or_default();
        let (Some(fix), Some(left)) = (&self.fix, self.removable_in_ms) else {
            return why.to_owned();
        };
        match left {
            0 => format!("{why}; --fix {fix}"),
            left => {
                let left = output::duration(Duration::from_millis(left));
                format!("{why}; --fix {fix}, in {left} at the earliest")
            }
        }
    }
}

impl DoctorJson {
    fn add(&mut self, host: &str, answer: v1::DoctorResponse) {
        let finding = |finding: v1::Finding| FindingJson {
            host: host.to_owned(),
            condition: finding.condition,
            kind: finding.kind,
            name: finding.name,
            why: (!finding.why.is_empty()).then_some(finding.why),
            mendable: finding.mendable,
            unclaimed_ms: (!finding.fix.is_empty()).then_some(finding.unclaimed_ms),
            removable_in_ms: (!finding.fix.is_empty()).then_some(finding.removable_in_ms),
            fix: (!finding.fix.is_empty()).then_some(finding.fix),
        };
        self.findings.extend(answer.findings.into_iter().map(finding));
        let failures = answer.failures.into_iter();
        self.failures
            .extend(failures.map(|failure| format!("host '{host}': {failure}")));
    }

    /// Records of images that nobody holds are the coordinator's to remove, for whoever may.
    async fn remove_records(&mut self, coordinator: &Coordinator) {
        let mut left = Vec::new();
        for finding in std::mem::take(&mut self.findings) {
            let image = match (finding.kind.as_str(), finding.removable_in_ms) {
                ("record", Some(0)) => finding.name.parse::<ImageId>().ok(),
                _ => None,
            };
            let Some(image) = image else {
                left.push(finding);
                continue;
            };
            if let Err(failure) = coordinator.remove_image(&(&image).into(), false).await {
                self.failures.push(failure.to_string());
                left.push(finding);
            }
        }
        self.findings = left;
    }

    fn render(&self) -> String {
        let mut text = if self.findings.is_empty() {
            "nothing of treeboot's is there\n".to_owned()
        } else {
            let mut table = Table::new(&[
                ("HOST", Align::Left),
                ("CONDITION", Align::Left),
                ("KIND", Align::Left),
                ("NAME", Align::Left),
                ("WHY", Align::Left),
            ]);
            for finding in &self.findings {
                table.row([
                    finding.host.clone(),
                    printable(&finding.condition),
                    printable(&finding.kind),
                    printable(&finding.name),
                    printable(&finding.words()),
                ]);
            }
            table.render()
        };
        for failure in &self.failures {
            text.push_str(&format!("not mended or not known: {}\n", printable(failure)));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_each_thing_and_what_failed() {
        let mut report = DoctorJson {
            findings: Vec::new(),
            failures: Vec::new(),
        };
        assert!(report.render().starts_with("nothing of treeboot's"));
        report.add(
            "host-1",
            v1::DoctorResponse {
                findings: vec![
                    v1::Finding {
                        condition: "half-built".into(),
                        kind: "leftover".into(),
                        name: "stack:0a".into(),
                        mendable: true,
                        ..v1::Finding::default()
                    },
                    v1::Finding {
                        condition: "orphaned".into(),
                        kind: "delta".into(),
                        name: "web-1".into(),
                        why: "nobody's".into(),
                        mendable: true,
                        fix: "deletes it".into(),
                        unclaimed_ms: 5_000,
                        removable_in_ms: 595_000,
                    },
                ],
                failures: vec!["stack:0a: in use".into()],
            },
        );
        let text = report.render();
        for part in [
            "host-1",
            "half-built",
            "stack:0a",
            "nobody's; --fix deletes it, in 9 min 55 s at the earliest",
            "not mended or not known: host 'host-1': stack:0a: in use",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}

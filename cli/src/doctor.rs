//! `treeboot doctor`: what of treeboot's is on each host against what should be, and the mending of it.

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::HostName;

use crate::client::{Agent, Coordinator, Options, host_name};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table, printable};

/// Show what of treeboot's is on hosts: used, orphaned, half-built or missing
///
/// The agent itself mends what it finds when it starts; this shows what is there now. What is not treeboot's is never shown or
/// touched. Exit code 6: something is left to mend.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  treeboot doctor\n  treeboot doctor --host host-1 --fix")]
pub(crate) struct DoctorArgs {
    /// This host only
    #[arg(long, value_name = "HOST")]
    host: Option<HostName>,
    /// Mend: remove what is orphaned or half-built, make what is missing
    #[arg(long)]
    fix: bool,
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
}

#[derive(Debug, Serialize)]
struct DoctorJson {
    findings: Vec<FindingJson>,
    /// What could not be mended, or which host could not be asked.
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
        match ask(options, record, args.fix).await {
            Ok(answer) => report.add(host_name(record), answer),
            // One host alone: its failure is the answer.
            Err(failure) if args.host.is_some() => return Err(failure),
            Err(failure) => report.failures.push(failure.to_string()),
        }
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

async fn ask(options: &Options, record: &v1::HostRecord, fix: bool) -> Result<v1::DoctorResponse, Failure> {
    let agent = Agent::connect(record, options.timeout).await?;
    let doing = format!("look at the host '{}'", agent.host);
    let request = v1::DoctorRequest { fix };
    agent.call(&doing, agent.client.clone().doctor(request)).await
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
        };
        self.findings.extend(answer.findings.into_iter().map(finding));
        let failures = answer.failures.into_iter();
        self.failures
            .extend(failures.map(|failure| format!("host '{host}': {failure}")));
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
                    printable(finding.why.as_deref().unwrap_or_default()),
                ]);
            }
            table.render()
        };
        for failure in &self.failures {
            text.push_str(&format!("not mended: {}\n", printable(failure)));
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
                findings: vec![v1::Finding {
                    condition: "half-built".into(),
                    kind: "leftover".into(),
                    name: "stack:0a".into(),
                    mendable: true,
                    ..v1::Finding::default()
                }],
                failures: vec!["stack:0a: in use".into()],
            },
        );
        let text = report.render();
        for part in [
            "host-1",
            "half-built",
            "stack:0a",
            "not mended: host 'host-1': stack:0a: in use",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}

//! `treeboot search IMAGE`: exports of an image from which a host could read, best first, and why each stands where it does.

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef};

use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::output::{self, Align, JsonFlag, Table};

/// List exports of an image, best first, with the reason
///
/// What the paper calls partial matching: the coordinator's choice of parents, as it would look at this moment. With --host the
/// list is for that host: never itself or what reads from it, nearest in racks and zones first.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot search debian\n  treeboot search debian --host host-7 --limit 4\n  treeboot search debian --json | jq -r '.[0].host'"
)]
pub(crate) struct SearchArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
    /// For this host
    #[arg(long, value_name = "HOST")]
    host: Option<HostName>,
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    limit: u32,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct ExportJson {
    stripe: u32,
    host: Option<String>,
    portal: String,
    target: String,
    origin: bool,
    depth: u32,
    state: &'static str,
    free_slots: u32,
    reason: String,
}

impl From<&v1::Candidate> for ExportJson {
    fn from(candidate: &v1::Candidate) -> Self {
        let parent = candidate.parent.clone().unwrap_or_default();
        let endpoint = parent.endpoint.unwrap_or_default();
        Self {
            stripe: candidate.stripe,
            host: (!parent.host.is_empty()).then_some(parent.host),
            portal: endpoint.portal,
            target: endpoint.target,
            origin: parent.origin,
            depth: parent.depth,
            state: match candidate.state() {
                v1::AttachState::Ready => "ready",
                v1::AttachState::Pending | v1::AttachState::Unspecified => "pending",
            },
            free_slots: candidate.free_slots,
            reason: candidate.reason.clone(),
        }
    }
}

/// Runs the verb.
pub(crate) async fn run(options: &Options, args: SearchArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let found = coordinator
        .search(&args.image, args.host.as_ref(), args.limit)
        .await?;
    let found: Vec<ExportJson> = found.iter().map(Into::into).collect();
    if args.json.json {
        return output::print_json(&found);
    }
    if found.is_empty() {
        return output::print_text("no export of it is up\n");
    }
    output::print_text(&table(&found))
}

fn table(found: &[ExportJson]) -> String {
    let mut table = Table::new(&[
        ("", Align::Right),
        ("HOST", Align::Left),
        ("PORTAL", Align::Left),
        ("STRIPE", Align::Right),
        ("WHY IT STANDS HERE", Align::Left),
    ]);
    for (rank, export) in (1..).zip(found) {
        table.row([
            format!("{rank}"),
            export.host.clone().unwrap_or_else(|| "-".into()),
            export.portal.clone(),
            export.stripe.to_string(),
            export.reason.clone(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_stand_in_their_order_with_their_reasons() {
        let export = |host: Option<&str>, stripe: u32, reason: &str| ExportJson {
            stripe,
            host: host.map(Into::into),
            portal: "10.0.0.1:3260".into(),
            target: String::new(),
            origin: false,
            depth: 1,
            state: "ready",
            free_slots: 1,
            reason: reason.into(),
        };
        let found = [
            export(
                Some("host-10"),
                1,
                "1 step from an origin, 2 slots free, same rack",
            ),
            export(None, 0, "origin, no slot free"),
        ];
        assert_eq!(
            table(&found),
            "   HOST     PORTAL         STRIPE  WHY IT STANDS HERE\n\
             1  host-10  10.0.0.1:3260       1  1 step from an origin, 2 slots free, same rack\n\
             2  -        10.0.0.1:3260       0  origin, no slot free\n"
        );
    }
}

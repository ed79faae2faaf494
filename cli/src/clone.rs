//! `treeboot clone`: a new VM with what another one wrote.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_proto::v1::agent_client::AgentClient;
use treeboot_types::{HostName, SnapshotName, VmName};

use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::follow::{Followed, follow};
use crate::output::{self, JsonFlag, Progress};
use crate::vm::agent_with;

/// How long nothing may be shipped: the other host may have to sync a disk and to attach its image.
const STALL_LIMIT: Duration = Duration::from_secs(240);

/// Make a new VM with the disk that a VM has now, or had at a snapshot; the VM goes on meanwhile
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Ctrl-C cancels it, and nothing is left.\n\nExample:\n  treeboot clone web-1 web-2\n  treeboot clone web-1 web-3 --to host-2 --snapshot before-upgrade"
)]
pub(crate) struct CloneArgs {
    /// The VM's name
    vm: VmName,
    /// The new VM's name
    new_vm: VmName,
    /// The new VM's host; the same one where it is left out
    #[arg(long, value_name = "HOST")]
    to: Option<HostName>,
    /// The disk as it was then
    #[arg(long)]
    snapshot: Option<SnapshotName>,
    /// The VM's host; looked up where it is left out
    #[arg(long)]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

/// A clone in `--json`.
#[derive(Debug, Serialize)]
struct ClonedJson {
    vm: String,
    host: String,
    from_vm: String,
    from_host: String,
    snapshot: Option<String>,
    data_bytes: u64,
    sent_bytes: u64,
    resumed: u32,
}

/// `clone`.
pub(crate) async fn run(options: &Options, args: CloneArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host).await?;
    let (to, address) = match &args.to {
        Some(to) if to.as_str() != agent.host => {
            let record = coordinator.host(to).await?;
            let address = record.info.map(|info| info.agent_address).unwrap_or_default();
            (to.to_string(), address)
        }
        _ => (agent.host.clone(), String::new()),
    };
    let (vm, new_vm) = (&args.vm, &args.new_vm);
    let doing = format!(
        "clone VM '{vm}' of host '{}' to '{new_vm}' on host '{to}'",
        agent.host
    );
    let snapshot = args.snapshot.map(|name| name.to_string());
    let request = v1::CloneRequest {
        vm: vm.to_string(),
        destination: to.clone(),
        new_vm: new_vm.to_string(),
        destination_address: address,
        snapshot: snapshot.clone().unwrap_or_default(),
    };
    let mut client = agent.client.clone();
    let stream = agent
        .call(&doing, AgentClient::clone(&mut client, request))
        .await?;
    let followed = Followed {
        peer: &agent.peer,
        doing: &doing,
        patience: options.timeout.max(STALL_LIMIT),
        advice: "see what the agents of both hosts log",
    };
    let result = follow(&followed, stream, Progress::of_bytes("shipping", 0), |step| {
        (step.done_bytes, step.total_bytes, step.result)
    })
    .await?;
    if args.json.json {
        return output::print_json(&ClonedJson {
            vm: new_vm.to_string(),
            host: to,
            from_vm: vm.to_string(),
            from_host: agent.host,
            snapshot,
            data_bytes: result.data_bytes,
            sent_bytes: result.sent_bytes,
            resumed: result.resumed,
        });
    }
    output::print_text(&format!(
        "cloned '{vm}' to '{new_vm}' on host '{to}': {} of what it wrote\n  start it with 'treeboot vm start {new_vm}'\n",
        output::bytes(result.data_bytes)
    ))
}

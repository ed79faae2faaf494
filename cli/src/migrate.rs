//! `treeboot migrate`: a VM goes to another host.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::follow::{Followed, follow};
use crate::output::{self, JsonFlag, Progress};
use crate::vm::agent_with;

/// How long nothing may be shipped: the guest may have to shut down, and the other host to attach its image and to start the VM.
const STALL_LIMIT: Duration = Duration::from_secs(300);

/// Move a VM to another host, with its name, identity, disk and snapshots; it is stopped for a moment and started there if it runs
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Ctrl-C before the other host takes it cancels it: the VM goes on where it was, and nothing is left.\n\nExample:\n  treeboot migrate web-1 --to host-2"
)]
pub(crate) struct MigrateArgs {
    /// The VM's name
    vm: VmName,
    /// The host it goes to
    #[arg(long, value_name = "HOST")]
    to: HostName,
    /// The VM's host; looked up where it is left out
    #[arg(long)]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

/// A move in `--json`.
#[derive(Debug, Serialize)]
struct MovedJson {
    vm: String,
    host: String,
    from_host: String,
    /// `false`: it was there already.
    moved: bool,
    data_bytes: u64,
    sent_bytes: u64,
    resumed: u32,
    /// For how long its disk was served nowhere.
    stopped_us: u64,
    /// What does not work of it there.
    trouble: Option<String>,
}

/// `migrate`.
pub(crate) async fn run(options: &Options, args: MigrateArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host).await?;
    let (vm, to) = (&args.vm, &args.to);
    let record = coordinator.host(to).await?;
    let address = record.info.map(|info| info.agent_address).unwrap_or_default();
    let doing = format!("move VM '{vm}' of host '{}' to host '{to}'", agent.host);
    let request = v1::MigrateRequest {
        vm: vm.to_string(),
        destination: to.to_string(),
        destination_address: address,
    };
    let mut client = agent.client.clone();
    let stream = agent.call(&doing, client.migrate(request)).await?;
    let followed = Followed {
        peer: &agent.peer,
        doing: &doing,
        patience: options.timeout.max(STALL_LIMIT),
        advice: "see what the agents of both hosts log, and where it is: treeboot vm list",
    };
    let result = follow(&followed, stream, Progress::of_bytes("moving", 0), |step| {
        (step.done_bytes, step.total_bytes, step.result)
    })
    .await?;
    let trouble = (!result.trouble.is_empty()).then_some(result.trouble);
    if args.json.json {
        return output::print_json(&MovedJson {
            vm: vm.to_string(),
            host: to.to_string(),
            from_host: agent.host,
            moved: !result.was_there,
            data_bytes: result.data_bytes,
            sent_bytes: result.sent_bytes,
            resumed: result.resumed,
            stopped_us: result.stopped_us,
            trouble,
        });
    }
    let mut text = match result.was_there {
        true => format!("'{vm}' is on host '{to}' already\n"),
        false => format!(
            "moved '{vm}' from host '{}' to host '{to}': {} of what it wrote, stopped for {}\n",
            agent.host,
            output::bytes(result.data_bytes),
            output::duration(Duration::from_micros(result.stopped_us)),
        ),
    };
    if let Some(trouble) = trouble {
        text += &format!("  it is there, and not all of it works: {trouble}\n");
    }
    output::print_text(&text)
}

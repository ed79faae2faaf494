//! `treeboot migrate`: a VM goes to another host, or is taken back from one that is gone for good.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use crate::client::{Coordinator, Options};
use crate::failure::{Exit, Failure};
use crate::follow::{Followed, follow};
use crate::output::{self, JsonFlag, Progress};
use crate::vm::agent_with;

/// How long nothing may be shipped: the guest may have to shut down, and the other host to attach its image and to start the VM.
const STALL_LIMIT: Duration = Duration::from_secs(300);

/// Move a VM to another host, with its name, identity, disk and snapshots; it is stopped for a moment and started there if it runs
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Ctrl-C before the other host takes it cancels it: the VM goes on where it was, and nothing is left.\n\n\
                  Once the other host was asked to take it that host alone knows whose the VM is. Should it be gone for good, --take-back \
                  --gone HOST gives the VM to the host that is left, with your word in place of that host's: if it still runs the VM there, \
                  the VM runs twice. Should its agent come back it asks first, and neither serves nor runs its copy any more.\n\n\
                  Example:\n  treeboot migrate web-1 --to host-2\n  treeboot migrate web-1 --take-back --gone host-2"
)]
pub(crate) struct MigrateArgs {
    /// The VM's name
    vm: VmName,
    /// The host it goes to
    #[arg(long, value_name = "HOST", required_unless_present = "take_back")]
    to: Option<HostName>,
    /// Take back a VM of which a host that is gone for good has not said whether it took it
    #[arg(long, conflicts_with = "to", requires = "gone")]
    take_back: bool,
    /// The host that will never come back with the VM
    #[arg(long, value_name = "HOST", requires = "take_back")]
    gone: Option<HostName>,
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

/// What came of taking it back, in `--json`.
#[derive(Debug, Serialize)]
struct TakenBackJson {
    vm: String,
    host: String,
    gone: String,
    /// `false`: it was there.
    taken_back: bool,
    /// By your word alone: the other host did not answer.
    by_force: bool,
}

/// `migrate`.
pub(crate) async fn run(options: &Options, args: MigrateArgs) -> Result<(), Failure> {
    match (&args.to, &args.gone) {
        (Some(to), _) => migrate(options, &args, to).await,
        (None, Some(gone)) => take_back(options, &args, gone).await,
        (None, None) => Err(Failure::new(
            Exit::Usage,
            "a move needs the host it goes to: --to HOST",
        )),
    }
}

async fn take_back(options: &Options, args: &MigrateArgs, gone: &HostName) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host.clone()).await?;
    let (vm, host) = (&args.vm, &agent.host);
    let doing = format!("take VM '{vm}' back from host '{gone}' to host '{host}'");
    let request = v1::TakeBackVmRequest {
        vm: vm.to_string(),
        gone: gone.to_string(),
    };
    let answer = agent
        .call(&doing, agent.client.clone().take_back_vm(request))
        .await?;
    let how = answer.how();
    if args.json.json {
        return output::print_json(&TakenBackJson {
            vm: vm.to_string(),
            host: host.clone(),
            gone: gone.to_string(),
            taken_back: how != v1::TakenBack::WasHere,
            by_force: how == v1::TakenBack::ByForce,
        });
    }
    output::print_text(&match how {
        v1::TakenBack::WasHere => format!("'{vm}' is host '{host}''s already\n"),
        v1::TakenBack::ByItsWord => {
            format!("'{vm}' is host '{host}''s: host '{gone}' answers, and has not taken it\n")
        }
        v1::TakenBack::ByForce | v1::TakenBack::Unspecified => format!(
            "'{vm}' is host '{host}''s again, by your word: host '{gone}' must not run it any more\n  \
             should its agent come back, it asks first, and keeps its copy without running it until you remove it: \
             treeboot vm destroy {vm} --host {gone}\n"
        ),
    })
}

async fn migrate(options: &Options, args: &MigrateArgs, to: &HostName) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = agent_with(&coordinator, options, &args.vm, args.host.clone()).await?;
    let vm = &args.vm;
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

//! `treeboot vm …`: one virtual machine, its private disk, and where it runs.

mod list;
mod many;
mod show;
mod spec;
mod watch;
mod whereabouts;

use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, VmName};

use crate::client::{Agent, Coordinator, Options, host_name, incomplete};
use crate::failure::{Exit, Failure};
use crate::output::{self, JsonFlag};

pub(crate) use list::{VmJson, limit_level, of_hosts};
use show::SecretFile;
pub(crate) use spec::{Machine, MachineArgs, ReadyArgs};
pub(crate) use watch::until_ready;
pub(crate) use whereabouts::agent_with;
use whereabouts::whereabouts;

/// Verbs on virtual machines.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum VmVerb {
    /// Give a VM its private disk on a host, without starting it; prints the URL that a front end takes
    #[command(
        after_help = "Example:\n  treeboot vm create web-1 --image debian --host host-1\n  treeboot vm create web --count 1024 --image debian --host host-1"
    )]
    Create {
        /// The VM's name
        name: VmName,
        /// Create this many in one call: NAME-1, NAME-2, ...
        #[arg(long, conflicts_with = "secret_file", value_parser = clap::value_parser!(u32).range(1..=4096))]
        count: Option<u32>,
        /// NAME or NAME@VERSION; without a version the newest
        #[arg(long)]
        image: ImageRef,
        #[command(flatten)]
        wish: DiskWish,
        /// The host; may be left out where only one runs VMs
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        secret: SecretFile,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// Show one VM and its disk, with what QEMU or iscsiadm need to attach it
    #[command(
        after_help = "Example:\n  treeboot vm show web-1\n  treeboot vm show web-1 --secret-file web-1.secret"
    )]
    Show {
        /// The VM's name
        name: VmName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        secret: SecretFile,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// Limit what a VM writes; one at its limit stands still, and goes on when the limit is raised or when it discards something
    #[command(after_help = "Example:\n  treeboot vm limit web-1 20G\n  treeboot vm limit web-1 none")]
    Limit {
        /// The VM's name
        name: VmName,
        /// 512M, 20G, or none; counted are the blocks that it wrote and did not discard, its snapshots' among them
        #[arg(value_name = "SIZE", value_parser = parse_limit)]
        limit: u64,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        json: JsonFlag,
    },
    Start(StartArgs),
    /// Stop a VM; its disk keeps what was written
    #[command(after_help = "Example:\n  treeboot vm stop web-1\n  treeboot vm stop web-1 --force")]
    Stop {
        /// The VM's name
        name: VmName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        /// At once, as if the power were cut
        #[arg(long)]
        force: bool,
    },
    /// Stop a VM and delete its private disk
    #[command(after_help = "Example:\n  treeboot vm destroy web-1\n  treeboot vm destroy web-1 --keep-base")]
    Destroy {
        /// The VM's name
        name: VmName,
        /// The host; looked up where it is left out
        #[arg(long)]
        host: Option<HostName>,
        /// Keep the image attached on the host although no VM uses it any more
        #[arg(long)]
        keep_base: bool,
    },
    /// List the VMs of one host or of all
    #[command(
        after_help = "Example:\n  treeboot vm list\n  treeboot vm list --json | jq '[.[] | select(.state == \"ready\")] | length'"
    )]
    List {
        /// Only this host
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        json: JsonFlag,
    },
}

/// How a new disk is to be.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct DiskWish {
    /// As a block device of the host, /dev/treeboot/NAME, too
    #[arg(long)]
    device: bool,
    /// The most that the VM may write (512M, 20G, or none) [default: the host's own limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    delta_limit: Option<u64>,
}

/// A size, or `none`.
fn parse_limit(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        text => spec::parse_size(text),
    }
}

/// Start a VM; its disk is created where it is not there
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot vm start web-1 --image debian --host host-1 --memory 512M --wait\n  treeboot vm start web-1 --ready-port 22 --wait"
)]
pub(crate) struct StartArgs {
    /// The VM's name
    name: VmName,
    /// NAME or NAME@VERSION; may be left out where the VM has a disk
    #[arg(long)]
    image: Option<ImageRef>,
    /// The host; looked up where the VM is there, or where only one runs VMs
    #[arg(long)]
    host: Option<HostName>,
    /// Return only when the VM is ready
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    ready: ReadyArgs,
    #[command(flatten)]
    json: JsonFlag,
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: VmVerb) -> Result<(), Failure> {
    match verb {
        VmVerb::Create {
            name,
            count: Some(count),
            image,
            wish,
            host,
            json,
            ..
        } => many::create(options, &name, count, &image, wish, host, json).await,
        VmVerb::Create {
            name,
            image,
            wish,
            host,
            secret,
            json,
            count: None,
        } => create(options, &name, &image, wish, host, &secret, json).await,
        VmVerb::Show {
            name,
            host,
            secret,
            json,
        } => {
            let coordinator = Coordinator::connect(options).await?;
            let agent = agent_with(&coordinator, options, &name, host).await?;
            show::show(&agent, &name, &secret, json).await
        }
        VmVerb::Limit {
            name,
            limit,
            host,
            json,
        } => {
            let coordinator = Coordinator::connect(options).await?;
            let agent = agent_with(&coordinator, options, &name, host).await?;
            limit_writes(&agent, &name, limit, json).await
        }
        VmVerb::Start(args) => start(options, args).await,
        VmVerb::Stop { name, host, force } => {
            let coordinator = Coordinator::connect(options).await?;
            let agent = agent_with(&coordinator, options, &name, host).await?;
            stop(&agent, name.as_str(), force).await?;
            output::print_text(&format!("stopped '{name}' on host '{}'\n", agent.host))
        }
        VmVerb::Destroy {
            name,
            host,
            keep_base,
        } => {
            let coordinator = Coordinator::connect(options).await?;
            let agent = agent_with(&coordinator, options, &name, host).await?;
            destroy(&agent, name.as_str(), keep_base).await?;
            output::print_text(&format!(
                "destroyed '{name}' and its disk on host '{}'\n",
                agent.host
            ))
        }
        VmVerb::List { host, json } => list::list(options, host, json).await,
    }
}

async fn limit_writes(agent: &Agent, name: &VmName, limit: u64, json: JsonFlag) -> Result<(), Failure> {
    let doing = format!("limit what the VM '{name}' on host '{}' writes", agent.host);
    let request = v1::LimitDiskRequest {
        vm: name.to_string(),
        limit_bytes: limit,
    };
    let answer = agent
        .call(&doing, agent.client.clone().limit_disk(request))
        .await?;
    let row = VmJson::of(&agent.host, None, answer.disk);
    if json.json {
        return output::print_json(&row);
    }
    let written = output::bytes(row.data_bytes);
    output::print_text(&match row.limit_bytes {
        Some(limit) => format!(
            "'{name}' may write {}, and has written {written}\n",
            output::bytes(limit)
        ),
        None => format!("'{name}' may write as much as there is room for, and has written {written}\n"),
    })
}

async fn create(
    options: &Options,
    name: &VmName,
    image: &ImageRef,
    wish: DiskWish,
    host: Option<HostName>,
    secret: &SecretFile,
    json: JsonFlag,
) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let image = coordinator.image(image).await?.id;
    let agent = agent_for_new(&coordinator, options, host).await?;
    let doing = format!("create the VM '{name}' on host '{}'", agent.host);
    let request = v1::CreateRequest {
        vm: name.to_string(),
        image,
        device: wish.device,
        limit_bytes: wish.delta_limit,
    };
    let answer = agent.call(&doing, agent.client.clone().create(request)).await?;
    let disk = answer.disk.ok_or_else(|| incomplete(&agent.peer, "disk"))?;
    secret.write(answer.secret)?;
    let row = VmJson::of(&agent.host, None, Some(disk));
    if json.json {
        return output::print_json(&row);
    }
    output::print_text(&format!(
        "created '{name}' on host '{}', a disk of {} over {}\n  {}\n  start it with 'treeboot vm start {name}', or attach it yourself: \
         'treeboot vm show {name}' says how\n",
        agent.host,
        output::bytes(row.bytes),
        row.image,
        row.place(),
    ))
}

async fn start(options: &Options, args: StartArgs) -> Result<(), Failure> {
    let machine = args.machine.read()?;
    let coordinator = Coordinator::connect(options).await?;
    let (agent, image) = match &args.image {
        Some(image) => {
            let image = coordinator.image(image).await?.id;
            let agent = match (
                &args.host,
                whereabouts(&coordinator, options, &args.name).await?.as_slice(),
            ) {
                (None, [part]) if !part.is_lost() => part.agent.clone(),
                (host, _) => agent_for_new(&coordinator, options, host.clone()).await?,
            };
            (agent, image)
        }
        None => {
            let agent = agent_with(&coordinator, options, &args.name, args.host.clone())
                .await
                .map_err(|failure| match failure.exit {
                    Exit::NotFound => failure.advice("give --image to start a new one"),
                    _ => failure,
                })?;
            let image = image_of(&agent, args.name.as_str()).await?;
            (agent, Some(image))
        }
    };
    let request = machine.request(args.name.as_str(), image, args.ready.message());
    let mut vm = start_one(&agent, request, args.ready.limit()).await?;
    if args.wait {
        vm = until_ready(&agent, vm, args.ready.limit()).await?;
    }
    let disk = agent
        .disks()
        .await
        .ok()
        .and_then(|disks| disks.into_iter().find(|disk| disk.vm == args.name.as_str()));
    let row = VmJson::of(&agent.host, Some(vm), disk);
    if args.json.json {
        return output::print_json(&row);
    }
    let ready = match row.ready_us {
        Some(us) => format!(
            "ready after {}",
            output::duration(std::time::Duration::from_micros(us))
        ),
        None => format!("{}; see 'treeboot vm list'", row.state),
    };
    output::print_text(&format!(
        "'{}' on host '{}' ({}, {}): {ready}\n",
        args.name,
        agent.host,
        row.image,
        row.acceleration.as_deref().unwrap_or("no acceleration known"),
    ))
}

/// Starts one VM and returns as soon as it runs.
pub(crate) async fn start_one(
    agent: &Agent,
    request: v1::StartVmRequest,
    limit: std::time::Duration,
) -> Result<v1::Vm, Failure> {
    let doing = format!("start the VM '{}' on host '{}'", request.vm, agent.host);
    // Attaching and probing the hypervisor are part of it, so it may take what being ready may take.
    let patient = Agent {
        timeout: limit.max(agent.timeout),
        ..agent.clone()
    };
    let answer = patient
        .call(&doing, agent.client.clone().start_vm(request))
        .await?;
    answer.vm.ok_or_else(|| incomplete(&agent.peer, "vm"))
}

/// Stops one VM.
pub(crate) async fn stop(agent: &Agent, vm: &str, force: bool) -> Result<(), Failure> {
    let doing = format!("stop the VM '{vm}' on host '{}'", agent.host);
    let request = v1::StopVmRequest {
        vm: vm.to_owned(),
        force,
    };
    agent
        .call(&doing, agent.client.clone().stop_vm(request))
        .await
        .map(|_| ())
        .map_err(|failure| match failure.exit {
            Exit::TimedOut => failure.advice("the guest may ignore its power button; use --force"),
            _ => failure,
        })
}

/// Stops one VM if need be and deletes its disk.
pub(crate) async fn destroy(agent: &Agent, vm: &str, keep_base: bool) -> Result<(), Failure> {
    let runs = |vms: &[v1::Vm]| {
        vms.iter().any(|found| {
            found.name == vm && matches!(found.state(), v1::VmState::Starting | v1::VmState::Ready)
        })
    };
    if runs(&agent.vms().await?) {
        // Its disk goes with it, so there is nothing that an orderly end would save.
        stop(agent, vm, true).await?;
    }
    let doing = format!("destroy the VM '{vm}' on host '{}'", agent.host);
    let request = v1::DestroyRequest {
        vm: vm.to_owned(),
        instance_only: keep_base,
    };
    agent
        .call(&doing, agent.client.clone().destroy(request))
        .await
        .map(|_| ())
}

/// The image of a VM's disk.
async fn image_of(agent: &Agent, vm: &str) -> Result<v1::ImageId, Failure> {
    let disk = agent.disks().await?.into_iter().find(|disk| disk.vm == vm);
    disk.and_then(|disk| disk.image).ok_or_else(|| {
        Failure::new(
            Exit::NotFound,
            format!("the VM '{vm}' has no disk on host '{}'", agent.host),
        )
        .advice("give --image to start a new one")
    })
}

/// The agent on which a new VM goes: the one named, or the only one that runs VMs.
async fn agent_for_new(
    coordinator: &Coordinator,
    options: &Options,
    host: Option<HostName>,
) -> Result<Agent, Failure> {
    if let Some(host) = host {
        return coordinator.agent(&host).await;
    }
    let hosts: Vec<_> = coordinator.hosts().await?.into_iter().filter(runs_vms).collect();
    match hosts.as_slice() {
        [only] => Agent::connect(only, options.timeout).await,
        [] => Err(no_host_runs_vms()),
        several => {
            let names: Vec<&str> = several.iter().map(host_name).collect();
            Err(Failure::new(
                Exit::Usage,
                format!("{} hosts run VMs: {}", names.len(), names.join(", ")),
            )
            .advice("say which with --host"))
        }
    }
}

/// Whether a host is there and has a working hypervisor.
pub(crate) fn runs_vms(host: &v1::HostRecord) -> bool {
    host.connected && host.info.as_ref().is_some_and(|info| info.runs_vms)
}

/// Nothing can run a VM.
pub(crate) fn no_host_runs_vms() -> Failure {
    Failure::new(Exit::NotFound, "no connected host runs VMs").advice(
        "start treeboot-agent where QEMU with iSCSI is installed (Debian: qemu-system-x86 qemu-block-extra); \
         see 'treeboot host list'",
    )
}

//! VMs through the agents' own service: started, awaited, looked at.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use treeboot_proto::v1;

use crate::daemon::Daemon;
use crate::measure::newest;
use crate::wait::wait_until;

/// Between two attempts to reach an agent that is away.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// A VM to be started.
#[derive(Debug, Clone)]
pub struct Order {
    /// Its name.
    pub vm: String,
    /// The image's name; its newest version.
    pub image: String,
    /// The text on the serial console that says it is up.
    pub ready_line: String,
    /// For how long the agent waits for it.
    pub limit: Duration,
    /// Memory; 0 for the agent's default.
    pub memory_mib: u32,
    /// Cloud-init user data.
    pub user_data: String,
}

impl Order {
    fn request(&self) -> v1::StartVmRequest {
        v1::StartVmRequest {
            vm: self.vm.clone(),
            image: Some(newest(&self.image)),
            memory_mib: self.memory_mib,
            cpus: 0,
            ready: Some(v1::Readiness {
                when: Some(v1::readiness::When::ConsoleLine(self.ready_line.clone())),
                deadline_ms: u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX),
            }),
            ssh_authorized_keys: Vec::new(),
            user_data: self.user_data.clone(),
        }
    }
}

/// Starts a VM; answers as soon as the agent has started it.
///
/// # Errors
/// The agent does not answer, or refused.
pub async fn start(agent: &Daemon, order: &Order) -> Result<v1::Vm> {
    let answer = agent
        .agent()
        .await?
        .start_vm(order.request())
        .await
        .with_context(|| format!("{} did not start {}", agent.name(), order.vm))?;
    answer.into_inner().vm.context("an answer without the VM")
}

/// Starts a VM and waits until it is ready.
///
/// # Errors
/// As [`start`] and [`await_ready`].
pub async fn boot(agent: &Daemon, order: &Order) -> Result<v1::Vm> {
    start(agent, order).await?;
    await_ready(agent, &order.vm, order.limit).await
}

/// Waits until a VM is ready. An agent that is away meanwhile is asked again when it is back.
///
/// # Errors
/// The VM failed or stopped (the error holds the agent's reason), or `limit` passed.
pub async fn await_ready(agent: &Daemon, vm: &str, limit: Duration) -> Result<v1::Vm> {
    let watch = async {
        loop {
            match watch_once(agent, vm).await {
                Ok(Some(seen)) => return Ok(seen),
                Err(error) if error.downcast_ref::<Refused>().is_some() => return Err(error),
                // The stream's end without an outcome, or a transport's fault: the agent is away.
                Ok(None) | Err(_) => tokio::time::sleep(AGAIN_AFTER).await,
            }
        }
    };
    let seen = tokio::time::timeout(limit, watch)
        .await
        .with_context(|| format!("{vm} on {}: not ready within {limit:?}", agent.name()))??;
    match seen.state() {
        v1::VmState::Ready => Ok(seen),
        other => bail!(
            "{vm} on {}: {}: {}",
            agent.name(),
            other.as_str_name(),
            seen.error
        ),
    }
}

/// Waits until a VM stands still for its disk.
///
/// # Errors
/// The agent does not know the VM, or `limit` passed.
pub async fn await_paused(agent: &Daemon, vm: &str, limit: Duration) -> Result<()> {
    wait_until(limit, "the guest to stand still", || async {
        Ok(describe(agent, vm).await?.paused.then_some(()))
    })
    .await
}

/// The agent answered, and its answer is final.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

async fn watch_once(agent: &Daemon, vm: &str) -> Result<Option<v1::Vm>> {
    let request = v1::WatchVmRequest { vm: vm.to_owned() };
    let mut states = match agent.agent().await?.watch_vm(request).await {
        Ok(states) => states.into_inner(),
        Err(status) if status.code() == tonic::Code::NotFound => {
            bail!(Refused(status.message().to_owned()))
        }
        Err(status) => return Err(status.into()),
    };
    while let Some(state) = states.message().await? {
        if matches!(
            state.state(),
            v1::VmState::Ready | v1::VmState::Failed | v1::VmState::Stopped
        ) {
            return Ok(Some(state));
        }
    }
    Ok(None)
}

/// Stops a VM; `force` is as if the power were cut.
///
/// # Errors
/// The agent does not answer, or refused.
pub async fn stop(agent: &Daemon, vm: &str, force: bool) -> Result<()> {
    let request = v1::StopVmRequest {
        vm: vm.to_owned(),
        force,
    };
    agent.agent().await?.stop_vm(request).await?;
    Ok(())
}

/// A VM as its agent sees it, with the hypervisor's own counters.
///
/// # Errors
/// The agent does not answer, or has no such VM.
pub async fn describe(agent: &Daemon, vm: &str) -> Result<v1::Vm> {
    let answer = agent.agent().await?.list_vms(v1::ListVmsRequest {}).await?;
    let vms = answer.into_inner().vms;
    vms.into_iter()
        .find(|candidate| candidate.name == vm)
        .with_context(|| format!("{} has no VM {vm}", agent.name()))
}

/// Attaches a host to an image, without a VM; gives the time from the request to the answer, as the caller sees it.
///
/// # Errors
/// The agent does not answer, or could not attach.
pub async fn attach(agent: &Daemon, image: &str) -> Result<(v1::AttachResponse, Duration)> {
    let mut client = agent.agent().await?;
    let began = Instant::now();
    let request = v1::AttachRequest {
        image: Some(newest(image)),
    };
    let answer = client
        .attach(request)
        .await
        .with_context(|| format!("{} could not attach to {image}", agent.name()))?;
    Ok((answer.into_inner(), began.elapsed()))
}

/// Follows a call that tells of its progress to its result.
///
/// # Errors
/// The call's own; without a result `UNAVAILABLE`.
pub async fn last<T>(
    mut stream: tonic::Streaming<T>,
    has_result: impl Fn(&T) -> bool,
) -> Result<(), tonic::Status> {
    while let Some(step) = stream.message().await? {
        if has_result(&step) {
            return Ok(());
        }
    }
    Err(tonic::Status::unavailable("no result"))
}

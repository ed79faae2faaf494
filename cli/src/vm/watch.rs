//! Waiting for a VM to be ready, across an agent's restart.

use std::time::{Duration, Instant};

use treeboot_proto::v1;

use crate::client::{Agent, refused};
use crate::failure::{Exit, Failure};
use crate::output::{duration, printable};

/// How much longer than the agent's own deadline is waited: its answer that the time is over should win.
const GRACE: Duration = Duration::from_secs(5);

/// Between two attempts to hear an agent that went away: it may be restarting, which takes about a second.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// Waits until a started VM is ready, for `limit` at most.
///
/// # Errors
/// It failed, it was stopped, or it was not ready in time.
pub(crate) async fn until_ready(agent: &Agent, vm: v1::Vm, limit: Duration) -> Result<v1::Vm, Failure> {
    let name = vm.name.clone();
    let console = printable(&vm.console_path);
    if let Some(done) = verdict(agent, vm) {
        return done;
    }
    let begun = Instant::now();
    let late = || {
        Failure::new(
            Exit::TimedOut,
            format!(
                "the VM '{name}' on host '{}' was not ready within {}",
                agent.host,
                duration(limit)
            ),
        )
        .advice(format!(
            "see its console in {console} on that host; allow more with --ready-timeout"
        ))
    };
    match tokio::time::timeout(limit + GRACE, follow(agent, &name, begun, limit)).await {
        Ok(done) => done,
        Err(_) => Err(late()),
    }
}

/// Follows the agent's stream, and opens it again where it broke.
async fn follow(agent: &Agent, name: &str, begun: Instant, limit: Duration) -> Result<v1::Vm, Failure> {
    let doing = format!("wait for the VM '{name}' on host '{}'", agent.host);
    loop {
        let request = v1::WatchVmRequest { vm: name.to_owned() };
        let broke = match agent.client.clone().watch_vm(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(vm)) => {
                            if let Some(done) = verdict(agent, vm) {
                                return done;
                            }
                        }
                        Ok(None) => {
                            break Failure::new(
                                Exit::Unreachable,
                                format!("cannot {doing}: the agent ended the stream"),
                            );
                        }
                        Err(status) => break refused(&agent.peer, &doing, &status),
                    }
                }
            }
            Err(status) => refused(&agent.peer, &doing, &status),
        };
        if broke.exit != Exit::Unreachable || begun.elapsed() > limit {
            return Err(broke);
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// What a state means for whoever waits; none while the VM is starting.
fn verdict(agent: &Agent, vm: v1::Vm) -> Option<Result<v1::Vm, Failure>> {
    let why = match vm.state() {
        v1::VmState::Ready => return Some(Ok(vm)),
        v1::VmState::Starting | v1::VmState::Unspecified => return None,
        v1::VmState::Failed => printable(&vm.error),
        v1::VmState::Stopped => "it stopped before it was ready".to_owned(),
    };
    let name = printable(&vm.name);
    let failure = Failure::new(
        Exit::Failed,
        format!("the VM '{name}' on host '{}' failed: {why}", agent.host),
    );
    let console = printable(&vm.console_path);
    Some(Err(failure.advice(format!(
        "see its console on that host, {console}; where it is up and only says so otherwise, give --ready-line or --ready-port"
    ))))
}

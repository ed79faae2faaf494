//! Where a VM is: on the host that is named, or on the only connected one that has it. One that moves may be on two.

use treeboot_proto::v1;
use treeboot_types::{HostName, VmName};

use crate::client::{Agent, Coordinator, Options, PARALLEL_CALLS};
use crate::failure::{Exit, Failure};
use crate::parallel;

/// The agent that has the VM: on the host that was named, or on the only one where it is found.
pub(crate) async fn agent_with(
    coordinator: &Coordinator,
    options: &Options,
    vm: &VmName,
    host: Option<HostName>,
) -> Result<Agent, Failure> {
    if let Some(host) = host {
        return coordinator.agent(&host).await;
    }
    let mut found = whereabouts(coordinator, options, vm).await?;
    if found.iter().any(|part| !part.is_lost()) {
        found.retain(|part| !part.is_lost());
    }
    if let Some(failure) = found
        .iter()
        .find_map(|part| part.undecided(vm))
        .filter(|_| found.len() > 1)
    {
        return Err(failure);
    }
    match (found.pop(), found.as_slice()) {
        (Some(part), []) => Ok(part.agent),
        (Some(part), others) => {
            let parts = others.iter().chain([&part]);
            let hosts: Vec<&str> = parts.map(|part| part.agent.host.as_str()).collect();
            Err(Failure::new(
                Exit::Usage,
                format!(
                    "there are several VMs of the name '{vm}': on {}",
                    hosts.join(", ")
                ),
            )
            .advice("say which with --host"))
        }
        (None, _) => Err(
            Failure::new(Exit::NotFound, format!("no connected host has a VM '{vm}'"))
                .advice("see which there are: treeboot vm list"),
        ),
    }
}

/// A host that has a VM, or a part of one that moves.
pub(super) struct Part {
    pub(super) agent: Agent,
    /// Where its disk is on its way to another host.
    moving: Option<v1::DiskMove>,
}

impl Part {
    /// What is left of a VM that another host has.
    pub(super) fn is_lost(&self) -> bool {
        self.moving
            .as_ref()
            .is_some_and(|moving| moving.end() == v1::DiskMoveEnd::Lost)
    }

    /// What is said of a VM that two hosts have, because one does not know yet that the other one took it.
    fn undecided(&self, vm: &VmName) -> Option<Failure> {
        undecided(vm, &self.agent.host, self.moving.as_ref()?)
    }
}

fn undecided(vm: &VmName, host: &str, moving: &v1::DiskMove) -> Option<Failure> {
    let other = &moving.to;
    let (what, whose) = match (moving.end(), moving.asked) {
        (v1::DiskMoveEnd::Unspecified, true) => (
            format!(
                "moves from host '{host}' to host '{other}', and host '{host}' has not heard yet whether it was taken"
            ),
            host,
        ),
        (v1::DiskMoveEnd::Unsure, _) => (
            format!(
                "moved from host '{other}' to host '{host}', and host '{host}' has not heard yet whether it was taken back"
            ),
            host,
        ),
        _ => return None,
    };
    let failure = Failure::new(Exit::Unreachable, format!("the VM '{vm}' {what}"));
    Some(failure.advice(format!(
        "host '{whose}' asks until it hears, so see that both agents run and reach each other (treeboot vm list); should host '{other}' be gone \
         for good: treeboot migrate {vm} --take-back --gone {other} --host {whose}"
    )))
}

/// The agents that have a VM or a disk of this name. A host that does not answer is named, because the VM may be there.
pub(super) async fn whereabouts(
    coordinator: &Coordinator,
    options: &Options,
    vm: &VmName,
) -> Result<Vec<Part>, Failure> {
    let hosts: Vec<_> = coordinator
        .hosts()
        .await?
        .into_iter()
        .filter(|host| host.connected)
        .collect();
    let answers = parallel::each(hosts, PARALLEL_CALLS, |host| async move {
        let agent = Agent::connect(&host, options.timeout).await?;
        let (vms, disks) = (agent.vms().await?, agent.disks().await?);
        let disk = disks.into_iter().find(|disk| disk.vm == vm.as_str());
        let here = disk.is_some() || vms.iter().any(|found| found.name == vm.as_str());
        let moving = disk.and_then(|disk| disk.moving);
        Ok(here.then_some(Part { agent, moving }))
    })
    .await;
    let mut found = Vec::new();
    let mut silent: Option<Failure> = None;
    for answer in answers {
        match answer {
            Ok(part) => found.extend(part),
            Err(failure) => silent = Some(failure),
        }
    }
    match silent {
        Some(failure) if found.is_empty() => Err(failure),
        _ => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_two_hosts_have_for_a_move_is_explained() {
        let vm = VmName::new("web-1").expect("valid");
        let moving = |asked, end: v1::DiskMoveEnd| v1::DiskMove {
            to: "h2".into(),
            asked,
            end: end.into(),
        };
        for (asked, end, part) in [
            (
                true,
                v1::DiskMoveEnd::Unspecified,
                Some("from host 'h1' to host 'h2'"),
            ),
            (
                false,
                v1::DiskMoveEnd::Unsure,
                Some("from host 'h2' to host 'h1'"),
            ),
            (false, v1::DiskMoveEnd::Unspecified, None),
            (false, v1::DiskMoveEnd::Lost, None),
        ] {
            let failure = undecided(&vm, "h1", &moving(asked, end)).map(|failure| failure.to_string());
            assert_eq!(failure.is_some(), part.is_some(), "{failure:?}");
            if let (Some(failure), Some(part)) = (failure, part) {
                assert!(
                    failure.contains(part) && failure.contains("--take-back --gone h2 --host h1"),
                    "{failure}"
                );
            }
        }
    }
}

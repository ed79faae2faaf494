//! `vm create --count`: disks of many VMs by one call.

use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, VmName};

use super::{DiskWish, VmJson, agent_for_new};
use crate::client::{Coordinator, Options};
use crate::failure::{Exit, Failure};
use crate::output::{self, JsonFlag};

pub(super) async fn create(
    options: &Options,
    name: &VmName,
    count: u32,
    image: &ImageRef,
    wish: DiskWish,
    host: Option<HostName>,
    json: JsonFlag,
) -> Result<(), Failure> {
    let names = (1..=count).map(|number| format!("{name}-{number}"));
    let vms = names.map(|name| {
        VmName::new(&name)
            .map(|name| name.to_string())
            .map_err(|error| Failure::new(Exit::Usage, error.to_string()))
    });
    let vms = vms.collect::<Result<Vec<_>, _>>()?;
    let coordinator = Coordinator::connect(options).await?;
    let image = coordinator.image(image).await?.id;
    let agent = agent_for_new(&coordinator, options, host).await?;
    let doing = format!("create {count} VMs on host '{}'", agent.host);
    let request = v1::CreateManyRequest {
        vms,
        image,
        device: wish.device,
        limit_bytes: wish.delta_limit,
    };
    let answer = agent
        .call(&doing, agent.client.clone().create_many(request))
        .await?;
    let (made, failed): (Vec<_>, Vec<_>) = answer.created.into_iter().partition(|one| one.code == 0);
    let rows: Vec<VmJson> = made
        .into_iter()
        .map(|one| VmJson::of(&agent.host, None, one.disk))
        .collect();
    if json.json {
        output::print_json(&rows)?;
    } else {
        let lines = rows
            .iter()
            .map(|row| format!("  {}  {}\n", row.name, row.place()));
        output::print_text(&format!(
            "created {} of {count} VMs on host '{}'\n{}",
            rows.len(),
            agent.host,
            lines.collect::<String>()
        ))?;
    }
    match failed.first() {
        None => Ok(()),
        Some(first) => Err(Failure::new(
            if rows.is_empty() {
                Exit::Failed
            } else {
                Exit::Partly
            },
            format!(
                "{} of {count} VMs have no disk; the first, '{}': {}",
                failed.len(),
                first.vm,
                first.error
            ),
        )
        .advice("the same command again makes those that are missing")),
    }
}

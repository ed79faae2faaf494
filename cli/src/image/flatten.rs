//! `image flatten`: a version that shares blocks with another one gets all of them.

use std::time::Duration;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef};

use crate::client::{Coordinator, Options, incomplete};
use crate::failure::Failure;
use crate::follow::{Followed, follow};
use crate::output::{self, JsonFlag, Progress};
use crate::tree::id_words;

use super::origin_of;

/// How long a disk may be silent while it syncs.
const STALL_LIMIT: Duration = Duration::from_secs(600);

/// Give a published version a copy of all its blocks
///
/// It reads the same, also meanwhile; it only shares nothing with other versions any more.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  treeboot image flatten web@4")]
pub(crate) struct FlattenArgs {
    /// NAME or NAME@VERSION; without a version the newest
    image: ImageRef,
    /// The host whose store has it; may be left out where only one has
    #[arg(long, value_name = "HOST")]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct FlattenedJson {
    image: String,
    host: String,
    shared: bool,
    allocated_bytes: u64,
}

/// `image flatten`.
pub(super) async fn flatten(options: &Options, args: FlattenArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let agent = match &args.host {
        Some(host) => coordinator.agent(host).await?,
        None => origin_of(&coordinator, options, &args.image).await?,
    };
    let record = coordinator.image(&args.image).await?;
    let id = record.id.ok_or_else(|| incomplete(&agent.peer, "image"))?;
    let words = id_words(&id);
    let doing = format!("flatten {words} on host '{}'", agent.host);
    let request = v1::FlattenImageRequest { image: Some(id) };
    let stream = agent
        .call(&doing, agent.client.clone().flatten_image(request))
        .await?;
    let followed = Followed {
        peer: &agent.peer,
        doing: &doing,
        patience: options.timeout.max(STALL_LIMIT),
        advice: "see what its agent logs",
    };
    let result = follow(&followed, stream, Progress::of_bytes("copying", 0), |step| {
        (step.done_bytes, step.total_bytes, step.result)
    })
    .await?;
    let flattened = FlattenedJson {
        image: words,
        host: agent.host,
        shared: result.shared,
        allocated_bytes: result.allocated_bytes,
    };
    if args.json.json {
        return output::print_json(&flattened);
    }
    let FlattenedJson { image, host, .. } = &flattened;
    output::print_text(&match flattened.shared {
        true => format!(
            "{image} on host '{host}' stands by itself, {} stored\n",
            output::bytes(flattened.allocated_bytes)
        ),
        false => format!("{image} on host '{host}' shared nothing\n"),
    })
}

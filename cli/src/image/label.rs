//! `image label`: what is said of an image, and who may use it.

use std::collections::BTreeMap;

use treeboot_types::ImageName;

use crate::client::{Coordinator, Options};
use crate::failure::Failure;
use crate::output::{self, JsonFlag, printable};

/// Show, set or remove labels of an image
///
/// They are of its name, for all its versions, those to come too. Two of them say who may use it: 'hosts' names labels that a host
/// must have (tier=gold,zone=a|b; the key 'name' is the host's name), 'role' the least role that sees it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  treeboot image label debian hosts='tier=gold,zone=a|b' role=operator\n  treeboot image label debian --remove role"
)]
pub(crate) struct LabelArgs {
    /// NAME, without a version; the image need not be there yet
    image: ImageName,
    /// KEY=VALUE
    #[arg(value_parser = pair, value_name = "LABEL")]
    labels: Vec<(String, String)>,
    /// Remove the label of this key; may be given several times
    #[arg(long, value_name = "KEY")]
    remove: Vec<String>,
    #[command(flatten)]
    json: JsonFlag,
}

/// `KEY=VALUE`
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!(
            "'{text}' is no label; write KEY=VALUE, for instance role=operator"
        )),
    }
}

/// `image label`.
pub(super) async fn label(options: &Options, args: LabelArgs) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    let labels = coordinator
        .label_image(args.image.as_str(), &args.labels, &args.remove)
        .await?;
    if args.json.json {
        return output::print_json(&labels);
    }
    output::print_text(&render(&labels))
}

/// A line for each.
pub(super) fn render(labels: &BTreeMap<String, String>) -> String {
    if labels.is_empty() {
        return "no labels: every host and every role may use it\n".to_owned();
    }
    let line = |(key, value): (&String, &String)| format!("{}={}\n", printable(key), printable(value));
    labels.iter().map(line).collect()
}

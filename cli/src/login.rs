//! `treeboot login`: keeps a person's identity where every later command finds it.

use std::path::PathBuf;

use crate::client::{Coordinator, Options, identify, kept_identity, read_identity};
use crate::failure::{Exit, Failure, chain};
use crate::output;

/// Keep an identity that an administrator made, for all later commands; asks the coordinator whether it is good
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  treeboot login alice.pem --coordinator https://10.0.0.1:7400")]
pub(crate) struct LoginArgs {
    /// The file of 'treeboot-coordinator user create NAME --role ROLE'
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// # Errors
/// The file is no identity, the coordinator does not take it, or it cannot be kept.
pub(crate) async fn run(options: &Options, args: LoginArgs) -> Result<(), Failure> {
    let credentials = read_identity(&args.file)?.ok_or_else(|| {
        Failure::new(
            Exit::NotFound,
            format!("there is no file {}", args.file.display()),
        )
    })?;
    let options = Options {
        identity: Some(args.file),
        insecure: false,
        ..options.clone()
    };
    identify(&options)?;
    // Asked with it, before it is kept: a wrong one would stand in the way of every later command.
    Coordinator::connect(&options).await?.images().await?;
    let place = kept_identity()?;
    credentials
        .save(&place)
        .map_err(|error| Failure::new(Exit::Failed, chain(&error)))?;
    output::print_text(&format!(
        "{} is logged in; the identity is kept in {}\n",
        credentials.certified().who,
        place.display()
    ))
}

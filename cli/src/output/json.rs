//! `--json`.

use serde::Serialize;

use crate::failure::{Exit, Failure};

/// The option of every verb that lists something.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct JsonFlag {
    /// Print JSON for scripts instead of a table; the fields are described in docs/cli.md
    #[arg(long)]
    pub(crate) json: bool,
}

/// Prints `value` on standard output.
///
/// # Errors
/// Standard output does not take it.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot write the result as JSON: {error}")))?;
    print_text(&(text + "\n"))
}

/// Prints `text` on standard output. A reader that went away (`| head`) is no failure.
///
/// # Errors
/// Standard output does not take it.
pub(crate) fn print_text(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::io("cannot write to standard output", &error))
        }
        _ => Ok(()),
    }
}

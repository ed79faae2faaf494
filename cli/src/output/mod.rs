//! How results look: tables for people, JSON for scripts, sizes and durations in words.
//!
//! The names of JSON fields are an interface and stand in `docs/cli.md`. Deliberately absent: colours.

mod json;
mod progress;
mod table;
mod words;

pub(crate) use json::{JsonFlag, print_json, print_text};
pub(crate) use progress::Progress;
pub(crate) use table::{Align, Table};
pub(crate) use words::{bytes, duration, natural, parse_duration, plural, printable};

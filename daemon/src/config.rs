//! A configuration file in TOML: each key is the long name of an option. What the command line says goes before what the environment
//! says, that before the file, and that before the default.
//!
//! The file becomes arguments in front of those that were given, so that clap alone reads values, and one error text serves all.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::Value;

/// What clap ends with too: no valid command line.
const WRONG: u8 = 2;

/// The option that names the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigFile {
    /// Options in a TOML file, each under its long name: `beat-ms = 500`. A flag or a variable of the environment goes before it.
    #[arg(long, env = "TREEBOOT_CONFIG", value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
}

/// Words about the configuration file.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum ConfigCommand {
    /// Reads file, environment and flags as a start would, and says what holds; ends with an error where a start would.
    Check {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML.
    #[error("{} is not TOML", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where, and what was expected.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// No option has this name.
    #[error("{}: there is no option '{key}'; {near}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// As it stands there.
        key: String,
        /// The nearest names.
        near: String,
    },
    /// A value that no option can have.
    #[error("{}: '{key}' {what}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Of which option.
        key: String,
        /// What is wrong.
        what: String,
    },
}

/// A command line with the file's part in it.
#[derive(Debug)]
pub struct Read<T> {
    /// The options.
    pub options: T,
    /// Each option that has a value, where it came from, and the value.
    pub settings: Vec<Setting>,
}

/// One option's value, and who gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The option's long name.
    pub key: String,
    /// `flag`, `environment`, `file` or `default`.
    pub from: &'static str,
    /// As text; several, where the option takes several.
    pub values: Vec<String>,
}

/// Reads the process's own command line, its environment and the file that they name.
///
/// # Errors
/// The exit code to end with, where one of them is wrong or help was asked for; the person has been told.
pub fn parse<T: CommandFactory + FromArgMatches>() -> Result<Read<T>, ExitCode> {
    read(std::env::args_os().collect()).map_err(|failure| match failure {
        Failure::Clap(error) => {
            // A terminal that is gone has nobody to tell.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(WRONG))
        }
        Failure::File(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("error: {error}{}", cause.unwrap_or_default());
            ExitCode::from(WRONG)
        }
    })
}

/// Why a command line was not read.
#[derive(Debug)]
pub enum Failure {
    /// What clap says; its text is for the person as it is.
    Clap(clap::Error),
    /// The file.
    File(ConfigError),
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Clap(error)
    }
}

/// As [`parse`], from arguments of the caller's, the program's name first.
///
/// # Errors
/// [`Failure`]; also where help was asked for.
pub fn read<T: CommandFactory + FromArgMatches>(mut arguments: Vec<OsString>) -> Result<Read<T>, Failure> {
    let mut command = T::command();
    command.build();
    // Only to see what was given; what is missing may stand in the file.
    let given = command
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(&arguments)?;
    let file = match given.try_get_one::<PathBuf>("config") {
        Ok(Some(path)) => File::read(path, &command, &given).map_err(Failure::File)?,
        Ok(None) | Err(_) => File::default(),
    };
    let at = arguments.len().min(1);
    arguments.splice(at..at, file.arguments.iter().cloned());
    let matches = command
        .clone()
        .try_get_matches_from(&arguments)
        .map_err(|error| file.explain(&error).unwrap_or(error))?;
    let options = T::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    Ok(Read {
        options,
        settings: settings(&command, &matches, &file),
    })
}

/// What a file adds to the command line.
#[derive(Debug, Default)]
struct File {
    path: PathBuf,
    keys: Vec<String>,
    arguments: Vec<OsString>,
}

impl File {
    fn read(path: &Path, command: &Command, given: &ArgMatches) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let table: toml::Table = text.parse().map_err(|source| ConfigError::Syntax {
            path: path.into(),
            source: Box::new(source),
        })?;
        let mut file = Self {
            path: path.into(),
            ..Self::default()
        };
        for (key, value) in &table {
            file.add(command, given, key, value)?;
        }
        Ok(file)
    }

    fn add(
        &mut self,
        command: &Command,
        given: &ArgMatches,
        key: &str,
        value: &Value,
    ) -> Result<(), ConfigError> {
        let option = options(command).find(|option| option.get_long() == Some(key));
        let Some(option) = option else {
            return Err(ConfigError::UnknownKey {
                path: self.path.clone(),
                key: key.into(),
                near: near(command, key),
            });
        };
        let wrong = |what: &str| ConfigError::Value {
            path: self.path.clone(),
            key: key.into(),
            what: what.into(),
        };
        let is_flag = !option.get_action().takes_values();
        let takes_several =
            matches!(option.get_action(), ArgAction::Append) || option.get_value_delimiter().is_some();
        let values = match value {
            Value::Boolean(true) if is_flag => vec![None],
            Value::Boolean(false) if is_flag => Vec::new(),
            _ if is_flag => return Err(wrong("is true or false")),
            Value::Array(items) if takes_several => items
                .iter()
                .map(|item| {
                    text(item)
                        .map(Some)
                        .ok_or_else(|| wrong("is a list of texts and numbers"))
                })
                .collect::<Result<_, _>>()?,
            Value::Table(items) if takes_several => items
                .iter()
                .map(|(name, item)| {
                    let item = text(item).ok_or_else(|| wrong("is a table of texts and numbers"))?;
                    Ok(Some(format!("{name}={item}")))
                })
                .collect::<Result<_, _>>()?,
            Value::Array(_) | Value::Table(_) => return Err(wrong("takes one value")),
            value => vec![Some(
                text(value).ok_or_else(|| wrong("is a text, a number, true or false"))?,
            )],
        };
        let source = given.value_source(option.get_id().as_str());
        if matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            return Ok(());
        }
        self.keys.push(key.into());
        for value in values {
            self.arguments.push(match value {
                None => format!("--{key}").into(),
                // One argument, so that a value that begins with a hyphen is a value.
                Some(value) => format!("--{key}={value}").into(),
            });
        }
        Ok(())
    }

    /// Says that a value stands in the file, where it does.
    fn explain(&self, error: &clap::Error) -> Option<clap::Error> {
        use clap::error::{ContextKind, ContextValue};
        let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
            return None;
        };
        let key = self
            .keys
            .iter()
            .find(|key| argument.split([' ', '=']).next() == Some(&format!("--{key}")))?;
        let text = format!("{}\n'{key}' stands in {}\n", error.render(), self.path.display());
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        Some(clap::Error::raw(error.kind(), text))
    }
}

/// The options that a file may hold.
fn options(command: &Command) -> impl Iterator<Item = &clap::Arg> {
    command
        .get_arguments()
        .filter(|option| !matches!(option.get_long(), None | Some("config" | "help" | "version")))
}

fn near(command: &Command, key: &str) -> String {
    let names: Vec<&str> = options(command).filter_map(clap::Arg::get_long).collect();
    // The name with the most pairs of neighbouring letters in common.
    let pairs = |name: &str| -> Vec<(char, char)> { name.chars().zip(name.chars().skip(1)).collect() };
    let (wanted, mut best) = (pairs(&key.replace('_', "-")), (0, ""));
    for name in &names {
        let common = pairs(name).iter().filter(|pair| wanted.contains(pair)).count();
        if common > best.0 {
            best = (common, *name);
        }
    }
    match best {
        (common, name) if common * 2 > wanted.len() => format!("did you mean '{name}'?"),
        _ => format!("there are: {}", names.join(", ")),
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

fn settings(command: &Command, matches: &ArgMatches, file: &File) -> Vec<Setting> {
    let mut settings: Vec<Setting> = options(command)
        .filter_map(|option| {
            let (id, key) = (option.get_id().as_str(), option.get_long()?);
            let from = match matches.value_source(id)? {
                _ if file.keys.iter().any(|of_file| of_file == key) => "file",
                ValueSource::CommandLine => "flag",
                ValueSource::EnvVariable => "environment",
                _ => "default",
            };
            let values = matches.get_raw(id)?;
            let values = if option.is_hide_env_values_set() {
                vec!["(not shown)".to_owned()]
            } else {
                values.map(|value| value.to_string_lossy().into_owned()).collect()
            };
            Some(Setting {
                key: key.into(),
                from,
                values,
            })
        })
        .collect();
    settings.sort_by(|a, b| a.key.cmp(&b.key));
    settings
}

/// What `config check` prints: a line an option, or JSON.
pub fn show(settings: &[Setting], json: bool) -> String {
    if json {
        let list: Vec<_> = settings
            .iter()
            .map(|setting| serde_json::json!({"key": setting.key, "from": setting.from, "values": setting.values}))
            .collect();
        return serde_json::json!({ "settings": list }).to_string();
    }
    let width = settings
        .iter()
        .map(|setting| setting.key.len())
        .max()
        .unwrap_or(0);
    let lines = settings.iter().map(|setting| {
        format!(
            "{:width$}  {:11}  {}",
            setting.key,
            setting.from,
            setting.values.join(", ")
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;

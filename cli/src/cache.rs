//! `treeboot cache …`: what hosts cache, and where.

use std::path::PathBuf;

use serde::Serialize;
use treeboot_proto::v1;
use treeboot_types::{HostName, ImageRef, parse_size};

use crate::client::{Agent, Coordinator, Options, host_name};
use crate::failure::{Exit, Failure};
use crate::output::{self, Align, JsonFlag, Table, printable};
use crate::tree::id_words;

/// Verbs on hosts' caches.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum CacheVerb {
    /// Show the directories of hosts' caches, and what they hold of which image
    #[command(
        after_help = "Example:\n  treeboot cache show\n  treeboot cache show --host host-1 --json | jq .[].hits"
    )]
    Show {
        /// This host only
        #[arg(long)]
        host: Option<HostName>,
        #[command(flatten)]
        json: JsonFlag,
    },
    /// Let a host cache in one more directory, while its VMs go on
    #[command(after_help = "Example:\n  treeboot cache add --host host-1 /mnt/nvme1/treeboot=200G")]
    Add {
        /// An absolute path on the host, and how much the cache may have of it; without a size: all the room that there is
        #[arg(value_name = "DIR[=SIZE]", value_parser = member)]
        member: (PathBuf, u64),
        #[command(flatten)]
        on: On,
    },
    /// Take a directory from a host's cache, while its VMs go on; what was in it is fetched again as it is read
    #[command(after_help = "Example:\n  treeboot cache remove --host host-1 /mnt/nvme1/treeboot")]
    Remove {
        /// The directory
        directory: PathBuf,
        /// Leave the files, to add the directory again
        #[arg(long)]
        keep_files: bool,
        #[command(flatten)]
        on: On,
    },
    /// Keep what a host caches of an image: none of it goes for others
    ///
    /// What is not there yet is not fetched for this; it stays once it was read.
    #[command(after_help = "Example:\n  treeboot cache pin --host host-1 debian")]
    Pin {
        /// NAME, NAME@VERSION, or eight or more digits of the digest
        image: String,
        #[command(flatten)]
        on: On,
    },
    /// Keep it no longer
    #[command(after_help = "Example:\n  treeboot cache unpin --host host-1 debian")]
    Unpin {
        /// NAME, NAME@VERSION, or eight or more digits of the digest
        image: String,
        #[command(flatten)]
        on: On,
    },
    /// Give up what a host caches of an image; in use, it is fetched again as it is read
    #[command(after_help = "Example:\n  treeboot cache drop --host host-1 debian@3")]
    Drop {
        /// NAME, NAME@VERSION, or eight or more digits of the digest
        image: String,
        #[command(flatten)]
        on: On,
    },
}

/// On which host.
#[derive(Debug, clap::Args)]
pub(crate) struct On {
    /// The host; where there is only one it may be left out
    #[arg(long)]
    host: Option<HostName>,
    #[command(flatten)]
    json: JsonFlag,
}

fn member(text: &str) -> Result<(PathBuf, u64), String> {
    let (path, budget) = match text.rsplit_once('=') {
        Some((path, budget)) => (path, parse_size(budget)?),
        None => (text, 0),
    };
    match path.starts_with('/') {
        true => Ok((path.into(), budget)),
        false => Err("give an absolute path on the host, for instance /mnt/nvme1/treeboot=200G".into()),
    }
}

#[derive(Debug, Serialize)]
struct CacheJson {
    host: String,
    members: Vec<MemberJson>,
    images: Vec<CachedJson>,
    hits: u64,
    misses: u64,
    evictions: u64,
    evicted_bytes: u64,
}

/// A directory of a cache group in `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct MemberJson {
    directory: String,
    /// `null`: all the room that there is.
    budget_bytes: Option<u64>,
    used_bytes: u64,
    /// working, full or failed.
    state: &'static str,
    why: Option<String>,
    hits: u64,
}

impl From<v1::CacheMember> for MemberJson {
    fn from(member: v1::CacheMember) -> Self {
        Self {
            state: match member.state() {
                v1::CacheMemberState::Failed => "failed",
                v1::CacheMemberState::Full => "full",
                v1::CacheMemberState::Working | v1::CacheMemberState::Unspecified => "working",
            },
            directory: member.directory,
            budget_bytes: (member.budget_bytes > 0).then_some(member.budget_bytes),
            used_bytes: member.used_bytes,
            why: (!member.why.is_empty()).then_some(member.why),
            hits: member.hits,
        }
    }
}

impl MemberJson {
    /// A line where something is wrong.
    pub(crate) fn alarm(&self) -> String {
        let directory = printable(&self.directory);
        match (self.state, &self.why) {
            ("failed", why) => format!(
                "CACHE DIRECTORY DROPPED: {directory}: {}; its content is fetched again\n",
                printable(why.as_deref().unwrap_or_default())
            ),
            ("full", _) => format!("the file system of the cache directory {directory} is full\n"),
            _ => String::new(),
        }
    }
}

#[derive(Debug, Serialize)]
struct CachedJson {
    digest: String,
    images: Vec<String>,
    bytes: u64,
    cached_bytes: u64,
    pinned: bool,
    used: bool,
    /// `null`: not known.
    last_use_unix_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct DroppedJson {
    host: String,
    dropped_bytes: u64,
}

impl CacheJson {
    fn of(host: &str, report: v1::CacheReport) -> Self {
        let images = report.images.into_iter().map(|image| CachedJson {
            digest: image.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            images: image.images.iter().map(id_words).collect(),
            bytes: image.bytes,
            cached_bytes: image.cached_bytes,
            pinned: image.pinned,
            used: image.used,
            last_use_unix_ms: (image.last_use_unix_ms > 0).then_some(image.last_use_unix_ms),
        });
        Self {
            host: host.to_owned(),
            images: images.collect(),
            members: report.members.into_iter().map(MemberJson::from).collect(),
            hits: report.hits,
            misses: report.misses,
            evictions: report.evictions,
            evicted_bytes: report.evicted_bytes,
        }
    }

    fn render(&self) -> String {
        let mut text = format!(
            "{}  {} hits, {} misses, {} evicted\n",
            printable(&self.host),
            self.hits,
            self.misses,
            output::bytes(self.evicted_bytes)
        );
        let mut table = Table::new(&[
            ("DIRECTORY", Align::Left),
            ("USED", Align::Right),
            ("BUDGET", Align::Right),
            ("STATE", Align::Left),
            ("HITS", Align::Right),
        ]);
        for member in &self.members {
            table.row([
                printable(&member.directory),
                output::bytes(member.used_bytes),
                member.budget_bytes.map_or_else(|| "-".into(), output::bytes),
                member.state.to_owned(),
                member.hits.to_string(),
            ]);
        }
        text += &table.render();
        self.members.iter().for_each(|member| text += &member.alarm());
        if self.images.is_empty() {
            return text;
        }
        let mut table = Table::new(&[
            ("IMAGE", Align::Left),
            ("DIGEST", Align::Left),
            ("CACHED", Align::Right),
            ("SIZE", Align::Right),
            ("", Align::Left),
        ]);
        for image in &self.images {
            table.row([
                match image.images.is_empty() {
                    true => "-".into(),
                    false => printable(&image.images.join(" ")),
                },
                image.digest.chars().take(12).collect(),
                output::bytes(image.cached_bytes),
                output::bytes(image.bytes),
                match (image.pinned, image.used) {
                    (true, true) => "pinned, in use",
                    (true, false) => "pinned",
                    (false, true) => "in use",
                    (false, false) => "",
                }
                .to_owned(),
            ]);
        }
        text + &table.render()
    }
}

/// Runs a verb.
pub(crate) async fn run(options: &Options, verb: CacheVerb) -> Result<(), Failure> {
    let coordinator = Coordinator::connect(options).await?;
    match verb {
        CacheVerb::Show { host, json } => show(&coordinator, options, host, json).await,
        CacheVerb::Add {
            member: (directory, budget_bytes),
            on,
        } => {
            let add = v1::AddCacheMember {
                directory: directory.display().to_string(),
                budget_bytes,
            };
            change(
                &coordinator,
                options,
                on,
                v1::change_cache_request::Change::Add(add),
            )
            .await
        }
        CacheVerb::Remove {
            directory,
            keep_files,
            on,
        } => {
            let remove = v1::RemoveCacheMember {
                directory: directory.display().to_string(),
                keep_files,
            };
            change(
                &coordinator,
                options,
                on,
                v1::change_cache_request::Change::Remove(remove),
            )
            .await
        }
        CacheVerb::Pin { image, on } => pin(&coordinator, options, on, &image, false).await,
        CacheVerb::Unpin { image, on } => pin(&coordinator, options, on, &image, true).await,
        CacheVerb::Drop { image, on } => {
            let agent = one(&coordinator, options, on.host).await?;
            let doing = format!("drop what host '{}' caches of {image}", agent.host);
            let (image, digest) = named(&image)?;
            let request = v1::DropCachedRequest { image, digest };
            let answer = agent
                .call(&doing, agent.client.clone().drop_cached(request))
                .await?;
            match on.json.json {
                true => output::print_json(&DroppedJson {
                    host: agent.host.clone(),
                    dropped_bytes: answer.dropped_bytes,
                }),
                false => output::print_text(&format!("dropped {}\n", output::bytes(answer.dropped_bytes))),
            }
        }
    }
}

/// An image by its name, or by the beginning of its digest.
fn named(text: &str) -> Result<(Option<v1::ImageId>, String), Failure> {
    if text.len() >= 8 && text.chars().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok((None, text.to_owned()));
    }
    let image: ImageRef = text
        .parse()
        .map_err(|error| Failure::new(Exit::Usage, format!("'{text}' names no image: {error}")))?;
    Ok((Some((&image).into()), String::new()))
}

async fn one(coordinator: &Coordinator, options: &Options, host: Option<HostName>) -> Result<Agent, Failure> {
    let record = match host {
        Some(host) => coordinator.host(&host).await?,
        None => match &coordinator.hosts().await?[..] {
            [only] => only.clone(),
            hosts => {
                return Err(Failure::new(
                    Exit::Usage,
                    format!("there are {} hosts; name one with --host", hosts.len()),
                ));
            }
        },
    };
    Agent::connect(&record, options.timeout).await
}

async fn show(
    coordinator: &Coordinator,
    options: &Options,
    host: Option<HostName>,
    json: JsonFlag,
) -> Result<(), Failure> {
    let hosts = match &host {
        Some(host) => vec![coordinator.host(host).await?],
        None => coordinator.hosts().await?,
    };
    let (mut reports, mut failures) = (vec![], vec![]);
    for record in &hosts {
        match ask(options, record).await {
            Ok(report) => reports.push(CacheJson::of(host_name(record), report)),
            Err(failure) if host.is_some() => return Err(failure),
            Err(failure) => failures.push(failure),
        }
    }
    match json.json {
        true => output::print_json(&reports)?,
        false => output::print_text(
            &reports
                .iter()
                .map(CacheJson::render)
                .collect::<Vec<_>>()
                .join("\n"),
        )?,
    }
    match failures.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(Failure::new(
            Exit::Partly,
            format!("not every host could be asked: {first}"),
        )),
    }
}

async fn ask(options: &Options, record: &v1::HostRecord) -> Result<v1::CacheReport, Failure> {
    let agent = Agent::connect(record, options.timeout).await?;
    let doing = format!("look at the cache of host '{}'", agent.host);
    let request = v1::ShowCacheRequest {};
    agent.call(&doing, agent.client.clone().show_cache(request)).await
}

async fn change(
    coordinator: &Coordinator,
    options: &Options,
    on: On,
    change: v1::change_cache_request::Change,
) -> Result<(), Failure> {
    let agent = one(coordinator, options, on.host).await?;
    let doing = format!("change the cache of host '{}'", agent.host);
    let request = v1::ChangeCacheRequest { change: Some(change) };
    let report = agent
        .call(&doing, agent.client.clone().change_cache(request))
        .await?;
    print(&agent, report, on.json)
}

async fn pin(
    coordinator: &Coordinator,
    options: &Options,
    on: On,
    image: &str,
    unpin: bool,
) -> Result<(), Failure> {
    let agent = one(coordinator, options, on.host).await?;
    let verb = if unpin { "unpin" } else { "pin" };
    let doing = format!("{verb} {image} in the cache of host '{}'", agent.host);
    let (image, digest) = named(image)?;
    let request = v1::PinCachedRequest { image, digest, unpin };
    let report = agent
        .call(&doing, agent.client.clone().pin_cached(request))
        .await?;
    print(&agent, report, on.json)
}

fn print(agent: &Agent, report: v1::CacheReport, json: JsonFlag) -> Result<(), Failure> {
    let report = CacheJson::of(&agent.host, report);
    match json.json {
        true => output::print_json(&report),
        false => output::print_text(&report.render()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_an_absolute_path_and_perhaps_a_size() {
        for (text, expected) in [
            ("/mnt/a", Some(("/mnt/a", 0))),
            ("/mnt/a=20G", Some(("/mnt/a", 20 << 30))),
            ("/mnt/a=", None),
            ("/mnt/a=much", None),
            ("a=20G", None),
            ("=20G", None),
        ] {
            let expected = expected.map(|(path, budget): (&str, u64)| (PathBuf::from(path), budget));
            assert_eq!(member(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn an_image_is_named_by_name_or_digest() {
        assert_eq!(named("0123abcd").unwrap(), (None, "0123abcd".to_owned()));
        let (image, digest) = named("debian@3").unwrap();
        assert!(digest.is_empty() && image.is_some_and(|image| image.version == 3));
        assert_eq!(named("no/name").unwrap_err().exit, Exit::Usage);
    }
}

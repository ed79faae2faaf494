//! `treeboot tree IMAGE --watch`: on a terminal the drawing is made anew at each change, cut to what the terminal shows; elsewhere, and in
//! JSON, each change is a line.
//!
//! The tree is asked for, not subscribed to: a question of half a second's distance costs the coordinator little, and survives its restart.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use serde::Serialize;
use treeboot_proto::v1;

use super::{EpochJson, NodeJson, TreeArgs, draw, title};
use crate::client::Coordinator;
use crate::failure::{Exit, Failure};
use crate::output;
use crate::signals::Signals;

/// Between two questions.
const PERIOD: Duration = Duration::from_millis(500);
/// An answer that takes long is a large tree: the coordinator gets at least this many times as long for others.
const REST: u32 = 9;
/// Taken for the terminal's size where it tells none.
const SIZE: (usize, usize) = (80, 24);

/// Follows the tree until a signal, which is its orderly end.
pub(super) async fn run(coordinator: &Coordinator, args: &TreeArgs) -> Result<(), Failure> {
    let mut signals = Signals::catch()?;
    tokio::select! {
        done = follow(coordinator, args) => done,
        _ = signals.next() => Ok(()),
    }
}

async fn follow(coordinator: &Coordinator, args: &TreeArgs) -> Result<(), Failure> {
    // Whoever asks for an image that is not there, or for a coordinator, is told at once.
    let mut tree = coordinator.tree(&args.image).await?;
    let mut face = Face::new(args)?;
    let mut before = Vec::new();
    let mut trouble: Option<String> = None;
    loop {
        if face.show(args, &before, &tree, trouble.as_deref())?.is_gone() {
            return Ok(());
        }
        before = tree.nodes.clone();
        let asked = Instant::now();
        trouble = match coordinator.tree(&args.image).await {
            Ok(now) => {
                tree = now;
                None
            }
            Err(failure) if matches!(failure.exit, Exit::Unreachable | Exit::TimedOut) => {
                if trouble.is_none() {
                    face.note(&failure.what);
                }
                Some(failure.what)
            }
            Err(failure) => return Err(failure),
        };
        tokio::time::sleep(PERIOD.max(asked.elapsed() * REST)).await;
    }
}

/// Whether anybody still reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    There,
    Gone,
}

impl Reader {
    fn is_gone(self) -> bool {
        self == Self::Gone
    }
}

/// How the tree is shown.
enum Face {
    /// Drawn anew; the last drawing is kept, so that what has not changed is not sent again.
    Screen(Screen, String),
    /// The first time whole, then a line for each change.
    Lines { first: bool },
    /// A line for each change, beginning with all that there is.
    Json,
}

impl Face {
    fn new(args: &TreeArgs) -> Result<Self, Failure> {
        if args.json.json {
            return Ok(Self::Json);
        }
        if io::stdout().is_terminal() {
            return Ok(Self::Screen(Screen::open()?, String::new()));
        }
        Ok(Self::Lines { first: true })
    }

    fn show(
        &mut self,
        args: &TreeArgs,
        before: &[v1::TreeNode],
        tree: &v1::GetTreeResponse,
        trouble: Option<&str>,
    ) -> Result<Reader, Failure> {
        match self {
            Self::Screen(screen, drawn) => {
                let words = trouble.map_or_else(
                    || title(&args.image, tree),
                    |why| format!("{why}; trying again\n"),
                );
                let text = words + &fitted(&tree.nodes, args.depth, screen.size());
                if text == *drawn {
                    return Ok(Reader::There);
                }
                *drawn = text;
                screen.draw(drawn)
            }
            Self::Lines { first: true } => {
                *self = Self::Lines { first: false };
                write(&(title(&args.image, tree) + &draw::draw(&tree.nodes, args.depth)))
            }
            Self::Lines { first: false } => {
                let changes = changes(before, &tree.nodes);
                write(
                    &changes
                        .iter()
                        .map(|change| format!("{change}\n"))
                        .collect::<String>(),
                )
            }
            Self::Json => {
                let mut lines = String::new();
                for change in changes(before, &tree.nodes) {
                    let line = ChangeJson {
                        epoch: tree.epoch.into(),
                        change: &change,
                    };
                    let line = serde_json::to_string(&line).map_err(|error| {
                        Failure::new(Exit::Failed, format!("cannot write a change as JSON: {error}"))
                    })?;
                    lines += &(line + "\n");
                }
                write(&lines)
            }
        }
    }

    /// A word that is no part of the result.
    fn note(&self, words: &str) {
        if !matches!(self, Self::Screen(..)) {
            eprintln!("treeboot: {words}\n  trying again until Ctrl-C");
        }
    }
}

/// What became of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Change {
    stripe: u32,
    host: String,
    change: &'static str,
    before: Option<NodeJson>,
    now: Option<NodeJson>,
}

#[derive(Serialize)]
struct ChangeJson<'a> {
    epoch: EpochJson,
    #[serde(flatten)]
    change: &'a Change,
}

/// What differs, by stripe and name. The time that a lease still has is no change.
fn changes(before: &[v1::TreeNode], now: &[v1::TreeNode]) -> Vec<Change> {
    type Nodes<'a> = BTreeMap<(u32, &'a str), &'a v1::TreeNode>;
    fn named(nodes: &[v1::TreeNode]) -> Nodes<'_> {
        nodes
            .iter()
            .map(|node| ((node.stripe, super::name(node)), node))
            .collect()
    }
    let (before, now) = (named(before), named(now));
    let mut keys: Vec<(u32, &str)> = before.keys().chain(now.keys()).copied().collect();
    keys.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| output::natural(a.1, b.1)));
    keys.dedup();
    let lasting = |node: &&v1::TreeNode| NodeJson {
        lease_left_ms: 0,
        ..NodeJson::from(*node)
    };
    let changes = keys.into_iter().filter_map(|key| {
        let (was, is) = (before.get(&key), now.get(&key));
        let change = match (was, is) {
            (None, _) => "came",
            (_, None) => "gone",
            (Some(was), Some(is)) if lasting(was) == lasting(is) => return None,
            _ => "changed",
        };
        Some(Change {
            stripe: key.0,
            host: key.1.to_owned(),
            change,
            before: was.map(|node| (*node).into()),
            now: is.map(|node| (*node).into()),
        })
    });
    changes.collect()
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parents = |node: &NodeJson| match node.parents.as_slice() {
            [] => "nobody".to_owned(),
            parents => output::printable(&parents.join(", ")),
        };
        let place = |node: &NodeJson| {
            let label =
                |key: &str, value: &Option<String>| value.as_ref().map(|value| format!("{key} {value}"));
            let labels: Vec<String> = label("zone", &node.zone)
                .into_iter()
                .chain(label("rack", &node.rack))
                .collect();
            if labels.is_empty() {
                "no rack".to_owned()
            } else {
                output::printable(&labels.join(", "))
            }
        };
        write!(f, "stripe {}  {}  ", self.stripe, output::printable(&self.host))?;
        let (was, is) = match (&self.before, &self.now) {
            (Some(was), Some(is)) => (was, is),
            (None, Some(is)) if is.origin => return write!(f, "came, {}", is.state),
            (None, Some(is)) => return write!(f, "came, {}, under {}", is.state, parents(is)),
            (Some(was), None) => return write!(f, "gone, was {}", was.state),
            (None, None) => return Ok(()),
        };
        let mut words = Vec::new();
        let mut differs = |what: &str, before: String, now: String| {
            if before != now {
                words.push(format!("{what}{before} → {now}"));
            }
        };
        differs("", was.state.into(), is.state.into());
        differs("under ", parents(was), parents(is));
        differs("depth ", was.depth.to_string(), is.depth.to_string());
        differs("children ", was.children.to_string(), is.children.to_string());
        differs("", place(was), place(is));
        differs("weight ", was.weight.to_string(), is.weight.to_string());
        differs("at ", was.portal.clone(), is.portal.clone());
        f.write_str(&words.join("; "))
    }
}

/// A drawing that a terminal of this size shows whole: of as many levels as there is room for.
fn fitted(nodes: &[v1::TreeNode], levels: Option<usize>, (columns, rows): (usize, usize)) -> String {
    // The title, and the line on which the cursor stays.
    let room = rows.saturating_sub(2).max(1);
    let text = match levels {
        Some(levels) => draw::draw(nodes, Some(levels)),
        None => {
            let whole = draw::draw(nodes, None);
            let fits = |text: &String| text.lines().count() <= room;
            let fewer = (0..draw::deepest(nodes))
                .rev()
                .map(|levels| draw::draw(nodes, Some(levels)));
            std::iter::once(whole.clone())
                .chain(fewer)
                .find(fits)
                .unwrap_or(whole)
        }
    };
    let cut = |line: &str| line.chars().take(columns).collect::<String>() + "\n";
    let count = text.lines().count();
    if count <= room {
        return text.lines().map(cut).collect();
    }
    let shown = text.lines().take(room - 1).map(cut).collect::<String>();
    format!("{shown}… {} more lines\n", count - (room - 1))
}

/// The terminal's other screen: what was there before is there again at the end, whichever that is.
struct Screen;

impl Screen {
    fn open() -> Result<Self, Failure> {
        // The other screen, without a cursor.
        write("\x1b[?1049h\x1b[?25l")?;
        Ok(Self)
    }

    fn size(&self) -> (usize, usize) {
        terminal_size::terminal_size_of(io::stdout()).map_or(SIZE, |(width, height)| {
            (usize::from(width.0), usize::from(height.0))
        })
    }

    /// Over the old drawing, each line's rest and what is below wiped, so that nothing flickers.
    fn draw(&self, text: &str) -> Result<Reader, Failure> {
        let lines: String = text.lines().map(|line| format!("{line}\x1b[K\r\n")).collect();
        write(&format!("\x1b[H{lines}\x1b[J"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody to tell when the terminal is gone.
        let _ = write("\x1b[?25h\x1b[?1049l");
    }
}

fn write(text: &str) -> Result<Reader, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failure::io("cannot write to standard output", &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(stripe: u32, host: &str, parent: &str) -> v1::TreeNode {
        v1::TreeNode {
            stripe,
            host: host.into(),
            portal: "10.0.0.1:3260".into(),
            origin: parent.is_empty(),
            depth: u32::from(!parent.is_empty()),
            state: v1::AttachState::Ready.into(),
            connected: true,
            parents: Vec::from_iter((!parent.is_empty()).then(|| parent.to_owned())),
            lease_left_ms: 900,
            ..Default::default()
        }
    }

    fn said(before: &[v1::TreeNode], now: &[v1::TreeNode]) -> Vec<String> {
        changes(before, now).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_changes_is_said_once_for_each_host_and_stripe_and_a_lease_that_runs_is_no_change() {
        let before = [
            node(0, "o", ""),
            node(0, "h2", "o"),
            node(0, "h10", "o"),
            node(1, "h2", "o"),
        ];
        assert_eq!(
            said(&[], &before[..2]),
            ["stripe 0  h2  came, ready, under o", "stripe 0  o  came, origin"]
        );
        let mut now = before.clone();
        now.iter_mut().for_each(|node| node.lease_left_ms = 100);
        assert_eq!(said(&before, &now), [""; 0]);
        now[1].connected = false;
        now[2].parents = vec!["h2".into()];
        now[2].depth = 2;
        now[3].rack = "r1".into();
        assert_eq!(
            said(&before, &now),
            [
                "stripe 0  h2  ready → lost",
                "stripe 0  h10  under o → h2; depth 1 → 2",
                "stripe 1  h2  no rack → rack r1"
            ]
        );
        assert_eq!(said(&before, &before[..3]), ["stripe 1  h2  gone, was ready"]);
    }

    #[test]
    fn a_drawing_takes_as_many_levels_as_the_terminal_has_lines_for() {
        let mut nodes = vec![node(0, "o", "")];
        for number in 1..200 {
            let parent = if number < 3 {
                "o".to_owned()
            } else {
                format!("h{}", (number - 1) / 2)
            };
            let depth = usize::ilog2(number + 1);
            nodes.push(v1::TreeNode {
                depth,
                ..node(0, &format!("h{number}"), &parent)
            });
        }
        assert_eq!(fitted(&nodes, None, (80, 400)).lines().count(), 201);
        for (columns, rows) in [(80, 24), (80, 50), (30, 100), (10, 5), (80, 2), (1, 1)] {
            let text = fitted(&nodes, None, (columns, rows));
            assert!(
                text.lines().count() <= rows.saturating_sub(2).max(1),
                "{rows}: {text}"
            );
            if columns > 20 {
                assert!(
                    text.lines().all(|line| line.chars().count() <= columns),
                    "{columns}: {text}"
                );
            }
        }
        let text = fitted(&nodes, None, (80, 24));
        assert!(
            text.starts_with("199 hosts, 7 deep: 199 ready\n") && text.contains("hosts below"),
            "{text}"
        );
    }
}

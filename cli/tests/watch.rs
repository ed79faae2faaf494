//! `treeboot tree --watch`, with and without a terminal, against a coordinator that is played.

// Helpers are outside of what clippy takes for a test.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read as _;
use std::process::{Child, Stdio};

use support::fake::Fakes;
use support::treeboot;
use treeboot_proto::v1;

fn three() -> Fakes {
    Fakes::start(&[("origin", &["store"]), ("host-1", &["vms"]), ("host-2", &["vms"])])
        .with_image("debian", 2, "origin")
}

fn interrupt(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

/// The lines that a program that still runs has written, each given by `next` within the deadline.
struct Lines {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Lines {
    fn of(fakes: &Fakes, arguments: &[&str]) -> Self {
        let mut child = treeboot()
            .env("TREEBOOT_COORDINATOR", &fakes.coordinator)
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let (lines, read) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(out).map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, lines: read }
    }

    fn next(&self) -> String {
        self.lines.recv_timeout(support::DEADLINE).unwrap()
    }

    fn interrupt(mut self) -> i32 {
        interrupt(&self.child);
        // What is left is read, so that the program's end shows that it wrote nothing more than lines.
        while self.lines.recv_timeout(support::DEADLINE).is_ok() {}
        self.child.wait().unwrap().code().unwrap_or(-1)
    }
}

#[test]
fn a_tree_is_followed_without_a_terminal_a_line_for_each_change_until_it_is_interrupted() {
    let fakes = three();
    let node = |host: &str, parent: &str| v1::TreeNode {
        host: host.into(),
        portal: "127.0.0.1:3260".into(),
        origin: parent.is_empty(),
        connected: true,
        state: v1::AttachState::Ready.into(),
        parents: Vec::from_iter((!parent.is_empty()).then(|| parent.to_owned())),
        ..Default::default()
    };
    let nodes = vec![node("origin", ""), node("host-1", "origin")];
    fakes.world.lock().unwrap().nodes = nodes.clone();
    let text = Lines::of(&fakes, &["tree", "debian", "--watch"]);
    let json = Lines::of(&fakes, &["tree", "debian", "--watch", "--json"]);
    for expected in ["debian@2  ", "1 host, ", "origin  ", "└─ host-1"] {
        let line = text.next();
        assert!(line.starts_with(expected), "{line}");
    }
    for host in ["host-1", "origin"] {
        let line: serde_json::Value = serde_json::from_str(&json.next()).unwrap();
        assert_eq!(
            (&line["host"], &line["change"]),
            (&host.into(), &"came".into()),
            "{line}"
        );
    }
    let mut changed = nodes;
    changed[1].connected = false;
    changed.push(node("host-2", "host-1"));
    fakes.world.lock().unwrap().nodes = changed;
    assert_eq!(text.next(), "stripe 0  host-1  ready → lost");
    assert_eq!(text.next(), "stripe 0  host-2  came, ready, under host-1");
    let line: serde_json::Value = serde_json::from_str(&json.next()).unwrap();
    assert_eq!(
        (&line["before"]["state"], &line["now"]["state"]),
        (&"ready".into(), &"lost".into())
    );
    assert_eq!(line["epoch"]["counter"], 9);
    assert_eq!((text.interrupt(), json.interrupt()), (0, 0));
    // A reader that goes away ends it too: seen at the next change.
    let mut gone = Lines::of(&fakes, &["tree", "debian", "--watch", "--json"]);
    gone.next();
    drop(gone.lines);
    let deadline = std::time::Instant::now() + support::DEADLINE;
    while gone.child.try_wait().unwrap().is_none() {
        assert!(
            std::time::Instant::now() < deadline,
            "it goes on without a reader"
        );
        let mut world = fakes.world.lock().unwrap();
        world.nodes[0].portal.push('1');
        drop(world);
        std::thread::park_timeout(std::time::Duration::from_millis(50));
    }
    fakes.run(&["tree", "absent", "--watch"]).fails(3, &["absent"]);
}

/// Output of a terminal, read until nobody has its other side any more.
fn heard(
    mut terminal: std::fs::File,
) -> (
    std::sync::Arc<std::sync::Mutex<String>>,
    std::thread::JoinHandle<()>,
) {
    let heard = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let into = std::sync::Arc::clone(&heard);
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        // A terminal that nobody writes to any more ends with an error (EIO).
        while let Ok(count @ 1..) = terminal.read(&mut bytes) {
            into.lock()
                .unwrap()
                .push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    });
    (heard, reader)
}

#[test]
fn on_a_terminal_the_tree_is_drawn_anew_within_its_lines_and_the_screen_is_given_back() {
    let fakes = three();
    let hosts = |lost: u32| -> Vec<v1::TreeNode> {
        let host = |number: u32| v1::TreeNode {
            host: if number == 0 {
                "origin".into()
            } else {
                format!("host-{number}")
            },
            portal: "127.0.0.1:3260".into(),
            origin: number == 0,
            depth: (number + 1).ilog2(),
            connected: number == 0 || number != lost,
            state: v1::AttachState::Ready.into(),
            parents: match number {
                0 => Vec::new(),
                1 | 2 => vec!["origin".into()],
                _ => vec![format!("host-{}", (number - 1) / 2)],
            },
            ..Default::default()
        };
        (0..100).map(host).collect()
    };
    fakes.world.lock().unwrap().nodes = hosts(0);
    let size = nix::pty::Winsize {
        ws_row: 12,
        ws_col: 60,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(Some(&size), None).unwrap();
    let mut child = treeboot()
        .env("TREEBOOT_COORDINATOR", &fakes.coordinator)
        .args(["tree", "debian", "--watch"])
        .stdout(Stdio::from(pty.slave))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (heard, reader) = heard(std::fs::File::from(pty.master));
    let wait = |words: &str| {
        let deadline = std::time::Instant::now() + support::DEADLINE;
        while !heard.lock().unwrap().contains(words) {
            assert!(
                std::time::Instant::now() < deadline,
                "no '{words}': {}",
                heard.lock().unwrap()
            );
            std::thread::park_timeout(std::time::Duration::from_millis(10));
        }
    };
    wait("99 hosts, 6 deep: 99 ready");
    fakes.world.lock().unwrap().nodes = hosts(50);
    wait("98 ready, 1 lost");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    reader.join().unwrap();
    let heard = heard.lock().unwrap();
    assert!(
        heard.starts_with("\x1b[?1049h") && heard.ends_with("\x1b[?1049l"),
        "{heard:?}"
    );
    let frames: Vec<&str> = heard.split("\x1b[H").skip(1).collect();
    assert!(frames.len() >= 2, "{heard:?}");
    for frame in frames {
        let frame = frame.split("\x1b[J").next().unwrap();
        assert!(frame.lines().count() <= 11 && frame.contains("below"), "{frame}");
    }
}

//! `shell`: a terminal, or one command, on a host of the lab that runs.
//!
//! Deliberately absent: a terminal that changes its size while the shell runs.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncWriteExt as _, BufWriter};
use tokio::net::tcp::OwnedWriteHalf;
use treeboot_tests::lab;
use treeboot_tests::lab::channel::{Kind, MAX_FRAME_BYTES, Running, header, read_frame};
use treeboot_tests::network;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The lab's folder
    #[arg(long)]
    state: PathBuf,
    /// The host: h1, h2, ...
    host: String,
    /// A command to run instead of a shell
    #[arg(last = true)]
    command: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let lab = lab::left(&options.state)?;
    let host = lab
        .hosts
        .iter()
        .find(|host| host.name == options.host)
        .with_context(|| {
            let names: Vec<&str> = lab.hosts.iter().map(|host| host.name.as_str()).collect();
            format!("no host '{}'; there are {}", options.host, names.join(", "))
        })?;
    network::enter(&lab.namespace)
        .context("the lab's namespace; `cargo xtask lab down` removes what is left")?;
    let terminal = std::io::stdin().is_terminal() && options.command.is_empty();
    let environment = format!(
        "export PATH={}:$PATH TREEBOOT_COORDINATOR={} TREEBOOT_IDENTITY={} TERM={} HOME=/root; cd /root; ",
        lab.programs.display(),
        lab.coordinator,
        lab.identity.display(),
        quoted(&std::env::var("TERM").unwrap_or_else(|_| "dumb".into())),
    );
    let what = match (options.command.as_slice(), terminal) {
        // No login shell: /etc/profile would set another PATH.
        ([], true) => format!("{} exec bash", size()),
        ([], false) => "exec bash".to_owned(),
        (command, _) => {
            let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
            format!("exec {}", words.join(" "))
        }
    };
    let line = environment + &what;
    // `script` makes the terminal on the other side.
    let argv: Vec<&str> = if terminal {
        vec!["script", "-qfec", &line, "/dev/null"]
    } else {
        vec!["bash", "-c", &line]
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let _raw = terminal.then(Raw::enter).transpose()?;
    let code = runtime.block_on(async {
        let running = Running::start(host.control, &argv).await?;
        let (mut reader, writer) = running.into_split();
        tokio::spawn(send(writer));
        loop {
            let (kind, bytes) = read_frame(&mut reader).await?;
            match kind {
                Kind::Output => {
                    std::io::stdout().write_all(&bytes)?;
                    std::io::stdout().flush()?;
                }
                Kind::Error => std::io::stderr().write_all(&bytes)?,
                Kind::Exit => return anyhow::Ok(String::from_utf8_lossy(&bytes).parse::<u8>().unwrap_or(1)),
                Kind::Input => {}
            }
        }
    });
    // Somebody may still be reading standard input.
    runtime.shutdown_background();
    Ok(ExitCode::from(code?))
}

/// Sends what is typed until it ends. A thread reads, because a terminal cannot be waited for in any other way.
async fn send(mut to: BufWriter<OwnedWriteHalf>) -> Result<()> {
    let (typed, mut queue) = tokio::sync::mpsc::channel::<Vec<u8>>(16);
    std::thread::spawn(move || {
        let mut buffer = vec![0; MAX_FRAME_BYTES];
        while let Ok(count) = std::io::stdin().read(&mut buffer) {
            // None is sent too: the end.
            if typed.blocking_send(buffer[..count].to_vec()).is_err() || count == 0 {
                return;
            }
        }
    });
    while let Some(bytes) = queue.recv().await {
        to.write_all(&header(Kind::Input, bytes.len())).await?;
        to.write_all(&bytes).await?;
        to.flush().await?;
    }
    // Keeps the connection, whose end would end the command.
    std::future::pending().await
}

/// A word as a shell takes it for itself.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Gives the other terminal this one's size.
fn size() -> String {
    // `stty` asks the terminal that it is given as standard input, which is ours.
    let output = Command::new("stty")
        .arg("size")
        .stdin(std::process::Stdio::inherit())
        .output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        [rows, columns] if rows.parse::<u16>().is_ok() && columns.parse::<u16>().is_ok() => {
            format!("stty rows {rows} cols {columns};")
        }
        _ => String::new(),
    }
}

/// The terminal hands on each key as it is; undone when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self> {
        let before = termios::tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

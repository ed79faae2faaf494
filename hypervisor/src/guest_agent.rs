//! The QEMU guest agent, a program inside the guest, over the unix socket of its virtio-serial port (QEMU `docs/interop/qemu-ga.rst`): one
//! JSON object a line, as in QMP, with no greeting and no events.
//!
//! Whoever answers is a program of the guest's, which may be hostile: nothing that it sends can make us panic, wait for ever or grow without
//! a limit. A conversation that went wrong is dropped, never continued. Deliberately absent: every command that is not about holding file
//! systems still.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

/// Most bytes that are read for one answer, with what an older conversation left before it. Answers in use have less than 100.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Sent first, it makes the agent forget half a command; it stands before the answer to `guest-sync-delimited`, too.
const DELIMITER: u8 = 0xff;

/// How long a guest may take for an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// To answer at all.
    pub(crate) sync: Duration,
    /// To write back what it holds and to stop writing, and to go on.
    pub(crate) act: Duration,
}

/// Under emulation, on a busy host, a guest's program waits for hundreds of milliseconds.
pub(crate) const LIMITS: Limits = Limits {
    sync: Duration::from_secs(3),
    act: Duration::from_secs(10),
};

/// Why a guest's agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestAgentError {
    /// No program of the guest has its end of the channel open.
    #[error("no guest agent listens in the guest of VM {vm}")]
    Nobody {
        /// The VM.
        vm: treeboot_types::VmName,
    },
    /// QEMU has no such channel: it was started by an older version.
    #[error("VM {vm} was started without a channel for a guest agent; it has one after its next start")]
    NoChannel {
        /// The VM.
        vm: treeboot_types::VmName,
    },
    /// QEMU did not say.
    #[error(transparent)]
    Qmp(#[from] crate::QmpError),
    /// The socket.
    #[error("cannot talk to the guest agent at {}", socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("the guest agent did not answer '{command}' within {limit_ms} ms")]
    TimedOut {
        /// What was asked.
        command: &'static str,
        /// The limit.
        limit_ms: u128,
    },
    /// It said no.
    #[error("the guest agent refused '{command}': {message}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// Its words, cut short and with nothing that could steer a terminal.
        message: String,
    },
    /// What came is no answer.
    #[error("what answers for the guest agent does not speak its protocol: {found}")]
    Protocol {
        /// What came, cut short.
        found: String,
    },
    /// It answered, and holds nothing still.
    #[error("the guest agent found no file system that it could freeze")]
    NothingFrozen,
    /// It answered, and still holds file systems still.
    #[error("the guest agent says that file systems are still frozen")]
    StillFrozen,
}

/// One conversation, which began with an answer.
pub struct GuestAgent {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
    limits: Limits,
}

impl GuestAgent {
    /// Connects, and makes sure that what comes next answers to us.
    pub(crate) async fn connect(socket: &Path, limits: Limits) -> Result<Self, GuestAgentError> {
        within("guest-sync-delimited", limits.sync, async {
            let stream = UnixStream::connect(socket).await;
            let stream = stream.map_err(|source| GuestAgentError::Io {
                socket: socket.into(),
                source,
            })?;
            let mut agent = Self {
                socket: socket.into(),
                stream: BufReader::new(stream),
                limits,
            };
            agent.synchronise().await?;
            Ok(agent)
        })
        .await
    }

    async fn synchronise(&mut self) -> Result<(), GuestAgentError> {
        static CONVERSATIONS: AtomicU64 = AtomicU64::new(1);
        // Another number than any that a predecessor of this process may have asked with; JavaScript's integers have 53 bits.
        let count = CONVERSATIONS.fetch_add(1, Ordering::Relaxed) & 0xffff_ffff;
        let id = (u64::from(std::process::id() & 0xf_ffff) << 32) | count;
        let question = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
        let mut bytes = vec![DELIMITER];
        bytes.extend(question.to_string().into_bytes());
        bytes.push(b'\n');
        self.write(&bytes).await?;
        let mut left = MAX_ANSWER_BYTES;
        loop {
            // What an older conversation left; also a complaint about the delimiter itself.
            self.until(DELIMITER, &mut left).await?;
            let line = self.until(b'\n', &mut left).await?;
            if let Ok(answer) = serde_json::from_slice::<Value>(&line)
                && answer.get("return").and_then(Value::as_u64) == Some(id)
            {
                return Ok(());
            }
        }
    }

    /// Asks one thing.
    pub(crate) async fn ask(
        &mut self,
        command: &'static str,
        limit: Duration,
    ) -> Result<Value, GuestAgentError> {
        within(command, limit, async {
            let question = format!("{}\n", json!({ "execute": command }));
            self.write(question.as_bytes()).await?;
            let line = self.until(b'\n', &mut MAX_ANSWER_BYTES.clone()).await?;
            let no_answer = || GuestAgentError::Protocol { found: cut(&line) };
            let answer: Value = serde_json::from_slice(&line).map_err(|_| no_answer())?;
            match (answer.get("return"), answer.get("error")) {
                (Some(value), None) => Ok(value.clone()),
                (_, Some(error)) => {
                    let words = error.get("desc").and_then(Value::as_str);
                    Err(GuestAgentError::Refused {
                        command,
                        message: cut(words.unwrap_or("no reason given").as_bytes()),
                    })
                }
                (None, None) => Err(no_answer()),
            }
        })
        .await
    }

    /// Has the guest write back what it holds and write no more, until [`RunningVm::thaw`](crate::RunningVm::thaw). Returns how many file
    /// systems that are.
    ///
    /// # Errors
    /// [`GuestAgentError`]; whether any is held still is not known then, so it is to be thawed all the same.
    pub async fn freeze(mut self) -> Result<u64, GuestAgentError> {
        let frozen = self.count("guest-fsfreeze-freeze", self.limits.act).await?;
        match frozen {
            0 => Err(GuestAgentError::NothingFrozen),
            frozen => Ok(frozen),
        }
    }

    /// Lets them go on, and makes sure that they do. Returns how many there were; nothing happens where none is held.
    pub(crate) async fn thaw(&mut self) -> Result<u64, GuestAgentError> {
        let thawed = self.count("guest-fsfreeze-thaw", self.limits.act).await;
        let refused = matches!(thawed, Err(GuestAgentError::Refused { .. }));
        if thawed.is_err() && !refused {
            return thawed;
        }
        let status = self.ask("guest-fsfreeze-status", self.limits.sync).await?;
        match (status.as_str(), thawed) {
            (Some("thawed"), thawed) => Ok(thawed.unwrap_or(0)),
            (_, Err(refused)) => Err(refused),
            (Some("frozen"), Ok(_)) => Err(GuestAgentError::StillFrozen),
            (_, Ok(_)) => Err(GuestAgentError::Protocol {
                found: cut(status.to_string().as_bytes()),
            }),
        }
    }

    async fn count(&mut self, command: &'static str, limit: Duration) -> Result<u64, GuestAgentError> {
        let answer = self.ask(command, limit).await?;
        answer.as_u64().ok_or_else(|| GuestAgentError::Protocol {
            found: cut(answer.to_string().as_bytes()),
        })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestAgentError> {
        let written = self.stream.get_mut().write_all(bytes).await;
        written.map_err(|source| self.io(source))
    }

    /// What comes before `end`, which goes, too. At most `left` bytes, of which what was read is taken.
    async fn until(&mut self, end: u8, left: &mut usize) -> Result<Vec<u8>, GuestAgentError> {
        let mut found = Vec::new();
        loop {
            let available = match self.stream.fill_buf().await {
                Ok([]) => return Err(self.io(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(available) => available,
                Err(source) => return Err(self.io(source)),
            };
            let at = available.iter().position(|&byte| byte == end);
            let taken = at.unwrap_or(available.len());
            found.extend(available.iter().take(taken));
            self.stream.consume(at.map_or(taken, |at| at + 1));
            *left = match left.checked_sub(taken) {
                Some(left) if left > 0 => left,
                _ => return Err(GuestAgentError::Protocol { found: cut(&found) }),
            };
            if at.is_some() {
                return Ok(found);
            }
        }
    }

    fn io(&self, source: std::io::Error) -> GuestAgentError {
        GuestAgentError::Io {
            socket: self.socket.clone(),
            source,
        }
    }
}

async fn within<T>(
    command: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, GuestAgentError>>,
) -> Result<T, GuestAgentError> {
    let silent = |_| GuestAgentError::TimedOut {
        command,
        limit_ms: limit.as_millis(),
    };
    tokio::time::timeout(limit, work).await.map_err(silent)?
}

/// The first 120 characters, with nothing that could steer a terminal: an error is for people.
fn cut(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text.get(..480).unwrap_or(text));
    let plain = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(plain).take(120).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::UnixListener;

    use super::*;

    /// So that silence is waited for in no time.
    const SHORT: Limits = Limits {
        sync: Duration::from_millis(500),
        act: Duration::from_millis(20),
    };

    /// An agent that answers the conversation's beginning, and then says `said` to whatever comes, one after the other.
    async fn against<T>(
        said: &[&str],
        talk: impl AsyncFnOnce(GuestAgent) -> Result<T, GuestAgentError>,
    ) -> Result<T, GuestAgentError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).expect("binds");
        let peer = async {
            let (stream, _) = listener.accept().await.expect("accepts");
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            let _ = stream.read_until(b'\n', &mut line).await;
            assert_eq!(line.first(), Some(&DELIMITER));
            let question: Value = serde_json::from_slice(&line[1..]).expect("JSON");
            // As the real one: a complaint about the delimiter, then the answer.
            let answer = format!("{}\n", json!({ "return": question["arguments"]["id"] }));
            let stale = b"{\"return\": 7}\n{\"error\": {\"desc\": \"parse error\"}}\n\xff";
            let _ = stream.get_mut().write_all(stale).await;
            let _ = stream.get_mut().write_all(answer.as_bytes()).await;
            for said in said {
                let mut line = String::new();
                let _ = stream.read_line(&mut line).await;
                let _ = stream.get_mut().write_all(said.as_bytes()).await;
            }
            if said.last() != Some(&"") {
                let _ = stream.get_mut().shutdown().await;
            }
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let talk = async { talk(GuestAgent::connect(&path, SHORT).await?).await };
        tokio::join!(talk, peer).0
    }

    #[tokio::test]
    async fn what_an_older_conversation_left_is_skipped_and_file_systems_are_counted() {
        let frozen = against(&["{\"return\": 3}\r\n"], async |agent| agent.freeze().await);
        assert_eq!(frozen.await.expect("freezes"), 3);
        let said = ["{\"return\": 3}\n", "{\"return\": \"thawed\"}\n"];
        let thawed = against(&said, async |mut agent| agent.thaw().await);
        assert_eq!(thawed.await.expect("thaws"), 3);
        let said = [
            "{\"error\": {\"desc\": \"nothing to do\"}}\n",
            "{\"return\": \"thawed\"}\n",
        ];
        let thawed = against(&said, async |mut agent| agent.thaw().await);
        assert_eq!(thawed.await.expect("goes on"), 0);
    }

    #[tokio::test]
    async fn whatever_a_guest_says_is_an_error_and_not_a_panic() {
        let endless = "x".repeat(MAX_ANSWER_BYTES * 2);
        let deep = format!("{}\n", "[".repeat(1000));
        for said in [
            "",
            "\n",
            "[]\n",
            "{}\n",
            "{\"return\": 0}\n",
            "{\"return\": -1}\n",
            "{\"return\": \"2\"}\n",
            "{\"error\": 5}\n",
            "{\"return\": 1, \"error\": {}}\n",
            "\u{1b}[2J{\"\n",
            &endless,
            &deep,
        ] {
            let frozen = against(&[said], async |agent| agent.freeze().await).await;
            assert!(frozen.is_err(), "{said:.40}: {frozen:?}");
        }
        for said in [
            ["{\"error\": {\"desc\": \"no\"}}\n", "{\"return\": \"frozen\"}\n"],
            [
                "{\"error\": {\"desc\": \"no\"}}\n",
                "{\"error\": {\"desc\": \"no\"}}\n",
            ],
            ["{\"return\": 1}\n", "{\"return\": \"frozen\"}\n"],
            ["{\"return\": 1}\n", "{\"return\": 1}\n"],
            ["{\"return\": 1}\n", ""],
        ] {
            let thawed = against(&said, async |mut agent| agent.thaw().await).await;
            assert!(thawed.is_err(), "{said:?}: {thawed:?}");
        }
    }

    #[tokio::test]
    async fn a_guest_that_never_ends_or_never_answers_is_given_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&path).expect("binds");
        let noisy = async {
            let (mut stream, _) = listener.accept().await.expect("accepts");
            while stream.write_all(&[b'{'; 4096]).await.is_ok() {}
        };
        let (said, ()) = tokio::join!(GuestAgent::connect(&path, SHORT), noisy);
        assert!(matches!(said, Err(GuestAgentError::Protocol { .. })), "endless");
        let silent = async {
            let (mut stream, _) = listener.accept().await.expect("accepts");
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let (said, ()) = tokio::join!(GuestAgent::connect(&path, SHORT), silent);
        assert!(matches!(said, Err(GuestAgentError::TimedOut { .. })), "silent");
    }

    #[test]
    fn a_guests_words_steer_no_terminal() {
        assert_eq!(cut(b"\x1b[2J\nno"), "?[2J?no");
        assert_eq!(cut(&[b'x'; 1000]).len(), 120);
        assert_eq!(cut("ä".repeat(300).as_bytes()).chars().count(), 120);
    }
}

//! The QEMU Machine Protocol over a unix socket: one JSON object a line (QEMU `docs/interop/qmp-spec.rst`).
//!
//! A connection lasts for one conversation: QEMU serves one client a socket at a time, and whoever keeps one open locks
//! out the others. Nothing that QEMU sends can make us panic or grow without a limit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

/// Longest line taken from QEMU: the longest answer in use, `query-blockstats`, has 2 KiB a disk.
const MAX_LINE_BYTES: usize = 256 * 1024;
/// Most events that are skipped while an answer is awaited: QEMU limits the rate of its chatty events itself.
const MAX_EVENTS_SKIPPED: u32 = 10_000;
/// Longest wait for one answer, the greeting included. QEMU answers within a millisecond unless its main loop waits for a disk.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(5);

/// Why a conversation with QEMU failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket.
    #[error("cannot talk to QEMU at {}; is the VM still running?", socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("QEMU at {} did not answer '{command}' within {limit_ms} ms; it may be waiting for its disk", socket.display())]
    TimedOut {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        command: String,
        /// The limit.
        limit_ms: u128,
    },
    /// QEMU said no.
    #[error("QEMU at {} refused '{command}': {message}", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// What was asked.
        command: String,
        /// QEMU's words.
        message: String,
    },
    /// What came is not QMP.
    #[error("what answers at {} does not speak QMP: {found}", socket.display())]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// What came, cut short.
        found: String,
    },
}

/// Something that QEMU tells by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) data: Value,
}

/// One conversation.
pub(crate) struct Qmp {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode.
    pub(crate) async fn connect(socket: &Path) -> Result<Self, QmpError> {
        let limited = tokio::time::timeout(COMMAND_LIMIT, async {
            let stream = UnixStream::connect(socket).await.map_err(|source| QmpError::Io {
                socket: socket.into(),
                source,
            })?;
            let mut qmp = Self {
                socket: socket.into(),
                stream: BufReader::new(stream),
            };
            let greeting = qmp.line().await?;
            if greeting.get("QMP").is_none() {
                return Err(qmp.protocol(&greeting.to_string()));
            }
            qmp.execute("qmp_capabilities", json!({})).await?;
            Ok(qmp)
        });
        limited.await.unwrap_or_else(|_| {
            Err(QmpError::TimedOut {
                socket: socket.into(),
                command: "qmp_capabilities".into(),
                limit_ms: COMMAND_LIMIT.as_millis(),
            })
        })
    }

    /// Connects, asks one thing, and hangs up.
    pub(crate) async fn ask(socket: &Path, command: &str, arguments: Value) -> Result<Value, QmpError> {
        Self::connect(socket).await?.execute(command, arguments).await
    }

    /// Asks one thing. Events that come before the answer are skipped.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let socket = self.socket.clone();
        let limited = tokio::time::timeout(COMMAND_LIMIT, self.execute_unlimited(command, arguments));
        limited.await.unwrap_or_else(|_| {
            Err(QmpError::TimedOut {
                socket,
                command: command.into(),
                limit_ms: COMMAND_LIMIT.as_millis(),
            })
        })
    }

    async fn execute_unlimited(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments, "id": command }).to_string();
        line.push('\n');
        let written = self.stream.get_mut().write_all(line.as_bytes()).await;
        written.map_err(|source| self.io(source))?;
        for _ in 0..MAX_EVENTS_SKIPPED {
            let answer = self.line().await?;
            if answer.get("event").is_some() {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let message = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                return Err(QmpError::Refused {
                    socket: self.socket.clone(),
                    command: command.into(),
                    message: cut(message),
                });
            }
            return match answer.get("return") {
                Some(value) if answer.get("id").and_then(Value::as_str) == Some(command) => Ok(value.clone()),
                _ => Err(self.protocol(&answer.to_string())),
            };
        }
        Err(self.protocol("events without end"))
    }

    /// The next event, however long it takes. `None` when QEMU hangs up, as it does when it ends.
    pub(crate) async fn event(&mut self) -> Result<Option<Event>, QmpError> {
        loop {
            let line = match self.line().await {
                Ok(line) => line,
                Err(QmpError::Io { .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
            if let Some(name) = line.get("event").and_then(Value::as_str) {
                let data = line.get("data").cloned().unwrap_or(Value::Null);
                return Ok(Some(Event {
                    name: name.into(),
                    data,
                }));
            }
        }
    }

    /// One line, parsed. Cancel-safe only between lines: a conversation that timed out is dropped, never continued.
    async fn line(&mut self) -> Result<Value, QmpError> {
        let mut line = Vec::new();
        loop {
            let available = match self.stream.fill_buf().await {
                Ok([]) => return Err(self.io(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(available) => available,
                Err(source) => return Err(self.io(source)),
            };
            let end = available.iter().position(|&byte| byte == b'\n');
            let taken = end.unwrap_or(available.len());
            line.extend_from_slice(&available[..taken]);
            self.stream.consume(end.map_or(taken, |end| end + 1));
            if line.len() > MAX_LINE_BYTES {
                return Err(self.protocol(&String::from_utf8_lossy(&line[..64])));
            }
            if end.is_some() {
                break;
            }
        }
        match serde_json::from_slice::<Value>(&line) {
            Ok(value) if value.is_object() => Ok(value),
            _ => Err(self.protocol(&String::from_utf8_lossy(&line))),
        }
    }

    fn io(&self, source: std::io::Error) -> QmpError {
        QmpError::Io {
            socket: self.socket.clone(),
            source,
        }
    }

    fn protocol(&self, found: &str) -> QmpError {
        QmpError::Protocol {
            socket: self.socket.clone(),
            found: cut(found),
        }
    }
}

/// The first 200 characters: an error is for people.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// A peer that says `said` line by line: the greeting at once, the rest when asked.
    async fn against(said: Vec<Vec<u8>>) -> Result<Value, QmpError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("q");
        let listener = UnixListener::bind(&path).expect("binds");
        let peer = async {
            let (mut stream, _) = listener.accept().await.expect("accepts");
            for line in said {
                // The client may have hung up already; that is what is tested.
                let _ = stream.write_all(&line).await;
            }
            let _ = stream.shutdown().await;
            let mut sink = Vec::new();
            let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut sink).await;
        };
        let (answer, ()) = tokio::join!(Qmp::ask(&path, "query-status", json!({})), peer);
        answer
    }

    fn line(text: &str) -> Vec<u8> {
        format!("{text}\r\n").into_bytes()
    }

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
    const READY: &str = r#"{"return": {}, "id": "qmp_capabilities"}"#;

    #[tokio::test]
    async fn an_answer_is_found_behind_events() {
        let said = [
            GREETING,
            READY,
            r#"{"event": "RESUME"}"#,
            r#"{"return": {"status": "running"}, "id": "query-status"}"#,
        ];
        let answer = against(said.iter().map(|text| line(text)).collect())
            .await
            .expect("answers");
        assert_eq!(answer["status"], "running");
    }

    #[tokio::test]
    async fn whatever_a_peer_says_is_an_error_and_not_a_panic() {
        let cases: Vec<Vec<Vec<u8>>> = vec![
            vec![],
            vec![line("")],
            vec![line("SSH-2.0-x")],
            vec![line("[]")],
            vec![line("{}")],
            vec![b"\xff\xfe\n".to_vec()],
            vec![line(GREETING), line("null")],
            vec![line(GREETING), line(r#"{"error": 5}"#)],
            vec![
                line(GREETING),
                line(READY),
                line(r#"{"return": {}, "id": "other"}"#),
            ],
            vec![line(GREETING), line(READY), line(r#"{"id": "query-status"}"#)],
            vec![
                line(GREETING),
                line(READY),
                vec![b'['; MAX_LINE_BYTES + 10],
                line(""),
            ],
            vec![line(GREETING), line(READY), line(&"[".repeat(1000))],
        ];
        for said in cases {
            let shown = said
                .last()
                .map(|last| String::from_utf8_lossy(last).chars().take(40).collect::<String>());
            assert!(against(said).await.is_err(), "{shown:?}");
        }
    }
}

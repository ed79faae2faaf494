//! From a portal's name to a connection in full feature phase; and discovery.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use treeboot_types::{ISCSI_PORT, Iqn};

use super::error::{ConnectError, ProtocolError};
use super::exchange::{MAX_RECEIVE_BYTES, Terms};
use super::session::Digests;
use crate::login::{
    self, Challenge, Chap, ChapError, InitiatorLogin, InitiatorOptions, LoginError, Progress,
};
use crate::pdu::{BHS_BYTES, FrameError, Framing, LunField, NO_TAG, Pdu, TextRequest, TextResponse, opcode};

/// Redirections followed in one connect. An honest one has one.
const REDIRECTS: u32 = 4;

/// Text of all targets of a portal in bytes: some 10,000 of them.
const MAX_DISCOVERY_BYTES: usize = 1 << 20;

/// A portal that was logged in to.
pub(super) struct LoggedIn {
    pub(super) stream: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) terms: Terms,
}

/// Splits `host:port`, `[v6]:port`, and either without a port.
///
/// # Errors
/// [`ConnectError::Portal`].
pub(super) fn parse_portal(portal: &str) -> Result<(&str, u16), ConnectError> {
    let error = || ConnectError::Portal(portal.to_owned());
    let (host, port) = match portal.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(error)?;
            let port = match rest {
                "" => None,
                rest => Some(rest.strip_prefix(':').ok_or_else(error)?),
            };
            (host, port)
        }
        None => match portal.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (portal, None),
        },
    };
    // A second colon is an IPv6 address without brackets, which could be read in two ways.
    let port = port.map_or(Ok(ISCSI_PORT), str::parse).map_err(|_| error())?;
    if host.is_empty() || host.contains(char::is_whitespace) {
        return Err(error());
    }
    Ok((host, port))
}

/// Ends `work` with [`ConnectError::TimedOut`] after `ms`.
pub(super) async fn within<T>(
    ms: u64,
    portal: &str,
    work: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    match tokio::time::timeout(Duration::from_millis(ms), work).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::TimedOut {
            portal: portal.to_owned(),
            ms,
        }),
    }
}

/// Who logs in to what, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Who<'a> {
    pub(super) initiator: &'a Iqn,
    /// `None` for a discovery session.
    pub(super) target: Option<&'a Iqn>,
    pub(super) chap: Option<&'a Chap>,
    pub(super) digests: Digests,
}

/// Connects and logs in, following redirections.
pub(super) async fn log_in(portal: &str, who: Who<'_>) -> Result<LoggedIn, ConnectError> {
    let mut at = portal.to_owned();
    let mut sha256 = true;
    let mut seen = vec![at.clone()];
    for _ in 0..=REDIRECTS {
        let (stream, peer) = open(&at).await?;
        let mut wire = Wire {
            stream,
            portal: at.clone(),
        };
        match negotiate(&mut wire, who, sha256).await? {
            Outcome::Done(terms) => {
                return Ok(LoggedIn {
                    stream: wire.stream,
                    peer,
                    terms,
                });
            }
            Outcome::Moved(to) if seen.contains(&to) => {
                at = to; // a circle
                break;
            }
            Outcome::Moved(to) => {
                seen.push(to.clone());
                at = to;
            }
            Outcome::Misread => sha256 = false,
        }
    }
    Err(ConnectError::Redirects {
        target: target_name(who.target),
        times: seen.len() as u32,
        portal: at,
    })
}

fn target_name(target: Option<&Iqn>) -> String {
    target.map_or_else(|| "discovery".to_owned(), Iqn::to_string)
}

async fn open(portal: &str) -> Result<(TcpStream, SocketAddr), ConnectError> {
    let resolve = |source| ConnectError::Resolve {
        portal: portal.to_owned(),
        source,
    };
    let addresses = tokio::net::lookup_host(parse_portal(portal)?)
        .await
        .map_err(resolve)?;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await.and_then(|stream| {
            // Commands are small and someone waits for each.
            stream.set_nodelay(true)?;
            Ok(stream)
        }) {
            Ok(stream) => return Ok((stream, address)),
            Err(error) => last = error,
        }
    }
    Err(ConnectError::Tcp {
        portal: portal.to_owned(),
        source: last,
    })
}

enum Outcome {
    Done(Terms),
    Moved(String),
    /// It takes SHA-256 for something else.
    Misread,
}

async fn negotiate(wire: &mut Wire, who: Who<'_>, sha256: bool) -> Result<Outcome, ConnectError> {
    let failed = |portal: &str, source| ConnectError::Login {
        portal: portal.to_owned(),
        target: target_name(who.target),
        source,
    };
    // Random format (RFC 7143 §11.12.5): two sessions with one name would replace each other.
    let [a, b, c, d, e] = rand::random();
    let options = InitiatorOptions {
        initiator: who.initiator.clone(),
        target: who.target.cloned(),
        isid: [0x80, a, b, c, d, e],
        terms: login::Terms {
            header_digest: who.digests.header,
            data_digest: who.digests.data,
            max_recv_bytes: MAX_RECEIVE_BYTES,
            ..login::Terms::default()
        },
    };
    let mut login = match who.chap {
        None => InitiatorLogin::new(options),
        Some(chap) => {
            // Also after a redirection: another challenge for another login.
            let challenge =
                Challenge::from_os().ok_or_else(|| failed(&wire.portal, ChapError::NoRandom.into()))?;
            let login = InitiatorLogin::with_chap(options, chap.clone(), challenge);
            if sha256 { login } else { login.without_sha256() }
        }
    };
    loop {
        let (request, text) = login.request();
        wire.send(&request.into(), &text).await?;
        let (pdu, text) = wire.receive().await?;
        let response = match pdu {
            Pdu::LoginResponse(response) => response,
            other => return Err(wire.unexpected(&other, "during the login")),
        };
        match login.response(&response, &text) {
            Ok(Progress::GoOn) => {}
            Ok(Progress::Done(established)) => {
                let agreed = established.parameters;
                let immediate = agreed.first_burst_bytes.min(agreed.peer_max_recv_bytes);
                return Ok(Outcome::Done(Terms {
                    header_digest: agreed.header_digest,
                    data_digest: agreed.data_digest,
                    max_send_bytes: agreed.peer_max_recv_bytes,
                    unsolicited_bytes: if agreed.initial_r2t {
                        0
                    } else {
                        agreed.first_burst_bytes
                    },
                    immediate_bytes: if agreed.immediate_data { immediate } else { 0 },
                    cmd_sn: established.cmd_sn,
                    exp_stat_sn: established.stat_sn,
                    max_cmd_sn: response.max_cmd_sn,
                }));
            }
            Err(LoginError::Moved { address, .. }) => {
                let (portal, _group) = address.split_once(',').unwrap_or((&address, ""));
                return Ok(Outcome::Moved(portal.to_owned()));
            }
            Err(refusal) if login.was_misread(&refusal) => return Ok(Outcome::Misread),
            Err(source) => {
                return Err(failed(&wire.portal, source));
            }
        }
    }
}

/// A connection before the owner task has it: one PDU at a time.
struct Wire {
    stream: TcpStream,
    portal: String,
}

impl Wire {
    fn broken(&self, source: io::Error) -> ConnectError {
        ConnectError::Broken {
            portal: self.portal.clone(),
            source,
        }
    }

    fn protocol(&self, source: impl Into<ProtocolError>) -> ConnectError {
        ConnectError::Protocol {
            portal: self.portal.clone(),
            source: source.into(),
        }
    }

    fn unexpected(&self, pdu: &Pdu, when: &'static str) -> ConnectError {
        self.protocol(ProtocolError::Unexpected {
            opcode: pdu.encode()[0] & 0x3f,
            when,
        })
    }

    async fn send(&mut self, pdu: &Pdu, data: &[u8]) -> Result<(), ConnectError> {
        let mut out = Vec::new();
        Framing::LOGIN.append(&mut out, pdu, data);
        self.stream.write_all(&out).await.map_err(|e| self.broken(e))
    }

    async fn receive(&mut self) -> Result<(Pdu, Vec<u8>), ConnectError> {
        let mut bhs = [0; BHS_BYTES];
        self.stream
            .read_exact(&mut bhs)
            .await
            .map_err(|e| self.broken(e))?;
        let pdu = Pdu::parse(&bhs).map_err(|e| self.protocol(e))?;
        let data_bytes = u32::from_be_bytes([0, bhs[5], bhs[6], bhs[7]]);
        // What we declared as our limit; some targets use it during the login as well.
        if data_bytes > MAX_RECEIVE_BYTES {
            return Err(self.protocol(FrameError::TooLong {
                bytes: data_bytes,
                limit: MAX_RECEIVE_BYTES,
            }));
        }
        let ahs_bytes = usize::from(bhs[4]) * 4;
        let data_bytes = data_bytes as usize;
        let mut rest = vec![0; ahs_bytes + data_bytes.next_multiple_of(4)];
        self.stream
            .read_exact(&mut rest)
            .await
            .map_err(|e| self.broken(e))?;
        rest.drain(..ahs_bytes);
        rest.truncate(data_bytes);
        Ok((pdu, rest))
    }
}

/// Asks a portal which targets it has: SendTargets in a discovery session (RFC 7143 Appendix C). Each target
/// comes with the portals that serve it; one without an address is served by `portal` itself.
///
/// # Errors
/// [`ConnectError`].
pub async fn discover(
    portal: &str,
    initiator: &Iqn,
    limit_ms: u64,
) -> Result<Vec<(Iqn, Vec<String>)>, ConnectError> {
    within(limit_ms, portal, async {
        let who = Who {
            initiator,
            target: None,
            chap: None,
            digests: Digests::default(),
        };
        let LoggedIn { stream, terms, .. } = log_in(portal, who).await?;
        let mut wire = Wire {
            stream,
            portal: portal.to_owned(),
        };
        let text = send_targets(&mut wire, terms).await?;
        targets_in(&text, portal).map_err(|source| wire.protocol(source))
    })
    .await
}

async fn send_targets(wire: &mut Wire, terms: Terms) -> Result<Vec<u8>, ConnectError> {
    const ITT: u32 = 1;
    let mut text = Vec::new();
    let mut ask = Vec::new();
    login::append_key(&mut ask, "SendTargets", "All");
    let (mut ttt, mut exp_stat_sn) = (NO_TAG, terms.exp_stat_sn);
    let mut cmd_sn = terms.cmd_sn;
    loop {
        let request = TextRequest {
            immediate: false,
            final_: true,
            continues: false,
            lun: LunField::default(),
            itt: ITT,
            ttt,
            cmd_sn,
            exp_stat_sn,
        };
        wire.send(&request.into(), &ask).await?;
        ask.clear();
        cmd_sn = cmd_sn.wrapping_add(1);
        let (response, part) = text_response(wire).await?;
        exp_stat_sn = response.stat_sn.wrapping_add(1);
        text.extend_from_slice(&part);
        if response.ttt == NO_TAG && !response.continues {
            return Ok(text);
        }
        ttt = response.ttt;
        // Each round costs the target at least a header; a part that is empty may only be the last.
        if text.len() > MAX_DISCOVERY_BYTES || part.is_empty() {
            return Err(wire.protocol(ProtocolError::Endless {
                what: "the list of its targets",
            }));
        }
    }
}

async fn text_response(wire: &mut Wire) -> Result<(TextResponse, Vec<u8>), ConnectError> {
    // A target may ping in between; a discovery is over before it minds that nobody answers.
    for _ in 0..8 {
        let (pdu, part) = wire.receive().await?;
        match pdu {
            Pdu::TextResponse(response) => return Ok((response, part)),
            Pdu::NopIn(_) => {}
            other => return Err(wire.unexpected(&other, "in a discovery session")),
        }
    }
    Err(wire.protocol(ProtocolError::Unexpected {
        opcode: opcode::NOP_IN,
        when: "over and over, in a discovery session",
    }))
}

fn targets_in(text: &[u8], portal: &str) -> Result<Vec<(Iqn, Vec<String>)>, ProtocolError> {
    let mut targets = Vec::<(Iqn, Vec<String>)>::new();
    // A target whose name is not one of ours to parse is skipped with its addresses, not the whole list.
    let mut known = false;
    for (key, value) in login::parse_keys(text)? {
        match key {
            "TargetName" => match Iqn::new(value) {
                Ok(name) => {
                    known = true;
                    targets.push((name, Vec::new()));
                }
                Err(_) => known = false,
            },
            "TargetAddress" if known && login::is_address(value) => {
                let (address, _group) = value.split_once(',').unwrap_or((value, ""));
                if let Some((_, portals)) = targets.last_mut() {
                    portals.push(address.to_owned());
                }
            }
            _ => {}
        }
    }
    for (_, portals) in &mut targets {
        if portals.is_empty() {
            portals.push(portal.to_owned());
        }
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portals_are_read_and_nonsense_is_not() {
        for (text, host, port) in [
            ("10.0.0.1:3260", "10.0.0.1", 3260),
            ("host:1", "host", 1),
            ("host", "host", 3260),
            ("[2001:db8::1]:3261", "2001:db8::1", 3261),
            ("[::1]", "::1", 3260),
        ] {
            assert_eq!(parse_portal(text).unwrap(), (host, port), "{text}");
        }
        for bad in [
            "",
            ":3260",
            "::1",
            "2001:db8::1:3260",
            "[::1",
            "[::1]x",
            "a:b",
            "a:70000",
            "a b:1",
            "[]:1",
        ] {
            assert!(parse_portal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_list_of_targets_keeps_each_with_its_portals() {
        let text = b"TargetName=iqn.2026-11.org.example:a\0TargetAddress=10.0.0.1:3260,1\0TargetAddress=[::1]:3260,1\0\
            TargetName=not a name\0TargetAddress=10.9.9.9:1,1\0TargetName=iqn.2026-11.org.example:b\0TargetAddress=\x1b[2Jevil:1,1\0";
        let targets = targets_in(text, "here:3260").unwrap();
        let name = |n: &str| Iqn::new(&format!("iqn.2026-11.org.example:{n}")).unwrap();
        assert_eq!(
            targets,
            [
                (
                    name("a"),
                    vec!["10.0.0.1:3260".to_owned(), "[::1]:3260".to_owned()]
                ),
                (name("b"), vec!["here:3260".to_owned()]),
            ]
        );
    }
}

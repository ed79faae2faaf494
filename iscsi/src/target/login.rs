//! A connection until it has logged in.

use std::io;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use treeboot_types::Iqn;

use super::buffers::Input;
use super::registry::{Desk, Shared};
use super::wire::Wire;
use crate::login::{Directory as _, Established, Refusal, TargetLogin, Then, parse_keys};
use crate::pdu::{FrameError, Framing, LoginRequest, Pdu, PduError, Split, opcode};

/// A connection that has logged in.
pub(super) struct Ready {
    pub(super) socket: Wire,
    pub(super) input: Input,
    pub(super) established: Box<Established>,
    /// The last login response; it is to be sent once the session stands.
    pub(super) last_reply: Vec<u8>,
    pub(super) wire_in: u64,
    pub(super) wire_out: u64,
}

/// Why a connection never got to its full feature phase.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginFailure {
    #[error("the connection ended during its login")]
    Ended,
    #[error("the connection failed during its login")]
    Io(#[from] io::Error),
    #[error("the stream is not iSCSI")]
    Frame(#[from] FrameError),
    #[error("the stream is not iSCSI")]
    Pdu(#[from] PduError),
    #[error("a PDU of operation code {0:#04x} before the login")]
    NotLogin(u8),
    #[error("the login was refused")]
    Refused(#[from] Refusal),
}

pub(super) async fn login(mut socket: Wire, shared: &Arc<Shared>) -> Result<Ready, LoginFailure> {
    let mut input = Input::new();
    let mut login = TargetLogin::new(shared.config.terms);
    let desk = Desk::new(shared.clone());
    let (mut wire_in, mut wire_out) = (0, 0);
    loop {
        let (request, data) = loop {
            match Framing::LOGIN.split(input.unparsed())? {
                Split::Frame(frame) => {
                    // Anything else before the login ends the connection (RFC 7143 §6.3).
                    if frame.bhs[0] & 0x3f != opcode::LOGIN_REQUEST {
                        return Err(LoginFailure::NotLogin(frame.bhs[0] & 0x3f));
                    }
                    let request = LoginRequest::parse(frame.bhs)?;
                    let data = frame.data.to_vec();
                    let bytes = frame.bytes;
                    input.consume(bytes);
                    break (request, data);
                }
                Split::Need(bytes) => input.require(bytes),
            }
            match std::future::poll_fn(|cx| input.poll_fill(&mut socket, cx)).await? {
                0 => return Err(LoginFailure::Ended),
                bytes => wire_in += bytes as u64,
            }
        };
        if let Some((initiator, target)) = names(&data) {
            wait_for_admission(shared, &desk, &initiator, &target).await;
        }
        let reply = login.take(&request, &data, &desk);
        let mut out = Vec::new();
        Framing::LOGIN.append(&mut out, &Pdu::LoginResponse(reply.response), &reply.text);
        if let Then::FullFeature(established) = reply.then {
            return Ok(Ready {
                socket,
                input,
                established,
                last_reply: out,
                wire_in,
                wire_out,
            });
        }
        socket.write_all(&out).await?;
        wire_out += out.len() as u64;
        if let Then::Close(refusal) = reply.then {
            // The initiator reads why before it sees the end of the stream.
            let _ = socket.shutdown().await;
            return Err(refusal.into());
        }
    }
}

/// Who wants to log in where, as far as this text says so.
fn names(text: &[u8]) -> Option<(Iqn, Iqn)> {
    let keys = parse_keys(text).ok()?;
    let name = |key: &str| {
        let (_, value) = keys.iter().find(|(found, _)| *found == key)?;
        Iqn::new(value).ok()
    };
    Some((name("InitiatorName")?, name("TargetName")?))
}

/// Holds a login that would be refused now until it would not be, or patience ends. The login decides by itself then.
async fn wait_for_admission(shared: &Shared, desk: &Desk, initiator: &Iqn, target: &Iqn) {
    let deadline = Instant::now() + shared.config.patience;
    loop {
        let changed = shared.changed.notified();
        let mut changed = std::pin::pin!(changed);
        // Before the look, so that no change between the two is missed.
        changed.as_mut().enable();
        match desk.admit(initiator, target) {
            Err(Refusal::NotFound(_) | Refusal::Forbidden { .. }) => {}
            _ => return,
        }
        if tokio::time::timeout_at(deadline, changed).await.is_err() {
            return;
        }
    }
}

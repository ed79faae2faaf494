//! CHAP (RFC 7143 §12.1.3, RFC 1994): who knows the secret answers a challenge with a hash over both.
//!
//! [`Chap`] is what both sides hold; `verify` is the target's machine, `prove` the initiator's. Deliberately absent:
//! where challenges come from. They are handed in, each for one login, and [`Challenge::from_os`] makes them.

mod binary;
mod prove;
mod secret;
#[cfg(test)]
mod tests;
mod verify;

use md5::Md5;
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub(super) use binary::Encoding;
pub(super) use prove::Prover;
pub use secret::{
    Chap, ChapSetupError, Credentials, MAX_SECRET_BYTES, MAX_USER_BYTES, MIN_SECRET_BYTES, Secret,
};
pub(super) use verify::Verifier;

use super::status;

/// Bytes of a challenge that we send: as many as the longest hash has.
const CHALLENGE_BYTES: usize = 32;

/// The longest challenge in bytes that is accepted (RFC 7143 §12.1.3).
const MAX_CHALLENGE_BYTES: usize = 1024;

/// Why an authentication failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChapError {
    /// The peer goes on without it.
    #[error("it is required, and was left out")]
    Required,
    /// A key that does not belong to the step, or came twice.
    #[error("the key {0} has no place there")]
    Order(&'static str),
    /// A key that belongs to the step is absent.
    #[error("the key {0} is missing")]
    Missing(&'static str),
    /// A value that is no number or no binary value, or too long.
    #[error("the value of {0} cannot be read")]
    Malformed(&'static str),
    /// No hash that both sides know.
    #[error("no common algorithm; SHA-256 (7) and MD5 (5) are known here")]
    Algorithm,
    /// Which of the two is wrong is said to nobody.
    #[error("the name or the secret is wrong")]
    Unproven,
    /// A challenge that came from us: whoever sends it wants us to answer our own question.
    #[error("the peer sent one of our own challenges back")]
    Reflected,
    /// The initiator wants a proof that the target was given no secret for.
    #[error("the initiator asks the target to prove itself, which has no secret to do so")]
    OneWay,
    /// The operating system gave no random bytes.
    #[error("no random bytes for a challenge")]
    NoRandom,
}

impl ChapError {
    /// Class and detail of the Login Response.
    pub fn status(self) -> (u8, u8) {
        match self {
            Self::Order(_) | Self::Malformed(_) => status::INITIATOR_ERROR,
            Self::Missing(_) => status::MISSING_PARAMETER,
            Self::Required | Self::Algorithm | Self::Unproven | Self::Reflected | Self::OneWay => {
                status::AUTHENTICATION_FAILURE
            }
            Self::NoRandom => status::OUT_OF_RESOURCES,
        }
    }
}

/// A question for one login; it cannot be copied, so that it is not asked twice.
#[derive(Debug)]
pub struct Challenge {
    id: u8,
    bytes: [u8; CHALLENGE_BYTES],
}

impl Challenge {
    /// From the operating system's random source; `None` where that fails.
    pub fn from_os() -> Option<Self> {
        let mut random = [0; CHALLENGE_BYTES + 1];
        OsRng.try_fill_bytes(&mut random).ok()?;
        Some(Self::from_random(random))
    }

    /// From bytes that must be random and never used before: the challenge, then its identifier.
    pub fn from_random(random: [u8; CHALLENGE_BYTES + 1]) -> Self {
        let mut bytes = [0; CHALLENGE_BYTES];
        bytes.copy_from_slice(&random[..CHALLENGE_BYTES]);
        Self {
            id: random[CHALLENGE_BYTES],
            bytes,
        }
    }

    /// What goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// The hash (CHAP_A; numbers of the IANA registry "PPP Authentication Algorithms").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Md5,
}

impl Algorithm {
    /// What an initiator offers, the better one first.
    const OFFER: &'static [Self] = &[Self::Sha256, Self::Md5];

    fn from_code(code: &str) -> Option<Self> {
        match code {
            "7" => Some(Self::Sha256),
            "5" => Some(Self::Md5),
            _ => None,
        }
    }

    fn code(self) -> &'static str {
        match self {
            Self::Sha256 => "7",
            Self::Md5 => "5",
        }
    }

    /// The answer to a challenge (RFC 1994 §4.1).
    fn answer(self, id: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(id: u8, secret: &Secret, challenge: &[u8]) -> Vec<u8> {
            D::new()
                .chain_update([id])
                .chain_update(secret.expose())
                .chain_update(challenge)
                .finalize()
                .to_vec()
        }
        match self {
            Self::Sha256 => hash::<Sha256>(id, secret, challenge),
            Self::Md5 => hash::<Md5>(id, secret, challenge),
        }
    }
}

/// Does the peer know `credentials`? Name and answer are both looked at whatever the other is.
fn proves(
    credentials: &Credentials,
    algorithm: Algorithm,
    challenge: &Challenge,
    user: &str,
    answer: &[u8],
) -> bool {
    let expected = algorithm.answer(challenge.id, credentials.secret(), challenge.bytes());
    let right_user = user.as_bytes().ct_eq(credentials.user().as_bytes());
    (right_user & answer.ct_eq(&expected)).into()
}

/// The CHAP keys of one text.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keys<'a> {
    algorithm: Option<&'a str>,
    id: Option<&'a str>,
    challenge: Option<&'a str>,
    name: Option<&'a str>,
    response: Option<&'a str>,
}

impl<'a> Keys<'a> {
    /// Takes `key` if it is one of CHAP's; `false` if it is not.
    pub(super) fn take(&mut self, key: &str, value: &'a str) -> Result<bool, ChapError> {
        let (name, place) = match key {
            "CHAP_A" => ("CHAP_A", &mut self.algorithm),
            "CHAP_I" => ("CHAP_I", &mut self.id),
            "CHAP_C" => ("CHAP_C", &mut self.challenge),
            "CHAP_N" => ("CHAP_N", &mut self.name),
            "CHAP_R" => ("CHAP_R", &mut self.response),
            _ => return Ok(false),
        };
        match place.replace(value) {
            Some(_) => Err(ChapError::Order(name)),
            None => Ok(true),
        }
    }

    /// The name of a key that is there, in the order of the exchange.
    fn first(&self) -> Option<&'static str> {
        let keys = [
            (self.algorithm, "CHAP_A"),
            (self.id, "CHAP_I"),
            (self.challenge, "CHAP_C"),
            (self.name, "CHAP_N"),
            (self.response, "CHAP_R"),
        ];
        keys.into_iter()
            .find(|(value, _)| value.is_some())
            .map(|(_, name)| name)
    }

    /// Fails where a key is there, because none may be.
    pub(super) fn none(&self) -> Result<(), ChapError> {
        self.first().map_or(Ok(()), |name| Err(ChapError::Order(name)))
    }

    /// The peer's challenge.
    fn question(&self) -> Result<Question, ChapError> {
        let id = self.id.ok_or(ChapError::Missing("CHAP_I"))?;
        let id =
            super::negotiation::number("CHAP_I", id, 0, 255).map_err(|_| ChapError::Malformed("CHAP_I"))?;
        let challenge = self.challenge.ok_or(ChapError::Missing("CHAP_C"))?;
        let (bytes, encoding) =
            binary::parse(challenge, MAX_CHALLENGE_BYTES).ok_or(ChapError::Malformed("CHAP_C"))?;
        Ok(Question {
            id: id as u8,
            bytes,
            encoding,
        })
    }

    /// The peer's name and its answer to our challenge.
    fn proof(&self) -> Result<(&'a str, Vec<u8>), ChapError> {
        let name = self.name.ok_or(ChapError::Missing("CHAP_N"))?;
        let response = self.response.ok_or(ChapError::Missing("CHAP_R"))?;
        let (answer, _) =
            binary::parse(response, MAX_CHALLENGE_BYTES).ok_or(ChapError::Malformed("CHAP_R"))?;
        Ok((name, answer))
    }
}

/// A challenge of the peer.
#[derive(Debug)]
struct Question {
    id: u8,
    bytes: Vec<u8>,
    /// How the peer writes binary values; it is answered likewise.
    encoding: Encoding,
}

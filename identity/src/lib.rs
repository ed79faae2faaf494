//! Who somebody is, and what they may do: a certificate authority of our own, certificates, tokens, TLS, roles.
//!
//! One authority a cluster, kept by the coordinator ([`authority`]). Hosts and people hold a [`Credentials`] file. [`tls`] makes
//! connections on which both sides know each other, [`gate`] compares each verb with who asks, [`edges`] makes the secrets by which hosts read from each other. Deliberately absent: what a verb
//! does, and whether a host may speak for itself (the services' business); revocation, because certificates are short-lived.

#![forbid(unsafe_code)]

pub mod authority;
mod credentials;
mod der;
pub mod edges;
pub mod files;
pub mod gate;
pub mod tls;
pub mod token;
mod who;

pub use credentials::{Credentials, CredentialsError, Holder, NewKey};
pub use who::{Certified, NotOurs, Person, PersonError, Role, Who};

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970 by this machine's clock. Certificates speak of the time of day, so here it counts; leases never do.
#[must_use]
#[allow(
    clippy::disallowed_methods,
    reason = "a certificate's dates are of the wall clock, and of nothing else"
)]
pub fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    // By hand: a coordinator writes half a million secrets while a large fleet comes.
    let digit = |half: u8| char::from(half + if half < 10 { b'0' } else { b'a' - 10 });
    let digits = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
    digits.collect()
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut result = [0; 32];
    result.copy_from_slice(digest.as_ref());
    result
}

#[cfg(test)]
mod tests;

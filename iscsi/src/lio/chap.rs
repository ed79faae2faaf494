//! CHAP names and secrets in LIO's attributes.

use std::path::Path;

use super::configfs::Tree;
use super::{Lio, LioError};
use crate::login::{Chap, Credentials};

/// What LIO takes for "none": any value that begins with it.
const NONE: &str = "NULL";

/// Longest name or secret in bytes (MAX_USER_LEN and MAX_PASS_LEN, each less its end).
const MAX_BYTES: usize = 255;

/// One direction: the attributes of name and secret, and what they are to hold.
type Direction<'a> = (&'static str, &'static str, Option<&'a Credentials>);

fn directions(chap: Option<&Chap>) -> [Direction<'_>; 2] {
    [
        ("userid", "password", chap.map(Chap::initiator)),
        ("userid_mutual", "password_mutual", chap.and_then(Chap::target)),
    ]
}

impl Lio {
    /// Does an `auth` folder hold exactly this?
    pub(super) fn has_chap(&self, auth: &Path, chap: Option<&Chap>) -> Result<bool, LioError> {
        for (user, secret, credentials) in directions(chap) {
            let (name, word) = values(credentials);
            if !holds(&self.tree, &auth.join(user), name)? || !holds(&self.tree, &auth.join(secret), word)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes an `auth` folder hold exactly this; whether anything changed.
    pub(super) fn set_chap(&self, auth: &Path, chap: Option<&Chap>) -> Result<bool, LioError> {
        let mut changed = false;
        for (user, secret, credentials) in directions(chap) {
            let (name, word) = values(credentials);
            for (attribute, value) in [(user, name), (secret, word)] {
                let path = auth.join(attribute);
                if !holds(&self.tree, &path, value)? {
                    let value = if value.is_empty() { NONE.as_bytes() } else { value };
                    changed |= self.tree.set_secret(&path, value)?;
                }
            }
        }
        Ok(changed)
    }
}

fn values(credentials: Option<&Credentials>) -> (&[u8], &[u8]) {
    credentials.map_or((&[], &[]), |c| (c.user().as_bytes(), c.secret().expose()))
}

fn holds(tree: &Tree, path: &Path, value: &[u8]) -> Result<bool, LioError> {
    // What was never set reads as nothing, what was unset as the word for none.
    let unset = |tree: &Tree| -> Result<bool, LioError> {
        let found = tree.read(path)?.unwrap_or_default();
        Ok(found.is_empty() || found == NONE)
    };
    if value.is_empty() {
        unset(tree)
    } else {
        tree.holds(path, value)
    }
}

/// Can LIO hold this?
///
/// # Errors
/// [`LioError::Chap`].
pub(super) fn check(chap: &Chap, whose: &str) -> Result<(), LioError> {
    for (_, _, credentials) in directions(Some(chap)) {
        let (name, secret) = values(credentials);
        for (what, value) in [("name", name), ("secret", secret)] {
            let why = if value.len() > MAX_BYTES {
                "it is longer than 255 bytes"
            } else if value.starts_with(NONE.as_bytes()) {
                "LIO takes a value that begins with NULL for none at all"
            } else if value.contains(&0) || value.ends_with(b"\n") {
                "a zero byte or a line's end would cut it short"
            } else {
                continue;
            };
            return Err(LioError::Chap {
                what,
                whose: whose.into(),
                why,
            });
        }
    }
    Ok(())
}

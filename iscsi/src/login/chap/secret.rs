//! What must not be known to others, and who is known by it.

use std::fmt;

use subtle::ConstantTimeEq;

/// The shortest secret in bytes: 96 bits, below which RFC 7143 §12.1.3 wants IPsec around the connection.
pub const MIN_SECRET_BYTES: usize = 12;

/// The longest secret in bytes. Other initiators and targets hold no longer ones.
pub const MAX_SECRET_BYTES: usize = 255;

/// The longest name in bytes; an iSCSI name has at most 223.
pub const MAX_USER_BYTES: usize = 255;

/// Why credentials cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChapSetupError {
    /// It could be guessed.
    #[error(
        "the secret has {bytes} bytes; CHAP needs at least {MIN_SECRET_BYTES}, and they should be random"
    )]
    TooShort {
        /// Its length in bytes.
        bytes: usize,
    },
    /// Other implementations could not hold it.
    #[error("the secret has {bytes} bytes; {MAX_SECRET_BYTES} is the most that all initiators take")]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
    },
    /// Not a text value of iSCSI.
    #[error("'{}' is no CHAP name; one has 1 to {MAX_USER_BYTES} bytes and no control characters", user.escape_debug())]
    User {
        /// The name.
        user: String,
    },
    /// Each side could have the other answer its own challenge.
    #[error("initiator and target have the same secret; mutual CHAP needs two that differ")]
    SameSecret,
}

/// A secret. It is never printed, and compared in a time that does not tell how much of it is right.
#[derive(Clone)]
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Takes a secret of [`MIN_SECRET_BYTES`] to [`MAX_SECRET_BYTES`].
    ///
    /// # Errors
    /// [`ChapSetupError::TooShort`], [`ChapSetupError::TooLong`].
    pub fn new(secret: impl Into<Vec<u8>>) -> Result<Self, ChapSetupError> {
        let secret = secret.into();
        match secret.len() {
            bytes @ ..MIN_SECRET_BYTES => Err(ChapSetupError::TooShort { bytes }),
            MIN_SECRET_BYTES..=MAX_SECRET_BYTES => Ok(Self(secret.into())),
            bytes => Err(ChapSetupError::TooLong { bytes }),
        }
    }

    /// The secret itself, for those who hand it to a kernel or hash it.
    pub(crate) fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

/// A name (CHAP_N) and the secret that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    user: String,
    secret: Secret,
}

impl Credentials {
    /// Takes a name of 1 to [`MAX_USER_BYTES`] bytes without control characters.
    ///
    /// # Errors
    /// [`ChapSetupError::User`].
    pub fn new(user: impl Into<String>, secret: Secret) -> Result<Self, ChapSetupError> {
        let user = user.into();
        let fits = (1..=MAX_USER_BYTES).contains(&user.len()) && !user.contains(char::is_control);
        if fits {
            Ok(Self { user, secret })
        } else {
            Err(ChapSetupError::User { user })
        }
    }

    /// The name.
    pub fn user(&self) -> &str {
        &self.user
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }
}

/// By what two sides know each other; both hold the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chap {
    initiator: Credentials,
    target: Option<Credentials>,
}

impl Chap {
    /// The initiator proves itself to the target.
    pub fn one_way(initiator: Credentials) -> Self {
        Self {
            initiator,
            target: None,
        }
    }

    /// Each proves itself to the other. An initiator that holds this insists on the target's proof; a target gives it
    /// to initiators that ask.
    ///
    /// # Errors
    /// [`ChapSetupError::SameSecret`].
    pub fn mutual(initiator: Credentials, target: Credentials) -> Result<Self, ChapSetupError> {
        if initiator.secret == target.secret {
            return Err(ChapSetupError::SameSecret);
        }
        Ok(Self {
            initiator,
            target: Some(target),
        })
    }

    /// What the initiator proves itself by.
    pub fn initiator(&self) -> &Credentials {
        &self.initiator
    }

    /// What the target proves itself by; `None`: it does not.
    pub fn target(&self) -> Option<&Credentials> {
        self.target.as_ref()
    }
}

//! A client that speaks to several peers shows each of them the same.

use super::{Dialer, SetupError};
use crate::who::Who;

impl Dialer {
    /// The same, to another peer.
    ///
    /// # Errors
    /// [`SetupError`]; also where this one shows nothing.
    pub fn to(&self, expected: Who) -> Result<Self, SetupError> {
        match self {
            Self::Insecure => Ok(Self::Insecure),
            Self::Mutual(_, Some(holder)) => Self::mutual(holder, expected),
            Self::Mutual(_, None) => Err(SetupError("there is no certificate to show".into())),
        }
    }
}

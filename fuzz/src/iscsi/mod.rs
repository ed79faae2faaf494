//! What an initiator may send, from a header to a whole session, and what a target may answer to a login.

mod cdb;
mod login;
mod pdu;
mod session;

pub use cdb::cdb;
pub use login::login;
pub use pdu::pdu;
pub use session::{framed, raw, session};

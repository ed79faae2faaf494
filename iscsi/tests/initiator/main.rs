//! The initiator against targets that misbehave on purpose, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers as well")]

mod access;
mod fake;
mod group;
mod own;
mod proxy;
mod security;
mod session;

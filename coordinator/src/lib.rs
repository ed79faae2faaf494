//! The coordinator: keeps the attach tree of every image.
//!
//! `tree` decides and knows neither clock nor disk nor network; `store` keeps the record; `owner` is the one task that
//! owns the trees; `rpc` turns calls into events; `face` is what is seen over HTTP; `identity` knows who may call; `daemon` puts them together.
//! Deliberately absent: any way for blocks of an image to pass through.

#![forbid(unsafe_code)]

pub mod daemon;
mod face;
mod figures;
pub mod identity;
mod note;
pub mod outbox;
pub mod owner;
pub mod planted;
pub mod rpc;
pub mod rules;
pub mod store;
pub mod tree;

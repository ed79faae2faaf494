//! The laws of the trees, and each fault of the earlier coordinator as a test named for the law that it broke.

mod beats;
mod census;
mod images;
mod laws;
mod places;
mod racks;
mod rebuild;
mod world;

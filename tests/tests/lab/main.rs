//! Real Linux hosts: what must hold on each plane and where planes mix. Which plane a host has is a parameter of every scenario.

#![forbid(unsafe_code)]

mod bytes;
mod faults;
mod power;
mod rate;
mod root_fs;
mod spread;
mod strangers;
mod support;

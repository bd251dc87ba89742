//! NCCL groups: over a fake library on every machine, over a GPU where there is one.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]
#![allow(unsafe_code, reason = "fault switches of the fake, and streams of another library")]

mod elements;
mod fake;
mod faults;
mod gpu;
mod host;
mod operations;
mod ordered;
mod ranks;

//! The worker: one per host. It starts ranks and replicas as their own processes, keeps their
//! output, reports what becomes of them, and clears away what a former incarnation left behind.
//!
//! It decides nothing (the leading coordinator does) and never sees a tensor or a GPU library.
//! While the control plane is away its ranks run on untouched.

#![forbid(unsafe_code)]

mod agent;
mod archive;
mod capture;
mod error;
mod flight;
mod folder;
mod leave;
mod ledger;
mod lines;
mod notice;
mod process;
mod session;
mod spool;
mod stacks;
mod stopped;
mod strays;
mod task;
mod threads;
mod worker;

pub use error::WorkerError;
pub use worker::{Worker, WorkerOptions};

//! The pure half of `cluster chaos`: which faults strike when, what the availability of spot nodes
//! looks like, and what it costs a job under one way to recover or another.
//!
//! Nothing here signals a process, reads a file or a clock: a [`Plan`] is offsets out of a seed, a
//! [`Trace`] is parsed from text, [`simulate`] is arithmetic. So the same seed gives the same faults,
//! samples and figures on every machine.

#![forbid(unsafe_code)]
#![warn(clippy::disallowed_methods)]

mod fault;
mod parcae;
mod plan;
mod policy;
mod random;
mod sample;
mod simulate;
mod skypilot;
mod trace;

pub use fault::{Fault, FaultKind, Role, Target, UnknownFault, UnknownRole};
pub use parcae::format as format_parcae;
pub use plan::{Plan, PlanOptions, Strike, Targets};
pub use policy::{Keeps, Policy, classes};
pub use random::Random;
pub use sample::{Sample, samples};
pub use simulate::{Outcome, simulate};
pub use skypilot::format as format_skypilot;
pub use trace::{Change, Statistics, Trace, TraceError};

//! The coordinator's pure half: the replicated records and the decisions taken over them.
//!
//! Nothing here opens a socket, starts a thread, reads a clock or draws a random number: time comes
//! in as [`Millis`], everything else as an [`Input`], and what is to be done goes out as a
//! [`Decision`]. So the same inputs give the same decisions, and golden scripts (`tests/scripts`)
//! can show all of them. `clippy.toml` beside this crate's manifest bans the calls that would
//! break this.

#![forbid(unsafe_code)]
#![warn(clippy::disallowed_methods)]

pub mod flight;
pub mod leader;
pub mod records;
pub mod retention;
pub mod transaction;

pub use leader::{
    Decision, Effect, Input, Leader, LeaderOptions, Millis, Reason, Refusal, SessionId, TaskPlace,
};
pub use records::{Outcome, RecordError, Records, Versioned};
pub use retention::Retention;
pub use transaction::{DecodeError, Precondition, RecordKey, Transaction, Write};

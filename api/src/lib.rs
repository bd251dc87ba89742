//! What crosses a process boundary: .proto files, ids, units, the documents of cluster.toml and
//! job.toml, records, events and messages.
//!
//! Nothing here decides or does anything; every other crate depends on this one and it on none.

#![forbid(unsafe_code)]

pub mod config;
pub mod connect;
pub mod control;
pub mod data_plane;
pub mod document;
pub mod environment;
pub mod events;
pub mod exit;
pub mod finding;
pub mod flight;
pub mod ids;
pub mod job;
pub mod records;
pub mod samples;
pub mod schema;
pub mod session;
pub mod stacks;
pub mod units;

/// Generated from `proto/`.
#[allow(missing_docs, unused_qualifications, clippy::all, reason = "generated code")]
pub mod pb {
    tonic::include_proto!("cohort.v1");
}

pub use exit::ExitClass;
pub use ids::{Generation, Name, NodeId, Rank, Secret, Step, TaskId};
pub use job::JobSpec;

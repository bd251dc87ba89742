//! The control plane's shell: raft, its log on disk, the RPC services, the leader's effects, and
//! the client that talks to them.
//!
//! Decisions are not here: they are pure functions in `coordinator-core`. This crate feeds them one
//! input at a time, commits what they write, and only then carries out what they ask for.

#![forbid(unsafe_code)]

mod adopt;
mod client;
mod client_error;
mod client_stream;
mod cluster_service;
mod coordinator;
mod coordinator_error;
mod flight;
mod leader_loop;
mod leadership;
mod log_history;
mod log_stream;
mod logs;
mod peers;
mod raft_node;
mod random;
mod secrets;
mod server;
mod session;
mod status;
mod sweep;
mod term;
mod token;
mod watch;

pub use client::ClusterClient;
pub use client_error::ClientError;
pub use client_stream::{EventStream, LineStream};
pub use coordinator::{Coordinator, CoordinatorHandle, CoordinatorOptions, Validate};
pub use coordinator_error::CoordinatorError;
pub use raft_node::{
    FolderError, ProposeError, RaftHandle, RaftNode, RaftOptions, RaftService, RaftStatus,
    StartError, StopReason,
};
pub use random::RandomError;

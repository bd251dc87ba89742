//! The replicated log: raft over redb, its transport, its snapshots.
//!
//! What it is: one raft group of the coordinators named in cluster.toml. A caller proposes a
//! [`coordinator_core::Transaction`] on the leader; once a majority has it on disk it is applied to
//! [`coordinator_core::Records`] on every node, in the same order. What it is not: a place for
//! decisions, or for anything about workers and jobs.
//!
//! Invariants:
//! - **Nothing acknowledged is lost.** A proposal is answered only after its entry was committed by
//!   a majority (each of them having it on disk, fsync included) and applied here.
//! - **What is on disk is consistent at any instruction.** Entries, raft's hard state, snapshot and
//!   truncation live in one redb file; whatever must agree is written in one transaction. The
//!   records are never stored beside the log: they are the last snapshot plus the committed entries
//!   after it, so they cannot disagree with it.
//! - **A retry is harmless.** Outcomes are remembered by request id inside the records themselves.
//! - **No wait without an end.** raft-rs answers a proposal on a cut-off leader with `Ok` and then
//!   nothing, so every proposal has its caller's deadline and ends when leadership does.
//!
//! ```text
//!  caller ── propose ──▶ RaftHandle ─┐ bounded                      ┌─▶ Outbox ─▶ task ─▶ peer 2
//!                                    ├────────▶ thread "raft": Driver┤
//!  peers ── Step ──▶ RaftService ────┘ channel   RawNode + LogStore └─▶ Outbox ─▶ task ─▶ peer 3
//! ```
//!
//! Membership is the one in cluster.toml, fixed at the first start. A coordinator whose folder was
//! lost must not come back under its old id (it could vote twice in one term): every folder has an
//! identity, drawn at its creation, that peers remember; see [`folder`] and [`service`].

mod driver;
mod folder;
mod handle;
mod logger;
mod node;
mod options;
mod outbox;
mod service;
mod snapshot;
mod storage;
mod transport;

pub use folder::FolderError;
pub use handle::{ProposeError, RaftHandle, RaftStatus, StopReason};
pub use node::RaftNode;
pub use options::{RaftOptions, StartError};
pub use service::RaftService;

//! What the harness and its ranks say to each other: one line of JSON each.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::census::Census;

/// What a rank is to do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Listen for the next group; answered by `Listening`.
    Listen { address: IpAddr },
    /// Form a group with what listens; answered by `Formed` or `Unformed`.
    Form { generation: u64, rank: u32, peers: Vec<SocketAddr>, transport: String },
    /// Repeat the operation of a case until it fails; answered by `Inside`, then `Failed`.
    Repeat { seed: u64 },
    /// Make this rank's calls of a mismatch; answered by `Failed`.
    Differ { seed: u64 },
    /// What the coordinator pushes: breaks off whatever the rank does; not answered.
    Abort { reason: String },
    /// One all-reduce of numbers that are checked; answered by `Summed`.
    Sum,
    /// Leave the group; answered by `Left`.
    Leave,
    /// Count what the process holds; answered by `Counted`.
    Count,
}

/// What a rank answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    Ready,
    Listening {
        address: SocketAddr,
    },
    /// With the time since it was told to listen, and what moves the data.
    Formed {
        took: Duration,
        transport: String,
    },
    Unformed {
        error: String,
    },
    /// The first call is over and the next has begun.
    Inside,
    /// The group is gone.
    Failed(Failure),
    Summed,
    Left,
    Counted(Census),
}

/// How a call failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    /// When the first call began.
    pub begun: Duration,
    /// When the call that failed returned.
    pub at: Duration,
    pub peer: Option<u32>,
    pub error: String,
}

/// The clock that all processes of this host share.
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the system has this clock").into()
}

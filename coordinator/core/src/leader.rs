//! The leader: decisions taken once, over the records and what workers say.
//!
//! [`Leader::decide`] is a plain function of (records, volatile inventory, input, now).

mod decision;
mod reason;

pub use decision::{Decision, Effect, Input, LeaderOptions, Millis, Refusal, SessionId};
pub use reason::Reason;

use api::ids::NodeId;
use api::records::WorkerView;

use crate::records::Records;

/// What the leader knows beyond the records. Never holds a secret.
#[derive(Debug)]
pub struct Leader {
    #[expect(dead_code, reason = "the decisions follow")]
    options: LeaderOptions,
    #[expect(dead_code, reason = "the decisions follow")]
    node: NodeId,
}

impl Leader {
    /// A leader that has heard of no worker yet.
    pub fn new(options: LeaderOptions, node: NodeId, _records: &Records, _now: Millis) -> Self {
        Self { options, node }
    }

    /// Decides what to do about one input.
    pub fn decide(&mut self, _records: &Records, _now: Millis, _input: Input) -> Decision {
        Decision::default()
    }

    /// The workers as the leader sees them, by name.
    pub fn workers(&self, _now: Millis) -> Vec<WorkerView> {
        Vec::new()
    }
}

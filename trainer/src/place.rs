//! A process's place in a generation of its gang: first from its assignment, later from orders to
//! regroup.

use api::events::CheckpointFact;
use api::session::{Regroup, TrainAssignment};
use api::units::Span;
use api::{Generation, Rank, Secret};

/// Who this process is in a generation.
#[derive(Clone, Debug)]
pub struct Place {
    /// The generation.
    pub generation: Generation,
    /// Its rank.
    pub rank: Rank,
    /// Ranks in the gang.
    pub world_size: u32,
    /// The newest recorded checkpoint.
    pub restore: Option<CheckpointFact>,
    /// What the ranks of the generation prove to one another.
    pub secret: Secret,
    /// Running time of earlier generations that counts towards `stop.max_time`.
    pub elapsed: Span,
}

impl Place {
    /// The place that the process was started for.
    pub fn first(assignment: &TrainAssignment) -> Self {
        Self {
            generation: assignment.generation,
            rank: assignment.rank,
            world_size: assignment.world_size,
            restore: assignment.restore.clone(),
            secret: assignment.secret.clone(),
            elapsed: assignment.elapsed,
        }
    }
}

impl From<Regroup> for Place {
    fn from(order: Regroup) -> Self {
        let Regroup { generation, rank, world_size, restore, secret, elapsed, reason: _ } = order;
        Self { generation, rank, world_size, restore, secret, elapsed }
    }
}

//! Ways to recover, by what they cost.
//!
//! The classes are those that published systems fall into; their seconds are the figures that these
//! systems state or that a launcher of that kind takes, not measurements made here.

use std::time::Duration;

use serde::Serialize;

/// What is left of the work since the last checkpoint when some nodes go and others stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keeps {
    /// All but the step under way: survivors hold the state in memory.
    Memory,
    /// Nothing: every rank starts again from the checkpoint.
    Checkpoint,
}

/// How a job recovers and what that costs it. A cost stalls every node that is there then.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Policy {
    /// Its name in tables.
    pub name: String,
    /// From a loss until it is known.
    pub detect: Duration,
    /// From then until the remaining nodes go on.
    pub shrink: Duration,
    /// For nodes that join.
    pub grow: Duration,
    /// In place of `detect` and `shrink`, and with nothing lost, where losses are announced; none:
    /// announcements are not used.
    pub noticed: Option<Duration>,
    /// To begin from a checkpoint when no node was left.
    pub restart: Duration,
    /// A step: on a loss, the one under way is computed again.
    pub step: Duration,
    /// Training time between two checkpoints; less than a second counts as one.
    pub checkpoint: Duration,
    /// How long a checkpoint stops the steps.
    pub save: Duration,
    /// What survives the loss of some nodes.
    pub keeps: Keeps,
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

impl Policy {
    /// Cohort: survivors keep process and memory, the gang shrinks at once and grows in place. With
    /// `noticed`, nodes that are announced to go leave between two steps.
    pub fn cohort(noticed: bool) -> Self {
        Self {
            name: if noticed { "cohort, noticed" } else { "cohort" }.into(),
            detect: seconds(1),
            shrink: seconds(4),
            grow: seconds(1),
            noticed: noticed.then_some(seconds(1)),
            restart: seconds(5),
            step: STEP,
            checkpoint: seconds(60),
            save: seconds(0),
            keeps: Keeps::Memory,
        }
    }

    /// Cohort with what its benchmarks measure, instead of assumptions: a host that is gone without a
    /// word is known by its lease, and checkpoints are cheap enough to be frequent.
    pub fn cohort_measured(noticed: bool) -> Self {
        Self {
            name: if noticed { "cohort, measured, noticed" } else { "cohort, measured" }.into(),
            detect: Duration::from_millis(2_500),
            shrink: Duration::from_millis(500),
            grow: Duration::from_millis(500),
            noticed: noticed.then_some(Duration::from_millis(500)),
            restart: seconds(5),
            step: STEP,
            checkpoint: seconds(20),
            save: Duration::from_millis(50),
            keeps: Keeps::Memory,
        }
    }

    /// Everything starts again on every change, as torchrun's elastic agent does.
    pub fn restart_all(checkpoint: Duration) -> Self {
        let minutes = checkpoint.as_secs() / 60;
        Self {
            name: format!("restart all, checkpoint every {minutes} min"),
            detect: seconds(0),
            shrink: seconds(300),
            grow: seconds(300),
            noticed: None,
            restart: seconds(300),
            step: STEP,
            checkpoint,
            save: seconds(0),
            keeps: Keeps::Checkpoint,
        }
    }

    /// The process of every rank is replaced and its state fetched from peers: `stall` for every
    /// change.
    pub fn replace(name: &str, stall: Duration) -> Self {
        Self {
            name: name.into(),
            detect: seconds(0),
            shrink: stall,
            grow: stall,
            noticed: None,
            restart: stall,
            step: STEP,
            checkpoint: seconds(60),
            save: seconds(0),
            keeps: Keeps::Memory,
        }
    }
}

/// A large model's step.
const STEP: Duration = seconds(5);

/// The table's rows: assumptions from the slowest to recover to the fastest, then what is measured.
pub fn classes() -> Vec<Policy> {
    vec![
        Policy::restart_all(seconds(30 * 60)),
        Policy::restart_all(seconds(5 * 60)),
        Policy::replace("replace in 90 s, lose one step", seconds(90)),
        Policy::replace("migrate in 20 s, lose one step", seconds(20)),
        Policy::cohort(false),
        Policy::cohort(true),
        Policy::cohort_measured(false),
        Policy::cohort_measured(true),
    ]
}

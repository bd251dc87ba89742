//! Why the leader did what it did, or did nothing: one sentence for logs, status and golden traces.

use std::fmt;

use api::ids::{Generation, Name, TaskId};
use api::records::Phase;

/// Why a decision came out as it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No worker is attached that could run anything.
    NoWorker,
    /// The workload at the head of the queue waits for slots.
    NeedsSlots {
        /// The workload.
        name: Name,
        /// Slots it needs at once.
        needs: u32,
        /// Free slots now.
        free: u32,
        /// Slots of all workers.
        total: u32,
        /// Workers that could run something.
        workers: usize,
    },
    /// It needs more slots than all workers together have; others may go first.
    TooLarge {
        /// The workload.
        name: Name,
        /// Slots it needs at once.
        needs: u32,
        /// Slots of all workers.
        total: u32,
    },
    /// It lacks slots, and a worker gets no work because the check of its host failed.
    Unfit {
        /// The workload.
        name: Name,
        /// The worker.
        worker: Name,
        /// What failed.
        why: String,
    },
    /// Workloads submitted earlier are placed first.
    Behind,
    /// The former generation's tasks are not all gone.
    Clearing {
        /// The workload.
        name: Name,
        /// The generation that ended.
        generation: Generation,
        /// What is waited for.
        waits_for: String,
    },
    /// The store is being searched for checkpoints that were not recorded yet.
    Adopting {
        /// The workload.
        name: Name,
        /// The generation that ended.
        generation: Generation,
    },
    /// A failed endpoint waits before its next start.
    BackingOff {
        /// The endpoint.
        name: Name,
        /// Milliseconds from the failure to the next start.
        wait_ms: u64,
    },
    /// A gang or replica was placed.
    Placed {
        /// The workload.
        name: Name,
        /// The new generation.
        generation: Generation,
        /// Which ranks where.
        places: String,
    },
    /// The workload moved on in its life.
    Changed {
        /// The workload.
        name: Name,
        /// Its new state, one sentence.
        text: String,
    },
    /// Something has begun, and what it waits for is named.
    Waiting {
        /// The workload.
        name: Name,
        /// What is waited for.
        text: String,
    },
    /// A word of a generation that is over, or of a task that is nobody's.
    Superseded {
        /// Who said it.
        task: TaskId,
        /// The current generation.
        current: Generation,
    },
    /// Something worth a line that changes no workload: a worker came, a word was repeated.
    Remark(String),
    /// A record could not be read; nothing is decided about it.
    Unreadable(String),
}

impl Reason {
    /// For a workload's own record: what was decided changed it.
    pub(crate) fn changed(name: Name, phase: Phase, reason: &str) -> Self {
        let begins_with_phase = reason.starts_with(&phase.to_string());
        let text = if begins_with_phase { reason.to_owned() } else { format!("{phase}: {reason}") };
        Self::Changed { name, text }
    }

    /// The sentence without the workload's name, for its own status.
    pub(crate) fn for_status(&self) -> String {
        let text = self.to_string();
        let name = match self {
            Self::NeedsSlots { name, .. }
            | Self::TooLarge { name, .. }
            | Self::Unfit { name, .. } => name,
            _ => return text,
        };
        text.strip_prefix(&format!("`{name}` ")).map(str::to_owned).unwrap_or(text)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoWorker => write!(f, "no worker is attached"),
            Self::NeedsSlots { name, needs, free, total, workers } => write!(
                f,
                "`{name}` needs {}, {free} of {total} free on {}: waiting",
                count(*needs as usize, "slot"),
                count(*workers, "worker")
            ),
            Self::TooLarge { name, needs, total } => write!(
                f,
                "`{name}` needs {}, the whole cluster has {total}: waiting for more workers, \
                 others may go first",
                count(*needs as usize, "slot")
            ),
            Self::Unfit { name, worker, why } => {
                write!(f, "`{name}` waits for slots: `{worker}` failed its health check: {why}")
            }
            Self::Behind => write!(f, "waiting for workloads submitted earlier"),
            Self::Clearing { name, generation, waits_for } => {
                write!(f, "`{name}` waits for the end of {generation}: {waits_for}")
            }
            Self::Adopting { name, generation } => write!(
                f,
                "`{name}` waits for a search of the store for checkpoints that {generation} \
                 completed unrecorded"
            ),
            Self::BackingOff { name, wait_ms } => {
                write!(f, "`{name}` failed and starts again {wait_ms} ms after that")
            }
            Self::Placed { name, generation, places } => {
                write!(f, "placed `{name}` as {generation}: {places}")
            }
            Self::Changed { name, text } | Self::Waiting { name, text } => {
                write!(f, "`{name}`: {text}")
            }
            Self::Superseded { task, current } => {
                write!(
                    f,
                    "ignored a word of {task}: its generation is over, the newest is {current}"
                )
            }
            Self::Remark(text) | Self::Unreadable(text) => f.write_str(text),
        }
    }
}

/// "1 slot", "2 slots".
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

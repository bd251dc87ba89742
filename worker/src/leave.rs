//! What keeps this worker from taking tasks, and what it says of it: the strongest of an end, a drain
//! and a host that had better be avoided.

use std::time::Duration;

use api::session::{LeaveScope, WorkerMessage};
use tokio::time::Instant;

/// Time left for the leader and the store to take the last words, before the host is gone …
const MARGIN_MAX: Duration = Duration::from_secs(5);
/// … but no more than this part of the notice: most of it belongs to the ranks.
const MARGIN_PART: u32 = 4;

/// A reason to leave, as the leader is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leave {
    pub(crate) scope: LeaveScope,
    /// Stands behind "`w2` is leaving: ".
    pub(crate) cause: String,
    /// When the host is gone or the tasks have to be.
    pub(crate) deadline: Option<Instant>,
}

impl Leave {
    pub(crate) fn message(&self) -> WorkerMessage {
        let left = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
        WorkerMessage::Leaving {
            deadline_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            cause: self.cause.clone(),
            scope: self.scope,
        }
    }
}

/// Everything that keeps a worker from taking tasks.
#[derive(Debug, Default)]
pub(crate) struct Leaves {
    pub(crate) end: Option<Leave>,
    pub(crate) drain: Option<Leave>,
    pub(crate) avoid: Option<Leave>,
}

impl Leaves {
    /// What the leader is to know; nothing: that the worker stays.
    pub(crate) fn word(&self) -> Option<Leave> {
        self.end.as_ref().or(self.drain.as_ref()).or(self.avoid.as_ref()).cloned()
    }
}

/// Time that tasks get for their last checkpoint when the host goes in `left`. A time that has
/// passed tells nothing: the host is still there.
pub(crate) fn task_limit(stop_timeout: Duration, left: Option<Duration>) -> Duration {
    match left {
        Some(left) if !left.is_zero() => {
            stop_timeout.min(left - MARGIN_MAX.min(left / MARGIN_PART))
        }
        _ => stop_timeout,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_get_what_the_notice_leaves_them() {
        let seconds = Duration::from_secs;
        for (left, expected) in [
            (None, seconds(60)),
            (Some(seconds(0)), seconds(60)),
            (Some(seconds(4)), seconds(3)),
            (Some(seconds(30)), seconds(25)),
            (Some(seconds(120)), seconds(60)),
        ] {
            assert_eq!(task_limit(seconds(60), left), expected, "{left:?}");
        }
    }

    #[test]
    fn the_strongest_word_is_said() {
        let leave = |scope| Some(Leave { scope, cause: String::new(), deadline: None });
        let mut leaves = Leaves { avoid: leave(LeaveScope::Avoided), ..Leaves::default() };
        let said = |leaves: &Leaves| leaves.word().map(|word| word.scope);
        assert_eq!(said(&leaves), Some(LeaveScope::Avoided));
        leaves.drain = leave(LeaveScope::Drains);
        assert_eq!(said(&leaves), Some(LeaveScope::Drains));
        leaves.end = leave(LeaveScope::Ends);
        assert_eq!(said(&leaves), Some(LeaveScope::Ends));
        assert_eq!(said(&Leaves::default()), None);
    }
}

//! What an availability trace leaves of a data-parallel elastic job under a way to recover.
//!
//! The job does work in proportion to its nodes. Every change of their number stalls all that are
//! there; a loss throws away the step under way or, where ranks start again from a checkpoint, the
//! work since that one, and so does the loss of all nodes whatever the policy. After a change during a
//! stall the nodes stand still for its own cost or what is left of the stall, whichever is longer; no
//! step is under way then. Work at the end of the window counts if a checkpoint or a survivor's
//! memory holds it. Left out: that a changed batch or fewer nodes may train worse, and that nodes
//! differ.

use std::time::Duration;

use serde::Serialize;

use crate::policy::{Keeps, Policy};
use crate::trace::Trace;

/// Where the node-seconds of a trace went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Node-seconds that there were.
    pub available: f64,
    /// Of these, spent on work that counts.
    pub useful: f64,
    /// Of these, spent standing still.
    pub stalled: f64,
    /// Of these, spent on work that was thrown away or is not held by anyone at the end.
    pub lost: f64,
    /// Changes of the number of nodes that the job lived through, its start among them.
    pub changes: u64,
}

impl Outcome {
    /// Useful over available node-seconds: time without any node is left out. None where there never
    /// was one.
    pub fn goodput(&self) -> Option<f64> {
        (self.available > 0.0).then(|| self.useful / self.available)
    }
}

/// Runs a job under `policy` on the nodes of `trace`.
pub fn simulate(trace: &Trace, policy: &Policy) -> Outcome {
    let mut job = Job {
        policy,
        outcome: Outcome::default(),
        nodes: 0,
        stall_left: Duration::ZERO,
        open: Vec::new(),
    };
    for (start, end, nodes) in trace.stretches() {
        let stall = job.change(nodes);
        job.run(Duration::from_millis(end - start), stall);
    }
    if policy.keeps == Keeps::Checkpoint || job.nodes == 0 {
        job.lose_open();
    }
    job.outcome.useful += job.open_work();
    job.outcome
}

/// A stretch of work that no checkpoint holds yet.
#[derive(Clone, Copy)]
struct Work {
    seconds: f64,
    nodes: u32,
}

struct Job<'a> {
    policy: &'a Policy,
    outcome: Outcome,
    nodes: u32,
    /// Of the last stall, what a change came before.
    stall_left: Duration,
    /// Work since the last checkpoint, oldest first.
    open: Vec<Work>,
}

impl Job<'_> {
    /// The number of nodes becomes `nodes`; gives how long those stand still.
    fn change(&mut self, nodes: u32) -> Duration {
        let before = std::mem::replace(&mut self.nodes, nodes);
        let policy = self.policy;
        self.outcome.changes += u64::from(nodes > 0 || before > 0);
        let left = std::mem::take(&mut self.stall_left);
        let cost = match (before, nodes) {
            (_, 0) => {
                // Announced, the last nodes save before they go.
                if policy.noticed.is_none() {
                    self.lose_open();
                } else {
                    self.commit();
                }
                Duration::ZERO
            }
            (0, _) => policy.restart,
            _ if policy.keeps == Keeps::Checkpoint => {
                self.lose_open();
                if nodes < before { policy.detect + policy.shrink } else { policy.grow }
            }
            _ if nodes > before => policy.grow,
            _ => policy.noticed.unwrap_or_else(|| {
                if left.is_zero() {
                    self.lose(policy.step.as_secs_f64());
                }
                policy.detect + policy.shrink
            }),
        };
        // What all nodes that went were waiting for goes with them.
        if before == 0 || nodes == 0 { cost } else { cost.max(left) }
    }

    /// The present nodes are there for `span`, the first `stall` of which they stand still.
    fn run(&mut self, span: Duration, stall: Duration) {
        if self.nodes == 0 {
            return;
        }
        let nodes = f64::from(self.nodes);
        self.stall_left = stall.saturating_sub(span);
        let stalled = stall.min(span).as_secs_f64();
        self.outcome.available += span.as_secs_f64() * nodes;
        self.outcome.stalled += stalled * nodes;
        let interval = self.policy.checkpoint.as_secs_f64().max(1.0);
        let mut left = span.as_secs_f64() - stalled;
        while left > 0.0 {
            let since: f64 = self.open.iter().map(|work| work.seconds).sum();
            let seconds = left.min((interval - since).max(0.0));
            self.open.push(Work { seconds, nodes: self.nodes });
            left -= seconds;
            if left > 0.0 {
                let saving = self.policy.save.as_secs_f64().min(left);
                self.outcome.stalled += saving * nodes;
                left -= saving;
                self.commit();
            }
        }
    }

    fn open_work(&self) -> f64 {
        self.open.iter().map(|work| work.seconds * f64::from(work.nodes)).sum()
    }

    /// A checkpoint holds all work so far.
    fn commit(&mut self) {
        self.outcome.useful += self.open_work();
        self.open.clear();
    }

    fn lose_open(&mut self) {
        self.outcome.lost += self.open_work();
        self.open.clear();
    }

    /// The newest `seconds` of work are thrown away, as far as there are any.
    fn lose(&mut self, seconds: f64) {
        let mut left = seconds;
        while let Some(work) = self.open.last_mut() {
            let gone = work.seconds.min(left);
            self.outcome.lost += gone * f64::from(work.nodes);
            work.seconds -= gone;
            left -= gone;
            if work.seconds > 0.0 {
                break;
            }
            self.open.pop();
        }
    }
}

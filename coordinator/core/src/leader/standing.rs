//! Where the tasks of a generation are: the records' gang against the workers' inventories.
//!
//! Only looks; what is to be done about it is decided in `train.rs` and `serve.rs`.

use std::collections::BTreeMap;

use api::ids::{Name, Rank};
use api::records::{Phase, Placement};
use api::session::ExitCause;

use super::Leader;
use super::decision::Millis;
use super::gang::Gang;
use super::index::Workload;
use super::workers::{Worker, task_id};

/// Where the ranks of a current gang are.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// On an attached or only just detached worker.
    pub(super) present: BTreeMap<Rank, Name>,
    /// On workers that have not come back to this leader yet.
    pub(super) away: Vec<Placement>,
    /// Not started yet, on an attached worker.
    pub(super) untold: Vec<Placement>,
    /// Not on their attached worker: they ended, and nobody knows how.
    pub(super) unseen: Vec<Placement>,
    /// On a worker that is gone, with what is known of that.
    pub(super) lost: Vec<(Placement, ExitCause)>,
}

impl Standing {
    /// Whether no task of the gang can be anywhere.
    pub(super) fn is_empty(&self) -> bool {
        self.present.is_empty() && self.away.is_empty() && self.untold.is_empty()
    }

    /// Whether every task is on its worker, will be, or ended under this leader's eyes.
    pub(super) fn is_accounted_for(&self) -> bool {
        self.unseen.is_empty() && self.lost.is_empty()
    }

    /// Puts the ends that are only inferred into the gang. `unseen`: what is to be thought of a
    /// task that ended while no coordinator led.
    pub(super) fn settle(&mut self, gang: &mut Gang, unseen: &ExitCause, now: Millis) {
        for place in self.unseen.drain(..) {
            gang.exited(place.rank, &place.worker, unseen.clone(), now);
        }
        for (place, cause) in self.lost.drain(..) {
            gang.exited(place.rank, &place.worker, cause, now);
        }
    }
}

/// An end that no leader heard of in time to record it.
pub(super) fn ended_unseen() -> ExitCause {
    ExitCause::WorkerLost { reason: "it ended while no coordinator led".into() }
}

/// The present rank that has come least far towards running.
pub(super) fn slowest<'a>(
    workers: &BTreeMap<Name, Worker>,
    workload: &Workload,
    standing: &'a Standing,
) -> Option<(Rank, &'a Name)> {
    let stage = |rank: Rank, worker: &Name| {
        let task = task_id(workload, rank);
        workers.get(worker).and_then(|w| w.tasks.get(&task)).map(|task| task.stage)
    };
    let present = standing.present.iter().map(|(rank, worker)| (*rank, worker));
    present.min_by_key(|(rank, worker)| stage(*rank, worker))
}

impl Leader {
    /// Where the ranks of the current gang are. Ranks known to have ended are nowhere.
    pub(super) fn standing(&self, workload: &Workload, now: Millis) -> Standing {
        let mut standing = Standing::default();
        // Later than that every task was told, whoever led.
        let gang = self.gangs.get(workload.name());
        let mine = gang.filter(|gang| workload.phase() == Phase::Starting && gang.is_mine());
        for place in workload.gang() {
            // A process that was there before is not started again; a spare may not have been yet.
            let may_be_untold = mine
                .is_some_and(|gang| place.started_as.is_none() || gang.is_unstarted(place.rank));
            if self.has_ended(workload, place.rank) {
                continue;
            }
            let lost = |reason: String| (place.clone(), ExitCause::WorkerLost { reason });
            match self.workers.get(&place.worker) {
                Some(worker) if worker.is_lost => {
                    standing.lost.push(lost("its lease ran out".into()));
                }
                Some(worker) if worker.tasks.contains_key(&workload.task(place)) => {
                    standing.present.insert(place.rank, place.worker.clone());
                }
                Some(worker) if may_be_untold && worker.session.is_some() => {
                    standing.untold.push(place.clone());
                }
                Some(_) if may_be_untold => standing.away.push(place.clone()),
                Some(_) => standing.unseen.push(place.clone()),
                None if self.is_past_grace(now) => {
                    let grace = self.options.grace_ms;
                    let text = format!("it has not come back to the new leader for {grace} ms");
                    standing.lost.push(lost(text));
                }
                None => standing.away.push(place.clone()),
            }
        }
        standing
    }

    /// What is left of a generation that is over, in words; `None` when nothing is.
    pub(super) fn left_over(&self, workload: &Workload, now: Millis) -> Option<String> {
        workload.gang().iter().find_map(|place| {
            let task = workload.task(place);
            match self.workers.get(&place.worker) {
                Some(worker) if worker.is_lost => None,
                Some(worker) if worker.tasks.contains_key(&task) => {
                    Some(format!("{} on `{}` has not ended yet", place.rank, place.worker))
                }
                Some(_) => None,
                None if self.is_past_grace(now) => None,
                None => Some(format!("`{}` has not come back to the new leader", place.worker)),
            }
        })
    }
}

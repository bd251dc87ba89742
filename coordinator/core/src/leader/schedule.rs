//! Who runs next and where: first come, first served, a whole gang or nothing of it.
//!
//! The queue is ordered by time of submission, then name. Its head waits for slots and nobody
//! overtakes it, because a stream of small workloads could otherwise keep a large one waiting for
//! ever. The one exception: a head that needs more slots than the whole cluster has cannot run
//! however long the others wait, so they go first until more workers come.

use std::collections::BTreeMap;

use api::ids::{Name, Rank};
use api::records::Placement;

use super::Leader;
use super::decision::Millis;
use super::draft::Draft;
use super::index::{Entry, Workload};
use super::reason::Reason;
use super::workers::Worker;

/// How long the former tasks of a restarting workload may keep the queue behind it waiting. They
/// are killed, so seconds suffice; a process that the kernel cannot end must not stop the cluster.
const CLEARING_HOLD_MS: u64 = 30_000;

/// Places `ranks` on workers with free slots: `None` when they do not all fit.
///
/// On one worker if one has room (the fullest such one, so that large gaps stay), else on as few as
/// possible. Ranks are numbered worker by worker in order of their names, so that a host's ranks
/// are neighbours and the reduction tree sums inside a host first.
pub(super) fn place(free: &BTreeMap<Name, u32>, ranks: u32) -> Option<Vec<Placement>> {
    let fits_alone = free.iter().filter(|(_, slots)| **slots >= ranks).min_by_key(|(_, s)| **s);
    let mut chosen: Vec<(&Name, u32)> = Vec::new();
    if let Some((name, _)) = fits_alone {
        chosen.push((name, ranks));
    } else {
        let mut emptiest: Vec<_> = free.iter().filter(|(_, slots)| **slots > 0).collect();
        emptiest.sort_by_key(|(_, slots)| std::cmp::Reverse(**slots));
        let mut missing = ranks;
        for (name, slots) in emptiest {
            let taken = missing.min(*slots);
            chosen.push((name, taken));
            missing -= taken;
            if missing == 0 {
                break;
            }
        }
        if missing > 0 {
            return None;
        }
    }
    chosen.sort();
    let workers = chosen.into_iter().flat_map(|(name, n)| std::iter::repeat_n(name, n as usize));
    let mut gang: Vec<Placement> = Vec::new();
    for (worker, rank) in workers.zip(0..) {
        let before = gang.last().filter(|last| last.worker == *worker);
        let local_rank = before.map_or(0, |last| last.local_rank + 1);
        let (rank, worker) = (Rank(rank), worker.clone());
        gang.push(Placement { rank, worker, started_as: None, local_rank });
    }
    Some(gang)
}

/// "r0 r1 on w1, r2 on w2".
pub(super) fn describe(gang: &[Placement]) -> String {
    let mut text = String::new();
    for (index, place) in gang.iter().enumerate() {
        text.push_str(if index == 0 { "" } else { " " });
        text.push_str(&place.rank.to_string());
        if gang.get(index + 1).is_none_or(|next| next.worker != place.worker) {
            let comma = if index + 1 < gang.len() { "," } else { "" };
            text.push_str(&format!(" on {}{comma}", place.worker));
        }
    }
    text
}

impl Leader {
    /// Places the first queued workload that may go, or writes why the queue waits. One transaction
    /// at most.
    pub(super) fn schedule(&mut self, draft: &mut Draft, records: &crate::Records, now: Millis) {
        let mut queue: Vec<Entry> = self
            .index
            .live()
            .filter(|(_, entry)| !entry.workload.phase().is_active())
            .map(|(_, entry)| entry.clone())
            .collect();
        if queue.is_empty() {
            return;
        }
        queue.sort_by_key(|e| (e.workload.submitted_ms(), e.workload.name().clone()));
        let free = self.free_slots();
        let mut is_blocked = false;
        for entry in queue {
            let reason = if is_blocked {
                Reason::Behind
            } else {
                match self.may_place(&entry.workload, &free, now) {
                    Ok(gang) => return self.begin(draft, records, &entry, gang, now),
                    Err(Waits { reason, holds_queue }) => {
                        is_blocked = holds_queue;
                        reason
                    }
                }
            };
            if self.is_given_up(&reason, &entry, now) {
                return self.give_up(draft, &entry, &free, now);
            }
            // Passing states explain themselves in the log; what a person waits for is recorded.
            let is_for_people = match &reason {
                Reason::NoWorker => self.is_past_grace(now),
                Reason::NeedsSlots { .. } | Reason::TooLarge { .. } | Reason::Unfit { .. } => true,
                Reason::Behind => self.is_ready(&entry.workload),
                _ => false,
            };
            let text = reason.for_status();
            if is_for_people && entry.workload.reason() != text {
                draft.decided(reason);
                return self.explain(draft, &entry, text);
            }
            if reason != Reason::Behind {
                draft.because(reason);
            }
        }
    }

    /// Whether nothing of a former generation is left.
    fn is_ready(&self, workload: &Workload) -> bool {
        workload.gang().is_empty()
    }

    /// A task of that name that is still on some worker, in words: one of a generation that was
    /// given up with its worker, which then came back. It is being killed.
    fn stray_of(&self, name: &Name) -> Option<String> {
        self.workers.iter().find_map(|(worker, state)| {
            let task = state.tasks.keys().find(|task| task.workload == *name)?;
            Some(format!("{} of {} on `{worker}` has not ended yet", task.rank, task.generation))
        })
    }

    pub(super) fn is_past_grace(&self, now: Millis) -> bool {
        now.since(self.since) >= self.options.grace_ms
    }

    fn may_place(
        &mut self,
        workload: &Workload,
        free: &BTreeMap<Name, u32>,
        now: Millis,
    ) -> Result<Vec<Placement>, Waits> {
        let name = workload.name().clone();
        let wait = |holds_queue, reason| Err(Waits { reason, holds_queue });
        let stray = self.stray_of(&name);
        if !self.is_ready(workload) || stray.is_some() {
            let gang = self.gangs.get_mut(&name);
            let since = gang.map_or(now, |gang| *gang.clearing_since.get_or_insert(now));
            let is_asked = self.gangs.get(&name).is_some_and(|gang| gang.adopt_asked.is_some());
            let generation = workload.generation();
            let reason = match stray {
                None if is_asked => Reason::Adopting { name, generation },
                stray => {
                    let waits_for = stray.unwrap_or_else(|| "its last tasks".into());
                    Reason::Clearing { name, generation, waits_for }
                }
            };
            return wait(now.since(since) < CLEARING_HOLD_MS, reason);
        }
        if let Workload::Endpoint(endpoint) = workload
            && let Some(wait_ms) = super::serve::back_off(&endpoint.status, now)
        {
            return wait(false, Reason::BackingOff { name, wait_ms });
        }
        let (needs, most) = workload.slots();
        let available: u32 = free.values().sum();
        if let Some(gang) = place(free, most.min(available).max(needs)) {
            return Ok(gang);
        }
        let kept_back = self.kept_back(&name);
        if free.is_empty() {
            return wait(true, kept_back.unwrap_or(Reason::NoWorker));
        }
        let total = self.slots_in_all();
        if needs > total {
            // Right after an election the cluster only looks small.
            let reason = kept_back.unwrap_or(Reason::TooLarge { name, needs, total });
            return wait(!self.is_past_grace(now), reason);
        }
        // Over in a moment, and no news for people.
        if let Some(reason @ Reason::Waiting { .. }) = kept_back {
            return wait(true, reason);
        }
        let (free, workers) = (free.values().sum(), free.len());
        wait(true, Reason::NeedsSlots { name, needs, free, total, workers })
    }

    /// Slots of all workers, free or not. Detached ones count, and those whose hosts are being checked:
    /// they are expected back within their lease, or at once.
    pub(super) fn slots_in_all(&self) -> u32 {
        let is_expected = |w: &&Worker| !w.is_lost && !w.is_leaving && !w.health.has_failed();
        self.workers.values().filter(is_expected).map(|w| w.slots).sum()
    }

    /// Free slots of every worker that can be told to start something.
    pub(super) fn free_slots(&self) -> BTreeMap<Name, u32> {
        let used = self.occupancy();
        let taking = self.workers.iter().filter(|(_, worker)| worker.takes_tasks());
        let free = taking.map(|(name, worker)| {
            let used = used.get(name).copied().unwrap_or(0);
            (name.clone(), worker.slots.saturating_sub(used))
        });
        free.collect()
    }

    /// Starts the next generation on `gang`.
    fn begin(
        &mut self,
        draft: &mut Draft,
        records: &crate::Records,
        entry: &Entry,
        gang: Vec<Placement>,
        now: Millis,
    ) {
        match &entry.workload {
            Workload::Job(job) => self.begin_job(draft, records, entry.version, job, gang, now),
            Workload::Endpoint(endpoint) => {
                self.begin_endpoint(draft, records, entry.version, endpoint, gang, now);
            }
        }
    }

    /// Records why a queued workload waits.
    fn explain(&mut self, draft: &mut Draft, entry: &Entry, text: String) {
        match &entry.workload {
            Workload::Job(job) => {
                self.change_job(draft, entry.version, job, |status| status.reason = text);
            }
            Workload::Endpoint(endpoint) => {
                self.change_endpoint(draft, entry.version, endpoint, |s| s.reason = text);
            }
        }
    }
}

/// Why a queued workload is not placed, and whether those behind it wait with it.
struct Waits {
    reason: Reason,
    holds_queue: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(free: &[(&str, u32)], ranks: u32) -> Option<String> {
        let free = free.iter().map(|(name, slots)| (name.parse().expect("a name"), *slots));
        place(&free.collect(), ranks).map(|gang| describe(&gang))
    }

    #[test]
    fn a_gang_is_placed_whole_on_few_workers_and_numbered_host_by_host() {
        type Case = (&'static [(&'static str, u32)], u32, Option<&'static str>);
        let cases: [Case; 7] = [
            (&[], 1, None),
            (&[("w1", 1), ("w2", 1)], 3, None),
            (&[("w1", 2), ("w2", 1)], 1, Some("r0 on w2")),
            (&[("w1", 2), ("w2", 2)], 2, Some("r0 r1 on w1")),
            (&[("w1", 1), ("w2", 3)], 4, Some("r0 on w1, r1 r2 r3 on w2")),
            (&[("w1", 1), ("w2", 1), ("w3", 2)], 3, Some("r0 on w1, r1 r2 on w3")),
            (&[("w1", 0), ("w2", 1), ("w3", 1)], 2, Some("r0 on w2, r1 on w3")),
        ];
        for (free, ranks, expected) in cases {
            assert_eq!(placed(free, ranks).as_deref(), expected, "{ranks} ranks on {free:?}");
        }
    }
}

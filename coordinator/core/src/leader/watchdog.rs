//! Gangs that do not move and ranks that hold the others up, judged by their own history.
//!
//! There is no time-out on a step: a gang whose steps take minutes is as good as one whose steps
//! take milliseconds. One that has reported nothing for many times its own longest pause hangs. Its
//! ranks' flight logs are laid side by side, and the first suspect is replaced. A rank that is
//! slower than its peers step after step is named, and replaced where the job says so.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::events::{JobEvent, StepMetrics};
use api::ids::{Generation, Name, Rank};
use api::job::Stragglers;
use api::records::{JobRecord, Moment};
use api::session::ExitCause;

use super::Leader;
use super::decision::{Effect, Millis};
use super::draft::Draft;
use super::gang::{Gang, LastWords};
use super::goodput::record_moment;
use super::reason::Reason;

/// A gang hangs after so many times the longest pause between two of its steps.
const PAUSES: u64 = 10;
/// Validation and the last save are given so many times `recovery.hang_min`: no step says how long
/// they take.
const BUSY_TIMES: u64 = 60;
/// A member is given so many times as long to hear an order to regroup.
const ORDER_TIMES: u64 = 4;
/// Pauses that make a history.
const BEATS_MIN: u64 = 3;
/// How long the search for the culprit may take before the gang is broken off without.
const DIAGNOSIS_WAIT_MS: u64 = 15_000;
/// A rank is a straggler when its microbatches take this many times the median of all ranks' …
const SLOW: f64 = 1.5;
/// … so many steps on end, and at least for `recovery.straggler_min`.
const SLOW_STEPS: u64 = 20;

/// When a gang's steps were reported.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    last: Option<Millis>,
    longest_ms: u64,
    beats: u64,
    /// It does something else than steps.
    is_busy: bool,
    /// When the ranks were asked what they do.
    asked: Option<Millis>,
    /// So often since it last moved its silence was put down to a leader that was away.
    excused: u32,
    straggler: Option<Straggler>,
    /// Ranks of this generation that people were told of.
    told: BTreeSet<Rank>,
    /// The one that is to be replaced, and for how many steps on end it has not been slow.
    replaced: Option<(Rank, u64)>,
}

/// The slowest rank of the last steps.
#[derive(Clone, Debug)]
struct Straggler {
    rank: Rank,
    since: Millis,
    steps: u64,
    ratio: f64,
}

impl Pace {
    /// The gang moves: a step or a validation was reported.
    pub(super) fn beat(&mut self, now: Millis) {
        let was_busy = std::mem::take(&mut self.is_busy);
        if let Some(last) = self.last.replace(now).filter(|_| !was_busy) {
            self.longest_ms = self.longest_ms.max(now.since(last));
            self.beats += 1;
        }
        (self.asked, self.excused) = (None, 0);
    }

    /// Whether its silence may be put down to a leader that was away once more; at most `times` on
    /// end.
    pub(super) fn is_excused(&mut self, times: u32) -> bool {
        let is_excused = self.excused < times;
        self.excused += u32::from(is_excused);
        is_excused
    }

    /// Since when it is silent, and has been asked.
    pub(super) fn times(&mut self) -> impl IntoIterator<Item = &mut Millis> {
        self.last.iter_mut().chain(&mut self.asked)
    }

    /// Something begins that may take much longer than a step.
    pub(super) fn busy(&mut self, now: Millis) {
        self.last = Some(now);
        self.asked = None;
        self.is_busy = true;
    }

    /// It is over, and a step is to be expected again.
    pub(super) fn busy_is_over(&mut self, now: Millis) {
        if self.is_busy {
            self.busy(now);
            self.is_busy = false;
        }
    }

    /// For the next generation: the history counts, the pause between the two does not.
    pub(super) fn carried(&self) -> Self {
        Self { longest_ms: self.longest_ms, beats: self.beats, ..Self::default() }
    }

    /// Since when the gang hangs, at `now`.
    fn hangs(&self, now: Millis, min_ms: u64) -> Option<u64> {
        let silent = now.since(self.last?);
        // Without a history, at first and under a new leader, no step says how long they take.
        let limit = match self.is_busy || self.beats < BEATS_MIN {
            true => min_ms.saturating_mul(BUSY_TIMES),
            false => min_ms.max(self.longest_ms.saturating_mul(PAUSES)),
        };
        (min_ms > 0 && silent >= limit).then_some(silent)
    }

    /// How long a member may take to hear an order to regroup, which it looks for while it computes.
    pub(super) fn limit_of_orders(&self, min_ms: u64) -> u64 {
        min_ms.max(self.longest_ms.saturating_mul(PAUSES)).saturating_mul(ORDER_TIMES)
    }

    /// Looks at who was the slowest in a step.
    pub(super) fn compare(&mut self, metrics: &StepMetrics, now: Millis) {
        let slow = metrics.slowest.filter(|slowest| slowest.ratio >= SLOW);
        if let Some((rank, steps)) = &mut self.replaced {
            *steps = match slow.is_some_and(|slow| slow.rank == *rank) {
                true => 0,
                false => steps.saturating_add(1),
            };
        }
        let Some(slow) = slow else { return self.straggler = None };
        match &mut self.straggler {
            Some(known) if known.rank == slow.rank => {
                known.steps += 1;
                known.ratio = slow.ratio;
            }
            other => {
                let (rank, ratio) = (slow.rank, slow.ratio);
                *other = Some(Straggler { rank, since: now, steps: 1, ratio });
            }
        }
    }
}

impl Gang {
    /// Whether a straggler that is to be replaced is none any more, and nothing is under way for it.
    fn has_recovered(&self) -> bool {
        let waits = self.replacing.filter(|_| self.pausing.is_none());
        let is_fast = |(rank, steps): (Rank, u64)| Some(rank) == waits && steps >= SLOW_STEPS;
        self.pace.replaced.is_some_and(is_fast)
    }
}

impl Leader {
    /// Looks whether a running gang hangs or is held up. True when something was decided.
    pub(super) fn watch_over(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) -> bool {
        let name = job.spec.name.clone();
        let min = u64::try_from(job.spec.recovery.hang_min.0.as_millis()).unwrap_or(u64::MAX);
        let Some(gang) = self.gangs.get_mut(&name) else { return false };
        // A new leader's history begins with its term.
        gang.pace.last.get_or_insert(now);
        let generation = gang.generation;
        if let Some(silent) = gang.pace.hangs(now, min) {
            match gang.pace.asked {
                None => {
                    gang.pace.asked = Some(now);
                    let text = format!(
                        "no step for {} s, the longest pause before was {} ms: asking its ranks \
                         what they do",
                        silent / 1000,
                        gang.pace.longest_ms
                    );
                    draft.note(&name, generation, None, text.clone());
                    draft.because(Reason::Waiting { name: name.clone(), text });
                    draft.effect(Effect::Diagnose { job: name, generation });
                }
                Some(asked) if now.since(asked) >= DIAGNOSIS_WAIT_MS => {
                    let text = "its ranks did not tell what they do".to_owned();
                    self.diagnosed(draft, now, &name, generation, None, text);
                    return false;
                }
                Some(_) => {}
            }
            return false;
        }
        self.name_straggler(draft, now, version, job)
    }

    fn name_straggler(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        job: &Arc<JobRecord>,
    ) -> bool {
        let name = job.spec.name.clone();
        let policy = job.spec.recovery.stragglers;
        let Some(gang) = self.gangs.get_mut(&name) else { return false };
        if gang.has_recovered() {
            let generation = gang.generation;
            let rank = gang.replacing.take();
            gang.pace.replaced = None;
            // It may be one again.
            gang.pace.told.retain(|told| Some(*told) != rank);
            let text =
                format!("it is as fast as the others again for {SLOW_STEPS} steps: it stays");
            draft.note(&name, generation, rank, text);
        }
        let Some(straggler) = gang.pace.straggler.clone() else { return false };
        let min = u64::try_from(job.spec.recovery.straggler_min.0.as_millis()).unwrap_or(u64::MAX);
        let is_lasting = now.since(straggler.since) >= min && straggler.steps >= SLOW_STEPS;
        let rank = straggler.rank;
        if !is_lasting || policy == Stragglers::Ignore || !gang.pace.told.insert(rank) {
            return false;
        }
        let worker = job.status.gang.iter().find(|place| place.rank == rank);
        let worker = worker.map(|place| place.worker.to_string()).unwrap_or_default();
        let replaced = match policy {
            Stragglers::Replace => "it is replaced as soon as another can take its place",
            _ => "recovery.stragglers = \"replace\" would replace it",
        };
        let text = format!(
            "{rank} on `{worker}` has been {:.1} times as slow as the median of the ranks for {} \
             steps: {replaced}",
            straggler.ratio, straggler.steps
        );
        if policy == Stragglers::Replace {
            gang.replacing = Some(rank);
            gang.pace.replaced = Some((rank, 0));
        }
        let generation = gang.generation;
        draft.note(&name, generation, Some(rank), text.clone());
        let time_ms = now.0;
        self.change_job(draft, version, job, |status| {
            let phase = status.phase;
            record_moment(&mut status.history, Moment { time_ms, generation, phase, text });
        });
        true
    }

    /// What the ranks of a gang that hangs told: whoever holds the others up is given up.
    pub(super) fn diagnosed(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        name: &Name,
        generation: Generation,
        suspect: Option<Rank>,
        text: String,
    ) {
        let entry = self.index.get(name);
        let entry = entry.filter(|entry| entry.workload.generation() == generation);
        let places = entry.map(|entry| entry.workload.gang().to_vec()).unwrap_or_default();
        let waits = |gang: &&mut Gang| gang.pace.asked.is_some() && gang.generation == generation;
        let Some(gang) = self.gangs.get_mut(name).filter(waits).filter(|_| !places.is_empty())
        else {
            let text = format!("a diagnosis of {generation} of `{name}` comes too late");
            return draft.because(Reason::Remark(text));
        };
        gang.pace.asked = None;
        gang.pace.last = None;
        // One that is no rank of the gang holds nobody up.
        match places.iter().find(|place| Some(place.rank) == suspect) {
            Some(place) => {
                let reason = format!("the gang hangs, and this rank holds it up: {text}");
                let cause = ExitCause::Killed { reason: reason.clone() };
                gang.exited(place.rank, &place.worker, cause, now);
                self.rank_failed(&place.worker, name, &reason, now);
            }
            // All meet again; should that not help, the job makes no progress.
            None => {
                let message = format!("the gang hangs: {text}");
                let words = LastWords {
                    message,
                    retryable: true,
                    blames: None,
                    stays: true,
                    damaged: None,
                    is_hearsay: false,
                };
                for place in &places {
                    gang.failed(place.rank, &place.worker, words.clone(), now);
                }
            }
        }
        draft.publish(
            name,
            JobEvent::Note { generation, rank: suspect, text: format!("it hangs: {text}") },
        );
    }
}

//! Hosts that get no new work until a check of them has passed: which are suspected, when they are
//! checked, and what people see of it.
//!
//! One death says nothing about a host, and its rank is replaced in place at once. A host is
//! suspected when its worker was lost and comes back, when its ranks died again and again of what
//! their program does not do by itself, or when the worker says that its last check has not passed.
//! What runs on it goes on. Volatile like everything about workers; the worker remembers a check
//! that has not passed and says so to the next leader.

use std::collections::BTreeSet;

use api::ids::Name;
use api::records::{Moment, WorkerState};
use api::session::{CoordinatorMessage, ExitCause};

use super::Leader;
use super::decision::Millis;
use super::draft::Draft;
use super::gang::clip;
use super::reason::{Reason, count};
use super::workers::{WORKERS_MAX, Worker};

/// So many deaths of ranks on one host …
const DEATHS_MAX: usize = 2;
/// … within this time make it suspected. After each check that it passes meanwhile it takes twice as
/// many: what kills ranks on a host that is fit is not found by looking again and again, and each
/// look holds up the recovery of a gang.
const DEATHS_WINDOW_MS: u64 = 600_000;
/// Most times that the number of deaths is doubled.
const DOUBLINGS_MAX: u32 = 6;
/// How long an answer is waited for: a check is bounded by `api::health::CHECK_TIMEOUT`, 10 s.
const ANSWER_WAIT_MS: u64 = 15_000;
/// Wait after a check that did not pass; doubled with each further one.
const BACK_OFF_MS: u64 = 2_000;
/// Longest wait: a host that was mended gets work again within it.
const BACK_OFF_MAX_MS: u64 = 60_000;
/// Jobs whose history tells of one check.
const JOBS_TOLD_MAX: usize = 16;
/// Moments that wait for the next change of a job's record.
const UNTOLD_MAX: usize = 16;
/// How the drivers of accelerators name their errors: a rank that could not go on because of one
/// says so in its last words.
const DEVICE_ERRORS: [&str; 3] = ["CUDA_ERROR_", "CUBLAS_STATUS_", "CUDNN_STATUS_"];

/// How a host stands to work.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// When ranks died on it of what may be its fault, the newest last.
    deaths: Vec<Millis>,
    /// Checks that it passed, one within the window after the other, and when the last one.
    passed: Option<(u32, Millis)>,
    /// A check that has not passed yet.
    check: Option<Check>,
}

#[derive(Clone, Debug)]
struct Check {
    /// Why the host is suspected.
    why: String,
    /// Jobs whose history tells of it.
    jobs: BTreeSet<Name>,
    /// When its worker was asked; absent: not in this session.
    asked: Option<Millis>,
    /// What failed in the last one.
    failed: Option<String>,
    /// Checks that failed, one after another.
    failures: u32,
    /// When it may be asked again.
    next: Millis,
}

impl Health {
    /// Whether the host gets new work.
    pub(super) fn is_fit(&self) -> bool {
        self.check.is_none()
    }

    /// Whether the last check failed.
    pub(super) fn has_failed(&self) -> bool {
        self.check.as_ref().is_some_and(|check| check.failed.is_some())
    }

    /// Suspects the host. One that is suspected already stays so for the first reason.
    pub(super) fn suspect(&mut self, why: &str, jobs: impl Iterator<Item = Name>, now: Millis) {
        let (why, asked, failed) = (clip(why), None, None);
        let check = self.check.get_or_insert_with(|| Check {
            why,
            jobs: BTreeSet::new(),
            asked,
            failed,
            failures: 0,
            next: now,
        });
        check.jobs.extend(jobs.take(JOBS_TOLD_MAX));
        while check.jobs.len() > JOBS_TOLD_MAX {
            check.jobs.pop_last();
        }
    }

    /// When its worker was asked, while the answer is waited for.
    pub(super) fn asked(&mut self) -> Option<&mut Millis> {
        self.check.as_mut()?.asked.as_mut()
    }

    /// Its session is another one: what it was asked in the former one may be lost.
    pub(super) fn ask_again(&mut self) {
        if let Some(check) = &mut self.check {
            check.asked = None;
        }
    }

    /// A rank died. True when that is once too often.
    fn has_died(&mut self, now: Millis) -> bool {
        let is_recent = |then: Millis| now.since(then) < DEATHS_WINDOW_MS;
        self.deaths.retain(|death| is_recent(*death));
        self.passed = self.passed.filter(|(_, at)| is_recent(*at) || !self.deaths.is_empty());
        self.deaths.push(now);
        let doublings = self.passed.map_or(0, |(times, _)| times.min(DOUBLINGS_MAX));
        self.deaths.len() >= DEATHS_MAX << doublings
    }

    /// It passed a check.
    fn pass(&mut self, now: Millis) {
        let times = self.passed.map_or(0, |(times, _)| times).saturating_add(1);
        *self = Self { passed: Some((times, now)), ..Self::default() };
    }

    /// The state and its reason, as people see them; none for a host that is fit.
    pub(super) fn state(&self) -> Option<(WorkerState, String)> {
        let check = self.check.as_ref()?;
        Some(match &check.failed {
            Some(failed) => {
                let times = match check.failures {
                    1 => String::new(),
                    times => format!(" {times} times"),
                };
                let text =
                    format!("failed its health check{times}: {failed}; checked: {}", check.why);
                (WorkerState::Unhealthy, text)
            }
            None => (WorkerState::Checking, check.why.clone()),
        })
    }
}

impl Check {
    fn fail(&mut self, failed: &str, now: Millis) {
        self.asked = None;
        self.failed = Some(clip(failed));
        let wait = (BACK_OFF_MS << self.failures.min(16)).min(BACK_OFF_MAX_MS);
        self.failures = self.failures.saturating_add(1);
        self.next = now.plus(wait);
    }
}

/// Whether a rank's program does not end like this by itself: a signal nobody of us sent, a process
/// that could not be started, an error of the device.
fn may_be_the_hosts(cause: &ExitCause) -> bool {
    match cause {
        ExitCause::Signal { .. } | ExitCause::NotStarted { .. } => true,
        ExitCause::Code { message, .. } => DEVICE_ERRORS.iter().any(|mark| message.contains(mark)),
        _ => false,
    }
}

impl Worker {
    /// Whether something may be placed on it.
    pub(super) fn takes_tasks(&self) -> bool {
        self.session.is_some() && !self.is_leaving && self.health.is_fit()
    }

    /// Suspects its host; the jobs that it has tasks of are told.
    pub(super) fn suspect(&mut self, why: &str, now: Millis) {
        let jobs: BTreeSet<Name> = self.tasks.keys().map(|task| task.workload.clone()).collect();
        self.health.suspect(why, jobs.into_iter(), now);
    }
}

impl Leader {
    /// A rank ended on a worker by itself, as far as the leader knows.
    pub(super) fn rank_died(&mut self, worker: &Name, job: &Name, cause: &ExitCause, now: Millis) {
        if may_be_the_hosts(cause) {
            self.rank_failed(worker, job, &cause.to_string(), now);
        }
    }

    /// A rank ended, or was ended, for what may be its host's fault.
    pub(super) fn rank_failed(&mut self, worker: &Name, job: &Name, how: &str, now: Millis) {
        let Some(host) = self.workers.get_mut(worker).filter(|host| !host.is_leaving) else {
            return;
        };
        if host.health.has_died(now) {
            let minutes = DEATHS_WINDOW_MS / 60_000;
            let deaths = count(host.health.deaths.len(), "rank");
            let why = format!(
                "{deaths} died on it within {minutes} minutes, the last one of `{job}`: {how}"
            );
            host.suspect(&why, now);
            host.health.suspect(&why, std::iter::once(job.clone()), now);
        }
    }

    /// Remembers that a worker was lost, or left while its host was suspected, after it is out of
    /// the list.
    pub(super) fn remember_lost(&mut self, name: Name) {
        if self.lost.len() >= WORKERS_MAX {
            self.lost.pop_first();
        }
        self.lost.insert(name);
    }

    /// Asks for the checks that are due, and gives up those that are not answered.
    pub(super) fn tend_health(&mut self, draft: &mut Draft, now: Millis) {
        let is_checked = |worker: &&Worker| worker.session.is_some() && !worker.health.is_fit();
        let names: Vec<Name> = self
            .workers
            .iter()
            .filter(|(_, worker)| is_checked(worker))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            let Some(worker) = self.workers.get_mut(&name) else { continue };
            let (Some(session), Some(check)) = (worker.session, &mut worker.health.check) else {
                continue;
            };
            match check.asked {
                Some(asked) if now.since(asked) >= ANSWER_WAIT_MS => {
                    let failed = format!("no answer within {} s", ANSWER_WAIT_MS / 1_000);
                    self.check_failed(draft, &name, &failed, now);
                }
                Some(_) => {}
                None if now < check.next => {}
                None => {
                    let is_first = check.failures == 0;
                    check.asked = Some(now);
                    let (request, reason) = (now.0, check.why.clone());
                    draft.send(
                        session,
                        CoordinatorMessage::Check { request, reason: reason.clone() },
                    );
                    if is_first {
                        let text = format!(
                            "`{name}` gets no new rank until its host is checked: {reason}"
                        );
                        self.tell_jobs(draft, &name, &text, now);
                        draft.because(Reason::Remark(text));
                    }
                }
            }
        }
    }

    /// A worker answers what came of a check. True when that may let others go on.
    pub(super) fn checked(
        &mut self,
        draft: &mut Draft,
        name: &Name,
        request: u64,
        failed: &[String],
        now: Millis,
    ) -> bool {
        let Some(worker) = self.workers.get_mut(name) else { return false };
        let is_awaited =
            worker.health.check.as_ref().is_some_and(|check| check.asked == Some(Millis(request)));
        if !is_awaited {
            draft.because(Reason::Remark(format!("`{name}` tells of a check nobody waits for")));
            return false;
        }
        if !failed.is_empty() {
            self.check_failed(draft, name, &failed.join("; "), now);
            return true;
        }
        let text = format!("the host of `{name}` passed its check: it takes tasks");
        self.tell_jobs(draft, name, &text, now);
        if let Some(worker) = self.workers.get_mut(name) {
            worker.health.pass(now);
        }
        draft.because(Reason::Remark(text));
        true
    }

    fn check_failed(&mut self, draft: &mut Draft, name: &Name, failed: &str, now: Millis) {
        let Some(check) = self.workers.get_mut(name).and_then(|w| w.health.check.as_mut()) else {
            return;
        };
        // The same again is no news for anybody's history.
        let former = check.failed.take();
        check.fail(failed, now);
        let wait = check.next.since(now) / 1_000;
        let failed = check.failed.clone();
        let is_new = failed != former;
        let failed = failed.unwrap_or_default();
        let text = format!("the host of `{name}` failed its check: {failed}");
        draft.because(Reason::Remark(format!("{text}; again in {wait} s")));
        if is_new {
            self.tell_jobs(draft, name, &text, now);
        }
    }

    /// Tells the jobs that a check concerns: at once whoever watches, and their history with the
    /// next change of their record.
    fn tell_jobs(&mut self, draft: &mut Draft, name: &Name, text: &str, now: Millis) {
        let check = self.workers.get(name).and_then(|worker| worker.health.check.as_ref());
        let Some(jobs) = check.map(|check| check.jobs.clone()) else { return };
        for job in jobs {
            let Some(entry) = self.index.get(&job) else { continue };
            let (generation, phase) = (entry.workload.generation(), entry.workload.phase());
            draft.note(&job, generation, None, text);
            let untold = self.untold.entry(job).or_default();
            if untold.len() < UNTOLD_MAX {
                untold.push(Moment { time_ms: now.0, generation, phase, text: text.to_owned() });
            }
        }
    }

    /// Why a workload that lacks slots does not get those of a worker that is there: the check of
    /// its host is under way, or has failed.
    pub(super) fn kept_back(&self, name: &Name) -> Option<Reason> {
        let is_unfit = |worker: &Worker| {
            worker.session.is_some() && !worker.is_leaving && !worker.health.is_fit()
        };
        let unfit = || self.workers.iter().filter(|(_, worker)| is_unfit(worker));
        let name = name.clone();
        if let Some((worker, _)) = unfit().find(|(_, worker)| !worker.health.has_failed()) {
            let text = format!("waits for the check of the host of `{worker}`");
            return Some(Reason::Waiting { name, text });
        }
        let failed = |worker: &Worker| worker.health.check.as_ref()?.failed.clone();
        let (worker, why) = unfit().find_map(|(name, worker)| Some((name, failed(worker)?)))?;
        Some(Reason::Unfit { name, worker: worker.clone(), why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_fails_again_waits_longer_and_passes_at_once() {
        let mut health = Health::default();
        health.suspect("it was lost", std::iter::empty(), Millis(0));
        let check = health.check.as_mut().expect("suspected");
        let waits: Vec<u64> = (0..7)
            .map(|_| {
                check.fail("disk", Millis(0));
                check.next.0 / 1_000
            })
            .collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60]);
        assert!(!health.is_fit() && health.has_failed());
    }

    #[test]
    fn deaths_far_apart_are_nobodys_fault() {
        let mut health = Health::default();
        assert!(!health.has_died(Millis(0)));
        assert!(!health.has_died(Millis(DEATHS_WINDOW_MS)));
        assert!(health.has_died(Millis(DEATHS_WINDOW_MS + 1)));
        // Checked and found fit, it takes four, for a while.
        let now = Millis(DEATHS_WINDOW_MS + 2);
        health.pass(now);
        let died: Vec<bool> = (0..4).map(|_| health.has_died(now)).collect();
        assert_eq!(died, [false, false, false, true]);
        health.pass(now);
        let later = now.plus(DEATHS_WINDOW_MS);
        assert!(!health.has_died(later) && health.has_died(later));
    }

    #[test]
    fn what_a_program_does_by_itself_is_not_the_hosts_fault() {
        let code = |message: &str| ExitCause::Code {
            code: 1,
            message: message.into(),
            retryable: true,
            damaged: None,
        };
        assert!(may_be_the_hosts(&ExitCause::Signal { signal: 9, message: String::new() }));
        assert!(may_be_the_hosts(&code("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal access")));
        assert!(!may_be_the_hosts(&code("the loss is not a number")));
        assert!(!may_be_the_hosts(&ExitCause::Killed { reason: "told to".into() }));
    }
}

//! The life of an endpoint: one replica on one worker, started again when it ends.
//!
//! The same phases as a job's. *Queued* with a gang: the former replica is being cleared; *queued*
//! without: it may be placed, once its back-off is over.

use std::sync::Arc;

use api::ids::{Generation, Rank};
use api::records::{
    EndpointRecord, EndpointStatus, Failure, JobRecord, KIND_JOB, KIND_MODEL, ModelRecord, Phase,
    Placement,
};
use api::session::{Assignment, ExitCause, ServeAssignment};

use super::Leader;
use super::decision::Millis;
use super::draft::{Draft, Expect};
use super::gang::{self, Gang, Verdict};
use super::index::Workload;
use super::reason::Reason;
use super::standing::{ended_unseen, slowest};
use super::train::{BY_A_USER, STOP_WAIT_MS};
use super::workers::task_id;
use crate::records::Records;

/// Failures in a row after which an endpoint is given up: with the back-off below, half a minute.
const FAILURES_MAX: u32 = 5;
/// Wait after the first failure; doubled with each further one.
const BACK_OFF_MS: u64 = 1_000;
/// Longest wait.
const BACK_OFF_MAX_MS: u64 = 30_000;
/// A replica that has run this long has recovered: its earlier failures no longer count.
const STEADY_MS: u64 = 60_000;

/// How long after its last failure an endpoint starts again; `None` when it may now.
pub(super) fn back_off(status: &EndpointStatus, now: Millis) -> Option<u64> {
    let failed = status.first_cause.as_ref().filter(|_| status.failures > 0)?;
    let doublings = (status.failures - 1).min(16);
    let wait = (BACK_OFF_MS << doublings).min(BACK_OFF_MAX_MS);
    (now.since(Millis(failed.time_ms)) < wait).then_some(wait)
}

impl Leader {
    /// Records a change of an endpoint's status.
    pub(super) fn change_endpoint(
        &mut self,
        draft: &mut Draft,
        version: u64,
        endpoint: &EndpointRecord,
        change: impl FnOnce(&mut EndpointStatus),
    ) {
        let mut endpoint = endpoint.clone();
        change(&mut endpoint.status);
        let name = endpoint.spec.name.clone();
        draft.decided(Reason::changed(name, endpoint.status.phase, &endpoint.status.reason));
        let workload = Workload::Endpoint(Arc::new(endpoint));
        if let Workload::Endpoint(endpoint) = &workload {
            draft.put(workload.key(), Expect::Version(version), &**endpoint);
        }
        self.index.set(workload);
    }

    /// Starts the next replica of an endpoint.
    pub(super) fn begin_endpoint(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        version: u64,
        endpoint: &Arc<EndpointRecord>,
        gang: Vec<Placement>,
        now: Millis,
    ) {
        let name = endpoint.spec.name.clone();
        let model = records.read::<ModelRecord>(KIND_MODEL, endpoint.spec.model.as_str());
        let Ok(Some((_, model))) = model else {
            let model = &endpoint.spec.model;
            let reason = format!("its model `{model}` is not in the registry any more");
            return self.change_endpoint(draft, version, endpoint, |status| {
                status.phase = Phase::Failed;
                status.reason = reason;
            });
        };
        // Above the generations of a job of the same name, so that task ids differ.
        let other = records.read::<JobRecord>(KIND_JOB, name.as_str());
        let other = other.ok().flatten().map(|(_, job)| job.status.generation);
        let generation: Generation =
            endpoint.status.generation.max(other.unwrap_or_default()).next();
        let places = super::schedule::describe(&gang);
        self.gangs.insert(name.clone(), Gang::new(generation, Some(now)));
        draft.decided(Reason::Placed { name: name.clone(), generation, places: places.clone() });
        self.change_endpoint(draft, version, endpoint, |status| {
            status.generation = generation;
            status.phase = Phase::Starting;
            status.reason = format!("starting: {places}");
            status.gang = gang;
            status.address = None;
        });
        let Some(entry) = self.index.get(&name).cloned() else { return };
        for place in entry.workload.gang() {
            self.start_replica(draft, &entry.workload, place, &model);
        }
    }

    fn start_replica(
        &mut self,
        draft: &mut Draft,
        workload: &Workload,
        place: &Placement,
        model: &ModelRecord,
    ) {
        let Workload::Endpoint(endpoint) = workload else { return };
        let assignment = Assignment::Serve(ServeAssignment {
            endpoint: endpoint.spec.name.clone(),
            generation: endpoint.status.generation,
            model: model.fact.clone(),
            listen: endpoint.spec.listen,
        });
        self.start_task(draft, workload, place, assignment);
    }

    /// One step in the life of an endpoint; does nothing when there is nothing to do.
    pub(super) fn advance_endpoint(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        version: u64,
        endpoint: &Arc<EndpointRecord>,
    ) {
        match endpoint.status.phase {
            Phase::Queued if endpoint.status.gang.is_empty() => {}
            Phase::Queued => self.clear_endpoint(draft, now, version, endpoint),
            phase if phase.is_active() => {
                self.advance_replica(draft, records, now, version, endpoint);
            }
            _ => {}
        }
    }

    fn clear_endpoint(
        &mut self,
        draft: &mut Draft,
        now: Millis,
        version: u64,
        endpoint: &Arc<EndpointRecord>,
    ) {
        let left = self.left_over(&Workload::Endpoint(Arc::clone(endpoint)), now);
        let (name, generation) = (endpoint.spec.name.clone(), endpoint.status.generation);
        if let Some(gang) = self.gangs.get_mut(&name) {
            gang.clearing_since.get_or_insert(now);
        }
        match left {
            Some(waits_for) => draft.because(Reason::Clearing { name, generation, waits_for }),
            None => self.change_endpoint(draft, version, endpoint, |status| status.gang.clear()),
        }
    }

    fn advance_replica(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        version: u64,
        endpoint: &Arc<EndpointRecord>,
    ) {
        let name = &endpoint.spec.name;
        let workload = Workload::Endpoint(Arc::clone(endpoint));
        let phase = endpoint.status.phase;
        let mut standing = self.standing(&workload, now);
        let Some(gang) = self.gangs.get_mut(name) else { return };
        if phase == Phase::Starting && !gang.is_mine() && !standing.is_accounted_for() {
            // The former leader may never have told the worker: nobody's failure.
            return self.change_endpoint(draft, version, endpoint, |status| {
                status.phase = Phase::Queued;
                status.reason = "starting over: the leader changed before it listened".into();
            });
        }
        standing.settle(gang, &ended_unseen(), now);
        if phase == Phase::Starting
            && let Some((rank, worker)) = slowest(&self.workers, &workload, &standing)
        {
            gang.give_up_if_overdue(rank, worker, now);
        }
        // Nobody asked it to end, so an end in good order is one as well.
        let ended = standing.is_empty();
        if phase == Phase::Stopping {
            if ended {
                return self.change_endpoint(draft, version, endpoint, |status| {
                    status.phase = Phase::Stopped;
                    status.reason = "stopped".into();
                    status.address = None;
                });
            }
            let since = *gang.leaving_since.get_or_insert(now);
            gang.is_condemned |= now.since(since) >= STOP_WAIT_MS;
            return self.tell_to_stop(draft, name, endpoint.status.generation, BY_A_USER);
        }
        let leaver = gang.leaver().filter(|_| ended).cloned();
        match gang.verdict(|_| false, now, self.options.lease_ms) {
            Verdict::Cause(failure) => {
                return self.fail_endpoint(draft, version, endpoint, failure);
            }
            Verdict::Await(text) => {
                return draft.because(Reason::Waiting { name: name.clone(), text });
            }
            // Replicas do not wait for one another.
            Verdict::AllWait => {}
            Verdict::Fine if ended => {
                if let Some(worker) = leaver {
                    return self.change_endpoint(draft, version, endpoint, |status| {
                        status.phase = Phase::Queued;
                        status.reason = format!("its worker `{worker}` left: starting again");
                        status.address = None;
                    });
                }
                let worker = endpoint.status.gang.first().map(|place| place.worker.clone());
                let failure = Failure {
                    generation: endpoint.status.generation,
                    rank: Some(Rank(0)),
                    worker: worker.unwrap_or_else(|| name.clone()),
                    cause: ExitCause::Completed,
                    time_ms: now.0,
                };
                return self.fail_endpoint(draft, version, endpoint, failure);
            }
            Verdict::Fine => {}
        }
        if phase == Phase::Running {
            let since = *gang.running_since.get_or_insert(now);
            if endpoint.status.failures > 0 && now.since(since) >= STEADY_MS {
                self.change_endpoint(draft, version, endpoint, |status| status.failures = 0);
            }
            return;
        }
        let task = task_id(&workload, Rank(0));
        let host = standing.present.get(&Rank(0)).and_then(|worker| self.workers.get(worker));
        if let Some(address) = host.and_then(|w| w.tasks.get(&task)).and_then(|task| task.address) {
            return self.change_endpoint(draft, version, endpoint, |status| {
                status.phase = Phase::Running;
                status.reason = format!("listens on {address}");
                status.address = Some(address);
            });
        }
        // A start that was lost with its session. Models are never deleted while one is served.
        let model = records.read::<ModelRecord>(KIND_MODEL, endpoint.spec.model.as_str());
        if let Ok(Some((_, model))) = model {
            for place in &standing.untold {
                self.start_replica(draft, &workload, place, &model);
            }
        }
    }

    fn fail_endpoint(
        &mut self,
        draft: &mut Draft,
        version: u64,
        endpoint: &Arc<EndpointRecord>,
        failure: Failure,
    ) {
        let what = gang::describe(&failure);
        let failures = endpoint.status.failures.saturating_add(1);
        let (phase, reason) = if !failure.cause.is_retryable() {
            (Phase::Failed, format!("{what}: trying again would end the same way"))
        } else if failures >= FAILURES_MAX {
            (Phase::Failed, format!("{what}: {failures} failures in a row"))
        } else {
            (Phase::Queued, format!("{what}: starting again"))
        };
        self.change_endpoint(draft, version, endpoint, |status| {
            status.phase = phase;
            status.reason = reason;
            status.failures = failures;
            status.address = None;
            status.first_cause = Some(failure);
        });
    }
}

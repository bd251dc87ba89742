//! The records that decisions are about, parsed once: live jobs and endpoints, and how the others
//! ended. Only a cache: everything in it comes from the records and is refreshed when they change.
//!
//! Invariant: a name has at most one live workload. A job and an endpoint may share a name (a model
//! is named after its job, and its endpoint after the model), but never run at the same time and
//! never use the same generation, so that a task's id belongs to one of them only.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::ids::{Generation, Name, Rank, TaskId};
use api::records::{EndpointRecord, JobRecord, KIND_ENDPOINT, KIND_JOB, Phase, Placement};
use serde::de::DeserializeOwned;

use super::reason::Reason;
use crate::records::Records;
use crate::transaction::RecordKey;

/// A job or endpoint.
#[derive(Clone, Debug)]
pub(super) enum Workload {
    Job(Arc<JobRecord>),
    Endpoint(Arc<EndpointRecord>),
}

impl Workload {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Job(_) => KIND_JOB,
            Self::Endpoint(_) => KIND_ENDPOINT,
        }
    }

    pub(super) fn name(&self) -> &Name {
        match self {
            Self::Job(job) => &job.spec.name,
            Self::Endpoint(endpoint) => &endpoint.spec.name,
        }
    }

    pub(super) fn key(&self) -> RecordKey {
        RecordKey::new(self.kind(), self.name().as_str())
    }

    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Job(job) => job.status.phase,
            Self::Endpoint(endpoint) => endpoint.status.phase,
        }
    }

    pub(super) fn generation(&self) -> Generation {
        match self {
            Self::Job(job) => job.status.generation,
            Self::Endpoint(endpoint) => endpoint.status.generation,
        }
    }

    pub(super) fn gang(&self) -> &[Placement] {
        match self {
            Self::Job(job) => &job.status.gang,
            Self::Endpoint(endpoint) => &endpoint.status.gang,
        }
    }

    pub(super) fn completed(&self) -> &[Rank] {
        match self {
            Self::Job(job) => &job.status.completed,
            Self::Endpoint(_) => &[],
        }
    }

    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Job(job) => &job.status.reason,
            Self::Endpoint(endpoint) => &endpoint.status.reason,
        }
    }

    pub(super) fn submitted_ms(&self) -> u64 {
        match self {
            Self::Job(job) => job.status.submitted_ms,
            Self::Endpoint(endpoint) => endpoint.status.submitted_ms,
        }
    }

    /// Fewest and most slots that it can use at once.
    pub(super) fn slots(&self) -> (u32, u32) {
        match self {
            Self::Job(job) => (job.spec.resources.ranks.min(), job.spec.resources.ranks.max()),
            Self::Endpoint(_) => (1, 1),
        }
    }

    /// The task of a place of the current gang.
    pub(super) fn task(&self, place: &Placement) -> TaskId {
        place.task(self.name(), self.generation())
    }

    /// The place of a task of this worker in the current gang, if it has one.
    pub(super) fn place_of(&self, worker: &Name, task: &TaskId) -> Option<&Placement> {
        self.gang().iter().find(|place| place.worker == *worker && self.task(place) == *task)
    }
}

/// A live workload and the version of its record; 0 while its next version is being committed.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) version: u64,
    pub(super) workload: Workload,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    applied: Option<u64>,
    live: BTreeMap<Name, Entry>,
    /// The version at which each record was read.
    read: BTreeMap<RecordKey, u64>,
    unreadable: Option<Reason>,
}

impl Index {
    /// Takes over what changed in the records.
    pub(super) fn refresh(&mut self, records: &Records) {
        if self.applied == Some(records.applied()) {
            return;
        }
        self.applied = Some(records.applied());
        self.unreadable = None;
        self.live.retain(|name, entry| records.get(entry.workload.kind(), name.as_str()).is_some());
        // Jobs last: should both be live, against the invariant, the job's results come first.
        self.load::<EndpointRecord>(records, KIND_ENDPOINT, Workload::Endpoint);
        self.load::<JobRecord>(records, KIND_JOB, Workload::Job);
    }

    fn load<T: DeserializeOwned>(
        &mut self,
        records: &Records,
        kind: &str,
        wrap: fn(Arc<T>) -> Workload,
    ) {
        for (key, found) in records.list(kind, "") {
            if self.read.get(key) == Some(&found.version) {
                continue;
            }
            let workload = match serde_json::from_slice::<T>(&found.json) {
                Ok(record) => wrap(Arc::new(record)),
                Err(error) => {
                    let text = format!("record `{key}` cannot be read, leaving it alone: {error}");
                    self.unreadable = Some(Reason::Unreadable(text));
                    continue;
                }
            };
            self.read.insert(key.clone(), found.version);
            self.place(found.version, workload);
        }
    }

    /// The state that is about to be committed. Should it not be, the leader is dropped.
    pub(super) fn set(&mut self, workload: Workload) {
        self.read.remove(&workload.key());
        self.place(0, workload);
    }

    fn place(&mut self, version: u64, workload: Workload) {
        let name = workload.name().clone();
        if !workload.phase().is_terminal() {
            self.live.insert(name, Entry { version, workload });
        } else if self.get(&name).is_some_and(|e| e.workload.kind() == workload.kind()) {
            self.live.remove(&name);
        }
    }

    pub(super) fn get(&self, name: &Name) -> Option<&Entry> {
        self.live.get(name)
    }

    pub(super) fn live(&self) -> impl Iterator<Item = (&Name, &Entry)> {
        self.live.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// A record that this binary cannot read, if any.
    pub(super) fn unreadable(&self) -> Option<&Reason> {
        self.unreadable.as_ref()
    }
}

//! Workers that leave, drain or are avoided: what they said of it, what people asked for, and how
//! both are shown.
//!
//! What a worker says is volatile like everything about workers: it says it again in each session. What a
//! person asked for is recorded until the worker says that it does so, and sent again when it comes back:
//! neither a broken session nor a change of leader loses it.

use api::ids::Name;
use api::records::{DrainRecord, KIND_DRAIN, WorkerState};
use api::session::{CoordinatorMessage, LeaveScope};
use api::units::Span;

use super::Leader;
use super::decision::{Millis, Refusal};
use super::draft::{Draft, Expect};
use super::gang::clip;
use super::reason::{Reason, count};
use super::workers::{WORKERS_MAX, Worker};
use crate::records::Records;
use crate::transaction::RecordKey;

/// In place of a record's kind in the answer to a drain: workers are in no record of their own.
const KIND_WORKER: &str = "worker";
/// Workers named in a refusal.
const NAMES_SHOWN: usize = 10;
/// What the worker is told to say to its tasks.
const DRAIN_REASON: &str = "drained by a user";

/// How a worker stands to leaving.
#[derive(Clone, Debug, Default)]
pub(super) struct Leave {
    /// What it said of it.
    said: Option<Said>,
    /// What a person asked for, for as long as the worker has not said that it does so; recorded.
    asked: Option<Asked>,
}

#[derive(Clone, Debug)]
struct Said {
    scope: LeaveScope,
    cause: String,
}

/// What a person asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Drain { until: Option<Millis> },
    Undrain,
}

impl Asked {
    fn message(self, now: Millis) -> CoordinatorMessage {
        match self {
            Self::Drain { until } => CoordinatorMessage::Drain {
                deadline: until.map(|until| Span::millis(until.since(now))),
                reason: DRAIN_REASON.into(),
            },
            Self::Undrain => CoordinatorMessage::Undrain,
        }
    }

    fn record(self, incarnation: u64) -> DrainRecord {
        let (drains, until_ms) = match self {
            Self::Drain { until } => (true, until.map(|until| until.0)),
            Self::Undrain => (false, None),
        };
        DrainRecord { incarnation, drains, until_ms }
    }

    fn of(record: DrainRecord) -> Self {
        match record.drains {
            true => Self::Drain { until: record.until_ms.map(Millis) },
            false => Self::Undrain,
        }
    }
}

fn key(worker: &Name) -> RecordKey {
    RecordKey::new(KIND_DRAIN, worker.as_str())
}

impl Leave {
    /// Whether it ends, rather than drains or is only avoided.
    pub(super) fn is_end(&self) -> bool {
        self.said.as_ref().is_some_and(|said| said.scope == LeaveScope::Ends)
    }

    /// The worker's own words; "" when it said none.
    pub(super) fn cause(&self) -> &str {
        self.said.as_ref().map_or("", |said| &said.cause)
    }

    /// Whether a person waits for it to drain or to stay.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Takes what the worker said. True when that is what it was asked for.
    fn hear(&mut self, scope: LeaveScope, cause: &str) -> bool {
        self.said = Some(Said { scope, cause: clip(cause) });
        let is_done = match self.asked {
            Some(Asked::Drain { .. }) => scope != LeaveScope::Avoided,
            Some(Asked::Undrain) => scope != LeaveScope::Drains,
            None => false,
        };
        if is_done {
            self.asked = None;
        }
        is_done
    }

    /// What people see of a worker that is attached.
    fn state(&self, has_tasks: bool) -> WorkerState {
        let drains = if has_tasks { WorkerState::Draining } else { WorkerState::Drained };
        match (self.said.as_ref().map(|said| said.scope), self.asked) {
            (Some(LeaveScope::Ends), _) => WorkerState::Leaving,
            (Some(LeaveScope::Drains), _) | (_, Some(Asked::Drain { .. })) => drains,
            (Some(LeaveScope::Avoided), _) => WorkerState::Avoided,
            (None, _) => WorkerState::Attached,
        }
    }
}

impl Worker {
    /// Whether it takes tasks, and why it does not.
    pub(super) fn state(&self) -> (WorkerState, String) {
        let state = match self.session {
            Some(_) => self.leave.state(!self.tasks.is_empty()),
            None => WorkerState::Away,
        };
        // Whoever leaves gets nothing anyway.
        if let (WorkerState::Attached | WorkerState::Avoided, Some(unfit)) =
            (state, self.health.state())
        {
            return unfit;
        }
        (state, self.leave.cause().to_owned())
    }

    /// Takes what it said of leaving. Whether that is new, and whether it was asked for it.
    pub(super) fn hear_leaving(&mut self, scope: LeaveScope, cause: &str) -> (bool, bool) {
        let former = self.leave.said.as_ref().map(|said| said.scope);
        let is_new = !self.is_leaving || former != Some(scope);
        self.is_leaving = true;
        (is_new, self.leave.hear(scope, cause))
    }

    /// "is leaving", with its cause where it said one.
    pub(super) fn leaves(&self) -> String {
        let verb = match self.leave.said.as_ref().map(|said| said.scope) {
            Some(LeaveScope::Drains) => "is draining",
            Some(LeaveScope::Avoided) => "is avoided",
            Some(LeaveScope::Ends) | None => "is leaving",
        };
        match self.leave.cause() {
            "" => verb.to_owned(),
            cause => format!("{verb}: {cause}"),
        }
    }
}

impl Leader {
    /// Who leaves, and why: "`w1` is leaving: AWS reclaims it at 12:00:31Z".
    pub(super) fn how_it_leaves(&self, worker: &Name) -> String {
        let how = self.workers.get(worker).filter(|worker| worker.is_leaving).map(Worker::leaves);
        format!("`{worker}` {}", how.as_deref().unwrap_or("is leaving"))
    }

    /// A worker says that it stays: it takes tasks again.
    pub(super) fn staying(&mut self, draft: &mut Draft, worker: &Name) {
        let Some(state) = self.workers.get_mut(worker) else { return };
        state.leave.said = None;
        match state.leave.asked {
            // Said before it heard of the drain.
            Some(Asked::Drain { .. }) => return,
            Some(Asked::Undrain) => {
                state.leave.asked = None;
                draft.delete(key(worker));
            }
            None => {}
        }
        if std::mem::take(&mut state.is_leaving) {
            draft.because(Reason::Remark(format!("worker `{worker}` stays: it takes tasks")));
        }
    }

    /// What a person asked of a worker that this leader had not heard of in its present life.
    pub(super) fn recall(
        draft: &mut Draft,
        records: &Records,
        worker: &Name,
        incarnation: u64,
    ) -> Leave {
        // One that cannot be read is left alone.
        let found = records.read::<DrainRecord>(KIND_DRAIN, worker.as_str()).ok().flatten();
        let Some((_, record)) = found else { return Leave::default() };
        if record.incarnation != incarnation {
            draft.delete(key(worker));
            return Leave::default();
        }
        Leave { said: None, asked: Some(Asked::of(record)) }
    }

    /// What was asked of a worker is done, or nobody waits for it any more.
    pub(super) fn settle_asked(draft: &mut Draft, worker: &Name) {
        draft.delete(key(worker));
    }

    /// Records what a person asked of a worker.
    fn put_asked(&self, draft: &mut Draft, records: &Records, worker: &Name, record: DrainRecord) {
        // Those of workers that never came back make room.
        let is_known = |key: &RecordKey| self.workers.keys().any(|name| name.as_str() == key.id);
        if records.count(KIND_DRAIN) >= WORKERS_MAX
            && let Some((key, _)) = records.list(KIND_DRAIN, "").find(|(key, _)| !is_known(key))
        {
            draft.delete(key.clone());
        }
        draft.put(key(worker), Expect::Anything, &record);
    }

    /// Sends again what a person asked of a worker that has just come back.
    pub(super) fn repeat_asked(&self, draft: &mut Draft, worker: &Name, now: Millis) {
        if let Some(state) = self.workers.get(worker)
            && let (Some(session), Some(asked)) = (state.session, state.leave.asked)
        {
            draft.send(session, asked.message(now));
        }
    }

    /// A person wants the tasks of a worker to go on elsewhere.
    pub(super) fn drain(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        name: &Name,
        deadline_ms: Option<u64>,
    ) -> Result<RecordKey, Refusal> {
        let worker = self.attached_worker(name)?;
        if worker.leave.is_end() {
            let leaves = worker.leaves();
            let text = format!("worker `{name}` {leaves}: it ends by itself, no need to drain it");
            return Err(Refusal::Conflict(text));
        }
        // From here on nothing is placed on it; its ranks leave once it says that it drains.
        worker.is_leaving = true;
        let asked = Asked::Drain { until: deadline_ms.map(|ms| now.plus(ms)) };
        worker.leave.asked = Some(asked);
        if let Some(session) = worker.session {
            draft.send(session, asked.message(now));
        }
        let tasks = count(worker.tasks.len(), "task");
        let record = asked.record(worker.incarnation);
        draft.decided(Reason::Remark(format!("worker `{name}` with {tasks} is to drain")));
        self.put_asked(draft, records, name, record);
        Ok(RecordKey::new(KIND_WORKER, name.as_str()))
    }

    /// A person wants a worker to take tasks again.
    pub(super) fn undrain(
        &mut self,
        draft: &mut Draft,
        records: &Records,
        now: Millis,
        name: &Name,
    ) -> Result<RecordKey, Refusal> {
        let worker = self.attached_worker(name)?;
        match worker.leave.state(!worker.tasks.is_empty()) {
            WorkerState::Draining | WorkerState::Drained => {
                worker.leave.asked = Some(Asked::Undrain);
                if let Some(session) = worker.session {
                    draft.send(session, Asked::Undrain.message(now));
                }
                let record = Asked::Undrain.record(worker.incarnation);
                draft.decided(Reason::Remark(format!("worker `{name}` is to take tasks again")));
                self.put_asked(draft, records, name, record);
            }
            WorkerState::Attached
            | WorkerState::Away
            | WorkerState::Checking
            | WorkerState::Unhealthy => {
                draft.because(Reason::Remark(format!("worker `{name}` is not drained")));
            }
            WorkerState::Leaving | WorkerState::Avoided => {
                let text = format!(
                    "worker `{name}` {}: only a drain that a user asked for can be taken back",
                    worker.leaves()
                );
                return Err(Refusal::Conflict(text));
            }
        }
        Ok(RecordKey::new(KIND_WORKER, name.as_str()))
    }

    /// The worker, when it can be told something.
    fn attached_worker(&mut self, name: &Name) -> Result<&mut Worker, Refusal> {
        let known: Vec<&str> = self.workers.keys().map(Name::as_str).collect();
        let Some(worker) = self.workers.get(name) else {
            let text = match known.len() {
                0 => "no worker is attached".to_owned(),
                all => {
                    let more = if all > NAMES_SHOWN { ", …" } else { "" };
                    let shown: Vec<&str> = known.into_iter().take(NAMES_SHOWN).collect();
                    format!("there are {}{more}", shown.join(", "))
                }
            };
            return Err(Refusal::NotFound(format!("no worker `{name}`: {text}")));
        };
        if worker.session.is_none() {
            let text = format!(
                "worker `{name}` is away and cannot be told: ask again when `cluster workers` shows \
                 it as attached"
            );
            return Err(Refusal::Conflict(text));
        }
        self.workers.get_mut(name).ok_or_else(|| Refusal::NotFound(format!("no worker `{name}`")))
    }
}

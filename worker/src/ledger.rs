//! What the leader has yet to learn: which tasks this worker has, and the messages about them that
//! are not acknowledged.
//!
//! Two queues. *Facts* (started, reports that change a record, exited) are kept until acknowledged
//! and sent again after every reconnect, in order. *Samples* (metrics, log lines) are kept and sent
//! again too, but under pressure the oldest go first, with a note in the log where lines are
//! missing. A task stays in the inventory until its exit is acknowledged, so that a leader never
//! takes a task for vanished while its cause of death is still on the way.
//!
//! Before both queues, once in each session: that this worker is leaving, or stays after all. Then answers to
//! questions, which are sent once: whoever asked has a deadline, so they are not kept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use api::pb::WorkerFrame;
use api::session::{
    ExitCause, LOG_LINE_BYTES_MAX, LogLine, LogStream, MESSAGE_BYTES_MAX, RankLine, RankReport,
    TaskEvent, TaskView, WorkerMessage,
};
use api::{Generation, TaskId};
use tokio::sync::watch;
use tracing::warn;

use crate::leave::Leave;

/// Facts kept. A task makes about five besides its checkpoints; at one checkpoint a minute this is
/// six weeks without a control plane.
const FACTS_MAX: usize = 65_536;
/// Bytes of log text and metrics kept (a fixed guess per metric): a few minutes of chatty ranks,
/// small beside a rank's own memory.
const SAMPLE_BYTES_MAX: usize = 8 << 20;
/// What one metrics report is counted as; more than it occupies.
const METRICS_BYTES: usize = 1 << 10;
/// Lines in one frame.
const LOG_BATCH_LINES: usize = 1_024;
/// Text in one frame, in bytes.
const LOG_BATCH_BYTES: usize = 256 << 10;
/// A line's bytes beside its text: JSON keys and numbers, and the worst text is escaped sixfold.
const LOG_LINE_OVERHEAD: usize = 128;
/// Bytes of answers that may wait for the connection; the oldest go first. A rank's largest is about
/// a quarter of a megabyte.
const ANSWER_BYTES_MAX: usize = 32 << 20;

const _: () = assert!(LOG_LINE_BYTES_MAX <= LOG_BATCH_BYTES);
const _: () = assert!(
    (LOG_BATCH_BYTES + LOG_LINE_BYTES_MAX) * 6 + LOG_BATCH_LINES * LOG_LINE_OVERHEAD
        < MESSAGE_BYTES_MAX
);

struct Fact {
    order: u64,
    task: TaskId,
    event: TaskEvent,
    sent: Option<u64>,
}

enum Sample {
    Metrics { task: TaskId, generation: Generation, report: RankReport },
    Logs { task: TaskId, gap: Option<Gap>, lines: Vec<LogLine>, bytes: usize },
}

struct Queued {
    order: u64,
    sample: Sample,
    sent: Option<u64>,
}

/// Lines that were dropped from the queue.
#[derive(Clone, Debug)]
struct Gap {
    /// Sequence of the last of them, so that the line behind the note follows on.
    sequence: u64,
    time_ms: u64,
    lines: u64,
}

impl Gap {
    fn after(self, earlier: Option<Self>) -> Self {
        Self { lines: self.lines + earlier.map_or(0, |gap| gap.lines), ..self }
    }
}

struct Task {
    view: TaskView,
    exited: bool,
}

#[derive(Default)]
struct Inner {
    tasks: BTreeMap<TaskId, Task>,
    facts: VecDeque<Fact>,
    samples: VecDeque<Queued>,
    sample_bytes: usize,
    /// Answers as JSON.
    answers: VecDeque<Vec<u8>>,
    answer_bytes: usize,
    /// Facts and samples at the front that this session has sent.
    facts_sent: usize,
    samples_sent: usize,
    /// Lines missing in front of what a task prints next.
    gaps: BTreeMap<TaskId, Gap>,
    /// Lines dropped after this session sent them, with the sequence of their last frame.
    lost_if_cut: BTreeMap<TaskId, (u64, Gap)>,
    order: u64,
    sequence: u64,
    /// Why it takes no tasks; none: it stays.
    leave: Option<Leave>,
    told: Told,
    /// Why its host must pass a check before it gets work.
    unhealthy: Option<String>,
    attached: bool,
}

/// Whether the leader knows that this worker is leaving, or stays after all.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Told {
    /// It has never been leaving.
    #[default]
    Nothing,
    /// This session has not said so.
    Unsaid,
    /// Said in this session, in this frame.
    Said(u64),
    /// Acknowledged: this leader knows.
    Known,
}

/// Shared by the tasks that write to it and the session that empties it.
pub(crate) struct Ledger {
    inner: Mutex<Inner>,
    changes: watch::Sender<u64>,
}

impl Sample {
    fn bytes(&self) -> usize {
        match self {
            Self::Metrics { .. } => METRICS_BYTES,
            Self::Logs { lines, bytes, .. } => bytes + lines.len() * LOG_LINE_OVERHEAD,
        }
    }

    fn message(&self) -> WorkerMessage {
        match self {
            Self::Metrics { task, generation, report } => WorkerMessage::Task {
                task: task.clone(),
                event: TaskEvent::Report { generation: *generation, report: report.clone() },
            },
            Self::Logs { task, gap, lines, .. } => {
                let note = gap.iter().map(|gap| LogLine {
                    sequence: gap.sequence,
                    time_ms: gap.time_ms,
                    stream: LogStream::Gap,
                    text: format!(
                        "{} lines are missing here: the worker could not reach a coordinator in \
                         time; the object store may have them",
                        gap.lines
                    ),
                });
                WorkerMessage::Logs {
                    task: task.clone(),
                    lines: note.chain(lines.iter().cloned()).collect(),
                }
            }
        }
    }
}

fn is_sample(report: &RankReport) -> bool {
    matches!(report, RankReport::Step(_) | RankReport::Evaluation(_) | RankReport::Busy { .. })
}

impl Inner {
    fn next_order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    fn push_fact(&mut self, task: TaskId, event: TaskEvent) {
        if self.facts.len() >= FACTS_MAX {
            self.forget_a_fact();
        }
        let order = self.next_order();
        self.facts.push_back(Fact { order, task, event, sent: None });
    }

    /// Only reports are forgotten: starts and exits are bounded by what the leader ordered. The
    /// first choice is a checkpoint that a later one of its task supersedes; the next leader adopts
    /// complete manifests from the store, so not even that is lost.
    fn forget_a_fact(&mut self) {
        let is_checkpoint = |fact: &Fact| {
            matches!(&fact.event, TaskEvent::Report { report: RankReport::Checkpoint(_), .. })
        };
        let superseded = self.facts.iter().position(|fact| {
            is_checkpoint(fact)
                && self
                    .facts
                    .iter()
                    .rev()
                    .take_while(|later| later.order > fact.order)
                    .any(|later| is_checkpoint(later) && later.task == fact.task)
        });
        let index = superseded.or_else(|| {
            self.facts.iter().position(|fact| matches!(fact.event, TaskEvent::Report { .. }))
        });
        if let Some(index) = index
            && let Some(fact) = self.facts.remove(index)
        {
            self.facts_sent -= usize::from(index < self.facts_sent);
            warn!(task = %fact.task, kept = FACTS_MAX, "forgot a report: nobody takes them");
        }
    }

    fn push_sample(&mut self, sample: Sample) {
        self.sample_bytes += sample.bytes();
        let order = self.next_order();
        self.samples.push_back(Queued { order, sample, sent: None });
        self.enforce_bound();
    }

    fn enforce_bound(&mut self) {
        while self.sample_bytes > SAMPLE_BYTES_MAX && self.samples.len() > 1 {
            self.drop_oldest_sample();
        }
    }

    fn drop_oldest_sample(&mut self) {
        let Some(Queued { sample, sent, .. }) = self.samples.pop_front() else { return };
        self.sample_bytes -= sample.bytes();
        self.samples_sent = self.samples_sent.saturating_sub(1);
        let Sample::Logs { task, gap, lines, .. } = sample else { return };
        let Some(last) = lines.last() else { return };
        let dropped = Gap {
            sequence: last.sequence,
            time_ms: last.time_ms,
            lines: lines.len() as u64 + gap.map_or(0, |earlier| earlier.lines),
        };
        match sent {
            // On its way: it is missing only if this session is cut before it is acknowledged.
            Some(sent) => {
                let earlier = self.lost_if_cut.remove(&task).map(|(_, gap)| gap);
                self.lost_if_cut.insert(task, (sent, dropped.after(earlier)));
            }
            None => self.note_gap(task, dropped),
        }
    }

    /// Puts a note in front of the task's next lines, be they here or yet to come.
    fn note_gap(&mut self, task: TaskId, dropped: Gap) {
        let next = self.samples.iter_mut().find_map(|queued| match &mut queued.sample {
            Sample::Logs { task: other, gap, .. } if *other == task => Some(gap),
            _ => None,
        });
        match next {
            Some(Some(later)) => *later = later.clone().after(Some(dropped)),
            Some(gap) => *gap = Some(dropped),
            None => {
                let earlier = self.gaps.remove(&task);
                self.gaps.insert(task, dropped.after(earlier));
            }
        }
    }

    fn push_lines(&mut self, task: &TaskId, lines: Vec<LogLine>) {
        for line in lines {
            let length = line.text.len();
            let unsent = self.samples.len() > self.samples_sent;
            if unsent
                && let Some(Queued {
                    sample: Sample::Logs { task: last, lines, bytes, .. }, ..
                }) = self.samples.back_mut()
                && last == task
                && lines.len() < LOG_BATCH_LINES
                && *bytes + length <= LOG_BATCH_BYTES
            {
                lines.push(line);
                *bytes += length;
                self.sample_bytes += length + LOG_LINE_OVERHEAD;
                self.enforce_bound();
                continue;
            }
            let gap = self.gaps.remove(task);
            let task = task.clone();
            self.push_sample(Sample::Logs { task, gap, lines: vec![line], bytes: length });
        }
    }
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), changes: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is complete before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Wakes when something was added or acknowledged.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The task is this worker's from now on; false when it has it already or its exit is not yet
    /// acknowledged.
    pub(crate) fn accept(&self, task: &TaskId) -> bool {
        let mut inner = self.lock();
        if inner.tasks.contains_key(task) {
            return false;
        }
        let view = TaskView {
            task: task.clone(),
            address: None,
            has_peers: false,
            generation: None,
            holds_state: false,
            waits: false,
        };
        inner.tasks.insert(task.clone(), Task { view, exited: false });
        true
    }

    /// Whether the task is in the inventory: running, or dead with its exit not acknowledged.
    pub(crate) fn knows(&self, task: &TaskId) -> bool {
        self.lock().tasks.contains_key(task)
    }

    pub(crate) fn started(&self, task: &TaskId, pid: u32) {
        self.lock().push_fact(task.clone(), TaskEvent::Started { pid });
        self.changed();
    }

    /// A task says something, as a rank of `generation`.
    pub(crate) fn report(&self, task: &TaskId, line: RankLine) {
        let RankLine { generation, report } = line;
        let mut inner = self.lock();
        // A state that a process holds it keeps, whatever it was told to be part of since.
        if let Some(known) = inner.tasks.get_mut(task)
            && let RankReport::Running { holds_state: true, .. } = &report
        {
            known.view.holds_state = true;
        }
        // What else it says of a former generation is no news of that one.
        if let Some(known) = inner.tasks.get_mut(task)
            && known.view.generation() == generation
        {
            let view = &mut known.view;
            match &report {
                RankReport::Listening { address, .. } => view.address = Some(*address),
                RankReport::Broken { .. } | RankReport::Paused { .. } => view.waits = true,
                _ => {}
            }
        }
        if is_sample(&report) {
            inner.push_sample(Sample::Metrics { task: task.clone(), generation, report });
        } else {
            inner.push_fact(task.clone(), TaskEvent::Report { generation, report });
        }
        drop(inner);
        self.changed();
    }

    /// An answer for whoever asked in this session; sent before everything that is kept.
    pub(crate) fn answer(&self, message: &WorkerMessage) {
        let json = encode(message);
        let mut inner = self.lock();
        inner.answer_bytes += json.len();
        inner.answers.push_back(json);
        while inner.answer_bytes > ANSWER_BYTES_MAX
            && let Some(dropped) = inner.answers.pop_front()
        {
            inner.answer_bytes -= dropped.len();
        }
        drop(inner);
        self.changed();
    }

    /// The task is told to be part of another generation.
    pub(crate) fn joins(&self, task: &TaskId, generation: Generation) {
        if let Some(known) = self.lock().tasks.get_mut(task) {
            known.view.generation = Some(generation);
            known.view.address = None;
            known.view.has_peers = false;
            known.view.waits = false;
        }
    }

    pub(crate) fn peers_given(&self, task: &TaskId) {
        if let Some(known) = self.lock().tasks.get_mut(task) {
            known.view.has_peers = true;
        }
    }

    pub(crate) fn exited(&self, task: &TaskId, cause: ExitCause) {
        let mut inner = self.lock();
        if let Some(known) = inner.tasks.get_mut(task) {
            known.exited = true;
        }
        inner.push_fact(task.clone(), TaskEvent::Exited { cause });
        drop(inner);
        self.changed();
    }

    /// This worker is leaving, or stays after all: told before everything that is not sent yet.
    pub(crate) fn leave(&self, leave: Option<Leave>) {
        let mut inner = self.lock();
        if inner.leave == leave {
            return;
        }
        inner.leave = leave;
        inner.told = Told::Unsaid;
        drop(inner);
        self.changed();
    }

    /// Tells it again although nothing has changed: someone believes otherwise.
    pub(crate) fn leave_again(&self) {
        self.lock().told = Told::Unsaid;
        self.changed();
    }

    /// Why its host must pass a check before it gets work; none: nothing is known against it. Said
    /// with the next hello.
    pub(crate) fn set_unhealthy(&self, why: Option<String>) {
        self.lock().unhealthy = why;
    }

    pub(crate) fn unhealthy(&self) -> Option<String> {
        self.lock().unhealthy.clone()
    }

    pub(crate) fn lines(&self, task: &TaskId, lines: Vec<LogLine>) {
        self.lock().push_lines(task, lines);
        self.changed();
    }

    /// Facts that no leader has acknowledged.
    pub(crate) fn facts_left(&self) -> usize {
        self.lock().facts.len()
    }

    /// Whether a leader is there that has yet to acknowledge that this worker is leaving.
    pub(crate) fn leave_is_unknown(&self) -> bool {
        let inner = self.lock();
        inner.attached && matches!(inner.told, Told::Unsaid | Told::Said(_))
    }

    /// Whether a leader has welcomed this worker and the session is up.
    pub(crate) fn attached(&self, is_attached: bool) {
        self.lock().attached = is_attached;
        self.changed();
    }

    /// A new session: sequences begin again, everything is unsent again. Returns the hello's
    /// sequence and the inventory, taken at the same instant.
    pub(crate) fn begin_session(&self) -> (u64, Vec<TaskView>) {
        let mut inner = self.lock();
        inner.facts.iter_mut().for_each(|fact| fact.sent = None);
        inner.samples.iter_mut().for_each(|queued| queued.sent = None);
        (inner.facts_sent, inner.samples_sent, inner.sequence) = (0, 0, 1);
        // They were asked for in another session.
        inner.answers.clear();
        inner.answer_bytes = 0;
        for (task, (_, gap)) in std::mem::take(&mut inner.lost_if_cut) {
            inner.note_gap(task, gap);
        }
        if inner.told != Told::Nothing {
            // Perhaps another leader, which has not heard of it.
            inner.told = Told::Unsaid;
        }
        (1, inner.tasks.values().map(|task| task.view.clone()).collect())
    }

    /// The next heartbeat of this session.
    pub(crate) fn heartbeat(&self) -> WorkerFrame {
        let mut inner = self.lock();
        inner.sequence += 1;
        frame(inner.sequence, &WorkerMessage::Heartbeat)
    }

    /// The oldest message that this session has not sent, facts and samples in the order in which
    /// they came about.
    pub(crate) fn next_frame(&self) -> Option<WorkerFrame> {
        let mut inner = self.lock();
        if inner.told == Told::Unsaid {
            inner.sequence += 1;
            inner.told = Told::Said(inner.sequence);
            let message = inner.leave.as_ref().map_or(WorkerMessage::Staying, Leave::message);
            return Some(frame(inner.sequence, &message));
        }
        if let Some(json) = inner.answers.pop_front() {
            inner.answer_bytes -= json.len();
            inner.sequence += 1;
            return Some(WorkerFrame { sequence: inner.sequence, json });
        }
        let Inner { facts, samples, facts_sent, samples_sent, sequence, .. } = &mut *inner;
        let fact = facts.get_mut(*facts_sent);
        let sample = samples.get_mut(*samples_sent);
        let fact_first = match (&fact, &sample) {
            (Some(fact), Some(sample)) => fact.order < sample.order,
            (fact, _) => fact.is_some(),
        };
        let (message, sent) = match (fact, sample) {
            (Some(fact), _) if fact_first => {
                *facts_sent += 1;
                let (task, event) = (fact.task.clone(), fact.event.clone());
                (WorkerMessage::Task { task, event }, &mut fact.sent)
            }
            (_, Some(queued)) => {
                *samples_sent += 1;
                (queued.sample.message(), &mut queued.sent)
            }
            _ => return None,
        };
        *sequence += 1;
        *sent = Some(*sequence);
        Some(frame(*sequence, &message))
    }

    /// Whether `next_frame` would return one.
    pub(crate) fn has_unsent(&self) -> bool {
        let inner = self.lock();
        let has_items =
            inner.facts.len() > inner.facts_sent || inner.samples.len() > inner.samples_sent;
        has_items || inner.told == Told::Unsaid || !inner.answers.is_empty()
    }

    /// Whether something sent in this session waits for its acknowledgement.
    pub(crate) fn awaits_acknowledgement(&self) -> bool {
        self.lock().facts_sent > 0
    }

    /// The leader has acted on every frame of this session up to `sequence`.
    pub(crate) fn acknowledge(&self, sequence: u64) {
        let mut inner = self.lock();
        let done = |sent: Option<u64>| sent.is_some_and(|sent| sent <= sequence);
        let former = inner.told;
        if matches!(inner.told, Told::Said(said) if said <= sequence) {
            inner.told = Told::Known;
        }
        let before = inner.facts.len() + inner.samples.len();
        while inner.facts.front().is_some_and(|fact| done(fact.sent)) {
            let Some(fact) = inner.facts.pop_front() else { break };
            inner.facts_sent -= 1;
            if matches!(fact.event, TaskEvent::Exited { .. })
                && inner.tasks.get(&fact.task).is_some_and(|task| task.exited)
            {
                inner.tasks.remove(&fact.task);
                inner.gaps.remove(&fact.task);
            }
        }
        while inner.samples.front().is_some_and(|queued| done(queued.sent)) {
            let Some(queued) = inner.samples.pop_front() else { break };
            inner.samples_sent -= 1;
            inner.sample_bytes -= queued.sample.bytes();
        }
        inner.lost_if_cut.retain(|_, (sent, _)| *sent > sequence);
        let is_fewer = before != inner.facts.len() + inner.samples.len();
        let changed = is_fewer || former != inner.told;
        drop(inner);
        if changed {
            self.changed();
        }
    }
}

/// Wraps a message.
pub(crate) fn frame(sequence: u64, message: &WorkerMessage) -> WorkerFrame {
    WorkerFrame { sequence, json: encode(message) }
}

/// A message of ours always serialises, its maps have text keys.
fn encode(message: &WorkerMessage) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages have no map with non-text keys")
}

#[cfg(test)]
mod tests;

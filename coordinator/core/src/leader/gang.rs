//! What this leader has seen of one generation of a gang: who placed it, how its tasks ended, and
//! which end was the cause of the others.
//!
//! Volatile: a new leader begins with an empty one and asks the workers' inventories instead.

use std::collections::{BTreeMap, BTreeSet};

use api::ids::{Generation, Name, Rank, Step, TaskId};
use api::job::LANES_MAX;
use api::records::Failure;
use api::session::{ExitCause, StopCause};

use super::decision::Millis;
use super::goodput::Unwritten;
use super::shunned::Shunned;
use super::watchdog::Pace;

/// How long a task may take from its placement until it runs. Restoring a large checkpoint over a
/// slow network takes minutes; what takes longer than this hangs.
pub(super) const START_WAIT_MS: u64 = 1_800_000;
/// Longest message taken into a record, in bytes: it goes through the log and into every listing.
const MESSAGE_BYTES_MAX: usize = 2 << 10;

/// A rank's own words before it left, or when its group broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LastWords {
    pub(super) message: String,
    pub(super) retryable: bool,
    pub(super) blames: Option<Rank>,
    /// It has not left: it keeps its state and waits for the next generation.
    pub(super) stays: bool,
    /// The checkpoint that it could not restore, and nobody can any more.
    pub(super) damaged: Option<Step>,
    /// Not its own words: its worker says that it waits. They come, if there are any.
    pub(super) is_hearsay: bool,
}

/// A process beside the gang that may become a rank of the next generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spare {
    pub(super) task: TaskId,
    pub(super) worker: Name,
    pub(super) local_rank: u32,
    /// It has read its data and built its model.
    pub(super) is_ready: bool,
    /// What it said before it left.
    pub(super) words: Option<String>,
}

/// How one task ended, or is about to.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) rank: Rank,
    pub(super) worker: Name,
    /// When the first was heard of it.
    pub(super) at: Millis,
    pub(super) words: Option<LastWords>,
    pub(super) exit: Option<ExitCause>,
    /// It held the job's state.
    pub(super) held_state: bool,
}

impl End {
    /// Its group is broken, its process lives.
    fn stays(&self) -> bool {
        self.exit.is_none() && self.words.as_ref().is_some_and(|words| words.stays)
    }

    fn is_failure(&self) -> bool {
        self.words.is_some() || self.exit.as_ref().is_some_and(|e| *e != ExitCause::Completed)
    }

    /// Trying again would end the same way: whoever is blamed need not leave for that.
    fn is_final(&self) -> bool {
        self.words.as_ref().is_some_and(|words| !words.retryable)
    }

    fn blames(&self) -> Option<Rank> {
        self.words.as_ref()?.blames.filter(|blamed| *blamed != self.rank)
    }

    /// How it ended, in its own words where it had some: they say whether trying again can help.
    fn cause(&self) -> ExitCause {
        let Some(words) = &self.words else {
            return self.exit.clone().unwrap_or(ExitCause::Completed);
        };
        let (message, retryable) = (words.message.clone(), words.retryable);
        let damaged = words.damaged;
        if self.stays() {
            return ExitCause::GroupBroken { message };
        }
        match &self.exit {
            Some(ExitCause::Signal { signal, .. }) => {
                ExitCause::Signal { signal: *signal, message }
            }
            Some(
                lost @ (ExitCause::WorkerLost { .. }
                | ExitCause::NotStarted { .. }
                | ExitCause::GroupBroken { .. }),
            ) => lost.clone(),
            Some(ExitCause::Code { code, .. }) => {
                ExitCause::Code { code: *code, message, retryable, damaged }
            }
            Some(ExitCause::Completed | ExitCause::Killed { .. }) | None => {
                ExitCause::Code { code: 1, message, retryable, damaged }
            }
        }
    }
}

/// What is to be thought of a generation.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    /// Nothing has failed.
    Fine,
    /// Something has failed; what exactly becomes known soon. The text says what is waited for.
    Await(String),
    /// This is what failed first.
    Cause(Failure),
    /// All live and wait for the next generation; the leader that knew why is gone.
    AllWait,
}

/// One generation of one workload.
#[derive(Clone, Debug)]
pub(super) struct Gang {
    pub(super) generation: Generation,
    /// When this leader placed it, which therefore holds its secret; absent for one that it found.
    pub(super) placed_at: Option<Millis>,
    /// In the order in which they were heard of.
    pub(super) ends: Vec<End>,
    /// Its tasks are to be killed although the workload is still active.
    pub(super) is_condemned: bool,
    /// Since when its tasks have been expected to leave by themselves.
    pub(super) leaving_since: Option<Millis>,
    /// Since when its last tasks have been waited for before the next generation.
    pub(super) clearing_since: Option<Millis>,
    /// When the store was asked for checkpoints that are not recorded.
    pub(super) adopt_asked: Option<Millis>,
    /// Since when all its ranks listen while it is not known how each of them computes.
    pub(super) unknown_since: Option<Millis>,
    /// Since when this leader has known it to run.
    pub(super) running_since: Option<Millis>,
    /// Ranks whose start was lost with a session.
    unstarted: BTreeSet<Rank>,
    /// Ranks on workers that said they are leaving.
    departing: BTreeMap<Rank, Name>,
    /// Rank 0's word that its state is saved and all ranks leave before the last step.
    pub(super) stopped: Option<StopCause>,
    /// Processes that may become ranks of the next generation.
    pub(super) spares: Vec<Spare>,
    /// Why its ranks were asked to leave their group between two steps, when they were.
    pub(super) pausing: Option<String>,
    /// Workers that the job does not use for now.
    pub(super) shunned: Shunned,
    /// When the first of the losses was heard of that it has to get over before it runs.
    pub(super) incident: Option<Millis>,
    /// When its steps were reported, and who was slow in them.
    pub(super) pace: Pace,
    /// A straggler that is to be replaced.
    pub(super) replacing: Option<Rank>,
    /// What its steps took, as far as the job's record does not say.
    pub(super) unwritten: Unwritten,
}

impl Gang {
    pub(super) fn new(generation: Generation, placed_at: Option<Millis>) -> Self {
        Self {
            generation,
            placed_at,
            ends: Vec::new(),
            is_condemned: false,
            leaving_since: None,
            clearing_since: None,
            adopt_asked: None,
            unknown_since: None,
            running_since: None,
            unstarted: BTreeSet::new(),
            departing: BTreeMap::new(),
            stopped: None,
            spares: Vec::new(),
            pausing: None,
            shunned: Shunned::default(),
            incident: None,
            pace: Pace::default(),
            replacing: None,
            unwritten: Unwritten::default(),
        }
    }

    /// Times from which something is waited for that a leader may have missed while it was away.
    pub(super) fn times(&mut self) -> impl Iterator<Item = &mut Millis> {
        let ends = self.ends.iter_mut().map(|end| &mut end.at);
        let since = [
            &mut self.placed_at,
            &mut self.leaving_since,
            &mut self.adopt_asked,
            &mut self.unknown_since,
            &mut self.incident,
        ];
        ends.chain(since.into_iter().flatten()).chain(self.pace.times())
    }

    /// Whether the task is a spare of this gang.
    pub(super) fn has_spare(&self, task: &TaskId) -> bool {
        self.spares.iter().any(|spare| spare.task == *task)
    }

    /// The order to start the rank's process was lost, whatever generation it was given in.
    pub(super) fn never_started(&mut self, rank: Rank) {
        self.unstarted.insert(rank);
    }

    /// Whether the rank's process is to be started, should its worker not have it.
    pub(super) fn is_unstarted(&self, rank: Rank) -> bool {
        self.unstarted.contains(&rank)
    }

    /// Whether the rank's worker is leaving.
    pub(super) fn is_departing(&self, rank: Rank) -> bool {
        self.departing.contains_key(&rank)
    }

    /// Ranks that have ended or are about to: no members of the next generation.
    pub(super) fn gone(&self) -> impl Iterator<Item = Rank> {
        self.ends.iter().filter(|end| !end.stays()).map(|end| end.rank)
    }

    /// Ranks that living ones blame for their broken group.
    pub(super) fn all_blamed(&self) -> Vec<Rank> {
        self.ends.iter().filter(|end| end.stays()).filter_map(End::blames).collect()
    }

    /// The rank that the others blame most for a broken group of which all live.
    pub(super) fn blamed(&self) -> Option<Rank> {
        let blamed: Vec<Rank> = self.ends.iter().filter_map(End::blames).collect();
        let votes = |rank: Rank| blamed.iter().filter(|other| **other == rank).count();
        blamed.iter().copied().max_by_key(|rank| (votes(*rank), std::cmp::Reverse(*rank)))
    }

    /// The rank's worker is leaving: however the rank ends, it is nobody's failure. True when that
    /// is new.
    pub(super) fn departs(&mut self, rank: Rank, worker: &Name) -> bool {
        self.departing.insert(rank, worker.clone()).is_none()
    }

    /// A worker that is leaving, or has left since.
    pub(super) fn leaver(&self) -> Option<&Name> {
        self.departing.values().next()
    }

    /// Whether an end is the consequence of a leave: of a rank on a worker that leaves, of one that
    /// blames such a rank, or of any rank once all had been asked to leave and the state was saved.
    fn is_excused(&self, end: &End) -> bool {
        self.departing.contains_key(&end.rank)
            || !end.is_final()
                && end.blames().is_some_and(|blamed| self.departing.contains_key(&blamed))
            || self.stopped == Some(StopCause::Order)
    }

    /// Whether some rank ended badly, so that the others cannot go on.
    pub(super) fn is_broken(&self) -> bool {
        self.ends.iter().any(End::is_failure)
    }

    /// Whether this leader placed it.
    pub(super) fn is_mine(&self) -> bool {
        self.placed_at.is_some()
    }

    /// Gives up a gang that has been starting for too long, on account of `rank`.
    pub(super) fn give_up_if_overdue(&mut self, rank: Rank, worker: &Name, now: Millis) {
        if self.placed_at.is_some_and(|placed| now.since(placed) >= START_WAIT_MS) {
            let minutes = START_WAIT_MS / 60_000;
            let reason = format!("it did not run within {minutes} minutes");
            self.exited(rank, worker, ExitCause::NotStarted { reason }, now);
        }
    }

    /// The end of `rank`, begun now if this is the first word of it.
    fn end(&mut self, rank: Rank, worker: &Name, now: Millis) -> &mut End {
        let index = self.ends.iter().position(|end| end.rank == rank).unwrap_or_else(|| {
            let worker = worker.clone();
            let (words, exit) = (None, None);
            self.ends.push(End { rank, worker, at: now, words, exit, held_state: false });
            self.ends.len() - 1
        });
        &mut self.ends[index]
    }

    /// The task is gone; the first word of it counts.
    pub(super) fn exited(&mut self, rank: Rank, worker: &Name, cause: ExitCause, now: Millis) {
        self.end(rank, worker, now).exit.get_or_insert(clip_cause(cause));
    }

    /// The task says that it cannot go on and is about to leave.
    pub(super) fn failed(&mut self, rank: Rank, worker: &Name, words: LastWords, now: Millis) {
        let words = LastWords { message: clip(&words.message), ..words };
        let known = &mut self.end(rank, worker, now).words;
        if known.as_ref().is_none_or(|known| known.is_hearsay) {
            *known = Some(words);
        }
    }

    /// Notes of a rank that has ended, or is about to, that it held the job's state.
    pub(super) fn held_state(&mut self, rank: Rank) {
        for end in self.ends.iter_mut().filter(|end| end.rank == rank) {
            end.held_state = true;
        }
    }

    /// A rank that was lost with its worker is back, alive: it did not end.
    pub(super) fn is_back(&mut self, rank: Rank) {
        let is_lost = |end: &End| matches!(end.exit, Some(ExitCause::WorkerLost { .. }));
        self.ends.retain(|end| end.rank != rank || !is_lost(end));
    }

    /// How the task ended, when it did.
    pub(super) fn exit_of(&self, rank: Rank) -> Option<&ExitCause> {
        self.ends.iter().find(|end| end.rank == rank)?.exit.as_ref()
    }

    /// Ranks that ended well.
    pub(super) fn completed(&self) -> impl Iterator<Item = Rank> {
        let ended_well = |end: &&End| !end.is_failure() && end.exit == Some(ExitCause::Completed);
        self.ends.iter().filter(ended_well).map(|end| end.rank)
    }

    /// What failed first. A rank that blames another is its victim: the blamed one's own end is
    /// waited for, up to `patience_ms` (a vanished worker's lease has run out by then). So is the
    /// exit of a rank that announced its own failure. What follows from a worker's leave is none.
    pub(super) fn verdict(
        &self,
        is_present: impl Fn(Rank) -> bool,
        now: Millis,
        patience_ms: u64,
    ) -> Verdict {
        let counts = |end: &&End| end.is_failure() && !self.is_excused(end);
        let failures: Vec<&End> = self.ends.iter().filter(counts).collect();
        let Some(first) = failures.first() else { return Verdict::Fine };
        let is_over = |end: &End| now.since(end.at) >= patience_ms;
        let is_hearsay = |end: &&End| {
            end.exit.is_none() && end.words.as_ref().is_some_and(|words| words.is_hearsay)
        };
        if failures.iter().all(is_hearsay) {
            return match self.everybody_stays(&is_present) || is_over(first) {
                true => Verdict::AllWait,
                false => Verdict::Await("its ranks wait, it is not known yet for whom".into()),
            };
        }
        let failures: Vec<&End> = failures.into_iter().filter(|end| !is_hearsay(end)).collect();
        let Some(first) = failures.first() else { return Verdict::Fine };
        if let Some(own) = failures.iter().find(|end| end.blames().is_none()) {
            let text = match own.stays() {
                // Whoever ended may yet be heard of.
                true if self.everybody_stays(&is_present) => String::new(),
                true => format!("the group of {} broke, waiting to hear why", own.rank),
                false => format!("{} failed, waiting for its exit", own.rank),
            };
            if own.exit.is_none() && !is_over(own) && !text.is_empty() {
                return Verdict::Await(text);
            }
            return Verdict::Cause(self.failure(own));
        }
        // Broken off and alive, the blamed one has said all there is to say.
        let ended = |rank| {
            let end = self.ends.iter().find(|end| end.rank == rank);
            end.is_some_and(|end| end.exit.is_some() || end.stays())
        };
        let awaited = failures.iter().find_map(|end| {
            end.blames()
                .filter(|blamed| !ended(*blamed) && is_present(*blamed))
                .map(|b| (end.rank, b))
        });
        match awaited {
            Some((victim, blamed)) if !is_over(first) => {
                Verdict::Await(format!("{victim} blames {blamed}, waiting for the end of {blamed}"))
            }
            _ => Verdict::Cause(self.failure(first)),
        }
    }

    /// Whether every present rank has said that it waits for the next generation.
    fn everybody_stays(&self, is_present: impl Fn(Rank) -> bool) -> bool {
        let said = self.ends.iter().filter(|end| end.stays()).count();
        (0..).map(Rank).take_while(|rank| rank.0 < LANES_MAX).filter(|r| is_present(*r)).count()
            == said
    }

    fn failure(&self, end: &End) -> Failure {
        let cause = end.cause();
        let is_lost = |other: &&End| {
            other.worker == end.worker && matches!(other.exit, Some(ExitCause::WorkerLost { .. }))
        };
        let several = matches!(cause, ExitCause::WorkerLost { .. })
            && self.ends.iter().filter(is_lost).count() > 1;
        Failure {
            generation: self.generation,
            rank: (!several).then_some(end.rank),
            worker: end.worker.clone(),
            cause,
            time_ms: end.at.0,
        }
    }
}

/// "r1 on `w2` killed by signal 9 (SIGKILL)", or "`w2`: worker lost: …" for a worker with several.
pub(super) fn describe(failure: &Failure) -> String {
    match failure.rank {
        Some(rank) if matches!(failure.cause, ExitCause::WorkerLost { .. }) => {
            format!("{rank} on `{}`: {}", failure.worker, failure.cause)
        }
        Some(rank) => format!("{rank} on `{}` {}", failure.worker, failure.cause),
        None => format!("`{}`: {}", failure.worker, failure.cause),
    }
}

/// Cuts a text from outside to what a record may hold.
pub(super) fn clip(text: &str) -> String {
    if text.len() <= MESSAGE_BYTES_MAX {
        return text.to_owned();
    }
    let end = (0..=MESSAGE_BYTES_MAX).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    format!("{}…", &text[..end])
}

fn clip_cause(cause: ExitCause) -> ExitCause {
    match cause {
        ExitCause::Completed => ExitCause::Completed,
        ExitCause::Code { code, message, retryable, damaged } => {
            ExitCause::Code { code, message: clip(&message), retryable, damaged }
        }
        ExitCause::Signal { signal, message } => {
            ExitCause::Signal { signal, message: clip(&message) }
        }
        ExitCause::Killed { reason } => ExitCause::Killed { reason: clip(&reason) },
        ExitCause::WorkerLost { reason } => ExitCause::WorkerLost { reason: clip(&reason) },
        ExitCause::NotStarted { reason } => ExitCause::NotStarted { reason: clip(&reason) },
        ExitCause::GroupBroken { message } => ExitCause::GroupBroken { message: clip(&message) },
    }
}

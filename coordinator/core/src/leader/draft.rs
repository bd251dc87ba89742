//! A decision in the making: at most one transaction, and the effects that follow its commit.

use api::events::JobEvent;
use api::ids::{Generation, Name, Rank, TaskId};
use api::session::{CoordinatorMessage, RankOrder};
use serde::Serialize;

use super::decision::{Decision, Effect, Refusal, SessionId};
use super::reason::Reason;
use crate::transaction::{Precondition, RecordKey, Transaction, Write};

/// What a written record must be before the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expect {
    /// Not there.
    Absent,
    /// Last written at this version.
    Version(u64),
    /// Anything: the write replaces or creates.
    Anything,
}

#[derive(Debug, Default)]
pub(super) struct Draft {
    transaction: Transaction,
    effects: Vec<Effect>,
    reply: Option<Result<RecordKey, Refusal>>,
    reason: Option<Reason>,
    has_decided: bool,
}

impl Draft {
    /// Whether something is to be committed.
    pub(super) fn has_writes(&self) -> bool {
        !self.transaction.writes.is_empty()
    }

    /// Creates or replaces a record.
    pub(super) fn put<T: Serialize>(&mut self, key: RecordKey, expect: Expect, record: &T) {
        match expect {
            Expect::Absent => {
                self.transaction.preconditions.push(Precondition::Absent(key.clone()));
            }
            Expect::Version(version) => {
                self.transaction.preconditions.push(Precondition::VersionIs(key.clone(), version));
            }
            Expect::Anything => {}
        }
        let json = serde_json::to_vec(record)
            .expect("records are structs whose maps have text keys, which JSON can always hold");
        self.transaction.writes.push(Write::Put { key, json });
    }

    pub(super) fn delete(&mut self, key: RecordKey) {
        self.transaction.writes.push(Write::Delete { key });
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(super) fn send(&mut self, session: SessionId, message: CoordinatorMessage) {
        self.effect(Effect::Send { session, message });
    }

    pub(super) fn deliver(&mut self, session: SessionId, task: &TaskId, order: RankOrder) {
        self.send(session, CoordinatorMessage::Deliver { task: task.clone(), order });
    }

    pub(super) fn publish(&mut self, job: &Name, event: JobEvent) {
        self.effect(Effect::Publish { job: job.clone(), event });
    }

    pub(super) fn note(
        &mut self,
        job: &Name,
        generation: Generation,
        rank: Option<Rank>,
        text: impl Into<String>,
    ) {
        self.publish(job, JobEvent::Note { generation, rank, text: text.into() });
    }

    pub(super) fn answer(&mut self, reply: Result<RecordKey, Refusal>) {
        self.reply = Some(reply);
    }

    /// Says why nothing, or nothing much, is done. The first to say so wins.
    pub(super) fn because(&mut self, reason: Reason) {
        self.reason.get_or_insert(reason);
    }

    /// Says why something is written, which matters more than why something else is not. The first
    /// to say so wins: it knows best.
    pub(super) fn decided(&mut self, reason: Reason) {
        if !self.has_decided {
            self.has_decided = true;
            self.reason = Some(reason);
        }
    }

    pub(super) fn finish(self) -> Decision {
        let Self { transaction, effects, reply, reason, .. } = self;
        let transaction = (!transaction.writes.is_empty()).then_some(transaction);
        Decision { transaction, effects, reply, reason }
    }
}

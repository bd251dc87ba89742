//! The leader: decisions taken once, over the records and what workers say.
//!
//! [`Leader::decide`] is a plain function of (records, volatile inventory, input, now). What has to
//! survive is in the records; what a worker can tell again (who is attached, what runs where) is
//! volatile. Decisions are level-triggered: each input first updates the inventory, then every live
//! workload is looked at and moved one step from where it is to where it should be. So a new leader
//! goes on from records and hellos alone, and a repeated message changes nothing.
//!
//! Invariants:
//! - one transaction per decision, about one workload; the shell ticks until nothing is left;
//! - a client's request never carries another workload's step in its transaction;
//! - metrics and heartbeats give no transaction;
//! - a generation is placed only when nothing of the former one can still run.

mod client;
mod cost;
mod decision;
mod draft;
mod fallback;
mod gang;
mod goodput;
mod health;
mod index;
mod leave;
mod reason;
mod regroup;
mod reports;
mod retain;
mod schedule;
mod serve;
mod shunned;
mod spares;
mod standing;
mod starting;
mod train;
mod wait;
mod watchdog;
mod workers;

pub use decision::{Decision, Effect, Input, LeaderOptions, Millis, Refusal, SessionId};
pub use reason::Reason;
pub use workers::TaskPlace;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use api::ids::{Name, NodeId};
use api::records::{JobRecord, Moment};

use self::draft::Draft;
use self::gang::Gang;
use self::index::{Entry, Index, Workload};
use self::workers::Worker;
use crate::records::Records;
use crate::transaction::RecordKey;

/// What the leader knows beyond the records. Never holds a secret.
#[derive(Debug)]
pub struct Leader {
    options: LeaderOptions,
    node: NodeId,
    /// When it began to lead.
    since: Millis,
    /// When the present decision is taken.
    now: Millis,
    index: Index,
    workers: BTreeMap<Name, Worker>,
    /// Workers that were lost and are out of the list: their hosts are checked when they come back.
    lost: BTreeSet<Name>,
    /// What live jobs' histories lack until their records change.
    untold: BTreeMap<Name, Vec<Moment>>,
    sessions: BTreeMap<SessionId, Name>,
    /// What it has seen of the current generation of every live workload.
    gangs: BTreeMap<Name, Gang>,
    /// Jobs that are over while ranks of theirs may still run.
    unswept: VecDeque<Arc<JobRecord>>,
}

impl Leader {
    /// A leader that has heard of no worker yet. The node shows itself as `node` to workers.
    pub fn new(options: LeaderOptions, node: NodeId, records: &Records, now: Millis) -> Self {
        let mut leader = Self {
            options,
            node,
            since: now,
            now,
            index: Index::default(),
            workers: BTreeMap::new(),
            lost: BTreeSet::new(),
            untold: BTreeMap::new(),
            sessions: BTreeMap::new(),
            gangs: BTreeMap::new(),
            unswept: VecDeque::new(),
        };
        leader.follow(records);
        leader
    }

    /// Decides what to do about one input. `records` must hold everything decided before; when a
    /// decision could not be committed, drop the leader.
    ///
    /// A client that asks again under the same request id is answered from [`Records::outcome`] by
    /// the shell: deciding anew would refuse it, because its own first attempt has taken the name.
    pub fn decide(&mut self, records: &Records, now: Millis, input: Input) -> Decision {
        self.now = now;
        self.follow(records);
        let mut draft = Draft::default();
        match input {
            Input::WasAway { milliseconds } => {
                self.was_away(milliseconds);
                return draft.finish();
            }
            Input::Submit { spec } => {
                let reply = self.submit(&mut draft, records, now, spec);
                return self.answer(draft, reply);
            }
            Input::Stop { kind, name } => {
                let reply = self.stop(&mut draft, records, now, &kind, &name);
                return self.answer(draft, reply);
            }
            Input::Resume { name } => {
                let reply = self.resume(&mut draft, records, &name);
                return self.answer(draft, reply);
            }
            Input::Deploy { spec } => {
                let reply = self.deploy(&mut draft, records, now, spec);
                return self.answer(draft, reply);
            }
            Input::Drain { worker, deadline_ms } => {
                let reply = self.drain(&mut draft, records, now, &worker, deadline_ms);
                return self.answer(draft, reply);
            }
            Input::Undrain { worker } => {
                let reply = self.undrain(&mut draft, records, now, &worker);
                return self.answer(draft, reply);
            }
            Input::WorkerHello { session, hello } => {
                self.hello(&mut draft, records, now, session, hello);
            }
            Input::WorkerMessage { session, message } => {
                let Some(worker) = self.heard(session, now) else {
                    draft.because(Reason::Remark(format!("a word on session {session}: not open")));
                    return draft.finish();
                };
                if !self.message(&mut draft, records, now, &worker, message) {
                    return draft.finish();
                }
            }
            Input::WorkerDetached { session } => self.detached(&mut draft, session),
            Input::Adopted { job, generation, facts } => {
                self.adopted(&mut draft, records, now, &job, generation, facts);
            }
            Input::Diagnosed { job, generation, suspect, text } => {
                self.diagnosed(&mut draft, now, &job, generation, suspect, text);
            }
            Input::Tick => {}
        }
        self.move_on(&mut draft, records, now);
        draft.finish()
    }

    /// Brings what is derived from the records up to date.
    fn follow(&mut self, records: &Records) {
        self.index.refresh(records);
        let index = &self.index;
        let is_current = |name: &Name, gang: &Gang| {
            index.get(name).is_some_and(|entry| entry.workload.generation() == gang.generation)
        };
        self.gangs.retain(|name, gang| is_current(name, gang));
        self.untold.retain(|name, _| index.get(name).is_some());
        for (name, entry) in index.live() {
            let generation = entry.workload.generation();
            // Placed by an earlier leader, or not placed at all.
            self.gangs.entry(name.clone()).or_insert_with(|| Gang::new(generation, None));
        }
    }

    /// A client's decision: only what it asked for, so that its request id stands for just that.
    fn answer(&mut self, mut draft: Draft, reply: Result<RecordKey, Refusal>) -> Decision {
        if let Err(refusal) = &reply {
            draft.because(Reason::Remark(format!("refused: {refusal}")));
        }
        draft.answer(reply);
        self.kill_unwanted(&mut draft);
        draft.finish()
    }

    /// Moves every workload one step, until one of them has something to commit.
    fn move_on(&mut self, draft: &mut Draft, records: &Records, now: Millis) {
        self.expire(draft, now);
        self.tend_health(draft, now);
        if !draft.has_writes() {
            self.advance(draft, records, now);
        }
        if !draft.has_writes() {
            self.schedule(draft, records, now);
        }
        self.kill_unwanted(draft);
        self.sweep_left(draft);
        if let Some(reason) = self.index.unreadable() {
            draft.because(reason.clone());
        }
    }

    fn advance(&mut self, draft: &mut Draft, records: &Records, now: Millis) {
        let live: Vec<Entry> = self.index.live().map(|(_, entry)| entry.clone()).collect();
        for Entry { version, workload } in live {
            match workload {
                Workload::Job(job) => self.advance_job(draft, records, now, version, &job),
                Workload::Endpoint(endpoint) => {
                    self.advance_endpoint(draft, records, now, version, &endpoint);
                }
            }
            if draft.has_writes() {
                return;
            }
        }
    }
}

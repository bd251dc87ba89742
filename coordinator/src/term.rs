//! One term of office: takes inputs one at a time, has the core decide, commits, then acts.
//!
//! Invariant: an effect is carried out, an answer given and a frame acknowledged only after the
//! transaction they belong to has committed. Nothing here decides.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::events::{CheckpointFact, JobEvent};
use api::ids::Step;
use api::records::{JobRecord, KIND_JOB};
use api::session::{Assignment, CoordinatorMessage, RankOrder};
use api::stacks::StackDump;
use api::{Generation, Name, pb};
use checkpoint::Store;
use coordinator_core::flight::suspect;
use coordinator_core::{
    Decision, Effect, Input, Leader, Millis, Outcome, RecordKey, SessionId, Transaction, Write,
};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, error, info, warn};

use crate::adopt::find_unrecorded;
use crate::flight::{FlightDesk, WantedStacks};
use crate::leadership::{ClientRequest, LeaderInput, LeaderQuestion, Leadership};
use crate::raft_node::{ProposeError, RaftHandle, RaftStatus};
use crate::random::RandomError;
use crate::secrets::GangSecrets;
use crate::session::SessionHandle;
use crate::status::refused;
use crate::sweep::Sweeper;
use crate::watch::Feeds;

/// A commit is waited for this long before it is proposed again under the same request id. Losing
/// the majority ends the leadership within an election timeout, so this repeats a few times at most.
const COMMIT_WAIT: Duration = Duration::from_secs(2);
/// Ticks taken right after one another before waiting inputs get their turn: a decision that needs
/// more transactions goes on with the next input.
const TICKS_AT_ONCE: usize = 64;

/// A leader that has not looked for words for so long was away; it does so more often than that.
const AWAY: Duration = Duration::from_millis(500);

/// Why a term of office ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TermEnded {
    #[error("another coordinator leads now")]
    NotLeader,
    #[error("the records changed under the leader: `{key}` expected {expected}, found {found}")]
    Conflict { key: String, expected: String, found: String },
    #[error("a decision cannot be written: {0}")]
    Unencodable(ProposeError),
    #[error("raft has stopped")]
    RaftStopped,
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// Milliseconds since the epoch that never go back while a leader leads.
struct Clock {
    began: Instant,
    began_ms: u64,
}

impl Clock {
    fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { began: Instant::now(), began_ms: since_epoch.as_millis() as u64 }
    }

    fn now(&self) -> Millis {
        Millis(self.began_ms + self.began.elapsed().as_millis() as u64)
    }
}

/// What a term needs from outside.
pub(crate) struct TermOptions {
    pub(crate) leader: coordinator_core::LeaderOptions,
    pub(crate) node: api::NodeId,
    pub(crate) raft: RaftHandle,
    pub(crate) store: Store,
    pub(crate) sweeper: Sweeper,
    pub(crate) feeds: Arc<Feeds>,
    /// The term's own queue, for answers of effects. Weak, so that the queue closes with the term.
    pub(crate) inputs: mpsc::WeakSender<LeaderInput>,
    pub(crate) desk: Arc<FlightDesk>,
    /// Cancelled when the term ends.
    pub(crate) over: CancellationToken,
    /// Makes request ids of the leader's own transactions unique.
    pub(crate) office: String,
}

/// The leader at work.
pub(crate) struct Term {
    leader: Leader,
    clock: Clock,
    sessions: BTreeMap<SessionId, SessionHandle>,
    secrets: GangSecrets,
    status: watch::Receiver<RaftStatus>,
    raft_term: u64,
    transactions: u64,
    /// Up to when it has read what came, or been told that it had not.
    read: Millis,
    last_reason: String,
    options: TermOptions,
}

impl Term {
    /// Takes office.
    pub(crate) fn begin(options: TermOptions) -> Self {
        let clock = Clock::start();
        let records = options.raft.records();
        let now = clock.now();
        let leader = Leader::new(options.leader.clone(), options.node, &records, now);
        let status = options.raft.watch_status();
        let raft_term = status.borrow().term;
        options.sweeper.take_over();
        Self {
            leader,
            clock,
            sessions: BTreeMap::new(),
            secrets: GangSecrets::default(),
            status,
            raft_term,
            transactions: 0,
            read: now,
            last_reason: String::new(),
            options,
        }
    }

    /// Returns when another coordinator leads, or this one in another term.
    pub(crate) async fn lost(&mut self) -> TermEnded {
        let term = self.raft_term;
        match self.status.wait_for(|status| !status.is_leader || status.term != term).await {
            Ok(_) => TermEnded::NotLeader,
            Err(_) => TermEnded::RaftStopped,
        }
    }

    /// Nothing that came before now is unread, or one of it is about to be acted on.
    pub(crate) fn reads(&mut self) {
        let now = self.clock.now();
        // Longer than that is told before the next decision.
        if u128::from(now.since(self.read)) <= AWAY.as_millis() {
            self.read = now;
        }
    }

    /// Acts on one input, then ticks until nothing is left to commit.
    pub(crate) async fn act(&mut self, input: LeaderInput) -> Result<(), TermEnded> {
        let committed = match input {
            LeaderInput::Client(request) => self.answer(*request).await?,
            LeaderInput::Attach { session, hello, sequence, handle } => {
                self.sessions.insert(session, handle);
                let hello = Input::WorkerHello { session, hello: *hello };
                self.decide_and_acknowledge(hello, session, sequence).await?
            }
            LeaderInput::Message { session, sequence, message } => {
                if !self.sessions.contains_key(&session) {
                    return Ok(());
                }
                let message = Input::WorkerMessage { session, message: *message };
                self.decide_and_acknowledge(message, session, sequence).await?
            }
            LeaderInput::Detached { session } => {
                self.sessions.remove(&session);
                self.decide(Input::WorkerDetached { session }, None).await?.committed
            }
            LeaderInput::Adopted { job, generation, facts } => {
                self.decide(Input::Adopted { job, generation, facts }, None).await?.committed
            }
            LeaderInput::Diagnosed { job, generation, suspect, text } => {
                let input = Input::Diagnosed { job, generation, suspect, text };
                self.decide(input, None).await?.committed
            }
            LeaderInput::Ranks { job, generation, request, question, reply } => {
                let mut places = self.leader.places(&job, generation);
                if let LeaderQuestion::Stacks { only: Some(only), .. } = question {
                    places.retain(|place| place.rank == only);
                }
                for place in &places {
                    let Some(session) = place.session else { continue };
                    let task = place.task.clone();
                    let message = match question {
                        LeaderQuestion::Flight { entries } => {
                            let order = RankOrder::Flight { request, entries };
                            CoordinatorMessage::Deliver { task, order }
                        }
                        LeaderQuestion::Stacks { keep, .. } => {
                            CoordinatorMessage::Stacks { request, task, keep }
                        }
                    };
                    self.send(session, message)?;
                }
                // The client may have left.
                let _ = reply.send(places);
                false
            }
            LeaderInput::Drain { input, worker, reply } => {
                let decided = self.decide(input, None).await?;
                let workers = self.leader.workers(self.clock.now());
                let found = workers.into_iter().find(|view| view.name == worker);
                let answer = match decided.reply {
                    Some(Err(refusal)) => Err(refused(refusal, false)),
                    _ => found.ok_or_else(|| Status::internal("the leader knows no such worker")),
                };
                // The client may have left.
                let _ = reply.send(answer);
                decided.committed
            }
            LeaderInput::Workers { reply } => {
                // The client may have left.
                let _ = reply.send(self.leader.workers(self.clock.now()));
                false
            }
        };
        if committed { self.tick().await } else { Ok(()) }
    }

    /// Lets time pass; repeats while there is something to commit.
    pub(crate) async fn tick(&mut self) -> Result<(), TermEnded> {
        for _ in 0..TICKS_AT_ONCE {
            if !self.decide(Input::Tick, None).await?.committed {
                break;
            }
        }
        Ok(())
    }

    async fn decide_and_acknowledge(
        &mut self,
        input: Input,
        session: SessionId,
        sequence: u64,
    ) -> Result<bool, TermEnded> {
        let decided = self.decide(input, None).await?;
        if let Some(handle) = self.sessions.get(&session) {
            handle.acknowledge(sequence);
        }
        Ok(decided.committed)
    }

    async fn answer(&mut self, request: ClientRequest) -> Result<bool, TermEnded> {
        let ClientRequest { input, about: (kind, id), request_id, reply } = request;
        let records = self.options.raft.records();
        let (answer, committed) = match records.outcome(&request_id) {
            // A retry: the first attempt's answer again.
            Some(Outcome::Committed) => (self.record(&RecordKey::new(kind, id)), false),
            Some(Outcome::Conflict { .. }) => (
                Err(Status::aborted(
                    "an earlier attempt met a conflict: ask under a new request id",
                )),
                false,
            ),
            None => {
                let taken = matches!(input, Input::Submit { .. } | Input::Deploy { .. });
                let decided = self.decide(input, Some(request_id)).await?;
                let answer = match decided.reply {
                    Some(Ok(key)) => self.record(&key),
                    Some(Err(refusal)) => Err(refused(refusal, taken)),
                    None => Err(Status::internal("the leader gave no answer to a request")),
                };
                (answer, decided.committed)
            }
        };
        // The client may have left.
        let _ = reply.send(answer);
        Ok(committed)
    }

    fn record(&self, key: &RecordKey) -> Result<pb::Record, Status> {
        let records = self.options.raft.records();
        let found = records.get(&key.kind, &key.id).ok_or_else(|| {
            Status::not_found(format!("{} `{}` was deleted meanwhile", key.kind, key.id))
        })?;
        Ok(pb::Record {
            kind: key.kind.clone(),
            id: key.id.clone(),
            version: found.version,
            json: found.json.to_vec(),
        })
    }

    async fn decide(
        &mut self,
        input: Input,
        request_id: Option<String>,
    ) -> Result<Decided, TermEnded> {
        let records = self.options.raft.records();
        let now = self.clock.now();
        let milliseconds = now.since(self.read);
        if u128::from(milliseconds) > AWAY.as_millis() {
            self.read = now;
            warn!(milliseconds, "nothing was read for a while: a slow disk, or a process held up");
            // It decides nothing but what the time counts for.
            self.leader.decide(&records, now, Input::WasAway { milliseconds });
        }
        let decision = self.leader.decide(&records, now, input);
        let Decision { transaction, effects, reply, reason } = decision;
        if let Some(reason) = reason {
            self.log_reason(reason.to_string());
        }
        let committed = transaction.is_some();
        if let Some(transaction) = transaction {
            self.commit(transaction, request_id).await?;
        }
        for effect in effects {
            self.carry_out(effect)?;
        }
        Ok(Decided { committed, reply })
    }

    /// Logs why the leader did what it did, only when that changes.
    fn log_reason(&mut self, reason: String) {
        if reason != self.last_reason {
            info!(reason, "leader");
            self.last_reason = reason;
        }
    }

    async fn commit(
        &mut self,
        mut transaction: Transaction,
        request_id: Option<String>,
    ) -> Result<(), TermEnded> {
        self.transactions += 1;
        let own = || format!("{}-{}", self.options.office, self.transactions);
        transaction.request_id = request_id.unwrap_or_else(own);
        let raft = self.options.raft.clone();
        loop {
            let proposed = raft.propose(transaction.clone(), COMMIT_WAIT);
            let outcome = tokio::select! {
                outcome = proposed => outcome,
                ended = self.lost() => return Err(ended),
            };
            match outcome {
                Ok(Outcome::Committed) => break,
                Ok(Outcome::Conflict { key, expected, found }) => {
                    // The leader is the only writer: this is a bug, or a second leader's write.
                    return Err(TermEnded::Conflict { key: key.to_string(), expected, found });
                }
                Err(ProposeError::Timeout) => {
                    warn!(request = transaction.request_id, "still not committed, trying again");
                }
                Err(ProposeError::NotLeader { .. }) => return Err(TermEnded::NotLeader),
                Err(ProposeError::Stopped) => return Err(TermEnded::RaftStopped),
                Err(error @ ProposeError::TooLarge { .. }) => {
                    return Err(TermEnded::Unencodable(error));
                }
            }
        }
        self.publish_statuses(&transaction);
        Ok(())
    }

    /// Watchers see every state of a job that was committed, and no other.
    fn publish_statuses(&self, transaction: &Transaction) {
        let records = self.options.raft.records();
        for write in &transaction.writes {
            let Write::Put { key, .. } = write else { continue };
            if key.kind != KIND_JOB {
                continue;
            }
            match (records.read::<JobRecord>(KIND_JOB, &key.id), key.id.parse::<Name>()) {
                (Ok(Some((version, record))), Ok(job)) => {
                    let event = JobEvent::Status(Box::new(record.status));
                    self.options.feeds.publish(&job, event, Some(version));
                }
                (Err(error), _) => error!(%error, "a committed record cannot be read"),
                _ => {}
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) -> Result<(), TermEnded> {
        match effect {
            Effect::Send { session, message } => self.send(session, message)?,
            Effect::CloseSession { session, reason } => {
                if let Some(handle) = self.sessions.remove(&session) {
                    info!(session = session.0, reason, "closing a worker session");
                    handle.close(Status::aborted(reason));
                }
            }
            // Status events come from committed records, see `publish_statuses`.
            Effect::Publish { event: JobEvent::Status(_), .. } => {}
            Effect::Publish { job, event } => self.options.feeds.publish(&job, event, None),
            Effect::Adopt { job, generation, after } => self.adopt(job, generation, after),
            Effect::Diagnose { job, generation } => self.diagnose(job, generation),
            Effect::Sweep { job, ended } => self.options.sweeper.ask(job, ended),
            Effect::ForgetSecret { job, generation } => self.secrets.forget(&job, generation),
        }
        Ok(())
    }

    fn send(
        &mut self,
        session: SessionId,
        mut message: CoordinatorMessage,
    ) -> Result<(), TermEnded> {
        if let CoordinatorMessage::Start { assignment, .. } = &mut message
            && let Assignment::Train(train) = assignment.as_mut()
        {
            train.secret = self.secrets.of(&train.spec.name, train.generation)?;
        }
        if let CoordinatorMessage::Deliver { task, order: RankOrder::Regroup(regroup) } =
            &mut message
        {
            regroup.secret = self.secrets.of(&task.workload, regroup.generation)?;
        }
        match self.sessions.get(&session) {
            Some(handle) => handle.send(message),
            None => debug!(session = session.0, "an order for a session that is gone"),
        }
        Ok(())
    }

    /// Lays the flight logs of a gang that hangs side by side; who holds it up, and why, comes back
    /// as an input.
    fn diagnose(&self, job: Name, generation: Generation) {
        let Some(inputs) = self.options.inputs.upgrade() else { return };
        let records = self.options.raft.records();
        let Ok(Some((_, record))) = records.read::<JobRecord>(KIND_JOB, job.as_str()) else {
            return;
        };
        let desk = Arc::clone(&self.options.desk);
        let (feeds, over) = (Arc::clone(&self.options.feeds), self.options.over.clone());
        tokio::spawn(async move {
            let leadership = Leadership { inputs, feeds, over };
            let (suspect, mut text) =
                match desk.report(&leadership, &record, None, WantedStacks::None).await {
                    Ok(report) => {
                        let text = report.verdict.first().cloned();
                        let text =
                            text.unwrap_or_else(|| "the flight logs show nothing amiss".into());
                        (suspect(&report.findings), text)
                    }
                    Err(status) => (None, format!("no flight logs: {}", status.message())),
                };
            // Now or never: the answer has it killed.
            let dumps = match suspect {
                None => Ok(Vec::new()),
                only => desk.ask_stacks(&leadership, &job, generation, only, true).await,
            };
            let dumps = dumps.unwrap_or_default();
            if let Some(innermost) = dumps.first().and_then(StackDump::innermost) {
                text = format!("{text}; its {innermost}");
            }
            let answer = LeaderInput::Diagnosed { job, generation, suspect, text };
            // The term may have ended; the next leader looks for itself.
            let _ = leadership.inputs.send(answer).await;
        });
    }

    fn adopt(&self, job: Name, generation: Generation, after: Option<Step>) {
        let store = self.options.store.clone();
        let feeds = Arc::clone(&self.options.feeds);
        let inputs = self.options.inputs.clone();
        tokio::spawn(async move {
            let found = find_unrecorded(&store, &job, generation, after).await;
            let facts = found.unwrap_or_else(|error| {
                let text = format!(
                    "checkpoints that may have been written during an outage of the control \
                     plane cannot be listed ({error}): going on from the last recorded one"
                );
                feeds.publish(&job, JobEvent::Note { generation, rank: None, text }, None);
                Vec::<CheckpointFact>::new()
            });
            if let Some(inputs) = inputs.upgrade() {
                // The term may have ended; the next leader adopts by itself.
                let _ = inputs.send(LeaderInput::Adopted { job, generation, facts }).await;
            }
        });
    }
}

struct Decided {
    committed: bool,
    reply: Option<Result<RecordKey, coordinator_core::Refusal>>,
}

//! The shell's part, in a few lines and without a network: decide, commit, apply, then run the
//! effects, one input at a time, with a tick after every commit. Shared by the golden scripts and
//! the random histories; also the place where both check what must always hold.

use std::collections::{BTreeMap, BTreeSet};

use api::events::{StepMetrics, StepTime};
use api::ids::{Generation, NodeId, Step as TrainStep};
use api::records::{
    CheckpointRecord, EndpointRecord, JobRecord, KIND_CHECKPOINT, KIND_ENDPOINT, KIND_JOB, Phase,
};
use api::units::Span;
use coordinator_core::{
    Decision, Input, Leader, LeaderOptions, Millis, Outcome, Records, Refusal, Transaction,
};

pub const LEASE_MS: u64 = 5_000;
const GRACE_MS: u64 = 10_000;

/// Ticks after one input before it counts as one that never settles.
const TICKS_MAX: usize = 200;

/// What one decision led to.
pub struct Step {
    /// Whether it was a tick that followed a commit.
    pub is_tick: bool,
    pub decision: Decision,
    /// Set when the transaction was applied, or a retry was answered without deciding.
    #[allow(dead_code, reason = "the random histories do not look at it")]
    pub outcome: Option<Outcome>,
}

/// A coordinator without sockets.
pub struct Shell {
    pub records: Records,
    pub leader: Leader,
    pub now: Millis,
    pub log: Vec<Transaction>,
    node: u64,
    requests: u64,
    phases: BTreeMap<(&'static str, String), (Phase, Generation)>,
    checkpoints: BTreeMap<String, TrainStep>,
}

fn leader(node: u64, records: &Records, now: Millis) -> Leader {
    let options = LeaderOptions {
        lease_ms: LEASE_MS,
        grace_ms: GRACE_MS,
        cluster_id: "cohort".into(),
        heartbeat: Span::seconds(1),
    };
    Leader::new(options, NodeId(node), records, now)
}

impl Shell {
    pub fn new() -> Self {
        let (records, now) = (Records::default(), Millis(1_767_225_600_000));
        let leader = leader(1, &records, now);
        let (log, phases, checkpoints) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { records, leader, now, log, node: 1, requests: 0, phases, checkpoints }
    }

    /// Another coordinator takes over; all that was volatile is gone.
    pub fn new_leader(&mut self) {
        self.node += 1;
        self.leader = leader(self.node, &self.records, self.now);
    }

    /// One input and the ticks that follow it.
    pub fn feed(&mut self, input: Input, request_id: Option<&str>) -> Vec<Step> {
        if let Some(outcome) = request_id.and_then(|id| self.records.outcome(id)) {
            let outcome = Some(outcome.clone());
            return vec![Step { is_tick: false, decision: Decision::default(), outcome }];
        }
        let is_metric = is_metric(&input);
        let is_request = is_request(&input);
        let mut steps = vec![self.decide(input, request_id)];
        assert!(
            !(is_metric && steps[0].decision.transaction.is_some()),
            "a metric or heartbeat gave a transaction"
        );
        let reply = &steps[0].decision.reply;
        assert_eq!(reply.is_some(), is_request, "who asks is answered, and nobody else");
        if let Some(Err(refusal)) = reply {
            let (Refusal::NotFound(text) | Refusal::Conflict(text) | Refusal::Invalid(text)) =
                refusal;
            assert!(!text.ends_with('.') && !text.is_empty(), "a refusal is a fragment: {text}");
            assert!(steps[0].decision.transaction.is_none(), "refused and written: {text}");
        }
        let ticks_before = steps.len();
        while steps.last().is_some_and(|step| step.decision.transaction.is_some()) {
            assert!(steps.len() - ticks_before < TICKS_MAX, "the decisions never settle");
            let mut step = self.decide(Input::Tick, None);
            step.is_tick = true;
            steps.push(step);
        }
        self.check();
        steps
    }

    fn decide(&mut self, input: Input, request_id: Option<&str>) -> Step {
        let mut decision = self.leader.decide(&self.records, self.now, input);
        let outcome = decision.transaction.as_mut().map(|transaction| {
            self.requests += 1;
            let own = || format!("own-{}", self.requests);
            transaction.request_id = request_id.map_or_else(own, str::to_owned);
            let decoded = Transaction::decode(&transaction.encode()).expect("decodes");
            assert_eq!(decoded, *transaction);
            let index = self.records.applied() + 1;
            let outcome = self.records.apply(index, transaction);
            assert_eq!(
                outcome,
                Outcome::Committed,
                "the leader is the only writer: {transaction:?}"
            );
            self.log.push(transaction.clone());
            outcome
        });
        self.check_phases();
        Step { is_tick: false, decision, outcome }
    }

    pub fn job(&self, name: &str) -> Option<JobRecord> {
        self.records.read(KIND_JOB, name).expect("readable").map(|(_, job)| job)
    }

    /// Whether a task of a worker is a rank of its job's current generation.
    #[allow(dead_code, reason = "the golden scripts do not ask")]
    pub fn is_member(&self, worker: &str, task: &api::ids::TaskId) -> bool {
        let job = self.job(task.workload.as_str());
        job.is_some_and(|job| {
            let (name, status) = (&job.spec.name, &job.status);
            status.gang.iter().any(|place| {
                place.worker.as_str() == worker && place.task(name, status.generation) == *task
            })
        })
    }

    pub fn endpoint(&self, name: &str) -> Option<EndpointRecord> {
        self.records.read(KIND_ENDPOINT, name).expect("readable").map(|(_, endpoint)| endpoint)
    }

    pub fn jobs(&self) -> Vec<JobRecord> {
        let ids: Vec<String> = self.records.list(KIND_JOB, "").map(|(k, _)| k.id.clone()).collect();
        ids.iter().filter_map(|id| self.job(id)).collect()
    }

    pub fn endpoints(&self) -> Vec<EndpointRecord> {
        let list = self.records.list(KIND_ENDPOINT, "");
        let ids: Vec<String> = list.map(|(k, _)| k.id.clone()).collect();
        ids.iter().filter_map(|id| self.endpoint(id)).collect()
    }

    /// The ways a workload may go: a terminal phase is left by a person only, a generation never
    /// goes back, and a job and an endpoint of one name are never active together.
    fn check_phases(&mut self) {
        let jobs = self.jobs();
        let endpoints = self.endpoints();
        for job in &jobs {
            let Some(fact) = &job.status.checkpoint else { continue };
            let id = CheckpointRecord::id(&job.spec.name, fact.step);
            assert!(self.records.get(KIND_CHECKPOINT, &id).is_some(), "{id} is not recorded");
            let former = self.checkpoints.insert(job.spec.name.to_string(), fact.step);
            let is_damaged = |step| {
                let id = CheckpointRecord::id(&job.spec.name, step);
                let record = self.records.read::<CheckpointRecord>(KIND_CHECKPOINT, &id);
                record.expect("readable").is_some_and(|(_, record)| record.damaged.is_some())
            };
            let is_newer = former.is_none_or(|former| former <= fact.step || is_damaged(former));
            assert!(is_newer, "{id} came after {former:?}");
        }
        let jobs = jobs
            .iter()
            .map(|j| (KIND_JOB, j.spec.name.to_string(), j.status.phase, j.status.generation));
        let endpoints = endpoints
            .iter()
            .map(|e| (KIND_ENDPOINT, e.spec.name.to_string(), e.status.phase, e.status.generation));
        let mut active = BTreeSet::new();
        for (kind, name, phase, generation) in jobs.chain(endpoints) {
            let key = (kind, name.clone());
            if let Some((was, former)) = self.phases.insert(key, (phase, generation)) {
                assert!(generation >= former, "{kind} {name} went from {former} to {generation}");
                assert!(
                    !was.is_terminal() || phase == was || phase == Phase::Queued,
                    "{kind} {name} went from {was} to {phase}"
                );
                let begins = matches!(was, Phase::Queued | Phase::Starting | Phase::Running)
                    && phase == Phase::Starting;
                assert!(
                    generation == former || begins,
                    "{kind} {name} began {generation} going from {was} to {phase}"
                );
            }
            let is_first = phase.is_terminal() || active.insert(name.clone());
            assert!(is_first, "a job and an endpoint `{name}` are both active");
        }
    }

    /// What must hold once the decisions have settled.
    fn check(&self) {
        let jobs = self.jobs();
        for job in jobs.iter().filter(|job| job.status.phase.is_active()) {
            let ranks: Vec<u32> = job.status.gang.iter().map(|place| place.rank.0).collect();
            // Members that are too few meet once more, to save what they hold.
            let fewest = match job.status.regroups {
                0 => job.spec.resources.ranks.min(),
                _ => 1,
            };
            let whole = fewest..=job.spec.resources.ranks.max();
            assert!(whole.contains(&(ranks.len() as u32)), "placed in part: {:?}", job.status);
            let expected: Vec<u32> = (0..ranks.len() as u32).collect();
            assert_eq!(ranks, expected, "ranks are numbered without gaps: {:?}", job.status);
            let mut workers: Vec<_> = job.status.gang.iter().map(|place| &place.worker).collect();
            assert!(workers.is_sorted(), "ranks are numbered worker by worker: {:?}", job.status);
            workers.dedup();
        }
        for job in &jobs {
            let (used, book) = (job.status.cost.total().rank_ms, job.status.goodput.total_ms());
            assert_eq!(used, book, "what ranks cost and what they did differ: {:?}", job.status);
        }
        for job in jobs {
            assert_eq!(job.status.phase.is_terminal(), job.status.ended_ms.is_some(), "{job:?}");
        }
    }
}

fn is_metric(input: &Input) -> bool {
    use api::session::{RankReport, TaskEvent, WorkerMessage};
    match input {
        Input::WorkerMessage { message, .. } => matches!(
            message,
            WorkerMessage::Heartbeat
                | WorkerMessage::Task {
                    event: TaskEvent::Report {
                        report: RankReport::Step(_)
                            | RankReport::Evaluation(_)
                            | RankReport::Busy { .. },
                        ..
                    },
                    ..
                }
        ),
        _ => false,
    }
}

fn is_request(input: &Input) -> bool {
    matches!(
        input,
        Input::Submit { .. }
            | Input::Stop { .. }
            | Input::Resume { .. }
            | Input::Deploy { .. }
            | Input::Drain { .. }
            | Input::Undrain { .. }
    )
}

/// What a rank tells of a step of which nothing but its number matters.
pub fn metrics(step: TrainStep) -> StepMetrics {
    StepMetrics {
        step,
        last_step: TrainStep(1000),
        epoch: 0.0,
        loss: 1.0,
        learning_rate: 0.1,
        gradient_norm: 1.0,
        samples_per_second: 1.0,
        tokens_per_second: 0.0,
        time: StepTime::default(),
        memory_bytes: 0,
        slowest: None,
    }
}

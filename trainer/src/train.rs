//! The step loop of one rank.
//!
//! A step: each own lane's microbatches forward and backward, lanes folded into open subtrees, the
//! fixed tree over all ranks, one division by the global count, the norm, the optimiser. Nothing in
//! it needs the coordinator. Between two steps the ranks agree, in one small all-reduce, on stopping
//! and on finished checkpoint shards.

use std::collections::BTreeMap;
use std::time::Instant;

use algorithms::{DataError, Mode, Problem, StepKey};
use api::control::Control;
use api::events::{Evaluation, ModelFact, StepMetrics, StepTime};
use api::job::Divergence;
use api::session::{RankReport, StopCause, TrainAssignment};
use api::{JobSpec, Rank, Step};
use burn::tensor::Device;
use collective::{Communicator, FlightRecorder, LaneFold, Queue, ReduceOp};

use crate::checkpoints::Checkpoints;
use crate::engine::{GradientSink, Leaves, MicrobatchSums, evaluate, forward_backward};
use crate::error::TrainError;
use crate::norm::squared_norm;
use crate::optimizer::Optimizer;
use crate::order::SampleOrder;
use crate::parallel::{Buckets, Lanes};
use crate::parameters::Table;
use crate::state::TrainState;

/// Metric sums that every model has: loss, counted elements, samples, tokens.
const COMMON_SUMS: usize = 4;

/// How a rank's work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The job ran to its last step and the model is written.
    Finished,
    /// It was asked to stop, and its state is saved.
    Stopped,
}

/// One rank of a job, ready to step.
pub struct Trainer {
    assignment: TrainAssignment,
    problem: Problem,
    table: Table,
    lanes: Lanes,
    order: SampleOrder,
    optimizer: Optimizer,
    state: TrainState,
    device: Device,
    queue: Queue,
    checkpoints: Checkpoints,
    control: Control,
    recorder: FlightRecorder,
    last_step: u64,
    gradient: Vec<f32>,
    buckets: Buckets,
    started: Instant,
    metrics: BTreeMap<String, f64>,
    /// The step that was validated last.
    evaluated: Option<Step>,
    /// Steps in a row that changed nothing.
    skipped: u32,
}

/// What a rank is made of; see [`Trainer::new`].
pub struct TrainerParts {
    /// The rank's part in the gang.
    pub assignment: TrainAssignment,
    /// Model and data.
    pub problem: Problem,
    /// Parameters' places.
    pub table: Table,
    /// Fresh or restored.
    pub state: TrainState,
    /// Update rule.
    pub optimizer: Optimizer,
    /// Where tensors live.
    pub device: Device,
    /// The formed group.
    pub communicator: Box<dyn Communicator>,
    /// This rank's saver.
    pub checkpoints: Checkpoints,
    /// To the worker.
    pub control: Control,
    /// Told what this rank is doing.
    pub recorder: FlightRecorder,
}

/// The step at which a job ends.
pub fn last_step(spec: &JobSpec, samples: u64) -> u64 {
    let by_epochs = spec.stop.max_epochs.map(|epochs| {
        (epochs.saturating_mul(samples)).div_ceil(u64::from(spec.batch.global.get()))
    });
    [spec.stop.max_steps, by_epochs].into_iter().flatten().min().unwrap_or(0)
}

impl Trainer {
    /// Puts the parts together.
    ///
    /// # Errors
    /// If the system refuses a thread for collectives.
    pub fn new(parts: TrainerParts) -> Result<Self, TrainError> {
        let spec = &parts.assignment.spec;
        let (rank, world) = (parts.assignment.rank.0, parts.assignment.world_size);
        let lanes = Lanes::new(&spec.batch, rank, world);
        Ok(Self {
            order: SampleOrder::new(spec.seed, parts.problem.train.len()),
            last_step: last_step(spec, parts.problem.train.len()),
            gradient: vec![0.0; parts.table.len],
            buckets: Buckets::new(&parts.table, &lanes),
            lanes,
            started: Instant::now(),
            metrics: BTreeMap::new(),
            evaluated: None,
            skipped: 0,
            assignment: parts.assignment,
            problem: parts.problem,
            table: parts.table,
            optimizer: parts.optimizer,
            state: parts.state,
            device: parts.device,
            queue: Queue::start(parts.communicator)?,
            checkpoints: parts.checkpoints,
            control: parts.control,
            recorder: parts.recorder,
        })
    }

    /// Steps until the job ends or is asked to stop.
    pub fn run(mut self) -> Result<End, TrainError> {
        let spec = self.assignment.spec.clone();
        while self.state.step.0 < self.last_step {
            if let Some(metrics) = self.step()? {
                self.announce(metrics)?;
            }
            let step = self.state.step;
            let every = spec.evaluate.every_steps;
            if every > 0 && step.0.is_multiple_of(every) && step.0 < self.last_step {
                self.evaluate()?;
            }
            if let Some(why) = self.agree_to_stop()? {
                return self.stop_here(why);
            }
        }
        if self.evaluated != Some(self.state.step) {
            self.evaluate()?;
        }
        self.finish()
    }

    /// One optimiser step, and a checkpoint after it when one is due; nothing of a step that is
    /// skipped because its loss or gradient is no number.
    fn step(&mut self) -> Result<Option<StepMetrics>, TrainError> {
        let begin = Instant::now();
        let mut time = StepTime::default();
        let step = self.state.step.0;
        let mut stats: LaneFold<f64> = self.lanes.fold();

        self.recorder.set_tag(format_args!("step {step} forward and backward"));
        let leaves = Leaves::new(&self.table, &self.state.values, &self.device, true);
        for lane in self.lanes.own() {
            self.buckets.begin_lane();
            let mut sums = vec![0.0; COMMON_SUMS + self.problem.model.sums.len()];
            let microbatches = self.lanes.microbatches(lane);
            let last = microbatches.end - 1;
            for microbatch in microbatches {
                let key = StepKey { seed: self.assignment.spec.seed, step, microbatch };
                let fetching = Instant::now();
                let batch = self.fetch(key)?;
                time.data += fetching.elapsed().as_secs_f64();
                let (samples, tokens) = (batch.samples, batch.tokens);
                let (model, mode) = (&self.problem.model, Mode::Train(key));
                let mut sink = LaneSink {
                    buckets: &mut self.buckets,
                    lanes: &self.lanes,
                    queue: &self.queue,
                    lane,
                    last: microbatch == last,
                };
                let found = forward_backward(model, &self.table, &leaves, batch, mode, &mut sink);
                add_sums(&mut sums, &found, samples, tokens);
            }
            stats.push(lane, sums);
        }
        drop(leaves);

        // What the backward pass did not hide: the buckets still under way, and the sums.
        self.recorder.set_tag(format_args!("step {step} reduce"));
        let reducing = Instant::now();
        let mut sums = vec![0.0; COMMON_SUMS + self.problem.model.sums.len()];
        self.lanes.reduce(&mut *self.queue.turn(), &mut stats, &mut sums)?;
        time.communication = reducing.elapsed().as_secs_f64();

        self.recorder.set_tag(format_args!("step {step} update"));
        let count = sums[1].max(1.0);
        let loss = sums[0] / count;
        let mut gradient = std::mem::take(&mut self.gradient);
        let ran = self.buckets.collect((1.0 / count) as f32, &mut gradient)?;
        time.communication_total = ran.as_secs_f64();
        let norm = squared_norm(&self.table, &gradient).sqrt();
        if !loss.is_finite() || !norm.is_finite() {
            self.gradient = gradient;
            self.skip(if loss.is_finite() { norm } else { loss })?;
            return Ok(None);
        }
        self.skipped = 0;
        self.metrics.insert("train:loss".into(), loss);
        for (name, sum) in self.problem.model.sums.iter().zip(&sums[COMMON_SUMS..]) {
            self.metrics.insert(format!("train:{name}"), sum / count);
        }
        let (scale, state) = (self.optimizer.clip_factor(norm), &mut self.state);
        let optimizer = self.optimizer;
        let values = &mut state.values;
        optimizer.apply(step, &self.table, values, &mut state.optimizer, &gradient, scale);
        state.step = Step(step + 1);
        self.gradient = gradient;

        time.checkpoint = self.checkpoint_if_due()?;
        time.total = begin.elapsed().as_secs_f64();
        time.compute = (time.total - time.data - time.communication - time.checkpoint).max(0.0);
        let samples = f64::from(self.assignment.spec.batch.global.get());
        Ok(Some(StepMetrics {
            step: self.state.step,
            last_step: Step(self.last_step),
            epoch: self.state.step.0 as f64 * samples / self.problem.train.len() as f64,
            loss,
            learning_rate: optimizer.schedule.rate(step),
            gradient_norm: norm,
            samples_per_second: sums[2] / time.total,
            tokens_per_second: sums[3] / time.total,
            time,
            memory_bytes: resident_bytes(),
        }))
    }

    /// Counts a step that changes nothing, if the job allows it. Every rank has the same loss, so all
    /// do the same.
    fn skip(&mut self, loss: f64) -> Result<(), TrainError> {
        let step = self.state.step.0 + 1;
        let stop = &self.assignment.spec.stop;
        if stop.divergence == Divergence::Stop || self.skipped >= stop.max_skips.get() {
            return Err(TrainError::Diverged { step, loss, skipped: self.skipped });
        }
        self.skipped += 1;
        self.state.step = Step(step);
        *self.metrics.entry("train:skipped_steps".into()).or_default() += 1.0;
        if self.assignment.rank == Rank(0) {
            println!("step {step}/{} skipped: the loss is {loss}", self.last_step);
        }
        self.checkpoint_if_due().map(|_| ())
    }

    fn fetch(&mut self, key: StepKey) -> Result<algorithms::Microbatch, DataError> {
        let global = u64::from(self.assignment.spec.batch.global.get());
        let (offset, count) = self.lanes.samples(key.microbatch);
        let indices = self.order.samples(key.step * global + offset, count);
        let device = self.device.clone().autodiff();
        self.problem.train.microbatch(&indices, Some(key), &device)
    }

    fn checkpoint_if_due(&mut self) -> Result<f64, TrainError> {
        let every = self.assignment.spec.checkpoint.every_steps;
        let step = self.state.step;
        if every == 0 || !step.0.is_multiple_of(every) || step.0 == self.last_step {
            return Ok(0.0);
        }
        if self.checkpoints.skips() {
            if self.assignment.rank == Rank(0) {
                println!("step {}: no checkpoint, the one before is still being written", step.0);
            }
            return Ok(0.0);
        }
        let begin = Instant::now();
        self.stage()?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn stage(&mut self) -> Result<(), TrainError> {
        self.recorder.set_tag(format_args!("checkpoint at step {}", self.state.step.0));
        let mut turn = self.queue.turn();
        let mut metrics = self.metrics.clone();
        if self.evaluated != Some(self.state.step) {
            // What an earlier step was worth says nothing about this one.
            metrics.retain(|name, _| !name.starts_with("validation:"));
        }
        self.checkpoints.stage(&mut *turn, self.state.step, &self.table, &self.state, metrics)
    }

    /// Reports the step, and what the savers have finished meanwhile.
    fn announce(&mut self, metrics: StepMetrics) -> Result<(), TrainError> {
        if self.assignment.rank != Rank(0) {
            return Ok(());
        }
        let lines = (self.last_step / 20).max(1);
        if metrics.step.0.is_multiple_of(lines) || metrics.step.0 == self.last_step {
            println!(
                "step {}/{} loss {:.4} rate {:.3e} {:.1} samples/s",
                metrics.step.0,
                self.last_step,
                metrics.loss,
                metrics.learning_rate,
                metrics.samples_per_second
            );
        }
        self.control.report(&RankReport::Step(metrics))?;
        for fact in self.checkpoints.committed()? {
            self.control.report(&RankReport::Checkpoint(fact))?;
        }
        Ok(())
    }

    /// One small all-reduce: does anyone want to stop, and whose shard is written.
    fn agree_to_stop(&mut self) -> Result<Option<StopCause>, TrainError> {
        let time_up = self
            .assignment
            .spec
            .stop
            .max_time
            .is_some_and(|limit| self.started.elapsed() + self.assignment.elapsed.0 >= limit.0);
        self.recorder.set_tag(format_args!("agreement after step {}", self.state.step.0));
        let ordered = self.control.stop_requested();
        let shards = self.checkpoints.shards_done()?;
        let mut votes = [i64::from(ordered), i64::from(time_up), shards];
        self.queue.turn().all_reduce(votes.as_mut_slice().into(), ReduceOp::Sum)?;
        let [ordered, time_up, shards] = votes;
        self.checkpoints.agree(&mut *self.queue.turn(), shards)?;
        if self.state.step.0 >= self.last_step {
            return Ok(None);
        }
        // With its time used up a job is over, whoever was asked to leave just then.
        let by_time = (time_up > 0).then_some(StopCause::MaxTime);
        Ok(by_time.or((ordered > 0).then_some(StopCause::Order)))
    }

    /// Validation over the whole set, dealt to lanes, so its result has the same bits for any
    /// number of ranks.
    fn evaluate(&mut self) -> Result<(), TrainError> {
        let Some(data) = &self.problem.validation else { return Ok(()) };
        self.recorder.set_tag(format_args!("validation at step {}", self.state.step.0));
        let size = u64::from(self.assignment.spec.batch.microbatch_size());
        let microbatches = data.len().div_ceil(size);
        let lanes = self.assignment.spec.batch.lanes.get();
        let leaves = Leaves::new(&self.table, &self.state.values, &self.device, false);
        let mut fold: LaneFold<f64> = self.lanes.fold();
        for lane in self.lanes.own() {
            let mut sums = vec![0.0; COMMON_SUMS + self.problem.model.sums.len()];
            for microbatch in self.lanes.deal(lane, lanes, microbatches) {
                let first = microbatch * size;
                let indices: Vec<u64> = (first..data.len().min(first + size)).collect();
                let batch = data.microbatch(&indices, None, &self.device)?;
                let (samples, tokens) = (batch.samples, batch.tokens);
                let found = evaluate(&self.problem.model, &leaves, batch);
                add_sums(&mut sums, &found, samples, tokens);
            }
            fold.push(lane, sums);
        }
        let mut sums = vec![0.0; COMMON_SUMS + self.problem.model.sums.len()];
        self.lanes.reduce(&mut *self.queue.turn(), &mut fold, &mut sums)?;
        let count = sums[1].max(1.0);
        let mut metrics = BTreeMap::from([("validation:loss".to_owned(), sums[0] / count)]);
        for (name, sum) in self.problem.model.sums.iter().zip(&sums[COMMON_SUMS..]) {
            metrics.insert(format!("validation:{name}"), sum / count);
        }
        self.metrics.extend(metrics);
        self.evaluated = Some(self.state.step);
        self.checkpoints.evaluated(self.state.step, &self.metrics);
        if self.assignment.rank == Rank(0) {
            let metrics = self.metrics.clone();
            let listed: Vec<String> =
                metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            println!("step {}/{} {}", self.state.step.0, self.last_step, listed.join(" "));
            let evaluation = Evaluation { step: self.state.step, metrics };
            self.control.report(&RankReport::Evaluation(evaluation))?;
        }
        Ok(())
    }

    fn stop_here(mut self, why: StopCause) -> Result<End, TrainError> {
        self.save_and_report()?;
        if self.assignment.rank == Rank(0) {
            println!("stopped at step {}/{}", self.state.step.0, self.last_step);
            self.control.report(&RankReport::Stopped { step: self.state.step, why })?;
        }
        self.queue.turn().barrier()?;
        self.checkpoints.into_saver().finish()?;
        Ok(End::Stopped)
    }

    fn finish(mut self) -> Result<End, TrainError> {
        self.save_and_report()?;
        self.recorder.set_tag("writing the model");
        let mut saver = self.checkpoints.into_saver();
        if self.assignment.rank == Rank(0) {
            let descriptor = serde_json::to_vec_pretty(&self.problem.descriptor)
                .map_err(|e| TrainError::Job(format!("model.json cannot be written: {e}")))?;
            let tensors = self.state.model_tensors(&self.table);
            let (key, sha256, bytes) = saver.put_model(&tensors, &descriptor)?;
            let step = self.state.step;
            let fact = ModelFact { key, sha256, bytes, step, metrics: self.metrics };
            println!("model written: sha256 {} ({} bytes)", fact.sha256, fact.bytes);
            self.control.report(&RankReport::Finished(fact))?;
        }
        // Nobody leaves before the model is written: a failure of rank 0 is everyone's.
        self.queue.turn().barrier()?;
        saver.finish()?;
        Ok(End::Finished)
    }

    /// A checkpoint of the current step, complete before this returns.
    fn save_and_report(&mut self) -> Result<(), TrainError> {
        self.stage()?;
        for fact in self.checkpoints.flush(&mut *self.queue.turn())? {
            self.control.report(&RankReport::Checkpoint(fact))?;
        }
        Ok(())
    }
}

/// The gradients of one lane's microbatches, on their way into buckets.
struct LaneSink<'a> {
    buckets: &'a mut Buckets,
    lanes: &'a Lanes,
    queue: &'a Queue,
    lane: u32,
    /// The lane's last microbatch: its blocks are whole when it has passed them.
    last: bool,
}

impl GradientSink for LaneSink<'_> {
    fn place(&mut self, block: usize) -> (&mut [f32], usize) {
        self.buckets.place(block)
    }

    fn done(&mut self, block: usize) {
        if self.last {
            self.buckets.block_is_whole(block, self.lane, self.lanes, self.queue);
        }
    }
}

fn add_sums(sums: &mut [f64], found: &MicrobatchSums, samples: u64, tokens: u64) {
    let common = [found.loss, found.count as f64, samples as f64, tokens as f64];
    for (sum, value) in sums.iter_mut().zip(common.iter().chain(&found.sums)) {
        *sum += value;
    }
}

/// Resident memory of this process; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let pages: Option<u64> = text.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    pages.unwrap_or(0) * page.unwrap_or(4096) as u64
}

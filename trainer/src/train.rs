//! The step loop of one rank.
//!
//! A step: each own lane's microbatches forward and backward, lanes folded into open subtrees, the
//! fixed tree over all ranks, one division by the global count, the norm, the optimiser. Nothing in
//! it needs the coordinator. Between two steps the ranks agree, in one small all-reduce, on stopping
//! and on finished checkpoint shards.

mod ending;

use std::collections::BTreeMap;
use std::time::Instant;

use algorithms::{Mode, StepKey};
use api::control::Control;
use api::events::{Evaluation, Slowest, StepMetrics, StepTime};
use api::job::Divergence;
use api::session::{RankReport, StopCause};
use api::{Rank, Step};
use collective::{Communicator, FlightRecorder, LaneFold, Queue, ReduceOp};

use crate::checkpoints::{Checkpoints, Told};
use crate::divergence::{Finds, Origin};
use crate::engine::{GradientSink, Leaves, MicrobatchSums, evaluate, forward_backward};
use crate::error::TrainError;
use crate::held::Held;
use crate::member::listed;
use crate::newcomers::{Joining, Transfer};
use crate::norm::squared_norm;
use crate::order::SampleOrder;
use crate::parallel::{Buckets, Lanes};
use crate::place::Place;
use crate::samples::StepSamples;
use crate::slowest::slowest;

/// Metric sums that every model has: loss, counted elements, samples, tokens.
const COMMON_SUMS: usize = 4;

/// How a rank's work in a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The job ran to its last step and the model is written.
    Finished,
    /// It was asked to stop, and its state is saved.
    Stopped,
    /// All ranks left the group between two steps, to meet again in the next generation.
    Paused,
}

/// What belongs to one generation.
pub struct Bound {
    place: Place,
    lanes: Lanes,
    order: SampleOrder,
    queue: Queue,
    checkpoints: Checkpoints,
    buckets: Buckets,
    gradient: Vec<f32>,
    /// Until the first step or, where there is none, the first boundary: who gets the state there.
    joining: Option<Joining>,
}

impl Bound {
    /// This rank's share of the work in a formed group.
    ///
    /// # Errors
    /// If the system refuses a thread for collectives.
    pub fn new(
        held: &Held,
        place: &Place,
        communicator: Box<dyn Communicator>,
        checkpoints: Checkpoints,
        joining: Option<Joining>,
    ) -> Result<Self, TrainError> {
        let idle = joining.as_ref().map_or(&[][..], |joining| &joining.newcomers);
        let lanes = Lanes::new(&held.spec.batch, place.rank.0, place.world_size, idle);
        Ok(Self {
            place: place.clone(),
            order: SampleOrder::new(held.spec.seed, held.problem.train.len()),
            buckets: Buckets::new(&held.table, &lanes),
            lanes,
            queue: Queue::start(communicator)?,
            checkpoints,
            gradient: vec![0.0; held.table.len],
            joining,
        })
    }

    /// Steps applied to the state that this rank holds, or waits for.
    fn step(&self, held: &Held) -> Step {
        self.joining.as_ref().map_or(held.step(), |joining| joining.step)
    }
}

/// One rank in one generation.
pub struct Trainer {
    bound: Bound,
    control: Control,
    recorder: FlightRecorder,
    started: Instant,
    /// What this rank's lanes took in the last step, each, in microseconds.
    microbatch_micros: i64,
    /// What this rank waited for others in the last step, in microseconds.
    waited_micros: i64,
    /// The same of all ranks, their mean in the step before, in seconds.
    waited_mean: Option<f64>,
    /// Who was the slowest in the step before.
    slowest: Option<Slowest>,
    /// What the losses of this rank's microbatches were in the step under way.
    finds: Finds,
}

/// What is decided between two steps.
enum Boundary {
    Stop(StopCause),
    Pause,
}

impl Trainer {
    /// A rank that is ready to step.
    pub fn new(bound: Bound, control: Control, recorder: &FlightRecorder) -> Self {
        Self {
            bound,
            control,
            recorder: recorder.clone(),
            started: Instant::now(),
            microbatch_micros: 0,
            waited_micros: 0,
            waited_mean: None,
            slowest: None,
            finds: Finds::default(),
        }
    }

    /// Steps until the job ends, is asked to stop, or pauses. After an error `held` is what it was
    /// after the last whole step.
    pub fn run(&mut self, held: &mut Held) -> Result<End, TrainError> {
        let ended = self.steps(held);
        if ended.is_err() {
            self.say_committed();
        }
        ended
    }

    fn steps(&mut self, held: &mut Held) -> Result<End, TrainError> {
        // What was due after the last step of the generation before may not have been done.
        if self.bound.step(held).0 > 0 {
            // Nothing is due where newcomers wait for the state.
            if self.bound.joining.is_none() {
                self.checkpoint_if_due(held)?;
                self.evaluate_if_due(held)?;
            }
            if let Some(end) = self.boundary(held)? {
                return Ok(end);
            }
        }
        while self.bound.step(held).0 < held.last_step {
            if let Some(metrics) = self.step(held)? {
                self.announce(held, metrics)?;
            }
            self.evaluate_if_due(held)?;
            if let Some(end) = self.boundary(held)? {
                return Ok(end);
            }
        }
        if held.progress.evaluated != Some(held.step()) {
            self.evaluate(held)?;
        }
        self.finish(held)
    }

    /// Between two steps: does anyone want to stop or pause?
    fn boundary(&mut self, held: &mut Held) -> Result<Option<End>, TrainError> {
        match self.agree_on_boundary(held)? {
            None => Ok(None),
            Some(Boundary::Stop(why)) => {
                self.send_at_once(held)?;
                self.stop_here(held, why).map(Some)
            }
            Some(Boundary::Pause) => {
                self.send_at_once(held)?;
                self.say_committed();
                if let Some(left) = self.bound.checkpoints.unfinished().filter(|_| self.is_first())
                {
                    println!(
                        "step {}: pausing before the checkpoint at step {} is complete: it is left out",
                        held.step().0,
                        left.0
                    );
                }
                Ok(Some(End::Paused))
            }
        }
    }

    fn evaluate_if_due(&mut self, held: &mut Held) -> Result<(), TrainError> {
        if held.evaluation_is_due(held.step(), &held.progress) {
            self.evaluate(held)?;
        }
        Ok(())
    }

    /// Checkpoints that are complete are not lost with the group.
    fn say_committed(&mut self) {
        for fact in self.bound.checkpoints.committed().unwrap_or_default() {
            // Best effort: where the worker is gone, so is the process.
            let _ = self.control.report(&RankReport::Checkpoint(fact));
        }
    }

    /// One optimiser step, and a checkpoint after it when one is due; nothing of a step that is
    /// skipped because its loss or gradient is no number. The state changes only when every
    /// reduction has succeeded.
    fn step(&mut self, held: &mut Held) -> Result<Option<StepMetrics>, TrainError> {
        let begin = Instant::now();
        let mut time = StepTime::default();
        let step = self.bound.step(held).0;
        let global = u64::from(held.spec.batch.global.get());
        let drawn =
            StepSamples { len: held.problem.train.len(), first: step * global, count: global };
        let leaves = held.state.as_ref();
        let leaves =
            leaves.map(|state| Leaves::new(&held.table, &state.values, &held.device, true));
        let transfer = self.begin_transfer(held)?;
        let folded = self.fold_lanes(held, (step, drawn), leaves, &mut time.data);

        // By microbatch, because ranks may own unequal numbers of lanes; 0 of a rank without.
        let own = self.bound.lanes.own().len() as f64;
        let spent = if own > 0.0 { begin.elapsed().as_secs_f64() - time.data } else { 0.0 };
        self.microbatch_micros = (spent / own.max(1.0) * 1e6) as i64;

        // What the backward pass did not hide: the state on its way to newcomers, the buckets still
        // under way, and the sums. A state that is lent comes back before anything is an error.
        let reducing = Instant::now();
        let has_newcomers = transfer.is_some();
        let arrived = transfer.map_or(Ok(()), |transfer| self.end_transfer(held, transfer));
        let mut stats = folded?;
        arrived?;
        self.recorder.set_tag(format_args!("step {step} reduce"));
        let bound = &mut self.bound;
        let Held { spec, problem, table, optimizer, last_step, state, progress, .. } = held;
        let Some(state) = state else { return Err(stateless()) };
        let own_sums = COMMON_SUMS + problem.model.sums.len();
        let mut sums = vec![0.0; own_sums + drawn.sums()];
        bound.lanes.reduce(&mut *bound.queue.turn(), &mut stats, &mut sums)?;
        time.communication = reducing.elapsed().as_secs_f64();
        time.communication_mean = self.waited_mean;
        self.waited_micros = (time.communication * 1e6) as i64;

        self.recorder.set_tag(format_args!("step {step} update"));
        let count = sums[1].max(1.0);
        let loss = sums[0] / count;
        let ran = bound.buckets.collect((1.0 / count) as f32, &mut bound.gradient)?;
        time.communication_total = ran.as_secs_f64();
        if has_newcomers {
            // From here on all have lanes.
            let Place { rank, world_size, .. } = &bound.place;
            bound.lanes = Lanes::new(&spec.batch, rank.0, *world_size, &[]);
        }
        let norm = squared_norm(table, &bound.gradient).sqrt();
        drawn
            .account(&mut progress.samples, &sums[own_sums..])
            .map_err(TrainError::SampleLedger)?;
        if !loss.is_finite() || !norm.is_finite() {
            let bad = if loss.is_finite() { ("gradient's norm", norm) } else { ("loss", loss) };
            let origin = self.origin_of_divergence(&drawn)?;
            self.skip(held, bad, origin)?;
            return Ok(None);
        }
        progress.skipped = 0;
        progress.metrics.insert("train:loss".into(), loss);
        for (name, sum) in problem.model.sums.iter().zip(&sums[COMMON_SUMS..]) {
            progress.metrics.insert(format!("train:{name}"), sum / count);
        }
        let scale = optimizer.clip_factor(norm);
        let values = &mut state.values;
        optimizer.apply(step, table, values, &mut state.optimizer, &bound.gradient, scale);
        state.step = Step(step + 1);
        let samples = f64::from(spec.batch.global.get());
        let mut metrics = StepMetrics {
            step: state.step,
            last_step: Step(*last_step),
            epoch: state.step.0 as f64 * samples / problem.train.len() as f64,
            loss,
            learning_rate: optimizer.schedule.rate(step),
            gradient_norm: norm,
            samples_per_second: 0.0,
            tokens_per_second: 0.0,
            time,
            memory_bytes: resident_bytes(),
            slowest: self.slowest,
        };

        let time = &mut metrics.time;
        time.checkpoint = self.checkpoint_if_due(held)?;
        time.total = begin.elapsed().as_secs_f64();
        time.compute = (time.total - time.data - time.communication - time.checkpoint).max(0.0);
        metrics.samples_per_second = sums[2] / metrics.time.total;
        metrics.tokens_per_second = sums[3] / metrics.time.total;
        Ok(Some(metrics))
    }

    /// Forward and backward of this rank's lanes: gradients go into the buckets, and these to their
    /// reductions. The sums of the lanes, and in `data` the time that samples took.
    fn fold_lanes(
        &mut self,
        held: &Held,
        (step, drawn): (u64, StepSamples),
        leaves: Option<Leaves>,
        data: &mut f64,
    ) -> Result<LaneFold<f64>, TrainError> {
        let bound = &mut self.bound;
        let mut stats: LaneFold<f64> = bound.lanes.fold();
        self.finds = Finds::default();
        if bound.lanes.own().is_empty() {
            bound.buckets.bring_nothing(&bound.lanes, &bound.queue);
            return Ok(stats);
        }
        let Some(leaves) = leaves else { return Err(stateless()) };
        let Held { spec, problem, table, device, .. } = held;
        self.recorder.set_tag(format_args!("step {step} forward and backward"));
        let own_sums = COMMON_SUMS + problem.model.sums.len();
        let sums_len = own_sums + drawn.sums();
        for lane in bound.lanes.own() {
            bound.buckets.begin_lane();
            let mut sums = vec![0.0; sums_len];
            let microbatches = bound.lanes.microbatches(lane);
            let last = microbatches.end - 1;
            for microbatch in microbatches {
                let key = StepKey { seed: spec.seed, step, microbatch };
                let fetching = Instant::now();
                let (offset, indices) = draw(bound, &drawn, microbatch);
                let batch =
                    problem.train.microbatch(&indices, Some(key), &device.clone().autodiff())?;
                drawn.add(&mut sums[own_sums..], offset, &indices);
                *data += fetching.elapsed().as_secs_f64();
                let (samples, tokens) = (batch.samples, batch.tokens);
                let (model, mode) = (&problem.model, Mode::Train(key));
                let mut sink = LaneSink {
                    buckets: &mut bound.buckets,
                    lanes: &bound.lanes,
                    queue: &bound.queue,
                    control: &self.control,
                    lane,
                    last: microbatch == last,
                };
                let found = forward_backward(model, table, &leaves, batch, mode, &mut sink)
                    .ok_or_else(interrupted)?;
                self.finds.note(microbatch, found.loss);
                add_sums(&mut sums, &found, samples, tokens);
            }
            stats.push(lane, sums);
        }
        Ok(stats)
    }

    /// Where newcomers wait for the state, begins to send it: from here to [`Self::end_transfer`] a
    /// holder's is lent. It comes before the step's reductions on every rank.
    fn begin_transfer(&mut self, held: &mut Held) -> Result<Option<Transfer>, TrainError> {
        let Some(joining) = self.bound.joining.take() else { return Ok(None) };
        // How long it takes says nothing about the steps.
        self.busy("the state for newcomers")?;
        let own = self.bound.place.rank;
        let state = match joining.is_newcomer(own) {
            true => held.blank_state(),
            false => held.state.take().ok_or_else(stateless)?,
        };
        Ok(Some(Transfer::begin(&self.bound.queue, joining, own, state)))
    }

    /// Waits until newcomers have the state, as all ranks do before they apply a step to it.
    fn end_transfer(&mut self, held: &mut Held, transfer: Transfer) -> Result<(), TrainError> {
        let joining = transfer.joining().clone();
        let step = joining.step;
        self.recorder.set_tag(format_args!("the state of step {} on its way", step.0));
        let waiting = Instant::now();
        let ran = transfer.end(&mut held.state)?;
        let waited = waiting.elapsed();
        let own = self.bound.place.rank;
        if joining.is_newcomer(own) {
            self.control.report(&RankReport::Running { step, holds_state: true })?;
            if held.spec.checkpoint.every_steps > 0
                && let Some(state) = &held.state
            {
                self.bound.checkpoints.reserve(&held.table, state)?;
            }
        } else if joining.holders.first() == Some(&own) {
            println!(
                "the state of step {} went to {} in {:.0} ms, of which this rank waited {:.0} ms",
                step.0,
                listed(&joining.newcomers),
                ran.as_secs_f64() * 1e3,
                waited.as_secs_f64() * 1e3,
            );
        }
        Ok(())
    }

    /// Where no step is to come behind which newcomers could get the state.
    fn send_at_once(&mut self, held: &mut Held) -> Result<(), TrainError> {
        match self.begin_transfer(held)? {
            Some(transfer) => self.end_transfer(held, transfer),
            None => Ok(()),
        }
    }

    /// Whose microbatch made the step's loss no number.
    fn origin_of_divergence(&mut self, drawn: &StepSamples) -> Result<Origin, TrainError> {
        let bound = &mut self.bound;
        let Place { rank, world_size, .. } = bound.place;
        let mut origin = self.finds.compare(&bound.queue, rank, world_size)?;
        if let Some((_, microbatch)) = origin.first {
            origin.samples = draw(bound, drawn, microbatch).1;
        }
        Ok(origin)
    }

    /// Counts a step that changes nothing, if the job allows it. Every rank has the same loss, so all
    /// do the same.
    fn skip(
        &mut self,
        held: &mut Held,
        (what, value): (&'static str, f64),
        origin: Origin,
    ) -> Result<(), TrainError> {
        let step = held.step().0 + 1;
        let stop = &held.spec.stop;
        let progress = &mut held.progress;
        if stop.divergence == Divergence::Stop || progress.skipped >= stop.max_skips.get() {
            let (origin, skipped) = (Box::new(origin), progress.skipped);
            return Err(TrainError::Diverged { step, what, value, origin, skipped });
        }
        progress.skipped += 1;
        *progress.metrics.entry("train:skipped_steps".into()).or_default() += 1.0;
        if let Some(state) = &mut held.state {
            state.step = Step(step);
        }
        if self.is_first() {
            println!("step {step}/{} skipped: the {what} is {value}{origin}", held.last_step);
        }
        self.checkpoint_if_due(held).map(|_| ())
    }

    fn is_first(&self) -> bool {
        self.bound.place.rank == Rank(0)
    }

    fn checkpoint_if_due(&mut self, held: &Held) -> Result<f64, TrainError> {
        let step = held.step();
        if !held.checkpoint_is_due(step) {
            return Ok(0.0);
        }
        if self.bound.checkpoints.skips() {
            if self.is_first() {
                println!("step {}: no checkpoint, the one before is still being written", step.0);
            }
            return Ok(0.0);
        }
        let begin = Instant::now();
        self.stage(held)?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn stage(&mut self, held: &Held) -> Result<(), TrainError> {
        let Some(state) = &held.state else { return Err(stateless()) };
        self.recorder.set_tag(format_args!("checkpoint at step {}", state.step.0));
        let mut metrics = held.progress.metrics.clone();
        if held.progress.evaluated != Some(state.step) {
            // What an earlier step was worth says nothing about this one.
            metrics.retain(|name, _| !name.starts_with("validation:"));
        }
        let bound = &mut self.bound;
        let mut turn = bound.queue.turn();
        let told = Told { metrics, samples: held.progress.samples };
        bound.checkpoints.stage(&mut *turn, state.step, &held.table, state, told)
    }

    /// Reports the step, and what the savers have finished meanwhile.
    fn announce(&mut self, held: &Held, metrics: StepMetrics) -> Result<(), TrainError> {
        if !self.is_first() {
            return Ok(());
        }
        let lines = (held.last_step / 20).max(1);
        if metrics.step.0.is_multiple_of(lines) || metrics.step.0 == held.last_step {
            println!(
                "step {}/{} loss {:.4} rate {:.3e} {:.1} samples/s",
                metrics.step.0,
                held.last_step,
                metrics.loss,
                metrics.learning_rate,
                metrics.samples_per_second
            );
        }
        self.control.report(&RankReport::Step(metrics))?;
        for fact in self.bound.checkpoints.committed()? {
            self.control.report(&RankReport::Checkpoint(fact))?;
        }
        Ok(())
    }

    /// One small all-reduce: does anyone want to stop, do all want to pause, and whose shard is
    /// written.
    fn agree_on_boundary(&mut self, held: &Held) -> Result<Option<Boundary>, TrainError> {
        let used = self.started.elapsed() + self.bound.place.elapsed.0;
        let time_up = held.spec.stop.max_time.is_some_and(|limit| used >= limit.0);
        let step = self.bound.step(held).0;
        self.recorder.set_tag(format_args!("agreement after step {step}"));
        let ordered = self.control.stop_requested();
        let pause = self.control.pause_requested();
        let bound = &mut self.bound;
        let shards = bound.checkpoints.shards_done()?;
        let (ordered, time_up, pause) = (ordered.into(), time_up.into(), pause.into());
        let mut votes = vec![ordered, time_up, shards, pause, self.waited_micros];
        // Each rank's place in a list of what its lanes took.
        let times = votes.len()..votes.len() + bound.place.world_size as usize;
        votes.resize(times.end, 0);
        votes[times.start + bound.place.rank.0 as usize] = self.microbatch_micros;
        bound.queue.turn().all_reduce(votes.as_mut_slice().into(), ReduceOp::Sum)?;
        self.slowest = slowest(&votes[times]);
        let [ordered, time_up, shards, pause, waited] = votes[..5] else { return Err(stateless()) };
        self.waited_mean = Some(waited as f64 / 1e6 / f64::from(bound.place.world_size));
        bound.checkpoints.agree(&mut *bound.queue.turn(), shards)?;
        if step >= held.last_step {
            return Ok(None);
        }
        // With its time used up a job is over, whoever was asked to leave just then. The order to
        // pause goes to every rank: those that have it wait until all have.
        let by_time = (time_up > 0).then_some(Boundary::Stop(StopCause::MaxTime));
        let by_order = (ordered > 0).then_some(Boundary::Stop(StopCause::Order));
        let all_pause = pause == i64::from(bound.place.world_size);
        Ok(by_time.or(by_order).or(all_pause.then_some(Boundary::Pause)))
    }

    /// Validation over the whole set, dealt to lanes, so its result has the same bits for any
    /// number of ranks.
    fn evaluate(&mut self, held: &mut Held) -> Result<(), TrainError> {
        let step = held.step();
        held.progress.evaluated = Some(step);
        let Held { spec, problem, device, table, state, .. } = &*held;
        let Some(data) = &problem.validation else { return Ok(()) };
        let Some(state) = state else { return Err(stateless()) };
        self.recorder.set_tag(format_args!("validation at step {}", step.0));
        self.busy("validation")?;
        let bound = &mut self.bound;
        let size = u64::from(spec.batch.microbatch_size());
        let microbatches = data.len().div_ceil(size);
        let lanes = spec.batch.lanes.get();
        let leaves = Leaves::new(table, &state.values, device, false);
        let mut fold: LaneFold<f64> = bound.lanes.fold();
        for lane in bound.lanes.own() {
            let mut sums = vec![0.0; COMMON_SUMS + problem.model.sums.len()];
            for microbatch in bound.lanes.deal(lane, lanes, microbatches) {
                let first = microbatch * size;
                let indices: Vec<u64> = (first..data.len().min(first + size)).collect();
                let batch = data.microbatch(&indices, None, device)?;
                if self.control.is_interrupted() {
                    held.progress.evaluated = None;
                    return Err(interrupted());
                }
                let (samples, tokens) = (batch.samples, batch.tokens);
                let found = evaluate(&problem.model, &leaves, batch);
                add_sums(&mut sums, &found, samples, tokens);
            }
            fold.push(lane, sums);
        }
        let mut sums = vec![0.0; COMMON_SUMS + problem.model.sums.len()];
        let reduced = bound.lanes.reduce(&mut *bound.queue.turn(), &mut fold, &mut sums);
        if let Err(error) = reduced {
            held.progress.evaluated = None;
            return Err(error.into());
        }
        let count = sums[1].max(1.0);
        let mut metrics = BTreeMap::from([("validation:loss".to_owned(), sums[0] / count)]);
        for (name, sum) in problem.model.sums.iter().zip(&sums[COMMON_SUMS..]) {
            metrics.insert(format!("validation:{name}"), sum / count);
        }
        held.progress.metrics.extend(metrics);
        self.bound.checkpoints.evaluated(step, &held.progress.metrics);
        if self.is_first() {
            let metrics = held.progress.metrics.clone();
            let listed: Vec<String> =
                metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            println!("step {}/{} {}", step.0, held.last_step, listed.join(" "));
            let finite = metrics.into_iter().filter(|(_, value)| value.is_finite());
            let metrics = finite.collect();
            self.control.report(&RankReport::Evaluation(Evaluation { step, metrics }))?;
        }
        Ok(())
    }

    /// Says that no step is to be expected for a while.
    fn busy(&self, what: &str) -> Result<(), TrainError> {
        if self.is_first() {
            self.control.report(&RankReport::Busy { what: what.to_owned() })?;
        }
        Ok(())
    }
}

/// The samples of a microbatch, and how many of the step's come before them.
fn draw(bound: &mut Bound, step: &StepSamples, microbatch: u64) -> (u64, Vec<u64>) {
    let (offset, count) = bound.lanes.samples(microbatch);
    (offset, bound.order.samples(step.first + offset, count))
}

/// The group is broken off while this rank computes.
fn interrupted() -> TrainError {
    let reason = "the step was abandoned: its group is broken off".to_owned();
    collective::CollectiveError::Aborted { reason }.into()
}

fn stateless() -> TrainError {
    api::control::ControlError("a step without a state".into()).into()
}

/// The gradients of one lane's microbatches, on their way into buckets.
struct LaneSink<'a> {
    buckets: &'a mut Buckets,
    lanes: &'a Lanes,
    queue: &'a Queue,
    control: &'a Control,
    lane: u32,
    /// The lane's last microbatch: its blocks are whole when it has passed them.
    last: bool,
}

impl GradientSink for LaneSink<'_> {
    fn is_abandoned(&self) -> bool {
        self.control.is_interrupted()
    }

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

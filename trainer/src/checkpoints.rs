//! When state is saved, and how ranks agree that a checkpoint is complete.
//!
//! Each rank writes its share of the tensors behind training. At every step boundary the ranks
//! count, in the same small all-reduce that carries stop votes, who has finished its shard; when
//! all have, the shard entries are gathered and rank 0 writes the manifest, last. So no rank waits
//! for another's upload, and the coordinator is not needed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api::control::Control;
use api::events::CheckpointFact;
use api::job::WhenBehind;
use api::samples::SampleTally;
use api::session::RankReport;
use api::{JobSpec, Rank, Step};
use checkpoint::{
    Manifest, ManifestInfo, Saver, SaverOptions, ShardEntry, Store, TensorSlice, share_tensors,
};
use collective::Communicator;

use crate::error::TrainError;
use crate::parameters::Table;
use crate::place::Place;
use crate::state::{StateTensor, TrainState};

/// A wait for the store of which people are told; shorter ones show in the step times.
const WAIT_WORTH_TELLING: Duration = Duration::from_secs(1);

/// What a checkpoint says beside the state.
pub struct Told {
    /// Metrics at its step.
    pub metrics: BTreeMap<String, f64>,
    /// Which samples it was trained on.
    pub samples: SampleTally,
}

/// Saves a job's state as its policy says.
pub struct Checkpoints {
    /// Present until [`Checkpoints::take_saver`].
    saver: Option<Saver>,
    rank: Rank,
    world_size: u32,
    info: ManifestInfo,
    when_behind: WhenBehind,
    pending: Option<Pending>,
    /// The newest step that is saved or being saved.
    newest: Option<Step>,
    /// Steps whose manifest rank 0 has begun and not heard of since.
    committing: BTreeSet<Step>,
}

/// A staged checkpoint whose shards are not all written yet. The same on every rank.
struct Pending {
    step: Step,
    own: Option<ShardEntry>,
}

impl Checkpoints {
    /// Starts this rank's saver; `base` is the checkpoint that the job was restored from.
    pub fn start(
        spec: &JobSpec,
        place: &Place,
        store: Store,
        info: ManifestInfo,
        base: Option<&Manifest>,
        control: &Control,
    ) -> Result<Self, TrainError> {
        let options = SaverOptions {
            job: spec.name.clone(),
            generation: place.generation,
            rank: place.rank,
            world_size: place.world_size,
            compression: spec.checkpoint.compression,
            incremental: spec.checkpoint.incremental,
        };
        let mut saver = Saver::with_store(store, options)?;
        saver.abandon_when(patience(control.clone()));
        if let Some(base) = base {
            saver.base_on(base);
        }
        Ok(Self {
            saver: Some(saver),
            rank: place.rank,
            world_size: place.world_size,
            info,
            when_behind: spec.checkpoint.when_behind,
            pending: None,
            newest: place.restore.as_ref().map(|fact| fact.step),
            committing: BTreeSet::new(),
        })
    }

    /// Provides the memory of the first copy while the first steps are computed.
    pub fn reserve(&mut self, table: &Table, state: &TrainState) -> Result<(), TrainError> {
        let tensors = state.tensors(table);
        let own = tensors[self.share(&tensors)].iter();
        let bytes = own.map(|tensor| size_of_val(tensor.data)).sum();
        self.saver()?.reserve(bytes);
        Ok(())
    }

    /// The tensors that this rank writes.
    fn share(&self, tensors: &[StateTensor<'_>]) -> Range<usize> {
        let lengths: Vec<usize> = tensors.iter().map(|t| t.data.len()).collect();
        share_tensors(&lengths, self.world_size)[self.rank.0 as usize].clone()
    }

    /// Whether a checkpoint that is due now is left out, as the job says, since the one before is
    /// still being written. The same on every rank, which all count the same shards.
    pub fn skips(&self) -> bool {
        self.when_behind == WhenBehind::Skip && self.pending.is_some()
    }

    /// Copies the state into memory; writing goes on behind training. A checkpoint still pending is
    /// completed first, so at most one is: this rank waits for its shard, and says so when that takes
    /// long. A step that is saved already is not saved again.
    pub fn stage(
        &mut self,
        communicator: &mut dyn Communicator,
        step: Step,
        table: &Table,
        state: &TrainState,
        told: Told,
    ) -> Result<(), TrainError> {
        if self.newest == Some(step) {
            return Ok(());
        }
        let begun = Instant::now();
        let former = self.pending.as_ref().map(|pending| pending.step);
        self.complete(communicator)?;
        if let Some(former) = former
            && begun.elapsed() >= WAIT_WORTH_TELLING
            && self.rank == Rank(0)
        {
            println!(
                "step {}: waited {:.1} s until the checkpoint at step {} was written: the store is \
                 slower than checkpoint.every_steps asks for",
                step.0,
                begun.elapsed().as_secs_f64(),
                former.0
            );
        }
        self.newest = Some(step);
        (self.info.metrics, self.info.samples) = (told.metrics, Some(told.samples));
        let tensors = state.tensors(table);
        let slices: Vec<TensorSlice<'_>> = tensors[self.share(&tensors)]
            .iter()
            .map(|t| TensorSlice { name: &t.name, shape: t.shape, data: t.data })
            .collect();
        self.saver()?.stage(step, &slices)?;
        self.pending = Some(Pending { step, own: None });
        Ok(())
    }

    /// A validation of this step has ended: a checkpoint of it that is not committed yet records it.
    pub fn evaluated(&mut self, step: Step, metrics: &BTreeMap<String, f64>) {
        if self.pending.as_ref().is_some_and(|pending| pending.step == step) {
            self.info.metrics.clone_from(metrics);
        }
    }

    /// 1 when this rank's shard of the pending checkpoint is written.
    pub fn shards_done(&mut self) -> Result<i64, TrainError> {
        for (step, entry) in self.saver()?.poll_shards()? {
            if let Some(pending) = self.pending.as_mut().filter(|p| p.step == step) {
                pending.own = Some(entry);
            }
        }
        Ok(i64::from(self.pending.as_ref().is_some_and(|p| p.own.is_some())))
    }

    /// Given the number of ranks whose shard is written, as all ranks counted it: gathers the
    /// entries and has rank 0 write the manifest.
    pub fn agree(
        &mut self,
        communicator: &mut dyn Communicator,
        done: i64,
    ) -> Result<(), TrainError> {
        if self.pending.is_some() && done == i64::from(self.world_size) {
            self.complete(communicator)?;
        }
        Ok(())
    }

    /// Waits for this rank's shard of the pending checkpoint, gathers all, and begins the manifest.
    fn complete(&mut self, communicator: &mut dyn Communicator) -> Result<(), TrainError> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let own = match pending.own {
            Some(entry) => entry,
            None => self.saver()?.wait_shard(pending.step)?,
        };
        let bytes = serde_json::to_vec(&own).map_err(unreadable)?;
        let all = communicator.gather_bytes(&bytes)?;
        if self.rank == Rank(0) {
            let shards: Result<Vec<ShardEntry>, _> =
                all.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
            let shards = shards.map_err(unreadable)?;
            self.committing.insert(pending.step);
            let info = self.info.clone();
            self.saver()?.commit(pending.step, shards, info);
        }
        Ok(())
    }

    /// Checkpoints whose manifest has been written since the last call (rank 0).
    pub fn committed(&mut self) -> Result<Vec<CheckpointFact>, TrainError> {
        let facts = self.saver()?.poll_committed()?;
        self.committing.retain(|step| facts.iter().all(|fact| fact.step != *step));
        Ok(facts)
    }

    /// The newest checkpoint that is not known to be complete: who leaves the group now leaves it out.
    pub fn unfinished(&self) -> Option<Step> {
        let pending = self.pending.as_ref().map(|pending| pending.step);
        pending.or_else(|| self.committing.last().copied())
    }

    /// Completes the pending checkpoint and waits until every manifest is written (rank 0), of
    /// older checkpoints too. Oldest first: once a newer one is recorded, an older one is refused.
    pub fn flush(
        &mut self,
        communicator: &mut dyn Communicator,
    ) -> Result<Vec<CheckpointFact>, TrainError> {
        self.complete(communicator)?;
        let mut facts = self.committed()?;
        for step in std::mem::take(&mut self.committing) {
            facts.push(self.saver()?.wait_committed(step)?);
        }
        facts.sort_by_key(|fact| fact.step);
        Ok(facts)
    }

    /// The saver, for the model's files at the end. Nothing is staged after that.
    pub fn take_saver(&mut self) -> Result<Saver, TrainError> {
        self.saver.take().ok_or_else(gone)
    }

    /// No step follows: what is saved from here on need not step back for one.
    pub fn hurry(&mut self) -> Result<(), TrainError> {
        Ok(self.saver()?.hurry()?)
    }

    fn saver(&mut self) -> Result<&mut Saver, TrainError> {
        self.saver.as_mut().ok_or_else(gone)
    }
}

/// A store that takes nothing must not keep this rank from its next generation; and how long it takes
/// says nothing about the ranks: the leader is told, which would else take it for a hang.
fn patience(control: Control) -> impl Fn(Duration) -> bool + Send + Sync {
    let is_told = AtomicBool::new(false);
    move |waited| {
        let is_long = waited >= WAIT_WORTH_TELLING;
        if is_long && !is_told.swap(is_long, Ordering::Relaxed) {
            // Where the worker is gone, so is the process.
            let _ = control.report(&RankReport::Busy { what: "the store".to_owned() });
        }
        is_told.store(is_long, Ordering::Relaxed);
        control.is_interrupted()
    }
}

fn gone() -> TrainError {
    checkpoint::SaveError::Background("the saver of this generation has been closed".into()).into()
}

fn unreadable(error: serde_json::Error) -> TrainError {
    api::control::ControlError(format!("a shard entry: {error}")).into()
}

//! Saves a rank's part of a checkpoint behind training: stage, upload, and (rank 0) commit.
//!
//! The caller's thread only copies; hashing, compression and transfer run on the saver's own small
//! runtime. What fails there is returned by the next call. The order of writes is the whole
//! safety: shards first, each under a key that no other write ever uses; the manifest when every
//! shard is there, only if absent. So whatever instruction the process dies at, a manifest that
//! exists is whole.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use api::events::CheckpointFact;
use api::job::Compression;
use api::{Generation, Name, Rank, Step};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use crate::error::StoreError;
use crate::format::{self, FormatError, TensorPiece, TensorSlice};
use crate::former::Former;
use crate::manifest::{Manifest, ManifestInfo, ShardEntry};
use crate::nonce::nonce;
use crate::priority::behind_training;
use crate::staging::{self, ARENAS_MAX, Staged};
use crate::store::Store;
use crate::upload::{Content, write_object};
use crate::write::{write_manifest, write_shard};
use crate::{keys, local};

/// Commits that may be under way; one more makes the caller wait. Each is small, and training stages
/// no faster than its two arenas come back.
const COMMITS_MAX: usize = 16;

/// Why a checkpoint or model was not saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tensors cannot be written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Steps go forward only.
    #[error("step {step} cannot be staged after step {last}")]
    StepOrder {
        /// The step given.
        step: u64,
        /// The last one staged.
        last: u64,
    },
    /// Something is awaited that was never begun, or was taken before.
    #[error("nothing is under way for step {0}")]
    UnknownStep(u64),
    /// The shards do not make a checkpoint.
    #[error("checkpoint at step {step} cannot be committed: {problem}")]
    Shards {
        /// The step.
        step: u64,
        /// What is wrong.
        problem: String,
    },
    /// A shard is not where rank 0 looks for it.
    #[error(
        "checkpoint at step {step} cannot be committed: the shard of {rank}, `{key}`, {problem}: \
         do all hosts reach the same store? a `file://` store must be one shared folder"
    )]
    ShardMissing {
        /// The step.
        step: u64,
        /// Whose shard.
        rank: Rank,
        /// Where it should be.
        key: String,
        /// What was found.
        problem: String,
    },
    /// Another writer committed this step of this generation.
    #[error(
        "`{0}` exists already and is not this writer's: another process of this generation runs"
    )]
    Superseded(String),
    /// The saver itself failed.
    #[error("saving failed: {0}")]
    Background(String),
    /// Whoever waited is wanted elsewhere.
    #[error("the wait for the store was abandoned")]
    Abandoned,
}

impl SaveError {
    /// Whether saving again may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(error) => error.is_retryable(),
            Self::Background(_) | Self::Abandoned => true,
            _ => false,
        }
    }
}

/// How often it is looked whether a wait is to be given up.
const ABANDONED_LOOK: Duration = Duration::from_millis(50);

/// What a saver saves for, and where.
#[derive(Clone, Debug)]
pub struct SaverOptions {
    /// The job.
    pub job: Name,
    /// The gang's incarnation, part of every key.
    pub generation: Generation,
    /// This rank.
    pub rank: Rank,
    /// Ranks in the gang.
    pub world_size: u32,
    /// Compression of shards.
    pub compression: Compression,
    /// Tensors whose content is that of the checkpoint before are referred to, not written again.
    /// Then every step that is staged must be committed, in order.
    pub incremental: bool,
}

/// Saves one rank's checkpoints. Its methods block and must not be called from async code; when it
/// is dropped without [`finish`](Saver::finish), what is under way is broken off.
pub struct Saver {
    options: Arc<SaverOptions>,
    store: Store,
    writer: Arc<str>,
    last_staged: Option<Step>,
    /// What the shard before holds, from whoever writes it; none when all is always written.
    former: Option<oneshot::Receiver<Former>>,
    /// Keys of the shards that the checkpoint before holds or refers to, from whoever commits it.
    known: Option<oneshot::Receiver<BTreeSet<String>>>,
    shared: Arc<Shared>,
    /// Present until dropped.
    runtime: Option<Runtime>,
    /// The one before, of threads that step back, since there is a hurry.
    behind: Option<Runtime>,
    /// Nobody wants what is under way.
    unwanted: Arc<AtomicBool>,
}

/// What the background and the caller share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    is_abandoned: OnceLock<IsAbandoned>,
}

/// Hears how long a wait has lasted, and tells whether it is to be given up.
type IsAbandoned = Box<dyn Fn(Duration) -> bool + Send + Sync>;

struct State {
    /// Arenas not in use; fewer than [`ARENAS_MAX`] exist until they are needed.
    arenas: Vec<Vec<u8>>,
    /// Steps whose shard is being written.
    staging: BTreeSet<Step>,
    /// Steps whose manifest is being written.
    committing: BTreeSet<Step>,
    shards: BTreeMap<Step, ShardEntry>,
    committed: BTreeMap<Step, CheckpointFact>,
    errors: VecDeque<SaveError>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere is reported as an error; the state is consistent at every unlock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `ready` yields something, or an error from behind comes first.
    fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> Result<T, SaveError> {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Ok(found);
            }
            if let Some(error) = state.errors.pop_front() {
                return Err(error);
            }
            let Some(is_abandoned) = self.is_abandoned.get() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if is_abandoned(begun.elapsed()) {
                return Err(SaveError::Abandoned);
            }
            let waited = self.changed.wait_timeout(state, ABANDONED_LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn next_error(&self) -> Result<(), SaveError> {
        self.lock().errors.pop_front().map_or(Ok(()), Err)
    }
}

impl Saver {
    /// Starts the background. Asks nothing of the store: whether the key at hand is its own is asked
    /// behind, before the first write.
    pub fn with_store(store: Store, options: SaverOptions) -> Result<Self, SaveError> {
        if options.rank.0 >= options.world_size {
            let (rank, size) = (options.rank, options.world_size);
            return Err(SaveError::Background(format!("{rank} is not of a world size of {size}")));
        }
        if let Some(folder) = store.folder() {
            let checkpoints = folder.join(keys::checkpoints(&options.job));
            local::clean_superseded(&checkpoints, options.generation);
        }
        let runtime = runtime(true)?;
        let state = State {
            arenas: vec![Vec::new(); ARENAS_MAX],
            staging: BTreeSet::new(),
            committing: BTreeSet::new(),
            shards: BTreeMap::new(),
            committed: BTreeMap::new(),
            errors: VecDeque::new(),
        };
        let incremental = options.incremental;
        Ok(Self {
            options: Arc::new(options),
            store,
            writer: nonce().into(),
            last_staged: None,
            former: incremental.then(|| ready(Former::default())),
            known: incremental.then(|| ready(BTreeSet::new())),
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                changed: Condvar::new(),
                is_abandoned: OnceLock::new(),
            }),
            runtime: Some(runtime),
            behind: None,
            unwanted: Arc::default(),
        })
    }

    /// Nothing is trained any more: what is begun from here on does not step back for it.
    pub fn hurry(&mut self) -> Result<(), SaveError> {
        if self.behind.is_none() {
            // What is under way there goes on.
            self.behind = self.runtime.replace(runtime(false)?);
        }
        Ok(())
    }

    /// The job goes on from this checkpoint, which is recorded: what it holds need not be written
    /// again. To be told before anything is staged; means nothing unless saving is incremental.
    pub fn base_on(&mut self, manifest: &Manifest) {
        if self.options.incremental && self.last_staged.is_none() {
            self.former = Some(ready(Former::of(&manifest.shards)));
            self.known = Some(ready(keys_of(manifest)));
        }
    }

    /// Provides memory for `bytes` of tensors behind the caller, so that the first copy is as cheap as
    /// all later ones. Means nothing but time.
    pub fn reserve(&self, bytes: usize) {
        let Some(arena) = self.shared.lock().arenas.pop() else { return };
        let shared = self.shared.clone();
        if let Some(runtime) = &self.runtime {
            runtime.spawn_blocking(move || {
                let arena = if arena.capacity() < bytes { staging::provided(bytes) } else { arena };
                shared.update(|state| state.arenas.push(arena));
            });
        }
    }

    /// From now on a wait for the store asks `is_abandoned` again and again, with how long it has lasted,
    /// and ends with [`SaveError::Abandoned`] when that says so; what is under way is not touched. The
    /// first one given counts.
    pub fn abandon_when(
        &mut self,
        is_abandoned: impl Fn(Duration) -> bool + Send + Sync + 'static,
    ) {
        let _ = self.shared.is_abandoned.set(Box::new(is_abandoned));
    }

    /// Copies this rank's tensors and returns; its shard is written behind. Waits only when both
    /// arenas are still being uploaded, so that a store that is too slow never costs more memory than
    /// two copies; returns for how long. `step` must be larger than the last one staged.
    pub fn stage(
        &mut self,
        step: Step,
        tensors: &[TensorSlice<'_>],
    ) -> Result<Duration, SaveError> {
        let shapes = format::shapes(tensors)?;
        self.stage_pieces(step, &format::whole(tensors, &shapes))
    }

    /// The same for parts of tensors, as a mesh cuts them. The pieces of all ranks must make whole
    /// tensors; what several ranks hold need be given by one of them only
    /// ([`share_replicas`](crate::share_replicas) says by which). An empty piece is left out.
    pub fn stage_pieces(
        &mut self,
        step: Step,
        pieces: &[TensorPiece<'_>],
    ) -> Result<Duration, SaveError> {
        self.shared.next_error()?;
        if let Some(last) = self.last_staged.filter(|last| step <= *last) {
            return Err(SaveError::StepOrder { step: step.0, last: last.0 });
        }
        let begun = Instant::now();
        let arena = self.shared.wait(|state| state.arenas.pop())?;
        let waited = begun.elapsed();
        // A compressed shard cannot be read in part.
        let with_checks = self.options.compression == Compression::None;
        let mut staged = match Staged::copy(pieces, arena, with_checks) {
            Ok(staged) => staged,
            Err(error) => {
                self.shared.update(|state| state.arenas.push(Vec::new()));
                return Err(error.into());
            }
        };
        self.last_staged = Some(step);
        self.shared.update(|state| {
            state.staging.insert(step);
        });
        let guard = Guard { shared: self.shared.clone(), work: Some(Work::Stage(step)) };
        let (store, options, writer) =
            (self.store.clone(), self.options.clone(), self.writer.clone());
        let (former, unwanted) = (pass_on(&mut self.former), self.unwanted.clone());
        self.spawn(async move {
            // Nothing comes from a task that was broken off: then all is written.
            let (former, next) = match former {
                Some((former, next)) => (Some(former.await.unwrap_or_default()), Some(next)),
                None => (None, None),
            };
            let known = former.as_ref();
            let written =
                write_shard(&store, &options, &writer, step, &mut staged, known, unwanted).await;
            if let (Some(former), Some(next)) = (former, next) {
                let held =
                    written.as_ref().ok().map(|entry| Former::of(std::slice::from_ref(entry)));
                // Nobody is there to receive it when the saver is dropped.
                let _ = next.send(held.unwrap_or(former));
            }
            let arena = staged.into_arena();
            guard.done(move |state| {
                state.arenas.push(arena);
                state.staging.remove(&step);
                match written {
                    Ok(entry) => drop(state.shards.insert(step, entry)),
                    Err(error) => state.errors.push_back(error),
                }
            });
        });
        Ok(waited)
    }

    /// Shards written since the last call, by step.
    pub fn poll_shards(&mut self) -> Result<Vec<(Step, ShardEntry)>, SaveError> {
        self.shared.next_error()?;
        Ok(std::mem::take(&mut self.shared.lock().shards).into_iter().collect())
    }

    /// Waits until the shard of a staged step is written.
    pub fn wait_shard(&mut self, step: Step) -> Result<ShardEntry, SaveError> {
        self.shared.wait(|state| match state.shards.remove(&step) {
            Some(entry) => Some(Ok(entry)),
            None if state.staging.contains(&step) || !state.errors.is_empty() => None,
            None => Some(Err(SaveError::UnknownStep(step.0))),
        })?
    }

    /// Begins the manifest of a step whose every rank has written its shard (rank 0 only). The
    /// outcome comes from [`poll_committed`](Self::poll_committed) or an error from any call.
    pub fn commit(&mut self, step: Step, shards: Vec<ShardEntry>, info: ManifestInfo) {
        let manifest = self.manifest(step, shards, info);
        let mut state = self.shared.lock();
        while state.committing.len() >= COMMITS_MAX {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.committing.insert(step);
        drop(state);
        let guard = Guard { shared: self.shared.clone(), work: Some(Work::Commit(step)) };
        let store = self.store.clone();
        let known = pass_on(&mut self.known);
        self.spawn(async move {
            let (known, next) = match known {
                Some((known, next)) => (known.await.unwrap_or_default(), Some(next)),
                None => (BTreeSet::new(), None),
            };
            let (fact, known) = match manifest {
                Ok(manifest) => match write_manifest(&store, &manifest, &known).await {
                    Ok(fact) => (Ok(fact), keys_of(&manifest)),
                    Err(error) => (Err(error), known),
                },
                Err(problem) => (Err(SaveError::Shards { step: step.0, problem }), known),
            };
            // Nobody is there to receive it when the saver is dropped.
            drop(next.map(|next| next.send(known)));
            guard.done(move |state| {
                state.committing.remove(&step);
                match fact {
                    Ok(fact) => drop(state.committed.insert(step, fact)),
                    Err(error) => state.errors.push_back(error),
                }
            });
        });
    }

    fn manifest(
        &self,
        step: Step,
        mut shards: Vec<ShardEntry>,
        info: ManifestInfo,
    ) -> Result<Manifest, String> {
        shards.sort_by_key(|shard| shard.rank);
        let finite = |(name, value): (String, f64)| value.is_finite().then_some((name, value));
        let manifest = Manifest {
            version: Manifest::version_of(&shards),
            job: self.options.job.clone(),
            step,
            generation: self.options.generation,
            world_size: self.options.world_size,
            lanes: info.lanes,
            fingerprint: info.fingerprint,
            data_digest: info.data_digest,
            spec_digest: info.spec_digest,
            metrics: info.metrics.into_iter().filter_map(finite).collect(),
            samples: info.samples,
            writer: self.writer.to_string(),
            shards,
        };
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checkpoints whose manifest was written since the last call.
    pub fn poll_committed(&mut self) -> Result<Vec<CheckpointFact>, SaveError> {
        self.shared.next_error()?;
        Ok(std::mem::take(&mut self.shared.lock().committed).into_values().collect())
    }

    /// Waits until the manifest of a step is written.
    pub fn wait_committed(&mut self, step: Step) -> Result<CheckpointFact, SaveError> {
        self.shared.wait(|state| match state.committed.remove(&step) {
            Some(fact) => Some(Ok(fact)),
            None if state.committing.contains(&step) || !state.errors.is_empty() => None,
            None => Some(Err(SaveError::UnknownStep(step.0))),
        })?
    }

    /// Writes the finished model: `model.safetensors`, then `model.json`, under
    /// [`keys::model`]. Blocks until both are written; returns the folder's key, and SHA-256 (hex)
    /// and size of the weights.
    pub fn put_model(
        &mut self,
        tensors: &[TensorSlice<'_>],
        descriptor_json: &[u8],
    ) -> Result<(String, String, u64), SaveError> {
        self.shared.next_error()?;
        self.hurry()?;
        let shapes = format::shapes(tensors)?;
        let staged = Staged::copy(&format::whole(tensors, &shapes), Vec::new(), false)?;
        let weights = Content::of(staged.pieces());
        let mut hasher = Sha256::new();
        for piece in &weights.pieces {
            hasher.update(piece);
        }
        let sha256 = hex(&hasher.finalize());
        let folder = keys::model(&self.options.job, self.options.generation);
        let descriptor = Content::of(vec![Bytes::copy_from_slice(descriptor_json)]);
        let weights_key = format!("{folder}/{}", keys::MODEL_WEIGHTS);
        let descriptor_key = format!("{folder}/{}", keys::MODEL_DESCRIPTOR);
        let store = &self.store;
        let runtime = self.runtime.as_ref().expect("the runtime is present until drop");
        runtime.block_on(async {
            store.check_key_once().await?;
            write_object(store, &weights_key, &weights, Compression::None).await?;
            write_object(store, &descriptor_key, &descriptor, Compression::None).await
        })?;
        Ok((folder, sha256, staged.bytes()))
    }

    /// Waits for everything under way, and returns the first error that no call has returned yet.
    pub fn finish(self) -> Result<(), SaveError> {
        let mut state = self.shared.lock();
        while !state.staging.is_empty() || !state.committing.is_empty() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.errors.pop_front().map_or(Ok(()), Err)
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(work);
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
        for runtime in [self.runtime.take(), self.behind.take()].into_iter().flatten() {
            runtime.shutdown_background();
        }
    }
}

/// Few threads, which step back `behind` those of the step loop or do not.
fn runtime(behind: bool) -> Result<Runtime, SaveError> {
    let mut builder = Builder::new_multi_thread();
    if behind {
        builder.on_thread_start(behind_training);
    }
    let built = builder.worker_threads(1).thread_name("checkpoint").enable_all().build();
    built.map_err(|error| SaveError::Background(error.to_string()))
}

/// What a background task is for.
enum Work {
    Stage(Step),
    Commit(Step),
}

/// Settles a background task's account even when it panics, so that nobody waits for ever.
struct Guard {
    shared: Arc<Shared>,
    work: Option<Work>,
}

impl Guard {
    fn done(mut self, change: impl FnOnce(&mut State)) {
        self.work = None;
        self.shared.update(change);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(work) = self.work.take() else { return };
        self.shared.update(|state| {
            let what = match work {
                Work::Stage(step) => {
                    state.staging.remove(&step);
                    state.arenas.push(Vec::new());
                    "writing a shard"
                }
                Work::Commit(step) => {
                    state.committing.remove(&step);
                    "writing a manifest"
                }
            };
            state.errors.push_back(SaveError::Background(format!("{what} was broken off")));
        });
    }
}

/// Every shard that a checkpoint cannot do without.
fn keys_of(manifest: &Manifest) -> BTreeSet<String> {
    manifest.objects().into_iter().map(|shard| shard.key).collect()
}

/// Something handed on from one task to the next, for the first of them.
fn ready<T>(value: T) -> oneshot::Receiver<T> {
    let (sender, receiver) = oneshot::channel();
    // The receiver is here.
    let _ = sender.send(value);
    receiver
}

/// What the task before hands on, and where to hand on to the one after; tasks so linked come one
/// after another.
fn pass_on<T>(
    link: &mut Option<oneshot::Receiver<T>>,
) -> Option<(oneshot::Receiver<T>, oneshot::Sender<T>)> {
    let before = link.take()?;
    let (sender, receiver) = oneshot::channel();
    *link = Some(receiver);
    Some((before, sender))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

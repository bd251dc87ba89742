//! Restores a checkpoint into memory the caller owns, refusing anything that is not exactly what
//! was committed.
//!
//! The number of ranks that wrote it does not matter: tensors are found by name, wherever they
//! lie. Every byte of every shard is checked before [`Restore::read_all`] succeeds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use api::Rank;
use api::config::StoreSection;
use api::events::CheckpointFact;
use tokio::runtime::{Builder, Runtime};

use crate::error::StoreError;
use crate::format::{Dtype, TensorEntry};
use crate::manifest::{self, MANIFEST_BYTES_MAX, Manifest};
use crate::read::{PieceTarget, ReadError, ReadOptions, ReadStats, read};
use crate::reshard::ReshardError;
use crate::slice::Slice;
use crate::store::{Store, with_retries};

/// Why a checkpoint was not restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The store failed, an object is missing, or one is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The manifest is what was written and cannot be understood: another release wrote it.
    #[error(transparent)]
    Manifest(Box<StoreError>),
    /// The manifest is not the one that was recorded.
    #[error(
        "manifest `{key}` is not the one that was recorded: BLAKE3 {found}, expected {expected}"
    )]
    Digest {
        /// Its key.
        key: String,
        /// Digest of what lies there.
        found: String,
        /// Digest on record.
        expected: String,
    },
    /// The record describes another checkpoint than the manifest.
    #[error("checkpoint `{key}` is that of {found}, expected {expected}")]
    Other {
        /// The manifest's key.
        key: String,
        /// What it is.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// A tensor is wanted that the checkpoint lacks.
    #[error("checkpoint `{key}` lacks tensor `{name}`: was the model changed since?")]
    Missing {
        /// The manifest's key.
        key: String,
        /// The tensor.
        name: String,
    },
    /// The checkpoint holds a tensor that nothing wants.
    #[error(
        "checkpoint `{key}` holds tensor `{name}`, which this model lacks: was the model or the \
         optimiser changed since?"
    )]
    Extra {
        /// The manifest's key.
        key: String,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape.
    #[error(
        "tensor `{name}` in checkpoint `{key}` has shape {found:?}, expected {expected:?}: was the \
         model changed since?"
    )]
    Shape {
        /// The manifest's key.
        key: String,
        /// The tensor.
        name: String,
        /// Its shape in the checkpoint.
        found: Vec<u64>,
        /// Its shape in the model.
        expected: Vec<usize>,
    },
    /// The checkpoint does not hold the parts of tensors that are wanted.
    #[error("checkpoint `{key}`: {problem}: was the model changed since?")]
    Reshard {
        /// The manifest's key.
        key: String,
        /// What is missing or differs.
        problem: Box<ReshardError>,
    },
    /// The caller asks for the impossible.
    #[error("tensor `{name}` cannot be restored: {problem}")]
    Target {
        /// The tensor.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// No runtime could be started.
    #[error("restoring cannot start: {0}")]
    Runtime(String),
}

impl RestoreError {
    /// Whether the checkpoint itself is not what was written: damaged, or something of it is gone. An
    /// older one may be whole.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Digest { .. } | Self::Other { .. } => true,
            Self::Store(error) => matches!(
                error,
                StoreError::NotFound { .. }
                    | StoreError::Corrupt { .. }
                    | StoreError::TooLarge { .. }
            ),
            _ => false,
        }
    }

    /// Whether restoring again may succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Store(error) => error.is_retryable(),
            Self::Runtime(_) => true,
            _ => false,
        }
    }
}

/// Where one tensor is to be restored to.
#[derive(Debug)]
pub struct TensorTarget<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// Its shape, which must be the one saved.
    pub shape: &'a [usize],
    /// As many elements as the shape has, row-major.
    pub out: &'a mut [f32],
}

/// An opened checkpoint. Its methods block and must not be called from async code.
pub struct Restore {
    store: Store,
    manifest: Arc<Manifest>,
    key: String,
    /// Present until dropped.
    runtime: Option<Runtime>,
}

impl Restore {
    /// Reads a checkpoint's manifest and checks it against its record: digest, version, job, step
    /// and generation.
    pub fn open(
        section: &StoreSection,
        uri: &str,
        fact: &CheckpointFact,
    ) -> Result<Self, RestoreError> {
        Self::with_store(Store::open(section, uri)?, fact)
    }

    /// The same over a store that is open already.
    pub fn with_store(store: Store, fact: &CheckpointFact) -> Result<Self, RestoreError> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("restore")
            .enable_all()
            .build()
            .map_err(|error| RestoreError::Runtime(error.to_string()))?;
        let manifest = Arc::new(runtime.block_on(read_recorded(&store, fact))?);
        let key = fact.manifest_key.clone();
        Ok(Self { store, manifest, key, runtime: Some(runtime) })
    }

    /// What the checkpoint holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Fills every target, whose names and shapes must be exactly those of the checkpoint. After an
    /// error the targets' contents are worthless.
    pub fn read_all(&mut self, targets: &mut [TensorTarget<'_>]) -> Result<(), RestoreError> {
        let saved: HashMap<&str, &TensorEntry> =
            self.manifest.tensors().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut wanted = HashSet::new();
        for target in targets.iter() {
            self.check(target, saved.get(target.name).copied())?;
            if !wanted.insert(target.name) {
                let (name, problem) = (target.name.to_owned(), "it is asked for twice".to_owned());
                return Err(RestoreError::Target { name, problem });
            }
        }
        if let Some(extra) = self.manifest.tensors().find(|t| !wanted.contains(t.name.as_str())) {
            let (key, name) = (self.key.clone(), extra.name.clone());
            return Err(RestoreError::Extra { key, name });
        }
        let pieces = targets.iter_mut().filter_map(|target| {
            let shape = &saved.get(target.name)?.shape;
            let out = bytemuck::cast_slice_mut(&mut *target.out);
            let (name, slice) = (target.name, Slice::whole(shape));
            Some(PieceTarget { name, dtype: Dtype::F32, shape, slice, out })
        });
        let mut pieces: Vec<PieceTarget<'_>> = pieces.collect();
        self.read_pieces(&mut pieces, &ReadOptions::of(Rank(0)), true).map(drop)
    }

    /// Fills every target, which may be any parts of any tensors, whatever mesh wrote them, reading
    /// little more than is wanted. After an error the targets' contents are worthless.
    ///
    /// How much more is bounded by the options, where parts are large beside the tiles that
    /// checksums are over. Of a compressed shard it is always all.
    pub fn read(
        &mut self,
        targets: &mut [PieceTarget<'_>],
        options: &ReadOptions,
    ) -> Result<ReadStats, RestoreError> {
        self.read_pieces(targets, options, false)
    }

    fn read_pieces(
        &self,
        targets: &mut [PieceTarget<'_>],
        options: &ReadOptions,
        all: bool,
    ) -> Result<ReadStats, RestoreError> {
        for target in targets.iter() {
            let elements = target.slice.length.iter().try_fold(1u64, |p, l| p.checked_mul(*l));
            let bytes = elements.and_then(|elements| elements.checked_mul(target.dtype.bytes()));
            if bytes != Some(target.out.len() as u64) {
                let (slice, found, name) =
                    (&target.slice, target.out.len(), target.name.to_owned());
                let problem = format!("{found} bytes were given for {slice}");
                return Err(RestoreError::Target { name, problem });
            }
        }
        let runtime = self.runtime.as_ref().expect("the runtime is present until drop");
        let reading = read(&self.store, &self.manifest, targets, options, all);
        runtime.block_on(reading).map_err(|error| match error {
            ReadError::Store(error) => RestoreError::Store(error),
            ReadError::Reshard(problem) => {
                RestoreError::Reshard { key: self.key.clone(), problem: Box::new(problem) }
            }
        })
    }

    fn check(
        &self,
        target: &TensorTarget<'_>,
        saved: Option<&TensorEntry>,
    ) -> Result<(), RestoreError> {
        let name = target.name.to_owned();
        let product = target.shape.iter().try_fold(1usize, |p, extent| p.checked_mul(*extent));
        if product != Some(target.out.len()) {
            let (shape, elements) = (target.shape, target.out.len());
            let problem = format!("{elements} elements were given for shape {shape:?}");
            return Err(RestoreError::Target { name, problem });
        }
        let key = self.key.clone();
        let Some(found) = saved else {
            return Err(RestoreError::Missing { key, name });
        };
        if !found.shape.iter().copied().eq(target.shape.iter().map(|extent| *extent as u64)) {
            let (found, expected) = (found.shape.clone(), target.shape.to_vec());
            return Err(RestoreError::Shape { key, name, found, expected });
        }
        Ok(())
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Reads the manifest that a record names, and refuses another.
pub(crate) async fn read_recorded(
    store: &Store,
    fact: &CheckpointFact,
) -> Result<Manifest, RestoreError> {
    let key = fact.manifest_key.clone();
    let bytes = with_retries(|| store.get_bounded(&key, MANIFEST_BYTES_MAX)).await?;
    let found = manifest::digest(&bytes);
    if found != fact.manifest_digest {
        let expected = fact.manifest_digest.clone();
        return Err(RestoreError::Digest { key, found, expected });
    }
    let unread = |error| RestoreError::Manifest(Box::new(error));
    let manifest = Manifest::parse(&key, &bytes).map_err(unread)?;
    if (manifest.step, manifest.generation) != (fact.step, fact.generation) {
        let found = format!("{} of {}", manifest.step, manifest.generation);
        let expected = format!("{} of {}", fact.step, fact.generation);
        return Err(RestoreError::Other { key, found, expected });
    }
    Ok(manifest)
}

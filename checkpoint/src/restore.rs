//! Restores a checkpoint into memory the caller owns, refusing anything that is not exactly what
//! was committed.
//!
//! The number of ranks that wrote it does not matter: tensors are found by name, wherever they
//! lie. Every byte of every shard is checked before [`Restore::read_all`] succeeds.

use std::collections::HashMap;
use std::io;

use api::config::StoreSection;
use api::events::CheckpointFact;
use tokio::runtime::{Builder, Runtime};

use crate::decode::{TensorSink, read_shard};
use crate::error::StoreError;
use crate::format::TensorEntry;
use crate::manifest::{self, MANIFEST_BYTES_MAX, Manifest};
use crate::store::{Store, with_retries};

/// Why a checkpoint was not restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The store failed, an object is missing, or one is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
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
    manifest: Manifest,
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
        let manifest = runtime.block_on(read_recorded(&store, fact))?;
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
        let mut outs: HashMap<&str, &mut TensorTarget<'_>> = HashMap::new();
        for target in targets {
            self.check(target, saved.get(target.name).copied())?;
            let name = target.name;
            if outs.insert(name, target).is_some() {
                let (name, problem) = (name.to_owned(), "it is asked for twice".to_owned());
                return Err(RestoreError::Target { name, problem });
            }
        }
        if let Some(extra) = self.manifest.tensors().find(|t| !outs.contains_key(t.name.as_str())) {
            let (key, name) = (self.key.clone(), extra.name.clone());
            return Err(RestoreError::Extra { key, name });
        }
        let runtime = self.runtime.as_ref().expect("the runtime is present until drop");
        for shard in &self.manifest.shards {
            let outs = shard.tensors.iter().map(|tensor| {
                let target = outs.remove(tensor.name.as_str());
                target.map(|target| bytemuck::cast_slice_mut(&mut *target.out))
            });
            let mut sink = Outs(outs.collect());
            runtime.block_on(read_shard(&self.store, shard, &mut sink))?;
        }
        Ok(())
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
    let manifest = Manifest::parse(&key, &bytes)?;
    if (manifest.step, manifest.generation) != (fact.step, fact.generation) {
        let found = format!("{} of {}", manifest.step, manifest.generation);
        let expected = format!("{} of {}", fact.step, fact.generation);
        return Err(RestoreError::Other { key, found, expected });
    }
    Ok(manifest)
}

/// A shard's tensors, each where it is to go.
struct Outs<'a>(Vec<Option<&'a mut [u8]>>);

impl TensorSink for Outs<'_> {
    fn data(&mut self, tensor: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let out = self.0.get_mut(tensor).and_then(Option::as_deref_mut);
        let start = offset as usize;
        let place = out.and_then(|out| out.get_mut(start..start + bytes.len()));
        let place = place.ok_or_else(|| io::Error::other("a tensor has no place to go"))?;
        place.copy_from_slice(bytes);
        Ok(())
    }
}

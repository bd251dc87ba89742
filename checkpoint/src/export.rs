//! Writes a checkpoint's weights, and nothing else of it, to one safetensors file on this host.
//!
//! The file's bytes are a function of the weights alone: the same whatever number of ranks saved
//! the checkpoint, and the same as those of the finished model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use api::events::CheckpointFact;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::decode::{TensorSink, read_shard};
use crate::error::StoreError;
use crate::format::{self, TensorEntry};
use crate::restore::{RestoreError, read_recorded};
use crate::saver::hex;
use crate::store::Store;
use crate::tools::blocking;

/// Names of weights begin so in a checkpoint, and lose it in an export.
const WEIGHTS_PREFIX: &str = "model.";
/// Bytes hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// The file.
    pub path: PathBuf,
    /// SHA-256 of it, hex.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

/// Writes the weights of a recorded checkpoint to the file `to`, replacing it only when all is
/// read and checked.
pub async fn export(
    store: &Store,
    fact: &CheckpointFact,
    to: &Path,
) -> Result<ExportReport, RestoreError> {
    let (store, fact, to) = (store.clone(), fact.clone(), to.to_owned());
    let key = fact.manifest_key.clone();
    blocking(&key, async move { Ok(export_here(&store, &fact, &to).await) }).await?
}

async fn export_here(
    store: &Store,
    fact: &CheckpointFact,
    to: &Path,
) -> Result<ExportReport, RestoreError> {
    let manifest = read_recorded(store, fact).await?;
    let weights: BTreeMap<&str, &TensorEntry> = manifest
        .tensors()
        .filter_map(|tensor| Some((tensor.name.strip_prefix(WEIGHTS_PREFIX)?, tensor)))
        .collect();
    if weights.is_empty() {
        let (key, name) = (fact.manifest_key.clone(), format!("{WEIGHTS_PREFIX}…"));
        return Err(RestoreError::Missing { key, name });
    }
    let tensors = weights.iter().map(|(name, tensor)| (*name, tensor.shape.clone()));
    let (header, entries) = format::layout(tensors).map_err(|error| RestoreError::Target {
        name: fact.manifest_key.clone(),
        problem: error.to_string(),
    })?;
    let places: BTreeMap<&str, u64> =
        entries.iter().map(|entry| (entry.name.as_str(), entry.offset)).collect();

    let failed = |error: io::Error| StoreError::host(to, &error);
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(failed)?;
    let staged = tempfile::Builder::new().prefix(".export-").tempfile_in(parent).map_err(failed)?;
    staged.as_file().write_all_at(&header, 0).map_err(failed)?;
    for shard in &manifest.shards {
        let place =
            |tensor: &TensorEntry| places.get(tensor.name.strip_prefix(WEIGHTS_PREFIX)?).copied();
        let places = shard.tensors.iter().map(place).collect();
        let mut sink = FileSink { file: staged.as_file(), places };
        read_shard(store, shard, &mut sink).await?;
    }
    let (sha256, bytes) = hash(staged.as_file()).map_err(failed)?;
    make_readable(staged.as_file()).map_err(failed)?;
    staged.as_file().sync_all().map_err(failed)?;
    staged.persist(to).map_err(|error| failed(error.error))?;
    Ok(ExportReport { path: to.to_owned(), sha256, bytes })
}

/// Temporary files are private; what is exported is an ordinary file.
fn make_readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

fn hash(mut file: &File) -> io::Result<(String, u64)> {
    file.rewind()?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut chunk)?;
        if read == 0 {
            return Ok((hex(&hasher.finalize()), bytes));
        }
        hasher.update(&chunk[..read]);
        bytes += read as u64;
    }
}

/// A shard's tensors, each at its place in the file or nowhere.
struct FileSink<'a> {
    file: &'a File,
    places: Vec<Option<u64>>,
}

impl TensorSink for FileSink<'_> {
    fn data(&mut self, tensor: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self.places.get(tensor).copied().flatten() {
            Some(place) => self.file.write_all_at(bytes, place + offset),
            None => Ok(()),
        }
    }
}

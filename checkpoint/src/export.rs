//! Writes a checkpoint's weights, and nothing else of it, to one safetensors file on this host.
//!
//! The file's bytes are a function of the weights alone: the same whatever number of ranks saved
//! the checkpoint, and the same as those of the finished model.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use api::Rank;
use api::events::CheckpointFact;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::decode::read_shard;
use crate::error::StoreError;
use crate::format::{self, TensorEntry};
use crate::read::Scatter;
use crate::reshard::{self, Source, Want};
use crate::restore::{RestoreError, read_recorded};
use crate::saver::hex;
use crate::slice::Slice;
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

/// Writes the weights of a recorded checkpoint to the file `to`, in a folder that is there, replacing
/// it only when all is read and checked.
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
    let weights: Vec<&TensorEntry> =
        manifest.tensors().filter(|tensor| tensor.name.starts_with(WEIGHTS_PREFIX)).collect();
    if weights.is_empty() {
        let (key, name) = (fact.manifest_key.clone(), format!("{WEIGHTS_PREFIX}…"));
        return Err(RestoreError::Missing { key, name });
    }
    let wrong = |problem: String| {
        let name = fact.manifest_key.clone();
        RestoreError::Target { name, problem }
    };
    let tensors = weights.iter().map(|tensor| {
        let name = tensor.name.strip_prefix(WEIGHTS_PREFIX).unwrap_or(&tensor.name);
        TensorEntry::new(name, tensor.dtype, &tensor.shape, None)
    });
    let (header, entries) =
        format::layout(tensors.collect()).map_err(|error| wrong(error.to_string()))?;
    let wants: Vec<Want> = weights.iter().map(|tensor| want(tensor)).collect();
    let shards = manifest.objects();
    let sources = reshard::sources(&shards, &wants, Rank(0));
    let mut sources = sources.map_err(|error| wrong(error.to_string()))?;

    let failed = |error: io::Error| StoreError::host(to, &error);
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let staged = tempfile::Builder::new().prefix(".export-").tempfile_in(parent).map_err(failed)?;
    staged.as_file().write_all_at(&header, 0).map_err(failed)?;
    // Every shard, also those without weights: what is exported is part of a whole checkpoint.
    for (index, shard) in shards.iter().enumerate() {
        let (here, rest): (Vec<_>, Vec<_>) = sources.into_iter().partition(|s| s.shard == index);
        sources = rest;
        let write = |want: usize, at: u64, bytes: &[u8]| {
            staged.as_file().write_all_at(bytes, entries[want].offset + at)
        };
        let place = |source: &Source| wants[source.want].slice.clone();
        read_shard(store, shard, &mut Scatter::new(shard, &here, place, write)).await?;
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

/// All of a tensor.
fn want(tensor: &TensorEntry) -> Want {
    Want {
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        slice: Slice::whole(&tensor.shape),
    }
}

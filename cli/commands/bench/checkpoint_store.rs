//! How fast a state is written to a store and read back, beside the same bytes written and read plainly.
//!
//! Written: from the first byte copied out of the state until the manifest is there. The plain way is one
//! file, synced, or one object, in parts as tools that copy files make it. Read: into memory that is there
//! already, after the operating system was asked to forget the files; the plain way reads the same file
//! without looking at it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use api::config::StoreSection;
use api::events::CheckpointFact;
use api::job::Compression;
use api::{Generation, Name, Rank, Step};
use chaos::Random;
use checkpoint::{
    ManifestInfo, Place, References, Restore, Saver, SaverOptions, Store, TensorSlice,
    TensorTarget, copy_to_store, delete_checkpoint,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use tokio::runtime::Handle;

use crate::error::{CliError, Result};

/// Whose checkpoints they are.
const JOB: &str = "bench-checkpoint";
/// Tensors of the state, all of one size: models have tens to hundreds.
const TENSORS: usize = 36;
/// Bytes of one plain read or write.
const BLOCK_BYTES: usize = 1 << 20;

/// One round. Times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct StoreSample {
    /// Copying the state, for which training stands still.
    pub staged: f64,
    /// From the copy's begin to the written manifest.
    pub written: f64,
    /// The same bytes written plainly.
    pub written_plainly: f64,
    /// Restoring.
    pub read: f64,
    /// The same bytes read plainly.
    pub read_plainly: f64,
}

impl StoreSample {
    /// Speed of writing as a part of a plain write's.
    pub fn write_ratio(&self) -> f64 {
        self.written_plainly / self.written
    }

    /// Time of reading over a plain read's.
    pub fn read_ratio(&self) -> f64 {
        self.read / self.read_plainly
    }
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::internal(error.to_string())
}

/// A state in memory, and where it is written to.
struct Bench {
    uri: String,
    section: StoreSection,
    store: Store,
    job: Name,
    names: Vec<String>,
    values: Vec<Vec<f32>>,
}

/// Writes and reads a state of about `bytes`, `rounds` times. Blocks; the second way is the first one in
/// every other round.
pub fn measure(
    section: StoreSection,
    bytes: u64,
    rounds: usize,
    mut tell: impl FnMut(usize, &StoreSample),
) -> Result<Vec<StoreSample>> {
    let uri = section.uri.clone();
    let store = Store::open(&section, &uri)?;
    let mut random = Random::new(1);
    let elements = (bytes as usize / size_of::<f32>()).div_ceil(TENSORS).max(1);
    let names = (0..TENSORS).map(|number| format!("tensor.{number:02}")).collect();
    // Values that no compressor and no hash finds twice.
    let values =
        (0..TENSORS).map(|_| (0..elements).map(|_| random.fraction() as f32).collect()).collect();
    let bench = Bench { uri, section, store, job: JOB.parse()?, names, values };
    let mut samples = Vec::new();
    // The first round provides memory and files, and is not counted.
    for round in 0..=rounds {
        let sample = bench.round(round)?;
        if round > 0 {
            tell(round, &sample);
            samples.push(sample);
        }
    }
    Ok(samples)
}

impl Bench {
    fn round(&self, round: usize) -> Result<StoreSample> {
        let plain = Plain::new(&self.store, &self.job);
        let mut written_plainly = 0.0;
        if round % 2 == 1 {
            written_plainly = plain.write(&self.values)?;
        }
        let (fact, staged, written) = self.save(round)?;
        if round.is_multiple_of(2) {
            written_plainly = plain.write(&self.values)?;
        }
        let shard = self.shard(&fact)?;
        let mut read_plainly = 0.0;
        let mut buffer = vec![1; self.values.len() * self.values[0].len() * size_of::<f32>()];
        if round % 2 == 1 {
            read_plainly = plain.read(&shard, &mut buffer)?;
        }
        let read = self.restore(&fact, &shard)?;
        if round.is_multiple_of(2) {
            read_plainly = plain.read(&shard, &mut buffer)?;
        }
        plain.remove()?;
        Handle::current().block_on(delete_checkpoint(
            &self.store,
            &fact.manifest_key,
            &References::default(),
        ))?;
        Ok(StoreSample { staged, written, written_plainly, read, read_plainly })
    }

    fn save(&self, round: usize) -> Result<(CheckpointFact, f64, f64)> {
        let options = SaverOptions {
            job: self.job.clone(),
            generation: Generation(1),
            rank: Rank(0),
            world_size: 1,
            compression: Compression::None,
            incremental: false,
        };
        let mut saver = Saver::with_store(self.store.clone(), options).map_err(failed)?;
        let shape = [self.values[0].len()];
        let tensors: Vec<TensorSlice<'_>> = self
            .names
            .iter()
            .zip(&self.values)
            .map(|(name, data)| TensorSlice { name, shape: &shape, data })
            .collect();
        let (warm, step) = (Step(2 * round as u64 + 1), Step(2 * round as u64 + 2));
        // Provides the memory, as a job does behind its first steps; never committed.
        saver.stage(warm, &tensors).map_err(failed)?;
        let unused = saver.wait_shard(warm).map_err(failed)?;
        Handle::current().block_on(self.store.delete(&unused.key))?;
        let begun = Instant::now();
        saver.stage(step, &tensors).map_err(failed)?;
        let staged = begun.elapsed().as_secs_f64();
        let shard = saver.wait_shard(step).map_err(failed)?;
        let info = ManifestInfo {
            fingerprint: "bench".into(),
            data_digest: "bench".into(),
            spec_digest: "bench".into(),
            lanes: 1,
            metrics: Default::default(),
            samples: None,
        };
        saver.commit(step, vec![shard], info);
        let fact = saver.wait_committed(step).map_err(failed)?;
        let written = begun.elapsed().as_secs_f64();
        saver.finish().map_err(failed)?;
        Ok((fact, staged, written))
    }

    fn shard(&self, fact: &CheckpointFact) -> Result<String> {
        let restore = Restore::open(&self.section, &self.uri, fact).map_err(failed)?;
        Ok(restore.manifest().shards[0].key.clone())
    }

    fn restore(&self, fact: &CheckpointFact, shard: &str) -> Result<f64> {
        let mut values: Vec<Vec<f32>> = vec![vec![1.0; self.values[0].len()]; self.values.len()];
        let shape = [self.values[0].len()];
        forget(&self.store, shard)?;
        let begun = Instant::now();
        let mut restore = Restore::open(&self.section, &self.uri, fact).map_err(failed)?;
        let mut targets: Vec<TensorTarget<'_>> = self
            .names
            .iter()
            .zip(&mut values)
            .map(|(name, out)| TensorTarget { name, shape: &shape, out })
            .collect();
        restore.read_all(&mut targets).map_err(failed)?;
        let taken = begun.elapsed().as_secs_f64();
        if values != self.values {
            return Err(CliError::internal("the state that was read is not the one written"));
        }
        Ok(taken)
    }
}

/// The file of a key, where the store is a folder.
fn file_of(store: &Store, key: &str) -> Option<PathBuf> {
    match store.place() {
        Place::Folder(folder) => Some(folder.join(key)),
        _ => None,
    }
}

/// Has the operating system drop what it remembers of an object's file.
fn forget(store: &Store, key: &str) -> Result<()> {
    let Some(path) = file_of(store, key) else { return Ok(()) };
    let file = File::open(&path).map_err(|error| at(&path, &error))?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(failed)
}

fn at(path: &Path, error: &std::io::Error) -> CliError {
    CliError::internal(format!("`{}`: {error}", path.display()))
}

/// Bytes written and read with nothing else done to them.
struct Plain<'a> {
    store: &'a Store,
    key: String,
}

impl<'a> Plain<'a> {
    fn new(store: &'a Store, job: &Name) -> Self {
        Self { store, key: format!("jobs/{job}/plain") }
    }

    fn write(&self, values: &[Vec<f32>]) -> Result<f64> {
        let mut bytes = Vec::with_capacity(values.len() * values[0].len() * size_of::<f32>());
        for value in values.iter().flatten() {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let Some(path) = file_of(self.store, &self.key) else {
            let begun = Instant::now();
            Handle::current().block_on(copy_to_store(self.store, &self.key, bytes.into()))?;
            return Ok(begun.elapsed().as_secs_f64());
        };
        let in_folder = || {
            let _ = std::fs::remove_file(&path);
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            let begun = Instant::now();
            let mut file = File::create(&path)?;
            for block in bytes.chunks(BLOCK_BYTES) {
                file.write_all(block)?;
            }
            file.sync_all()?;
            Ok(begun.elapsed().as_secs_f64())
        };
        in_folder().map_err(|error| at(&path, &error))
    }

    fn read(&self, shard: &str, buffer: &mut [u8]) -> Result<f64> {
        let Some(path) = file_of(self.store, shard) else {
            let begun = Instant::now();
            Handle::current().block_on(self.store.get(shard))?;
            return Ok(begun.elapsed().as_secs_f64());
        };
        forget(self.store, shard)?;
        let begun = Instant::now();
        let mut file = File::open(&path).map_err(|error| at(&path, &error))?;
        for block in buffer.chunks_mut(BLOCK_BYTES) {
            file.read_exact(block).map_err(|error| at(&path, &error))?;
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    fn remove(&self) -> Result<()> {
        Ok(Handle::current().block_on(self.store.delete(&self.key))?)
    }
}

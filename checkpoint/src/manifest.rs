//! The manifest: what a complete checkpoint consists of, and how to know that it is whole.
//!
//! It is the last object of a checkpoint to be written, only if absent, and never changed. The
//! digest of its bytes is what the leader records, so the record vouches for every byte of every
//! shard. [`Manifest::parse`] yields only manifests that agree with themselves; what the shards
//! really hold is checked by whoever reads them.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use api::job::Compression;
use api::samples::SampleTally;
use api::{Generation, Name, Rank, Step};
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::format::{self, TensorEntry};
use crate::{keys, reshard};

/// The newest version: 3, in which tensors may lie in shards of former checkpoints.
pub const MANIFEST_VERSION: u32 = 3;
/// Written where no former shard is referred to, since the release before reads it: a shard may hold
/// parts of tensors and checksums of parts. In version 1, which is read too, every tensor is whole
/// and every shard is read whole.
const MANIFEST_VERSION_ALONE: u32 = 2;
/// The oldest version that is read.
const MANIFEST_VERSION_MIN: u32 = 1;
/// Largest manifest: about half a million tensors; a larger object is no manifest of ours.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Largest uncompressed shard: well beyond a host's memory.
const SHARD_BYTES_MAX: u64 = 1 << 42;
/// Most ranks in a gang.
const WORLD_SIZE_MAX: u32 = 1 << 16;

/// One rank's part of a checkpoint, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// The rank that wrote it.
    pub rank: Rank,
    /// Its key in the store.
    pub key: String,
    /// Bytes of the safetensors file, uncompressed.
    pub bytes: u64,
    /// Bytes of the object in the store.
    pub stored_bytes: u64,
    /// BLAKE3 of the object in the store, hex.
    pub blake3: String,
    /// How the object is compressed.
    pub compression: Compression,
    /// The tensors inside, whole or in part, in the file's order.
    pub tensors: Vec<TensorEntry>,
    /// Which of them count, by their place in that order; all when absent. Only of a former shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Vec<u32>>,
    /// Shards of former checkpoints that hold what this rank had no need to write again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<ShardEntry>,
}

/// What a job knows about a checkpoint beyond its tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ManifestInfo {
    /// Numeric fingerprint of the ranks that computed the state.
    pub fingerprint: String,
    /// Digest of the training data.
    pub data_digest: String,
    /// Digest of the parts of the job's spec that the state depends on.
    pub spec_digest: String,
    /// Lanes of the global batch.
    pub lanes: u32,
    /// Metrics at this step; those that are not finite are left out (JSON has none).
    pub metrics: BTreeMap<String, f64>,
    /// Which samples the state was trained on, where it is known.
    pub samples: Option<SampleTally>,
}

/// A checkpoint's table of contents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of this document.
    pub version: u32,
    /// Whose state it is.
    pub job: Name,
    /// Steps applied.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Ranks that wrote it; any number may restore it.
    pub world_size: u32,
    /// Lanes of the global batch.
    pub lanes: u32,
    /// Numeric fingerprint of the ranks that computed the state.
    pub fingerprint: String,
    /// Digest of the training data.
    pub data_digest: String,
    /// Digest of the parts of the job's spec that the state depends on.
    pub spec_digest: String,
    /// Metrics at this step.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// Which samples the state was trained on; older checkpoints do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleTally>,
    /// Unique to the writer: tells a retried own write from somebody else's.
    pub writer: String,
    /// One per rank, in rank order.
    pub shards: Vec<ShardEntry>,
}

impl Manifest {
    /// Its key.
    pub fn key(&self) -> String {
        keys::manifest(&self.job, self.step, self.generation)
    }

    /// Bytes of the shards that were written for it.
    pub fn stored_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.stored_bytes).sum()
    }

    /// Every object that its tensors lie in, each once: its own shards by rank, then former ones by
    /// key.
    pub fn objects(&self) -> Vec<ShardEntry> {
        let mut former: BTreeMap<&str, ShardEntry> = BTreeMap::new();
        for shard in self.shards.iter().flat_map(|shard| &shard.former) {
            let merged = former.entry(&shard.key).or_insert_with(|| shard.clone());
            let both = merged.used.iter().chain(&shard.used).flatten().copied();
            merged.used = Some(both.collect::<BTreeSet<u32>>().into_iter().collect());
        }
        let own = |shard: &ShardEntry| ShardEntry { former: Vec::new(), ..shard.clone() };
        self.shards.iter().map(own).chain(former.into_values()).collect()
    }

    /// Keys of the former shards that it refers to.
    pub fn references(&self) -> BTreeSet<&str> {
        let former = self.shards.iter().flat_map(|shard| &shard.former);
        former.map(|shard| shard.key.as_str()).collect()
    }

    /// The version that says no more than is needed to read it.
    pub(crate) fn version_of(shards: &[ShardEntry]) -> u32 {
        match shards.iter().all(|shard| shard.former.is_empty()) {
            true => MANIFEST_VERSION_ALONE,
            false => MANIFEST_VERSION,
        }
    }

    /// Every tensor by name, each once: as the first of its pieces says.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        let former = self.shards.iter().flat_map(|shard| &shard.former);
        let pieces = self.shards.iter().chain(former).flat_map(ShardEntry::used_tensors);
        let mut tensors: BTreeMap<&str, &TensorEntry> = BTreeMap::new();
        for (_, piece) in pieces {
            tensors.entry(piece.name.as_str()).or_insert(piece);
        }
        tensors.into_values()
    }

    /// Reads a manifest's bytes as they lie under `key`; refuses one that contradicts itself or
    /// its key.
    pub(crate) fn parse(key: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        let corrupt = |problem| StoreError::Corrupt { key: key.to_owned(), problem };
        check_version(key, bytes)?;
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| corrupt(format!("it is not a manifest: {error}")))?;
        if manifest.key() != key {
            let own = manifest.key();
            return Err(corrupt(format!("it describes `{own}`: the object was moved or copied")));
        }
        manifest.validate().map_err(corrupt)?;
        Ok(manifest)
    }

    /// The document's bytes.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            let length = bytes.len();
            return Err(format!("it has {length} bytes, expected at most {MANIFEST_BYTES_MAX}"));
        }
        Ok(bytes)
    }

    /// Checks every rule that needs only the document.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let world_size = self.world_size;
        if world_size == 0 || world_size > WORLD_SIZE_MAX {
            return Err(format!("world size {world_size} is not within 1 to {WORLD_SIZE_MAX}"));
        }
        if self.shards.len() != world_size as usize {
            let found = self.shards.len();
            return Err(format!("it names {found} shards for a world size of {world_size}"));
        }
        let folder = keys::checkpoint(&self.job, self.step, self.generation);
        let mut keys = HashSet::new();
        for (rank, shard) in self.shards.iter().enumerate() {
            if shard.rank != Rank(rank as u32) {
                return Err(format!("its shard {rank} is that of {}", shard.rank));
            }
            shard
                .validate(&folder)
                .map_err(|problem| format!("shard of {} `{}`: {problem}", shard.rank, shard.key))?;
            if !keys.insert(shard.key.as_str()) {
                return Err(format!("`{}` is the key of two shards", shard.key));
            }
        }
        self.validate_former()?;
        reshard::check_whole(&self.objects()).map_err(|error| error.to_string())
    }

    /// Former shards are older, of this job, and described alike by all who refer to them.
    fn validate_former(&self) -> Result<(), String> {
        let mut known: BTreeMap<&str, &ShardEntry> = BTreeMap::new();
        for former in self.shards.iter().flat_map(|shard| &shard.former) {
            let wrong = |problem| Err(format!("former shard `{}`: {problem}", former.key));
            match keys::parse_object(&self.job, &former.key) {
                Some((step, ..)) if step < self.step => {}
                Some((step, ..)) => {
                    return wrong(format!("it is of step {}, not before {}", step.0, self.step.0));
                }
                None => return wrong(format!("it is no shard of a checkpoint of `{}`", self.job)),
            }
            let used = former.used.as_deref().unwrap_or_default();
            let is_within = |index: &u32| (*index as usize) < former.tensors.len();
            if !used.is_sorted_by(|a, b| a < b) || !used.iter().all(is_within) {
                return wrong(format!("{used:?} are not tensors of it in ascending order"));
            }
            if former.used.is_none() || !former.former.is_empty() {
                return wrong("what is used of it is not said, or it refers further".into());
            }
            former.validate_content().or_else(wrong)?;
            let other = known.entry(&former.key).or_insert(former);
            if !other.is_same_object(former) {
                return wrong("two ranks describe it differently".into());
            }
        }
        Ok(())
    }
}

/// Read first, so that another version is not called damaged.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Whether these bytes are a manifest's; an error when they are, of a version that is not known.
pub(crate) fn check_version(key: &str, bytes: &[u8]) -> Result<bool, StoreError> {
    let Ok(Version { version }) = serde_json::from_slice(bytes) else { return Ok(false) };
    if (MANIFEST_VERSION_MIN..=MANIFEST_VERSION).contains(&version) {
        return Ok(true);
    }
    let problem = format!(
        "it has version {version}, expected at most {MANIFEST_VERSION}: it was written by another \
         release of Cohort, use that one"
    );
    Err(StoreError::Corrupt { key: key.to_owned(), problem })
}

impl ShardEntry {
    /// The tensors that count, with their index in `tensors`.
    pub(crate) fn used_tensors(&self) -> impl Iterator<Item = (usize, &TensorEntry)> {
        let is_used = |index: usize| match &self.used {
            Some(used) => used.binary_search(&(index as u32)).is_ok(),
            None => true,
        };
        self.tensors.iter().enumerate().filter(move |(index, _)| is_used(*index))
    }

    /// Whether both are the same bytes in the store, whatever is used of them.
    fn is_same_object(&self, other: &Self) -> bool {
        let bare =
            |entry: &Self| Self { used: None, former: Vec::new(), rank: Rank(0), ..entry.clone() };
        bare(self) == bare(other)
    }

    /// The bytes before the first tensor, as the entries imply them.
    pub(crate) fn header(&self) -> Result<Vec<u8>, String> {
        let entries = self.tensors.clone();
        let (header, entries) = format::layout(entries).map_err(|error| error.to_string())?;
        if entries != self.tensors {
            return Err("its tensors do not lie one after another".into());
        }
        Ok(header)
    }

    fn validate(&self, folder: &str) -> Result<(), String> {
        let file = self.key.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
        if file.is_none_or(|file| file.is_empty() || file.contains('/')) {
            return Err(format!("it does not lie in `{folder}`"));
        }
        if self.used.is_some() {
            return Err("it is not used as a whole, but no former one".into());
        }
        self.validate_content()
    }

    fn validate_content(&self) -> Result<(), String> {
        if self.bytes > SHARD_BYTES_MAX || self.stored_bytes > stored_bytes_max(self.bytes) {
            let (raw, stored) = (self.bytes, self.stored_bytes);
            return Err(format!("{raw} bytes, {stored} stored: more than can be"));
        }
        if self.compression == Compression::None && self.bytes != self.stored_bytes {
            return Err(format!("{} bytes, {} stored uncompressed", self.bytes, self.stored_bytes));
        }
        let hashes = self.tensors.iter().filter_map(|tensor| tensor.blake3.as_ref());
        if !hashes.chain([&self.blake3]).all(|hash| is_hash(hash)) {
            return Err("a checksum of it is not 64 hexadecimal digits".into());
        }
        let header = self.header()?.len() as u64;
        let tensors = self.tensors.last().map_or(header, |last| last.offset + last.bytes);
        let end = tensors + self.tensors.iter().map(TensorEntry::check_bytes).sum::<u64>();
        if end != self.bytes {
            return Err(format!("its tensors end at byte {end} of {}", self.bytes));
        }
        Ok(())
    }
}

fn is_hash(hash: &str) -> bool {
    hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Longest compressed form of so many bytes: zstd's own bound (`ZSTD_compressBound`), rounded up.
pub(crate) fn stored_bytes_max(raw: u64) -> u64 {
    raw.saturating_add(raw >> 8).saturating_add(1 << 10)
}

/// BLAKE3 in hex.
pub(crate) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

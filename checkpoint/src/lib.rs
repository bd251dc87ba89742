//! Checkpoints and the object store they lie in: safetensors shards, a manifest written last, to a
//! folder or to S3.
//!
//! It knows tensors only as names, shapes and bytes, and decides nothing about when to save, what
//! to resume from or what to delete. Its invariant: a reader never sees half a checkpoint, because
//! a manifest is written after every shard it names, only if absent, and never changed.
//!
//! Tensors may be stored in parts and read in others: a part is a [`Slice`], `reshard` finds who has
//! what, `fetch` plans which bytes to read, `tiles` is how any range of them is checked.
//!
//! [`Store`] and the functions in `tools` are asynchronous (coordinator, worker, command line);
//! [`Saver`] and [`Restore`] block and own their runtime (a rank's step loop).

#![deny(unsafe_code)]

mod ahead;
mod crc;
mod decode;
mod diff;
mod direct;
mod download;
mod error;
mod export;
mod fetch;
mod format;
mod former;
pub mod keys;
mod local;
mod manifest;
mod nonce;
mod plan;
mod priority;
mod probe;
mod read;
mod references;
mod reshard;
mod restore;
mod s3;
mod saver;
mod sealed_store;
mod sealing;
mod slice;
mod staging;
mod store;
mod store_key;
mod tiles;
mod tools;
mod upload;
mod write;

pub use diff::{DiffReport, Difference, TensorDiff, diff};
pub use error::{Place, StoreError};
pub use export::{ExportReport, export};
pub use format::{
    Checks, Dtype, FormatError, TensorEntry, TensorPiece, TensorSlice, safetensors_bytes,
};
pub use manifest::{MANIFEST_VERSION, Manifest, ManifestInfo, ShardEntry};
pub use plan::{HeldTensor, share_replicas, share_tensors};
pub use read::{PieceTarget, ReadOptions, ReadStats};
pub use references::{References, Stays, delete_orphans, find_orphans};
pub use reshard::ReshardError;
pub use restore::{Restore, RestoreError, TensorTarget};
pub use saver::{SaveError, Saver, SaverOptions};
pub use sealing::is_encrypted;
pub use slice::{Runs, Slice};
pub use store::{ObjectInfo, Store};
pub use store_key::StoreKey;
pub use tools::{
    StoredCheckpoint, VerifyReport, delete_checkpoint, find_complete, list_checkpoints, verify,
};
pub use upload::copy_to_store;

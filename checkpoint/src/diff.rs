//! What differs between two checkpoints, tensor by tensor.
//!
//! Two tensors are in memory at a time. Of a compressed shard every tensor costs a read of all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::Rank;
use api::events::CheckpointFact;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::format::{Dtype, TensorEntry};
use crate::manifest::Manifest;
use crate::read::{PieceTarget, ReadError, ReadOptions, read};
use crate::restore::{RestoreError, read_recorded};
use crate::slice::Slice;
use crate::store::Store;
use crate::tools::blocking;

/// How two checkpoints differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiffReport {
    /// Tensors that are the same, byte for byte.
    pub same: u64,
    /// The others, by name.
    pub differing: Vec<TensorDiff>,
}

/// How one tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// In what.
    #[serde(flatten)]
    pub difference: Difference,
}

/// In what a tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "difference", rename_all = "kebab-case")]
pub enum Difference {
    /// The second checkpoint lacks it.
    OnlyFirst,
    /// The first checkpoint lacks it.
    OnlySecond,
    /// Its type or shape.
    Kind {
        /// Such as `F32 [2, 3]`.
        first: String,
        /// The same of the second.
        second: String,
    },
    /// Its values.
    Values {
        /// Elements of the tensor.
        elements: u64,
        /// Those of which the bytes differ.
        differing: u64,
        /// The largest difference of two numbers; absent where one that differs is no number.
        #[serde(skip_serializing_if = "Option::is_none")]
        largest: Option<f64>,
    },
}

/// Compares two recorded checkpoints; every byte that is compared is checked first.
///
/// # Errors
/// As for a restore: the store failed, or a checkpoint is not whole.
pub async fn diff(
    store: &Store,
    first: &CheckpointFact,
    second: &CheckpointFact,
) -> Result<DiffReport, RestoreError> {
    let (store, first, second) = (store.clone(), first.clone(), second.clone());
    let key = first.manifest_key.clone();
    blocking(&key, async move { Ok(compare(&store, &first, &second).await) }).await?
}

async fn compare(
    store: &Store,
    first: &CheckpointFact,
    second: &CheckpointFact,
) -> Result<DiffReport, RestoreError> {
    let (first, second) = (Side::open(store, first).await?, Side::open(store, second).await?);
    let (ones, twos) = (first.tensors(), second.tensors());
    let names: BTreeSet<&str> = ones.keys().chain(twos.keys()).copied().collect();
    let mut report = DiffReport::default();
    for name in names {
        let difference = match (ones.get(name), twos.get(name)) {
            (Some(_), None) => Some(Difference::OnlyFirst),
            (None, _) => Some(Difference::OnlySecond),
            (Some(one), Some(two)) if (one.dtype, &one.shape) != (two.dtype, &two.shape) => {
                let kind = |tensor: &TensorEntry| format!("{:?} {:?}", tensor.dtype, tensor.shape);
                Some(Difference::Kind { first: kind(one), second: kind(two) })
            }
            (Some(one), Some(two)) => {
                let (a, b) = (first.read(store, one).await?, second.read(store, two).await?);
                values(one.dtype, &a, &b)
            }
        };
        match difference {
            Some(difference) => {
                report.differing.push(TensorDiff { name: name.to_owned(), difference });
            }
            None => report.same += 1,
        }
    }
    Ok(report)
}

struct Side {
    manifest: Arc<Manifest>,
    key: String,
}

impl Side {
    async fn open(store: &Store, fact: &CheckpointFact) -> Result<Self, RestoreError> {
        let manifest = Arc::new(read_recorded(store, fact).await?);
        Ok(Self { manifest, key: fact.manifest_key.clone() })
    }

    fn tensors(&self) -> BTreeMap<&str, &TensorEntry> {
        self.manifest.tensors().map(|tensor| (tensor.name.as_str(), tensor)).collect()
    }

    async fn read(&self, store: &Store, tensor: &TensorEntry) -> Result<Vec<u8>, RestoreError> {
        let slice = Slice::whole(&tensor.shape);
        let bytes = slice.elements() * tensor.dtype.bytes();
        let too_large = || StoreError::Host {
            path: self.key.clone(),
            problem: format!("`{}` has {bytes} bytes, too many for this host", tensor.name),
        };
        let mut out = vec![0; usize::try_from(bytes).map_err(|_| too_large())?];
        let (name, dtype, shape) = (tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice());
        let mut targets = [PieceTarget { name, dtype, shape, slice, out: &mut out }];
        let options = ReadOptions::of(Rank(0));
        read(store, &self.manifest, &mut targets, &options, false).await.map_err(|error| {
            match error {
                ReadError::Store(error) => RestoreError::Store(error),
                ReadError::Reshard(problem) => {
                    RestoreError::Reshard { key: self.key.clone(), problem: Box::new(problem) }
                }
            }
        })?;
        Ok(out)
    }
}

/// How values of one type differ; none if they are the same.
fn values(dtype: Dtype, one: &[u8], two: &[u8]) -> Option<Difference> {
    if one == two {
        return None;
    }
    let size = dtype.bytes() as usize;
    let (mut differing, mut largest) = (0, Some(0.0f64));
    for (a, b) in one.chunks_exact(size).zip(two.chunks_exact(size)) {
        if a != b {
            differing += 1;
            let distance = (number(dtype, a) - number(dtype, b)).abs();
            largest = largest.filter(|_| distance.is_finite()).map(|known| known.max(distance));
        }
    }
    Some(Difference::Values { elements: (one.len() / size) as u64, differing, largest })
}

/// An element as a number; not exact for large integers.
fn number(dtype: Dtype, bytes: &[u8]) -> f64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    let word = u64::from_le_bytes(word);
    match dtype {
        Dtype::F64 => f64::from_bits(word),
        Dtype::F32 => f32::from_bits(word as u32).into(),
        Dtype::F16 => f16::from_bits(word as u16).into(),
        Dtype::BF16 => bf16::from_bits(word as u16).into(),
        Dtype::I64 => word as i64 as f64,
        Dtype::I32 => (word as u32 as i32).into(),
        Dtype::U8 => word as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_their_bytes_and_by_how_much() {
        let found = |dtype, one: &[u8], two: &[u8]| match values(dtype, one, two) {
            Some(Difference::Values { elements, differing, largest }) => {
                Some((elements, differing, largest))
            }
            _ => None,
        };
        let floats = |values: [f32; 3]| values.map(f32::to_le_bytes).concat();
        let (one, two) = (floats([1.0, -0.0, 3.0]), floats([1.0, 0.0, 5.5]));
        assert_eq!(found(Dtype::F32, &one, &one), None);
        assert_eq!(found(Dtype::F32, &one, &two), Some((3, 2, Some(2.5))));
        let nan = floats([1.0, f32::NAN, 3.0]);
        assert_eq!(found(Dtype::F32, &one, &nan), Some((3, 1, None)));
        let half = |value: f32| f16::from_f32(value).to_le_bytes();
        assert_eq!(found(Dtype::F16, &half(1.5), &half(1.0)), Some((1, 1, Some(0.5))));
        let brain = |value: f32| bf16::from_f32(value).to_le_bytes();
        assert_eq!(found(Dtype::BF16, &brain(-2.0), &brain(2.0)), Some((1, 1, Some(4.0))));
        let (low, high) = ((-7i32).to_le_bytes(), 1i32.to_le_bytes());
        assert_eq!(found(Dtype::I32, &low, &high), Some((1, 1, Some(8.0))));
        let (low, high) = ((-7i64).to_le_bytes(), 1i64.to_le_bytes());
        assert_eq!(found(Dtype::I64, &low, &high), Some((1, 1, Some(8.0))));
        assert_eq!(found(Dtype::U8, &[1, 2], &[1, 250]), Some((2, 1, Some(248.0))));
        assert_eq!(found(Dtype::F64, &[], &[]), None);
    }
}

//! What of a rank's state the former checkpoint holds already, by the hash of its content.
//!
//! A piece of the same tensor, place, type and hash is referred to, not written again. Two rules keep
//! that harmless. A checkpoint refers only to shards that the checkpoint before it holds or refers
//! to, which stays in the store until the newer one is recorded: so at no time does a shard that will
//! still be needed look like one that nobody needs. And a shard is kept for what it holds only while
//! that is half of it: so a checkpoint never keeps more than twice its bytes in the store.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::TensorEntry;
use crate::manifest::ShardEntry;
use crate::slice::Slice;
use crate::staging::Staged;

/// Of a former shard's bytes, the percentage that must still count for it to be referred to.
const USED_PERCENT_MIN: u64 = 50;

/// The pieces that a checkpoint holds, wherever they lie.
#[derive(Debug, Default)]
pub(crate) struct Former {
    /// Without what they refer to.
    objects: Vec<ShardEntry>,
    /// Object and index of the tensor in it.
    pieces: BTreeMap<(String, Option<Slice>), (usize, u32)>,
}

impl Former {
    /// What these shards hold, and what they refer to.
    pub fn of(shards: &[ShardEntry]) -> Self {
        let mut former = Self::default();
        for shard in shards.iter().flat_map(|shard| shard.former.iter().chain([shard])) {
            let object = former.objects.len();
            for (index, piece) in shard.used_tensors() {
                let place = (piece.name.clone(), piece.slice.clone());
                former.pieces.insert(place, (object, index as u32));
            }
            former.objects.push(ShardEntry { former: Vec::new(), ..shard.clone() });
        }
        former
    }

    /// Leaves out of a staged shard what is held already; returns the former shards that hold it.
    pub fn reuse(&self, staged: &mut Staged) -> Result<Vec<ShardEntry>, crate::FormatError> {
        staged.hash();
        let mut held: BTreeMap<usize, BTreeMap<u32, usize>> = BTreeMap::new();
        for (index, piece) in staged.tensors.iter().enumerate() {
            if let Some((object, tensor)) = self.find(piece) {
                held.entry(object).or_default().insert(tensor, index);
            }
        }
        held.retain(|object, used| self.is_worth_keeping(*object, used.keys()));
        let reused: BTreeSet<usize> = held.values().flat_map(BTreeMap::values).copied().collect();
        if reused.is_empty() {
            return Ok(Vec::new());
        }
        staged.retain(|index| !reused.contains(&index))?;
        let refer = |(object, used): (usize, BTreeMap<u32, usize>)| ShardEntry {
            used: Some(used.into_keys().collect()),
            ..self.objects[object].clone()
        };
        Ok(held.into_iter().map(refer).collect())
    }

    fn find(&self, piece: &TensorEntry) -> Option<(usize, u32)> {
        let place = self.pieces.get(&(piece.name.clone(), piece.slice.clone()))?;
        let held = &self.objects[place.0].tensors[place.1 as usize];
        let is_same = held.blake3.is_some()
            && (&held.blake3, held.dtype, &held.shape)
                == (&piece.blake3, piece.dtype, &piece.shape);
        is_same.then_some(*place)
    }

    fn is_worth_keeping<'a>(&self, object: usize, used: impl Iterator<Item = &'a u32>) -> bool {
        let tensors = &self.objects[object].tensors;
        let all: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
        let used: u64 = used.map(|index| tensors[*index as usize].bytes).sum();
        used > 0 && u128::from(used) * 100 >= u128::from(all) * u128::from(USED_PERCENT_MIN)
    }
}

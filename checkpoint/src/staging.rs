//! The memory that a rank's state is copied to while training goes on: at most two arenas, reused.
//!
//! Copying is all that the step loop pays for. Arenas come back when their upload is done.

use std::sync::Arc;

use bytes::Bytes;

use crate::format::{self, FormatError, TensorEntry, TensorSlice};

/// One being uploaded while the next is filled; a third would only hide a store that is too slow.
pub(crate) const ARENAS_MAX: usize = 2;

/// A copy of tensors, as the bytes of a safetensors file.
pub(crate) struct Staged {
    /// The file's header.
    pub header: Bytes,
    /// The tensors' bytes, in the file's order.
    pub arena: Arc<Vec<u8>>,
    /// What lies where.
    pub tensors: Vec<TensorEntry>,
}

/// Lets the arena's memory be sent without another copy.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Staged {
    /// Copies tensors into `arena`, whose former content is dropped and whose memory is reused.
    pub fn copy(tensors: &[TensorSlice<'_>], mut arena: Vec<u8>) -> Result<Self, FormatError> {
        let order = format::order(tensors)?;
        let sorted = || order.iter().map(|index| &tensors[*index]);
        let (header, entries) = format::layout(sorted().map(|t| (t.name, format::shape_of(t))))?;
        arena.clear();
        arena.reserve_exact(entries.iter().map(|entry| entry.bytes as usize).sum());
        for tensor in sorted() {
            arena.extend_from_slice(bytemuck::cast_slice(tensor.data));
        }
        Ok(Self { header: header.into(), arena: Arc::new(arena), tensors: entries })
    }

    /// The file, without copying the arena.
    pub fn pieces(&self) -> Vec<Bytes> {
        let data = Bytes::from_owner(Shared(self.arena.clone()));
        [self.header.clone(), data].into_iter().filter(|piece| !piece.is_empty()).collect()
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        (self.header.len() + self.arena.len()) as u64
    }

    /// The memory, for the next copy; new if something still holds it.
    pub fn into_arena(self) -> Vec<u8> {
        Arc::try_unwrap(self.arena).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_reuses_the_memory_and_gives_the_same_bytes() {
        let data: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let tensors = [
            TensorSlice { name: "b", shape: &[10, 100], data: &data },
            TensorSlice { name: "a", shape: &[1000], data: &data },
        ];
        let first = Staged::copy(&tensors, Vec::new()).expect("copies");
        let file: Vec<u8> = first.pieces().concat();
        assert_eq!(file, format::safetensors_bytes(&tensors).expect("writes"));
        assert_eq!(first.bytes(), file.len() as u64);
        let arena = first.into_arena();
        let address = arena.as_ptr();
        assert_eq!(arena.capacity(), 8000);
        let second = Staged::copy(&tensors, arena).expect("copies");
        assert_eq!(second.pieces().concat(), file);
        assert_eq!(second.arena.as_ptr(), address, "memory was not reused");
    }
}

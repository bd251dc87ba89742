//! The memory that a rank's state is copied to while training goes on: at most two arenas, reused.
//!
//! Copying is all that the step loop pays for. Arenas come back when their upload is done.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;

use crate::format::{self, Checks, FormatError, TensorEntry, TensorPiece};
use crate::manifest;
use crate::tiles::{self, TileSums};

/// One being uploaded while the next is filled; a third would only hide a store that is too slow.
pub(crate) const ARENAS_MAX: usize = 2;
/// What one thread copies at once: small beside a tensor, so that all threads of the rank have work.
const BLOCK_BYTES: usize = 1 << 20;
/// What is checked in all ways before the next: less than a processor's second cache.
const CHECKED_BYTES: usize = 256 << 10;
/// Pages are never smaller.
const PAGE_BYTES: usize = 4096;

/// Memory of `bytes` that the kernel has provided already: a first copy into it costs no page faults.
pub(crate) fn provided(bytes: usize) -> Vec<u8> {
    let mut arena = vec![0; bytes];
    arena.iter_mut().step_by(PAGE_BYTES).for_each(|byte| *byte = 1);
    arena
}

/// A copy of tensors, as the bytes of a safetensors file.
pub(crate) struct Staged {
    /// The file's header.
    pub header: Bytes,
    /// The tensors' bytes, in the file's order.
    pub arena: Arc<Vec<u8>>,
    /// What lies where in the file.
    pub tensors: Vec<TensorEntry>,
    /// Where each of them lies in the arena.
    spans: Vec<Range<usize>>,
}

/// What parts of a shard's tensors are checked by.
#[derive(Clone, Debug)]
pub(crate) struct Checksums {
    /// The end of the file.
    pub bytes: Bytes,
    /// CRC32C of each tensor's and way's checksums, in the file's order.
    own: Arc<[u32]>,
}

/// Lets the arena's memory be sent without another copy.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Staged {
    /// Copies pieces into `arena`, whose former content is dropped and whose memory is reused. With
    /// checks, the file ends with [`Checksums`].
    pub fn copy(
        pieces: &[TensorPiece<'_>],
        mut arena: Vec<u8>,
        with_checks: bool,
    ) -> Result<Self, FormatError> {
        let (order, mut entries): (Vec<usize>, Vec<TensorEntry>) =
            format::order(pieces)?.into_iter().unzip();
        for entry in entries.iter_mut().filter(|_| with_checks) {
            let ways = tiles::ways(&entry.place().length, entry.dtype.bytes());
            entry.checks = ways.into_iter().map(|tile| Checks { tile, crc32c: 0 }).collect();
        }
        let (header, entries) = format::layout(entries)?;
        let total = entries.iter().map(|entry| entry.bytes as usize).sum();
        if arena.capacity() < total {
            // Untouched zero pages: cheaper than filling what is overwritten at once.
            arena = vec![0; total];
        }
        arena.resize(total, 0);
        let mut spans = Vec::with_capacity(order.len());
        let mut blocks = Vec::new();
        let (mut start, mut rest) = (0, arena.as_mut_slice());
        for index in order {
            let data = pieces[index].data;
            let (target, tail) = rest.split_at_mut(data.len());
            rest = tail;
            blocks.extend(target.chunks_mut(BLOCK_BYTES).zip(data.chunks(BLOCK_BYTES)));
            spans.push(start..start + data.len());
            start += data.len();
        }
        blocks.into_par_iter().for_each(|(target, data)| target.copy_from_slice(data));
        Ok(Self { header: header.into(), arena: Arc::new(arena), tensors: entries, spans })
    }

    /// Notes the hash of every tensor's bytes in its entry.
    pub fn hash(&mut self) {
        for (entry, span) in self.tensors.iter_mut().zip(&self.spans) {
            entry.blake3 = Some(manifest::digest(&self.arena[span.clone()]));
        }
    }

    /// Leaves tensors out of the file; those that stay keep their place in memory.
    pub fn retain(&mut self, stays: impl Fn(usize) -> bool) -> Result<(), FormatError> {
        let all =
            std::mem::take(&mut self.tensors).into_iter().zip(std::mem::take(&mut self.spans));
        let left = all.enumerate().filter(|(index, _)| stays(*index)).map(|(_, both)| both);
        let (entries, spans): (Vec<TensorEntry>, Vec<Range<usize>>) = left.unzip();
        let (header, entries) = format::layout(entries)?;
        (self.header, self.tensors, self.spans) = (header.into(), entries, spans);
        Ok(())
    }

    /// What computes the [`Checksums`], on whatever thread it is called.
    pub fn checksums(&self) -> impl FnOnce() -> Checksums + Send + 'static {
        let (arena, spans) = (self.arena.clone(), self.spans.clone());
        let ways: Vec<(Vec<u64>, u64, Vec<Vec<u64>>)> = self.tensors.iter().map(ways_of).collect();
        move || {
            let (mut all, mut own) = (Vec::new(), Vec::new());
            for ((length, element_bytes, tiles), span) in ways.into_iter().zip(spans) {
                let new = |tile: &Vec<u64>| TileSums::new(&length, tile, element_bytes);
                let mut sums: Vec<TileSums> = tiles.iter().map(new).collect();
                // All ways of one block while it is in the processor's cache.
                for block in arena[span].chunks(CHECKED_BYTES) {
                    sums.iter_mut().for_each(|sums| sums.update(block));
                }
                for sums in sums {
                    let bytes = tiles::to_bytes(&sums.finish());
                    own.push(crc32c::crc32c(&bytes));
                    all.extend_from_slice(&bytes);
                }
            }
            Checksums { bytes: all.into(), own: own.into() }
        }
    }

    /// Notes in the entries what the checksums are themselves checked by.
    pub fn note(&mut self, checksums: &Checksums) {
        let checks = self.tensors.iter_mut().flat_map(|entry| &mut entry.checks);
        checks.zip(checksums.own.iter()).for_each(|(checks, own)| checks.crc32c = *own);
    }

    /// The file up to its [`Checksums`], without copying the arena.
    pub fn pieces(&self) -> Vec<Bytes> {
        let arena = Bytes::from_owner(Shared(self.arena.clone()));
        let mut runs: Vec<Range<usize>> = Vec::new();
        for span in self.spans.iter().filter(|span| !span.is_empty()) {
            match runs.last_mut() {
                Some(run) if run.end == span.start => run.end = span.end,
                _ => runs.push(span.clone()),
            }
        }
        let data = runs.into_iter().map(|run| arena.slice(run));
        let pieces = std::iter::once(self.header.clone()).chain(data);
        pieces.filter(|piece| !piece.is_empty()).collect()
    }

    /// Length of the checksums.
    pub fn checksum_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorEntry::check_bytes).sum()
    }

    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|entry| entry.bytes).sum();
        self.header.len() as u64 + data + self.checksum_bytes()
    }

    /// The memory, for the next copy; new if something still holds it.
    pub fn into_arena(self) -> Vec<u8> {
        Arc::try_unwrap(self.arena).unwrap_or_default()
    }
}

/// A stored part's elements along each dimension, bytes of one, and the tiles it is checked in.
fn ways_of(entry: &TensorEntry) -> (Vec<u64>, u64, Vec<Vec<u64>>) {
    let tiles = entry.checks.iter().map(|checks| checks.tile.clone()).collect();
    (entry.place().length, entry.dtype.bytes(), tiles)
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::format::TensorSlice;

    fn checked_file(staged: &mut Staged) -> Vec<u8> {
        let checksums = staged.checksums()();
        staged.note(&checksums);
        [staged.pieces().concat(), checksums.bytes.to_vec()].concat()
    }

    #[test]
    fn a_second_copy_reuses_the_memory_and_gives_the_same_bytes() {
        let data: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let tensors = [
            TensorSlice { name: "b", shape: &[10, 100], data: &data },
            TensorSlice { name: "a", shape: &[1000], data: &data },
        ];
        let shapes = format::shapes(&tensors).expect("agree");
        let pieces = format::whole(&tensors, &shapes);
        let first = Staged::copy(&pieces, Vec::new(), false).expect("copies");
        let file: Vec<u8> = first.pieces().concat();
        assert_eq!(file, format::safetensors_bytes(&tensors).expect("writes"));
        assert_eq!(first.bytes(), file.len() as u64);
        let arena = first.into_arena();
        let address = arena.as_ptr();
        assert_eq!(arena.capacity(), 8000);
        let mut second = Staged::copy(&pieces, arena, true).expect("copies");
        let checked = checked_file(&mut second);
        assert_eq!(checked.len() as u64, second.bytes());
        let theirs = SafeTensors::deserialize(&checked).expect("a safetensors file");
        assert_eq!(theirs.tensor("b").expect("there").data(), bytemuck::cast_slice::<_, u8>(&data));
        assert_eq!(theirs.len(), 3, "two tensors and the checksums");
        assert_eq!(second.arena.as_ptr(), address, "memory was not reused");
    }

    #[test]
    fn what_is_left_out_is_not_in_the_file_and_the_rest_is() {
        let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let names = ["a", "b", "c", "d"];
        let tensor = |name| TensorSlice { name, shape: &[24], data: &data };
        let tensors = names.map(tensor);
        let shapes = format::shapes(&tensors).expect("agree");
        for mask in 0..16 {
            let stays = |index: usize| mask & (1 << index) != 0;
            let pieces = format::whole(&tensors, &shapes);
            let mut staged = Staged::copy(&pieces, Vec::new(), true).expect("copies");
            staged.hash();
            staged.retain(stays).expect("fits");
            let file = checked_file(&mut staged);
            assert_eq!(file.len() as u64, staged.bytes(), "mask {mask}");
            let theirs = SafeTensors::deserialize(&file).expect("a safetensors file");
            for (index, name) in names.iter().enumerate() {
                let found = theirs.tensor(name).ok().map(|tensor| tensor.data().to_vec());
                let expected = bytemuck::cast_slice::<_, u8>(&data).to_vec();
                assert_eq!(found, stays(index).then_some(expected), "mask {mask}, `{name}`");
            }
        }
    }
}

//! Gradients in buckets, each reduced over the ranks as soon as the backward pass has filled it.
//!
//! A bucket is a run of whole blocks of the model. The backward pass goes from the last block to the
//! first, so the last bucket is whole first, and its reduction runs while the blocks before it are
//! still computed. Every element is summed alone, so buckets change no bit of the result.

use std::ops::Range;
use std::time::Duration;

use collective::{CollectiveError, LaneFold, Partial, Queue, Work};

use super::Lanes;
use crate::parameters::Table;

/// Bytes from which a run of blocks is a bucket: large enough to use the bandwidth, small enough to
/// begin early.
const BUCKET_BYTES: usize = 4 << 20;

/// One bucket.
struct Bucket {
    /// Its first block: when this block's gradients are there, the bucket is whole.
    first_block: usize,
    /// Its elements of the flat buffer.
    range: Range<usize>,
    fold: LaneFold<f32>,
    /// The lane under way.
    lane: Vec<f32>,
    /// Memory for the sum.
    sum: Vec<f32>,
    work: Option<Work<Reduced>>,
}

impl Bucket {
    /// Begins the reduction of what this rank has folded.
    fn reduce(&mut self, lanes: &Lanes, queue: &Queue) {
        let parts = self.fold.finish();
        let tree = lanes.tree().clone();
        let mut sum = std::mem::take(&mut self.sum);
        sum.resize(self.range.len(), 0.0);
        self.work = Some(queue.submit(move |communicator| {
            let partials: Vec<Partial<'_>> = parts
                .iter()
                .map(|(subtree, data)| Partial { subtree: *subtree, data: data.into() })
                .collect();
            communicator.reduce_lanes(&tree, &partials, (&mut sum).into())?;
            drop(partials);
            Ok((sum, parts.into_iter().map(|(_, buffer)| buffer).collect()))
        }));
    }
}

/// What comes back from a reduction: the sum, and the partials' memory.
type Reduced = (Vec<f32>, Vec<Vec<f32>>);

/// The gradients of a step.
pub struct Buckets {
    buckets: Vec<Bucket>,
    /// The bucket of each block.
    of_block: Vec<usize>,
}

impl Buckets {
    /// Buckets for a model.
    pub fn new(table: &Table, lanes: &Lanes) -> Self {
        let mut buckets: Vec<Bucket> = Vec::new();
        let mut of_block = vec![0; table.blocks.len()];
        let mut end = table.len;
        let mut last = table.blocks.len();
        let mut start = table.len;
        for block in (0..table.blocks.len()).rev() {
            let entries = &table.entries[table.blocks[block].clone()];
            start = entries.first().map_or(start, |entry| entry.range.start);
            if (end - start) * size_of::<f32>() < BUCKET_BYTES && block > 0 {
                continue;
            }
            of_block[block..last].fill(buckets.len());
            buckets.push(Bucket {
                first_block: block,
                range: start..end,
                fold: lanes.fold(),
                lane: Vec::new(),
                sum: Vec::new(),
                work: None,
            });
            (end, last) = (start, block);
        }
        Self { buckets, of_block }
    }

    /// Begins a lane: every bucket gets a zeroed buffer.
    pub fn begin_lane(&mut self) {
        for bucket in &mut self.buckets {
            bucket.lane = bucket.fold.take_buffer(bucket.range.len());
        }
    }

    /// Where the gradients of a block are added: memory, and the flat index of its first element.
    pub fn place(&mut self, block: usize) -> (&mut [f32], usize) {
        let bucket = &mut self.buckets[self.of_block[block]];
        (&mut bucket.lane, bucket.range.start)
    }

    /// A block's gradients of the lane are whole. If its bucket is, the lane joins the fold; if it
    /// was the rank's last lane, the bucket's reduction begins.
    pub fn block_is_whole(&mut self, block: usize, lane: u32, lanes: &Lanes, queue: &Queue) {
        let bucket = &mut self.buckets[self.of_block[block]];
        if bucket.first_block != block {
            return;
        }
        bucket.fold.push(lane, std::mem::take(&mut bucket.lane));
        if lane + 1 == lanes.own().end {
            bucket.reduce(lanes, queue);
        }
    }

    /// Takes part in the reductions of all buckets, as a rank without lanes.
    pub fn bring_nothing(&mut self, lanes: &Lanes, queue: &Queue) {
        self.buckets.iter_mut().for_each(|bucket| bucket.reduce(lanes, queue));
    }

    /// Waits for every bucket and writes the sums, times a factor, into the flat gradient; how long
    /// the reductions ran in all.
    pub fn collect(
        &mut self,
        factor: f32,
        gradient: &mut [f32],
    ) -> Result<Duration, CollectiveError> {
        let mut ran = Duration::ZERO;
        for bucket in &mut self.buckets {
            let Some(work) = bucket.work.take() else { continue };
            let ((sum, parts), time) = work.wait()?;
            ran += time;
            for (place, value) in gradient[bucket.range.clone()].iter_mut().zip(&sum) {
                *place = value * factor;
            }
            bucket.sum = sum;
            parts.into_iter().for_each(|buffer| bucket.fold.recycle(buffer));
        }
        Ok(ran)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use algorithms::{Init, ParamSpec};

    use super::*;
    use crate::parameters::Entry;

    fn table(lengths: &[&[usize]]) -> Table {
        let (mut entries, mut blocks, mut len) = (Vec::new(), Vec::new(), 0);
        for (block, tensors) in lengths.iter().enumerate() {
            let first = entries.len();
            for tensor in *tensors {
                let (name, shape) = (format!("b{block}"), vec![*tensor]);
                let spec = ParamSpec { name, shape, init: Init::Zeros, decay: false };
                entries.push(Entry { spec, block, range: len..len + tensor });
                len += tensor;
            }
            blocks.push(first..entries.len());
        }
        Table { entries, blocks, len }
    }

    #[test]
    fn buckets_tile_the_parameters_from_the_back_in_runs_of_blocks() {
        let one = NonZeroU32::MIN;
        let batch = api::job::Batch { global: one, lanes: one, ..Default::default() };
        let lanes = Lanes::new(&batch, 0, 1, &[]);
        for lengths in [
            vec![&[10][..]],
            vec![&[3 << 20, 5][..], &[7], &[], &[2 << 20], &[9]],
            vec![&[][..], &[1 << 20], &[1 << 20]],
            vec![&[][..], &[10]],
        ] {
            let table = table(&lengths);
            let buckets = Buckets::new(&table, &lanes);
            let mut end = table.len;
            for (index, bucket) in buckets.buckets.iter().enumerate() {
                assert_eq!(bucket.range.end, end);
                end = bucket.range.start;
                assert_eq!(buckets.of_block[bucket.first_block], index);
            }
            assert_eq!(end, 0);
            for (block, entries) in table.blocks.iter().enumerate() {
                let range = &buckets.buckets[buckets.of_block[block]].range;
                for entry in &table.entries[entries.clone()] {
                    assert!(range.start <= entry.range.start && entry.range.end <= range.end);
                }
            }
        }
    }
}

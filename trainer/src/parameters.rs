//! A model's parameters in one flat buffer, with a table of what lies where.
//!
//! Reducing, clipping, stepping and checkpointing are passes over memory; only the forward pass
//! needs tensors.

use std::ops::Range;

use algorithms::{Model, ParamSpec, initial_values};

/// One parameter's place in the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name, shape, initialisation, decay.
    pub spec: ParamSpec,
    /// The block it belongs to.
    pub block: usize,
    /// Its elements in every flat buffer.
    pub range: Range<usize>,
}

/// The table of a model: parameters in block order, then in the block's own order.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// In flat order, without gaps.
    pub entries: Vec<Entry>,
    /// Entries of each block.
    pub blocks: Vec<Range<usize>>,
    /// Elements in all.
    pub len: usize,
}

impl Table {
    /// The table of a model.
    pub fn of(model: &Model) -> Self {
        let (mut entries, mut blocks, mut len) = (Vec::new(), Vec::new(), 0);
        for (block, segment) in model.blocks.iter().enumerate() {
            let first = entries.len();
            for spec in segment.params() {
                let range = len..len + spec.len();
                len = range.end;
                entries.push(Entry { spec: spec.clone(), block, range });
            }
            blocks.push(first..entries.len());
        }
        Self { entries, blocks, len }
    }

    /// The flat buffer of a fresh model: a pure function of (seed, parameter names).
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        for entry in &self.entries {
            initial_values(seed, &entry.spec, &mut values[entry.range.clone()]);
        }
        values
    }
}

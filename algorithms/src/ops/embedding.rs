//! Token and position embeddings, added.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::tensor::{Int, Tensor};

use super::fused::{FusedOp, apply, from_values, input, is_fusable, values};
use super::vector::{add_rows, vectorized};
use crate::tensor::class_ids;

/// Looks up every token and adds its position's vector. `tokens` is `[batch, sequence]` with values
/// below the vocabulary; `table` holds `[vocabulary, width]` and `positions` at least
/// `[sequence, width]`, both flat. The result is `[batch · sequence, width]`.
pub(crate) fn embedding(
    tokens: Tensor<2, Int>,
    table: Tensor<1>,
    positions: Tensor<1>,
    width: usize,
) -> Tensor<2> {
    let [batch, sequence] = tokens.dims();
    let rows = batch * sequence;
    let ids = tokens.reshape([rows]);
    if is_fusable(&table) {
        let op = Embedding { tokens: class_ids(&ids).into(), sequence, width };
        return apply(op, [input(table), input(positions)]);
    }
    composed(ids, table, positions, sequence, width)
}

pub(super) fn composed(
    ids: Tensor<1, Int>,
    table: Tensor<1>,
    positions: Tensor<1>,
    sequence: usize,
    width: usize,
) -> Tensor<2> {
    let ([rows], [elements], [longest]) = (ids.dims(), table.dims(), positions.dims());
    let looked_up = table.reshape([elements / width, width]).select(0, ids);
    let positions = positions.reshape([longest / width, width]).narrow(0, 0, sequence);
    let by_sequence = looked_up.reshape([rows / sequence, sequence, width]);
    (by_sequence + positions.unsqueeze::<3>()).reshape([rows, width])
}

#[derive(Clone, Debug)]
struct Embedding {
    tokens: Arc<[usize]>,
    sequence: usize,
    width: usize,
}

impl FusedOp<2> for Embedding {
    /// Lengths of the two tables.
    type Saved = [usize; 2];

    fn forward(
        &self,
        [table, positions]: &[FlexTensor; 2],
        _keep: bool,
    ) -> (FlexTensor, Self::Saved) {
        let width = self.width;
        let (rows, places) = (values(table), values(positions));
        let mut out = vec![0f32; self.tokens.len() * width];
        vectorized(
            #[inline(always)]
            || {
                for (i, target) in out.chunks_exact_mut(width).enumerate() {
                    let (token, place) = (self.tokens[i], i % self.sequence);
                    let row = &rows[token * width..(token + 1) * width];
                    let position = &places[place * width..(place + 1) * width];
                    for ((y, &a), &b) in target.iter_mut().zip(row).zip(position) {
                        *y = a + b;
                    }
                }
            },
        );
        (from_values(out, &[self.tokens.len(), width]), [rows.len(), places.len()])
    }

    fn backward(
        &self,
        [table, positions]: Self::Saved,
        gradient: FlexTensor,
        _wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let width = self.width;
        let source = values(&gradient);
        let (mut d_table, mut d_positions) = (vec![0f32; table], vec![0f32; positions]);
        vectorized(
            #[inline(always)]
            || {
                // One token after another: the order of the sum is that of the data.
                for (&token, row) in self.tokens.iter().zip(source.chunks_exact(width)) {
                    add_rows(&mut d_table[token * width..(token + 1) * width], row);
                }
                for sequence in source.chunks_exact(width * self.sequence) {
                    add_rows(&mut d_positions[..width * self.sequence], sequence);
                }
            },
        );
        [Some(from_values(d_table, &[table])), Some(from_values(d_positions, &[positions]))]
    }
}

//! Runs the language model token by token: keys and values of earlier positions are kept, so a new
//! token costs one row instead of the whole window.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::ops;
use crate::tensor::{tensor_from_vec, tensor_into_vec};
use crate::transformer::architecture::Architecture;
use crate::transformer::blocks::{LayerParams, logits};

/// A trained model and the context it has read.
pub(super) struct Decoder {
    architecture: Architecture,
    /// Of every block, in order.
    params: Vec<Vec<Tensor<1>>>,
    device: Device,
    /// Keys and values of every layer, `[length, width]` each.
    caches: Vec<[Vec<f32>; 2]>,
    length: usize,
}

impl Decoder {
    pub(super) fn new(
        architecture: Architecture,
        params: Vec<Vec<Tensor<1>>>,
        device: &Device,
    ) -> Self {
        let caches = vec![[Vec::new(), Vec::new()]; architecture.layers];
        Self { architecture, params, device: device.clone(), caches, length: 0 }
    }

    /// Tokens that still fit the context.
    pub(super) fn room(&self) -> usize {
        self.architecture.sequence_length - self.length
    }

    /// Tokens of the longest context.
    pub(super) fn window(&self) -> usize {
        self.architecture.sequence_length
    }

    /// Forgets the context.
    pub(super) fn clear(&mut self) {
        self.length = 0;
        for [keys, values] in &mut self.caches {
            keys.clear();
            values.clear();
        }
    }

    /// Appends `tokens` (at least one, at most [`Decoder::room`], each below the vocabulary) to the
    /// context and returns the logits of what follows.
    pub(super) fn read(&mut self, tokens: &[u32]) -> Vec<f32> {
        assert!(!tokens.is_empty() && tokens.len() <= self.room(), "the context must fit");
        let width = self.architecture.width;
        let mut x = self.embed(tokens);
        for index in 0..self.architecture.layers {
            let params = LayerParams::new(&self.params[index + 1]);
            let packed = tensor_into_vec(params.queries_keys_values(x.clone()));
            let attended = attend(&packed, &mut self.caches[index], self.architecture);
            let attended = tensor_from_vec(attended, [tokens.len(), width], &self.device);
            x = x + params.attention_output(attended);
            x = x.clone() + params.mlp(x);
        }
        self.length += tokens.len();
        let last = x.narrow(0, tokens.len() - 1, 1);
        tensor_into_vec(logits(&self.params[self.architecture.layers + 1], last))
    }

    fn embed(&self, tokens: &[u32]) -> Tensor<2> {
        let [table, positions] = [&self.params[0][0], &self.params[0][1]];
        let width = self.architecture.width;
        let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let ids =
            Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens.len()]), &self.device);
        let from = self.length * width;
        let places = positions.clone().narrow(0, from, tokens.len() * width);
        ops::embedding(ids, table.clone(), places, width)
    }
}

/// Attention of the rows of `packed` (query, key, value) over the cache, to which they are added
/// one by one.
fn attend(packed: &[f32], cache: &mut [Vec<f32>; 2], architecture: Architecture) -> Vec<f32> {
    let Architecture { width, heads, .. } = architecture;
    let size = width / heads;
    let scale = 1.0 / (size as f32).sqrt();
    let [keys, values] = cache;
    let mut out = vec![0f32; packed.len() / 3];
    let mut scores = Vec::new();
    ops::vectorized(
        #[inline(always)]
        || {
            for (row, target) in packed.chunks_exact(3 * width).zip(out.chunks_exact_mut(width)) {
                keys.extend_from_slice(&row[width..2 * width]);
                values.extend_from_slice(&row[2 * width..]);
                for (head, target) in target.chunks_exact_mut(size).enumerate() {
                    let columns = head * size..(head + 1) * size;
                    let query = &row[columns.clone()];
                    scores.clear();
                    for key in keys.chunks_exact(width) {
                        scores.push(ops::dot(query, &key[columns.clone()]));
                    }
                    ops::softmax_in_place(&mut scores, scale);
                    for (value, &weight) in values.chunks_exact(width).zip(&scores) {
                        ops::add_scaled(target, weight, &value[columns.clone()]);
                    }
                }
            }
        },
    );
    out
}

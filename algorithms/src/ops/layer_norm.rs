//! Layer normalisation over the last dimension (Ba, Kiros and Hinton 2016), biased variance.

use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::fused::{FusedOp, apply, from_values, input, is_fusable, values};
use super::vector::{sum_of, sum_of_pairs, vectorized};

/// As PyTorch and GPT-2.
const EPSILON: f32 = 1e-5;

/// Normalises every row of `x` `[rows, width]`, then scales and shifts it; `weight` and `bias` are
/// `[width]`.
pub(crate) fn layer_norm(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<2> {
    if is_fusable(&x) {
        return apply(LayerNorm, [input(x), input(weight), input(bias)]);
    }
    composed(x, weight, bias)
}

pub(super) fn composed(x: Tensor<2>, weight: Tensor<1>, bias: Tensor<1>) -> Tensor<2> {
    let centred = x.clone() - x.mean_dim(1);
    let variance = (centred.clone() * centred.clone()).mean_dim(1);
    centred / (variance + EPSILON).sqrt() * weight.unsqueeze() + bias.unsqueeze()
}

#[derive(Clone, Debug)]
struct LayerNorm;

#[derive(Clone, Debug)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// Mean and reciprocal standard deviation of every row.
    statistics: Vec<[f32; 2]>,
}

#[inline(always)]
fn statistics(row: &[f32]) -> [f32; 2] {
    let count = row.len() as f32;
    let mean = sum_of(row, |x| x) / count;
    let variance = sum_of(row, |x| (x - mean) * (x - mean)) / count;
    [mean, 1.0 / (variance + EPSILON).sqrt()]
}

impl FusedOp<3> for LayerNorm {
    type Saved = Saved;

    fn forward(&self, inputs: &[FlexTensor; 3], keep: bool) -> (FlexTensor, Saved) {
        let [x, weight, bias] = inputs;
        let width = weight.layout().num_elements();
        let rows = x.layout().num_elements() / width;
        let mut kept = Vec::with_capacity(if keep { rows } else { 0 });
        let mut out = vec![0f32; rows * width];
        let (source, weights, biases) = (values(x), values(weight), values(bias));
        vectorized(
            #[inline(always)]
            || {
                for (row, target) in source.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    let [mean, scale] = statistics(row);
                    for (((y, &x), &w), &b) in target.iter_mut().zip(row).zip(weights).zip(biases) {
                        *y = (x - mean) * scale * w + b;
                    }
                    if keep {
                        kept.push([mean, scale]);
                    }
                }
            },
        );
        let saved = Saved { x: x.clone(), weight: weight.clone(), statistics: kept };
        (from_values(out, &[rows, width]), saved)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let weights = values(&saved.weight);
        let width = weights.len();
        let rows = saved.statistics.len();
        let mut dx = vec![0f32; rows * width];
        let mut dw = vec![0f32; width];
        let mut db = vec![0f32; width];
        let (source, upstream) = (values(&saved.x), values(&gradient));
        vectorized(
            #[inline(always)]
            || {
                // The normalised row and its weighted gradient, used three times each.
                let (mut hat, mut weighted) = (vec![0f32; width], vec![0f32; width]);
                for (r, &[mean, scale]) in saved.statistics.iter().enumerate() {
                    let range = r * width..(r + 1) * width;
                    let (row, dy) = (&source[range.clone()], &upstream[range.clone()]);
                    for i in 0..width {
                        let h = (row[i] - mean) * scale;
                        hat[i] = h;
                        weighted[i] = dy[i] * weights[i];
                        dw[i] += dy[i] * h;
                        db[i] += dy[i];
                    }
                    let mean_weighted = sum_of(&weighted, |v| v) / width as f32;
                    let mean_product = sum_of_pairs(&weighted, &hat, |a, b| a * b) / width as f32;
                    for ((d, &g), &h) in dx[range].iter_mut().zip(&weighted).zip(&hat) {
                        *d = scale * (g - mean_weighted - h * mean_product);
                    }
                }
            },
        );
        let [want_x, want_weight, want_bias] = wanted;
        [
            want_x.then(|| from_values(dx, &[rows, width])),
            want_weight.then(|| from_values(dw, &[width])),
            want_bias.then(|| from_values(db, &[width])),
        ]
    }
}

//! Causal self-attention (Vaswani et al. 2017) straight from the packed query/key/value matrix: no
//! transposed copies go in, and the masked half is never exponentiated.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Bool, Tensor, activation};

use super::fused::{
    FusedOp, apply, from_values, input, is_fusable, matmul, transposed, values, values_mut, view,
};
use super::vector::{dot, softmax_in_place, vectorized};

/// Attends within each sequence. `packed` is `[batch · sequence, 3 · width]` with queries, keys and
/// values side by side, each cut into `heads`; the result is `[batch · sequence, width]`.
pub(crate) fn causal_attention(packed: Tensor<2>, sequence: usize, heads: usize) -> Tensor<2> {
    if is_fusable(&packed) {
        return apply(Attention { sequence, heads }, [input(packed)]);
    }
    composed(packed, sequence, heads)
}

pub(super) fn composed(packed: Tensor<2>, sequence: usize, heads: usize) -> Tensor<2> {
    let [rows, triple] = packed.dims();
    let (batch, width) = (rows / sequence, triple / 3);
    let size = width / heads;
    let device = packed.device();
    let packed = packed.reshape([batch, sequence, 3, heads, size]).permute([2, 0, 3, 1, 4]);
    let part = |i: usize| packed.clone().narrow(0, i, 1).reshape([batch, heads, sequence, size]);
    let scores = part(0).matmul(part(1).swap_dims(2, 3)) / (size as f32).sqrt();
    let future: Tensor<2, Bool> = Tensor::<2>::ones([sequence, sequence], &device).triu(1).bool();
    let future = future.unsqueeze::<4>().expand([batch, heads, sequence, sequence]);
    let weights = activation::softmax(scores.mask_fill(future, f32::NEG_INFINITY), 3);
    weights.matmul(part(2)).swap_dims(1, 2).reshape([rows, width])
}

#[derive(Clone, Debug)]
struct Attention {
    sequence: usize,
    heads: usize,
}

#[derive(Clone, Debug)]
struct Saved {
    packed: FlexTensor,
    /// Attention weights `[batch, heads, sequence, sequence]`, 0 above the diagonal.
    weights: FlexTensor,
}

/// Sizes that follow from the packed matrix.
struct Sizes {
    batch: usize,
    sequence: usize,
    heads: usize,
    /// Features per head.
    size: usize,
    width: usize,
}

impl Attention {
    fn sizes(&self, packed: &FlexTensor) -> Sizes {
        let shape = packed.layout().shape();
        let width = shape[1] / 3;
        Sizes {
            batch: shape[0] / self.sequence,
            sequence: self.sequence,
            heads: self.heads,
            size: width / self.heads,
            width,
        }
    }
}

impl Sizes {
    fn scale(&self) -> f32 {
        1.0 / (self.size as f32).sqrt()
    }

    /// Queries (0), keys (1) or values (2) as `[batch, heads, sequence, size]`.
    fn part(&self, packed: &FlexTensor, index: usize) -> FlexTensor {
        let row = 3 * self.width;
        let shape = [self.batch, self.heads, self.sequence, self.size];
        view(packed, &shape, &[self.sequence * row, self.size, row, 1], index * self.width)
    }

    /// A `[batch · sequence, width]` matrix as `[batch, heads, sequence, size]`.
    fn by_head(&self, matrix: &FlexTensor) -> FlexTensor {
        let shape = [self.batch, self.heads, self.sequence, self.size];
        view(matrix, &shape, &[self.sequence * self.width, self.size, self.width, 1], 0)
    }

    /// Copies `[batch, heads, sequence, size]` into columns `offset..` of a matrix with rows of
    /// `stride`.
    fn scatter_heads(&self, heads: &FlexTensor, out: &mut [f32], stride: usize, offset: usize) {
        let source = values(heads);
        for (block, matrix) in source.chunks_exact(self.sequence * self.size).enumerate() {
            let (b, h) = (block / self.heads, block % self.heads);
            for (t, row) in matrix.chunks_exact(self.size).enumerate() {
                let start = (b * self.sequence + t) * stride + offset + h * self.size;
                out[start..start + self.size].copy_from_slice(row);
            }
        }
    }
}

impl FusedOp<1> for Attention {
    type Saved = Saved;

    fn forward(&self, [packed]: &[FlexTensor; 1], _keep: bool) -> (FlexTensor, Saved) {
        let sizes = self.sizes(packed);
        let (sequence, scale) = (sizes.sequence, sizes.scale());
        let mut weights = matmul(sizes.part(packed, 0), transposed(&sizes.part(packed, 1)));
        let scores = values_mut(&mut weights);
        vectorized(
            #[inline(always)]
            || {
                for (r, row) in scores.chunks_exact_mut(sequence).enumerate() {
                    let (past, future) = row.split_at_mut(r % sequence + 1);
                    softmax_in_place(past, scale);
                    future.fill(0.0);
                }
            },
        );
        let attended = matmul(weights.clone(), sizes.part(packed, 2));
        let rows = sizes.batch * sequence;
        let mut out = vec![0f32; rows * sizes.width];
        sizes.scatter_heads(&attended, &mut out, sizes.width, 0);
        (from_values(out, &[rows, sizes.width]), Saved { packed: packed.clone(), weights })
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        _wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let Saved { packed, weights } = saved;
        let sizes = self.sizes(&packed);
        let (sequence, scale) = (sizes.sequence, sizes.scale());
        let gradient = sizes.by_head(&gradient);
        let d_values = matmul(transposed(&weights), gradient.clone());
        let mut d_scores = matmul(gradient, transposed(&sizes.part(&packed, 2)));
        let (target, source) = (values_mut(&mut d_scores), values(&weights));
        vectorized(
            #[inline(always)]
            || {
                let rows = target.chunks_exact_mut(sequence).zip(source.chunks_exact(sequence));
                for (r, (d, w)) in rows.enumerate() {
                    let length = r % sequence + 1;
                    let (past, future) = d.split_at_mut(length);
                    let w = &w[..length];
                    let mean = dot(past, w);
                    for (d, &w) in past.iter_mut().zip(w) {
                        *d = (*d - mean) * w * scale;
                    }
                    future.fill(0.0);
                }
            },
        );
        let d_queries = matmul(d_scores.clone(), sizes.part(&packed, 1));
        let d_keys = matmul(transposed(&d_scores), sizes.part(&packed, 0));
        let (rows, stride) = (sizes.batch * sequence, 3 * sizes.width);
        let mut out = vec![0f32; rows * stride];
        for (index, part) in [d_queries, d_keys, d_values].iter().enumerate() {
            sizes.scatter_heads(part, &mut out, stride, index * sizes.width);
        }
        [Some(from_values(out, &[rows, stride]))]
    }
}

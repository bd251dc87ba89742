//! Softmax cross-entropy, summed over rows.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::tensor::{Int, Tensor, activation};

use super::fused::{FusedOp, apply, from_values, input, is_fusable, values, values_mut};
use super::vector::{exp, maximum, sum_of, vectorized};
use crate::tensor::{class_ids, with_slice};

/// Sum over rows of −log softmax(logits)\[target\], shape `[1]`, and, when asked for, how many rows
/// have their largest logit at the target (the first of equals counts). `logits` is
/// `[rows, classes]`, `targets` `[rows]` with values below `classes`.
pub(crate) fn cross_entropy(
    logits: Tensor<2>,
    targets: &Tensor<1, Int>,
    count_right: bool,
) -> (Tensor<1>, Option<u64>) {
    let [_, classes] = logits.dims();
    let fusable = is_fusable(&logits);
    if !fusable && !count_right {
        return (composed(logits, targets.clone()), None);
    }
    let ids = class_ids(targets);
    let right = count_right.then(|| with_slice(logits.clone(), |l| rows_right(l, &ids, classes)));
    if !fusable {
        return (composed(logits, targets.clone()), right);
    }
    (apply(CrossEntropy { targets: ids.into() }, [input(logits)]), right)
}

pub(super) fn composed(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    activation::log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1)).sum().neg()
}

fn rows_right(logits: &[f32], targets: &[usize], classes: usize) -> u64 {
    vectorized(
        #[inline(always)]
        || {
            let right = |(row, target): &(&[f32], &usize)| {
                let best = maximum(row);
                row.iter().position(|&x| x == best) == Some(**target)
            };
            logits.chunks_exact(classes).zip(targets).filter(right).count() as u64
        },
    )
}

#[derive(Clone, Debug)]
struct CrossEntropy {
    targets: Arc<[usize]>,
}

impl FusedOp<1> for CrossEntropy {
    /// The softmax of every row, when a gradient will be asked for.
    type Saved = Option<FlexTensor>;

    fn forward(&self, [logits]: &[FlexTensor; 1], keep: bool) -> (FlexTensor, Self::Saved) {
        let shape = logits.layout().shape();
        let (rows, classes) = (shape[0], shape[1]);
        assert_eq!(rows, self.targets.len(), "one target per row of logits");
        let source = values(logits);
        let mut probabilities = vec![0f32; if keep { rows * classes } else { classes }];
        let mut sum = 0f64;
        vectorized(
            #[inline(always)]
            || {
                for (r, (row, &target)) in
                    source.chunks_exact(classes).zip(self.targets.iter()).enumerate()
                {
                    let start = if keep { r * classes } else { 0 };
                    let out = &mut probabilities[start..start + classes];
                    let max = maximum(row);
                    for (p, &x) in out.iter_mut().zip(row) {
                        *p = exp(x - max);
                    }
                    let total = sum_of(out, |p| p);
                    // In f64: one logarithm per row costs nothing beside the exponentials.
                    sum += libm::log(f64::from(total)) + f64::from(max) - f64::from(row[target]);
                    if keep {
                        let inverse = 1.0 / total;
                        for p in out {
                            *p *= inverse;
                        }
                    }
                }
            },
        );
        let saved = keep.then(|| from_values(probabilities, &[rows, classes]));
        (from_values(vec![sum as f32], &[1]), saved)
    }

    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        _wanted: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let mut gradients = saved.expect("kept, since a gradient is asked for");
        let factor = values(&gradient)[0];
        let classes = gradients.layout().shape()[1];
        let target = values_mut(&mut gradients);
        vectorized(
            #[inline(always)]
            || {
                for (row, &target) in target.chunks_exact_mut(classes).zip(self.targets.iter()) {
                    row[target] -= 1.0;
                    for d in row {
                        *d *= factor;
                    }
                }
            },
        );
        [Some(gradients)]
    }
}

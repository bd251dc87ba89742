//! The loss of both algorithms: cross-entropy over classes or tokens.

use burn::tensor::Tensor;

use crate::block::{LossOutput, Targets};
use crate::ops;

/// Names of the sums that [`classification_loss`] reports.
pub(crate) const SUMS: [&str; 1] = ["accuracy"];

/// Sum of the cross-entropy over all targets. `output` holds one row of logits per target, in any
/// matrix shape. `sums` is the number of right answers with `with_sums`, else empty.
pub(crate) fn classification_loss(
    output: Tensor<2>,
    targets: &Targets,
    with_sums: bool,
) -> LossOutput {
    let Targets::Classes(classes) = targets;
    let ([batch, features], [rows]) = (output.dims(), classes.dims());
    let logits = output.reshape([rows, batch * features / rows]);
    let (sum, right) = ops::cross_entropy(logits, classes, with_sums);
    let sums = right.into_iter().map(|right| right as f64).collect();
    LossOutput { sum, count: rows as u64, sums }
}

//! A dense layer with its bias and activation in one operation.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, activation};

use super::fused::{
    FusedOp, apply, contiguous, from_values, input, is_fusable, matmul, reshaped, transposed,
    values, values_mut,
};
use super::vector::{add_rows, exp, vectorized};

/// What follows the matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Nothing.
    None,
    /// GELU in its tanh form (Hendrycks and Gimpel 2016), as GPT-2.
    Gelu,
}

/// `activation(x · weight + bias)`: `x` is `[rows, inputs]`, `weight` holds `[inputs, outputs]` flat,
/// `bias` is `[outputs]`, the result `[rows, outputs]`.
pub(crate) fn linear(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    activation: Activation,
) -> Tensor<2> {
    let [_, inputs] = x.dims();
    let [elements] = weight.dims();
    let outputs = elements / inputs;
    if !is_fusable(&x) {
        return composed(x, weight.reshape([inputs, outputs]), bias, activation);
    }
    match bias {
        None => apply(Linear { activation }, [input(x), input(weight)]),
        Some(bias) => apply(Linear { activation }, [input(x), input(weight), input(bias)]),
    }
}

pub(super) fn composed(
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Activation,
) -> Tensor<2> {
    let product = x.matmul(weight);
    let shifted = match bias {
        Some(bias) => product + bias.unsqueeze(),
        None => product,
    };
    match activation {
        Activation::None => shifted,
        Activation::Gelu => activation::gelu_approximate(shifted),
    }
}

#[derive(Clone, Debug)]
struct Linear {
    activation: Activation,
}

#[derive(Clone, Debug)]
struct Saved {
    x: FlexTensor,
    /// As a matrix.
    weight: FlexTensor,
    /// What went into the activation, when there is one.
    before: Option<FlexTensor>,
}

/// 2·sqrt(2/π): GELU's tanh form is x · sigmoid(SLOPE · (x + CUBE · x³)).
const SLOPE: f32 = 1.595_769;
const CUBE: f32 = 0.044_715;

#[inline(always)]
fn gelu(x: f32) -> f32 {
    x / (1.0 + exp(-SLOPE * (x + CUBE * x * x * x)))
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-SLOPE * (x + CUBE * x * x * x)));
    s + x * s * (1.0 - s) * SLOPE * (1.0 + 3.0 * CUBE * x * x)
}

impl Linear {
    fn output(
        &self,
        x: &FlexTensor,
        weight: &FlexTensor,
        bias: Option<&FlexTensor>,
        keep: bool,
    ) -> (FlexTensor, Saved) {
        let [rows, inputs] = matrix(x);
        let outputs = weight.layout().num_elements() / inputs;
        let weight = reshaped(weight, &[inputs, outputs]);
        let mut out = matmul(x.clone(), weight.clone());
        if let Some(bias) = bias {
            let (bias, out) = (values(bias), values_mut(&mut out));
            vectorized(
                #[inline(always)]
                || {
                    for row in out.chunks_exact_mut(outputs) {
                        for (y, &b) in row.iter_mut().zip(bias) {
                            *y += b;
                        }
                    }
                },
            );
        }
        let mut before = None;
        if self.activation == Activation::Gelu {
            let mut activated = vec![0f32; rows * outputs];
            let source = values(&out);
            vectorized(
                #[inline(always)]
                || {
                    for (y, &x) in activated.iter_mut().zip(source) {
                        *y = gelu(x);
                    }
                },
            );
            before = keep.then_some(out);
            out = from_values(activated, &[rows, outputs]);
        }
        (out, Saved { x: x.clone(), weight, before })
    }

    /// Gradients of x, weight and bias.
    fn gradients(
        saved: Saved,
        mut gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        if let Some(before) = &saved.before {
            let source = values(before);
            let target = values_mut(&mut gradient);
            vectorized(
                #[inline(always)]
                || {
                    for (d, &x) in target.iter_mut().zip(source) {
                        *d *= gelu_slope(x);
                    }
                },
            );
        }
        let [inputs, outputs] = matrix(&saved.weight);
        let [want_x, want_weight, want_bias] = wanted;
        let db = want_bias.then(|| {
            let mut totals = vec![0f32; outputs];
            let rows = values(&gradient);
            vectorized(
                #[inline(always)]
                || add_rows(&mut totals, rows),
            );
            from_values(totals, &[outputs])
        });
        let dw = want_weight.then(|| {
            let product = contiguous(matmul(transposed(&saved.x), gradient.clone()));
            reshaped(&product, &[inputs * outputs])
        });
        let dx = want_x.then(|| matmul(gradient, transposed(&saved.weight)));
        [dx, dw, db]
    }
}

fn matrix(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

impl FusedOp<2> for Linear {
    type Saved = Saved;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], keep: bool) -> (FlexTensor, Saved) {
        self.output(x, weight, None, keep)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        [x, weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [dx, dw, _] = Self::gradients(saved, gradient, [x, weight, false]);
        [dx, dw]
    }
}

impl FusedOp<3> for Linear {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3], keep: bool) -> (FlexTensor, Saved) {
        self.output(x, weight, Some(bias), keep)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        Self::gradients(saved, gradient, wanted)
    }
}

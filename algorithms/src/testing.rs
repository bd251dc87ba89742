//! What the tests of both algorithms share: a training step as the trainer makes it, a step on one
//! global tape, and gradients by finite differences.

use burn::tensor::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::block::{BlockInput, Mode, Model, ParamSpec, StepKey, Targets};
use crate::init::initial_values;
use crate::random;
use crate::registry::model_params;
use crate::tensor::{tensor_from_slice, tensor_into_vec};

/// Values of all parameters, `[block][parameter][element]`.
pub(crate) type Values = Vec<Vec<Vec<f32>>>;

/// Any key.
pub(crate) const TRAIN: Mode = Mode::Train(StepKey { seed: 3, step: 1, microbatch: 2 });

/// Numbers in ±1, a function of the name.
pub(crate) fn noise(name: &str, length: usize) -> Vec<f32> {
    let mut generator = random::stream("test noise", &[name.as_bytes()]);
    (0..length).map(|_| (2.0 * random::unit(&mut generator) - 1.0) as f32).collect()
}

/// The model's initial values.
pub(crate) fn initial(model: &Model, seed: u64) -> Values {
    let value = |spec: &ParamSpec| {
        let mut out = vec![0.0; spec.len()];
        initial_values(seed, spec, &mut out);
        out
    };
    model.blocks.iter().map(|block| block.params().iter().map(value).collect()).collect()
}

/// [`initial`] plus noise, so that nothing is exactly 0 or 1 and every path carries a gradient.
pub(crate) fn perturbed(model: &Model, size: f32) -> Values {
    let mut values = initial(model, 1);
    for (block, params) in model.blocks.iter().zip(&mut values) {
        for (spec, param) in block.params().iter().zip(params) {
            for (value, noise) in param.iter_mut().zip(noise(&spec.name, spec.len())) {
                *value += size * noise;
            }
        }
    }
    values
}

fn leaves(values: &[Vec<f32>], device: &Device) -> Vec<Tensor<1>> {
    values.iter().map(|v| tensor_from_slice(v, device).require_grad()).collect()
}

/// The loss alone, without gradients.
pub(crate) fn loss(
    model: &Model,
    values: &Values,
    input: &BlockInput,
    targets: &Targets,
    mode: Mode,
) -> f64 {
    let device = Device::flex();
    let mut x = input.clone();
    for (block, params) in model.blocks.iter().zip(values) {
        let params: Vec<_> = params.iter().map(|v| tensor_from_slice(v, &device)).collect();
        x = BlockInput::Features(block.forward(&params, x, mode));
    }
    let BlockInput::Features(output) = x else { panic!("the last block gives features") };
    f64::from((model.loss)(output, targets, false).sum.into_scalar::<f32>())
}

/// Loss and gradients as the trainer computes them: every block its own graph.
pub(crate) fn blockwise(
    model: &Model,
    values: &Values,
    input: &BlockInput,
    targets: &Targets,
    mode: Mode,
) -> (f64, Values) {
    let device = Device::flex().autodiff();
    let mut stages = Vec::new();
    let mut x = input.clone();
    for (block, params) in model.blocks.iter().zip(values) {
        let params = leaves(params, &device);
        let leaf = match &x {
            BlockInput::Tokens(_) => None,
            BlockInput::Features(x) => Some(x.clone().autodiff().require_grad()),
        };
        let entering = leaf.clone().map_or(x, BlockInput::Features);
        let output = block.forward(&params, entering, mode);
        x = BlockInput::Features(output.clone().inner());
        stages.push((params, leaf, output));
    }
    let BlockInput::Features(output) = x else { panic!("the last block gives features") };
    let output = output.autodiff().require_grad();
    let loss = (model.loss)(output.clone(), targets, true).sum;
    let mut gradients = loss.backward();
    let mut seed = output.grad_remove(&mut gradients).expect("the output has a gradient");
    let mut results = Vec::new();
    for (params, leaf, output) in stages.into_iter().rev() {
        let mut gradients = (output * seed.clone().autodiff()).sum().backward();
        let gradient = |p: Tensor<1>| {
            tensor_into_vec(p.grad_remove(&mut gradients).expect("every parameter has a gradient"))
        };
        results.push(params.into_iter().map(gradient).collect());
        if let Some(leaf) = leaf {
            seed = leaf.grad_remove(&mut gradients).expect("the input has a gradient");
        }
    }
    results.reverse();
    (f64::from(loss.into_scalar::<f32>()), results)
}

/// Gradients from one tape over the whole model.
pub(crate) fn one_tape(
    model: &Model,
    values: &Values,
    input: &BlockInput,
    targets: &Targets,
    mode: Mode,
) -> Values {
    let device = Device::flex().autodiff();
    let params: Vec<_> = values.iter().map(|v| leaves(v, &device)).collect();
    let mut x = input.clone();
    for (block, params) in model.blocks.iter().zip(&params) {
        x = BlockInput::Features(block.forward(params, x, mode));
    }
    let BlockInput::Features(output) = x else { panic!("the last block gives features") };
    let gradients = (model.loss)(output, targets, false).sum.backward();
    let gradient = |p: &Tensor<1>| tensor_into_vec(p.grad(&gradients).expect("a gradient"));
    params.iter().map(|block| block.iter().map(gradient).collect()).collect()
}

/// Compares block-wise gradients with finite differences of the loss, along one random direction
/// per parameter (which involves all its elements), and with one tape's. Differences below
/// `tolerance · floor` are noise.
pub(crate) fn check_gradients(
    model: &Model,
    values: &Values,
    input: &BlockInput,
    targets: &Targets,
    (step, tolerance, floor): (f32, f64, f64),
) {
    let (_, gradients) = blockwise(model, values, input, targets, TRAIN);
    let reference = one_tape(model, values, input, targets, TRAIN);
    assert_eq!(gradients, reference, "a block's own graph gives what one tape gives, bit by bit");
    for (b, block) in model.blocks.iter().enumerate() {
        for (p, spec) in block.params().iter().enumerate() {
            let direction = noise(&format!("direction {}", spec.name), spec.len());
            let along = |sign: f32| {
                let mut moved = values.clone();
                for (value, d) in moved[b][p].iter_mut().zip(&direction) {
                    *value += sign * step * d;
                }
                loss(model, &moved, input, targets, TRAIN)
            };
            let numeric = (along(1.0) - along(-1.0)) / (2.0 * f64::from(step));
            let analytic: f64 =
                gradients[b][p].iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let scale = numeric.abs().max(analytic.abs()).max(floor);
            assert!(
                (numeric - analytic).abs() < tolerance * scale,
                "{}: numeric {numeric}, analytic {analytic}",
                spec.name
            );
        }
    }
}

/// The loss per element before and after, and the values that came out.
pub(crate) struct Descent {
    pub(crate) before: f64,
    pub(crate) after: f64,
    pub(crate) values: Values,
}

/// `steps` of gradient descent on one microbatch: plain, or with every element moved by the sign of
/// its gradient, which is quick to learn a toy by heart.
pub(crate) fn descend(
    model: &Model,
    (input, targets): (&BlockInput, &Targets),
    rate: f32,
    steps: usize,
    by_sign: bool,
) -> Descent {
    let mut values = initial(model, 5);
    let Targets::Classes(classes) = targets;
    let count = classes.dims()[0] as f32;
    let mut before = None;
    for step in 0..steps {
        let (loss, gradients) = blockwise(model, &values, input, targets, TRAIN);
        before.get_or_insert(loss);
        let rate = if by_sign { rate * (steps - step) as f32 / steps as f32 } else { rate };
        for (block, gradients) in values.iter_mut().zip(gradients) {
            for (param, gradient) in block.iter_mut().zip(gradients) {
                for (value, g) in param.iter_mut().zip(gradient) {
                    let mean = g / count;
                    *value -= rate * if by_sign { mean / (mean.abs() + 1e-6) } else { mean };
                }
            }
        }
    }
    let after = loss(model, &values, input, targets, TRAIN) / f64::from(count);
    Descent { before: before.unwrap_or_default() / f64::from(count), after, values }
}

/// The bytes of `model.safetensors` with these values.
pub(crate) fn safetensors(model: &Model, values: &Values) -> Vec<u8> {
    let flat = values.iter().flatten();
    let bytes: Vec<Vec<u8>> =
        flat.map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let specs = model_params(model);
    let views = specs.iter().zip(&bytes).map(|((_, spec), bytes)| {
        let view = TensorView::new(Dtype::F32, spec.shape.clone(), bytes).expect("sizes fit");
        (spec.name.clone(), view)
    });
    ::safetensors::serialize(views, None).expect("serialisable")
}

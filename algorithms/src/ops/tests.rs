//! Every fused operation against the same operation composed of burn's: outputs and all gradients.

use burn::tensor::{Device, Int, Tensor};

use super::convolution::{Convolution, PixelLayout};
use super::group_norm::GroupNorm;
use super::linear::Activation;
use super::{
    attention, causal_attention, convolution, cross_entropy, embedding, group_norm, layer_norm,
    linear,
};
use crate::tensor::{tensor_from_slice, tensor_into_vec};
use crate::testing::noise;

/// Runs both forms on leaves of the given lengths and compares. `shape` turns the leaves and a
/// flag (fused?) into the output.
fn compare(lengths: &[usize], run: impl Fn(Vec<Tensor<1>>, bool) -> Tensor<2>) {
    let device = Device::flex().autodiff();
    let outcome = |fused: bool| {
        let leaves: Vec<Tensor<1>> = lengths
            .iter()
            .enumerate()
            .map(|(i, &n)| {
                tensor_from_slice(&noise(&format!("input {i}"), n), &device).require_grad()
            })
            .collect();
        let output = run(leaves.clone(), fused);
        let values = tensor_into_vec(output.clone());
        let weights = tensor_from_slice(&noise("weights", values.len()), &device);
        let gradients = (output.clone() * weights.reshape(output.dims())).sum().backward();
        let mut all = vec![values];
        for leaf in leaves {
            all.push(tensor_into_vec(leaf.grad(&gradients).expect("a gradient")));
        }
        all
    };
    for (part, (fused, composed)) in outcome(true).iter().zip(&outcome(false)).enumerate() {
        assert_eq!(fused.len(), composed.len(), "part {part}");
        let size = composed.iter().fold(1e-3f32, |a, &b| a.max(b.abs()));
        for (i, (a, b)) in fused.iter().zip(composed).enumerate() {
            assert!((a - b).abs() < 2e-5 * size, "part {part}, element {i}: {a}, expected {b}");
        }
    }
}

#[test]
fn layer_norm_is_exact() {
    compare(&[7 * 37, 37, 37], |leaves, fused| {
        let [x, weight, bias] = leaves.try_into().expect("three");
        let x = x.reshape([7, 37]) * 3.0 + 1.0;
        let run = if fused { layer_norm } else { layer_norm::composed };
        run(x, weight, bias)
    });
}

#[test]
fn linear_is_exact_with_and_without_bias_and_activation() {
    for activation in [Activation::None, Activation::Gelu] {
        compare(&[9 * 13, 13 * 21, 21], |leaves, fused| {
            let [x, weight, bias] = leaves.try_into().expect("three");
            let x = x.reshape([9, 13]) * 2.0;
            if fused {
                return linear(x, weight, Some(bias), activation);
            }
            linear::composed(x, weight.reshape([13, 21]), Some(bias), activation)
        });
    }
    compare(&[9 * 13, 13 * 21], |leaves, fused| {
        let [x, weight] = leaves.try_into().expect("two");
        let x = x.reshape([9, 13]);
        if fused {
            return linear(x, weight, None, Activation::None);
        }
        linear::composed(x, weight.reshape([13, 21]), None, Activation::None)
    });
}

#[test]
fn attention_is_exact() {
    let (batch, sequence, heads, size) = (2, 9, 3, 5);
    compare(&[batch * sequence * 3 * heads * size], |leaves, fused| {
        let packed = leaves[0].clone().reshape([batch * sequence, 3 * heads * size]) * 2.0;
        let run = if fused { causal_attention } else { attention::composed };
        run(packed, sequence, heads)
    });
}

#[test]
fn attention_does_not_see_the_future() {
    let device = Device::flex();
    let mut values = noise("packed", 8 * 12);
    let run = |values: &[f32]| {
        let packed = tensor_from_slice(values, &device).reshape([8, 12]);
        tensor_into_vec(causal_attention(packed, 8, 2))
    };
    let before = run(&values);
    values[5 * 12..].fill(9.0);
    let after = run(&values);
    assert_eq!(before[..5 * 4], after[..5 * 4]);
    assert_ne!(before[5 * 4..], after[5 * 4..]);
}

#[test]
fn cross_entropy_is_exact_and_counts_right_answers() {
    let device = Device::flex().autodiff();
    let targets = Tensor::<1, Int>::from_ints([0, 4, 2, 2, 1, 3], &device);
    compare(&[6 * 5], |leaves, fused| {
        let logits = leaves[0].clone().reshape([6, 5]) * 4.0;
        let sum = if fused {
            cross_entropy(logits, &targets, false).0
        } else {
            cross_entropy::composed(logits, targets.clone())
        };
        sum.reshape([1, 1])
    });
    let logits = Tensor::<2>::from_floats(
        [[1.0, 1.0, 0.0], [0.0, 2.0, 3.0], [0.0, 5.0, 1.0]],
        &Device::flex(),
    );
    let targets = Tensor::<1, Int>::from_ints([0, 1, 1], &Device::flex());
    // Row 0 has two largest: the first counts.
    assert_eq!(cross_entropy(logits, &targets, true).1, Some(2));
}

#[test]
fn embedding_is_exact_with_repeated_tokens() {
    let device = Device::flex().autodiff();
    let tokens = Tensor::<2, Int>::from_ints([[1, 4, 1], [0, 4, 4]], &device);
    compare(&[5 * 6, 4 * 6], |leaves, fused| {
        let [table, positions] = leaves.try_into().expect("two");
        if fused {
            return embedding(tokens.clone(), table, positions, 6);
        }
        embedding::composed(tokens.clone().reshape([6]), table, positions, 3, 6)
    });
}

#[test]
fn convolution_is_exact_for_every_shape_in_use() {
    let first = Convolution {
        batch: 2,
        height: 7,
        width: 6,
        channels: 3,
        outputs: 4,
        kernel: 3,
        stride: 1,
        padding: 1,
        layout: PixelLayout::ChannelsLast,
    };
    let shapes = [
        first,
        Convolution { stride: 2, layout: PixelLayout::ChannelsFirst, ..first },
        Convolution { kernel: 1, padding: 0, stride: 2, ..first },
        Convolution { kernel: 1, padding: 0, ..first },
        Convolution { height: 1, width: 1, stride: 2, ..first },
    ];
    for sizes in shapes {
        let image = sizes.height * sizes.width * sizes.channels;
        let weights = sizes.kernel * sizes.kernel * sizes.channels * sizes.outputs;
        compare(&[sizes.batch * image, weights], |leaves, fused| {
            let [x, weight] = leaves.try_into().expect("two");
            let x = x.reshape([sizes.batch, image]);
            let run = if fused { convolution } else { convolution::composed };
            run(x, weight, sizes)
        });
    }
}

#[test]
fn group_norm_is_exact_with_and_without_shortcut() {
    let sizes = GroupNorm { pixels: 10, channels: 6, groups: 3 };
    compare(&[3 * 60, 6, 6, 3 * 60], |leaves, fused| {
        let [x, weight, bias, shortcut] = leaves.try_into().expect("four");
        let (x, shortcut) = (x.reshape([30, 6]) * 2.0 + 0.5, shortcut.reshape([30, 6]));
        let run = if fused { group_norm } else { group_norm::composed };
        run(x, weight, bias, Some(shortcut), sizes)
    });
    compare(&[3 * 60, 6, 6], |leaves, fused| {
        let [x, weight, bias] = leaves.try_into().expect("three");
        let run = if fused { group_norm } else { group_norm::composed };
        run(x.reshape([30, 6]), weight, bias, None, sizes)
    });
}

#[test]
fn a_diverged_activation_stays_visible() {
    let device = Device::flex();
    let x = tensor_from_slice(&[f32::NAN, 1.0, 2.0, 3.0], &device).reshape([1, 4]);
    let one = || tensor_from_slice(&[1.0; 4], &device);
    let sizes = GroupNorm { pixels: 1, channels: 4, groups: 1 };
    let normed = group_norm(x.clone(), one(), one(), None, sizes);
    assert!(tensor_into_vec(normed)[0].is_nan());
    let normed = layer_norm(x.clone(), one(), one());
    assert!(tensor_into_vec(normed)[0].is_nan());
    let target = Tensor::<1, Int>::from_ints([1], &device);
    let (sum, _) = cross_entropy(x, &target, true);
    assert!(sum.into_scalar::<f32>().is_nan());
}

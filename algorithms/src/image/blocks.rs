//! The blocks of the residual network: stem, residual blocks, head. Images enter as
//! `[batch, channels · height · width]`; between blocks an activation is
//! `[batch, height · width · channels]`.

use burn::tensor::Tensor;

use crate::block::{Block, BlockInput, Init, Mode, ParamSpec};
use crate::image::architecture::Plane;
use crate::ops::{self, Activation, Convolution, GroupNorm, PixelLayout};

/// Most groups per norm; fewer where they do not divide the channels.
const GROUPS_MAX: usize = 8;

fn features(input: BlockInput, block: &str) -> Tensor<2> {
    match input {
        BlockInput::Features(x) => x,
        BlockInput::Tokens(_) => panic!("block `{block}` takes images, not tokens"),
    }
}

fn groups(channels: usize) -> usize {
    (1..=GROUPS_MAX).rev().find(|&groups| channels.is_multiple_of(groups)).unwrap_or(1)
}

fn normalise(
    x: Tensor<2>,
    params: &[Tensor<1>],
    shortcut: Option<Tensor<2>>,
    plane: Plane,
) -> Tensor<2> {
    let Plane { channels, .. } = plane;
    let sizes = GroupNorm { pixels: plane.pixels(), channels, groups: groups(channels) };
    ops::group_norm(x, params[0].clone(), params[1].clone(), shortcut, sizes)
}

/// Normal with the variance that keeps activations alive through rectifiers (He et al. 2015).
fn kernel(name: String, size: usize, inputs: usize, outputs: usize) -> ParamSpec {
    let std = (2.0 / (size * size * inputs) as f32).sqrt();
    let shape = vec![size, size, inputs, outputs];
    ParamSpec { name, shape, init: Init::Normal { std }, decay: true }
}

fn vector(name: String, length: usize, init: Init) -> ParamSpec {
    ParamSpec { name, shape: vec![length], init, decay: false }
}

/// A convolution of `size`² over planes of `from`, padded to keep the borders.
fn convolution(
    from: Plane,
    batch: usize,
    outputs: usize,
    size: usize,
    stride: usize,
) -> Convolution {
    Convolution {
        batch,
        height: from.height,
        width: from.width,
        channels: from.channels,
        outputs,
        kernel: size,
        stride,
        padding: size / 2,
        layout: PixelLayout::ChannelsLast,
    }
}

/// The first convolution.
pub(super) struct Stem {
    from: Plane,
    to: Plane,
    stride: usize,
    params: Vec<ParamSpec>,
}

impl Stem {
    pub(super) fn new(from: Plane, channels: usize, stride: usize) -> Self {
        let params = vec![
            kernel("stem.convolution.weight".into(), 3, from.channels, channels),
            vector("stem.norm.weight".into(), channels, Init::Ones),
            vector("stem.norm.bias".into(), channels, Init::Zeros),
        ];
        Self { from, to: from.convolved(stride, channels), stride, params }
    }

    pub(super) fn output(&self) -> Plane {
        self.to
    }
}

impl Block for Stem {
    fn name(&self) -> &str {
        "stem"
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn forward(&self, params: &[Tensor<1>], input: BlockInput, _mode: Mode) -> Tensor<2> {
        let x = features(input, "stem");
        let [batch, _] = x.dims();
        let sizes = Convolution {
            layout: PixelLayout::ChannelsFirst,
            ..convolution(self.from, batch, self.to.channels, 3, self.stride)
        };
        let x = ops::convolution(x, params[0].clone(), sizes);
        normalise(x, &params[1..3], None, self.to).reshape([batch, self.to.features()])
    }
}

/// Two convolutions with a shortcut around them.
pub(super) struct Residual {
    name: String,
    from: Plane,
    to: Plane,
    stride: usize,
    /// The last one is the shortcut's projection, where the shape changes.
    params: Vec<ParamSpec>,
}

impl Residual {
    pub(super) fn new(name: String, from: Plane, channels: usize, stride: usize) -> Self {
        let mut params = vec![
            kernel(format!("{name}.first.weight"), 3, from.channels, channels),
            vector(format!("{name}.first.norm.weight"), channels, Init::Ones),
            vector(format!("{name}.first.norm.bias"), channels, Init::Zeros),
            kernel(format!("{name}.second.weight"), 3, channels, channels),
            // From 0, so that every block begins as its shortcut (Goyal et al. 2017).
            vector(format!("{name}.second.norm.weight"), channels, Init::Zeros),
            vector(format!("{name}.second.norm.bias"), channels, Init::Zeros),
        ];
        if stride != 1 || from.channels != channels {
            params.push(kernel(format!("{name}.shortcut.weight"), 1, from.channels, channels));
        }
        Self { name, from, to: from.convolved(stride, channels), stride, params }
    }

    pub(super) fn output(&self) -> Plane {
        self.to
    }
}

impl Block for Residual {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn forward(&self, params: &[Tensor<1>], input: BlockInput, _mode: Mode) -> Tensor<2> {
        let x = features(input, &self.name);
        let [batch, _] = x.dims();
        let (from, to) = (self.from, self.to);
        let x = x.reshape([batch * from.pixels(), from.channels]);
        let first = convolution(from, batch, to.channels, 3, self.stride);
        let inner = ops::convolution(x.clone(), params[0].clone(), first);
        let inner = normalise(inner, &params[1..3], None, to);
        let second = convolution(to, batch, to.channels, 3, 1);
        let inner = ops::convolution(inner, params[3].clone(), second);
        let shortcut = match params.get(6) {
            None => x,
            Some(weight) => {
                let sizes = convolution(from, batch, to.channels, 1, self.stride);
                ops::convolution(x, weight.clone(), sizes)
            }
        };
        normalise(inner, &params[4..6], Some(shortcut), to).reshape([batch, to.features()])
    }
}

/// Mean over the image, then one logit per class.
pub(super) struct Head {
    from: Plane,
    params: Vec<ParamSpec>,
}

impl Head {
    pub(super) fn new(from: Plane, classes: usize) -> Self {
        let weight = ParamSpec {
            name: "head.weight".into(),
            shape: vec![from.channels, classes],
            init: Init::Normal { std: (1.0 / from.channels as f32).sqrt() },
            decay: true,
        };
        Self { from, params: vec![weight, vector("head.bias".into(), classes, Init::Zeros)] }
    }
}

impl Block for Head {
    fn name(&self) -> &str {
        "head"
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn forward(&self, params: &[Tensor<1>], input: BlockInput, _mode: Mode) -> Tensor<2> {
        let x = features(input, "head");
        let [batch, _] = x.dims();
        let channels = self.from.channels;
        let x = x.reshape([batch, self.from.pixels(), channels]);
        let pooled = x.mean_dim(1).reshape([batch, channels]);
        ops::linear(pooled, params[0].clone(), Some(params[1].clone()), Activation::None)
    }
}

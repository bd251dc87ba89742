//! Group normalisation (Wu and He 2018) with what follows it in a residual network: the sum with
//! the shortcut and the rectifier. It knows no other sample, so a microbatch's gradient does not
//! depend on what it is computed together with.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Tensor, activation};

use super::fused::{FusedOp, apply, from_values, input, is_fusable, values};
use super::vector::vectorized;

const EPSILON: f32 = 1e-5;

/// A group normalisation's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupNorm {
    /// Pixels of one image.
    pub(crate) pixels: usize,
    /// Channels.
    pub(crate) channels: usize,
    /// Groups of channels normalised together; divides the channels.
    pub(crate) groups: usize,
}

/// `relu(norm(x) · weight + bias + shortcut)`: `x` and `shortcut` are `[batch · pixels, channels]`,
/// `weight` and `bias` `[channels]`.
pub(crate) fn group_norm(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    shortcut: Option<Tensor<2>>,
    sizes: GroupNorm,
) -> Tensor<2> {
    if !is_fusable(&x) {
        return composed(x, weight, bias, shortcut, sizes);
    }
    match shortcut {
        None => apply(sizes, [input(x), input(weight), input(bias)]),
        Some(shortcut) => apply(sizes, [input(x), input(weight), input(bias), input(shortcut)]),
    }
}

pub(super) fn composed(
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    shortcut: Option<Tensor<2>>,
    sizes: GroupNorm,
) -> Tensor<2> {
    let [rows, channels] = x.dims();
    let GroupNorm { pixels, groups, .. } = sizes;
    let (batch, members) = (rows / pixels, channels / groups);
    let x = x.reshape([batch, pixels, groups, members]);
    let centred = x.clone() - x.mean_dims(&[1, 3]);
    let variance = (centred.clone() * centred.clone()).mean_dims(&[1, 3]);
    let normed = (centred / (variance + EPSILON).sqrt()).reshape([rows, channels]);
    let scaled = normed * weight.unsqueeze() + bias.unsqueeze();
    activation::relu(match shortcut {
        Some(shortcut) => scaled + shortcut,
        None => scaled,
    })
}

#[derive(Clone, Debug)]
pub(super) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    /// Its sign is the rectifier's mask.
    output: FlexTensor,
    /// Mean and reciprocal standard deviation of every group of every image.
    statistics: Vec<[f32; 2]>,
}

impl GroupNorm {
    /// Sums `term(row, channel)` over the pixels of one image, per channel.
    #[inline(always)]
    fn per_channel(&self, totals: &mut [f32], image: &[f32], term: impl Fn(f32, usize) -> f32) {
        totals.fill(0.0);
        for pixel in image.chunks_exact(self.channels) {
            for (c, (total, &x)) in totals.iter_mut().zip(pixel).enumerate() {
                *total += term(x, c);
            }
        }
    }

    /// Replaces each channel's value by its group's mean per element.
    #[inline(always)]
    fn group_means(&self, totals: &mut [f32]) {
        let members = self.channels / self.groups;
        let count = (members * self.pixels) as f32;
        for group in totals.chunks_exact_mut(members) {
            let mean = group.iter().sum::<f32>() / count;
            group.fill(mean);
        }
    }

    fn output(
        &self,
        [x, weight, bias]: [&FlexTensor; 3],
        shortcut: Option<&FlexTensor>,
        keep: bool,
    ) -> (FlexTensor, Saved) {
        let (channels, image) = (self.channels, self.pixels * self.channels);
        let source = values(x);
        let (weights, biases) = (values(weight), values(bias));
        let shortcut = shortcut.map(values);
        let mut out = vec![0f32; source.len()];
        let mut statistics = Vec::new();
        vectorized(
            #[inline(always)]
            || {
                let (mut mean, mut spread) = (vec![0f32; channels], vec![0f32; channels]);
                for (b, (input, target)) in
                    source.chunks_exact(image).zip(out.chunks_exact_mut(image)).enumerate()
                {
                    self.per_channel(&mut mean, input, |x, _| x);
                    self.group_means(&mut mean);
                    self.per_channel(&mut spread, input, |x, c| (x - mean[c]) * (x - mean[c]));
                    self.group_means(&mut spread);
                    for s in &mut spread {
                        *s = 1.0 / (*s + EPSILON).sqrt();
                    }
                    if keep {
                        let first = (0..channels).step_by(channels / self.groups);
                        statistics.extend(first.map(|c| [mean[c], spread[c]]));
                    }
                    let pixels =
                        input.chunks_exact(channels).zip(target.chunks_exact_mut(channels));
                    match shortcut {
                        None => {
                            for (x, y) in pixels {
                                for c in 0..channels {
                                    let v = (x[c] - mean[c]) * spread[c] * weights[c] + biases[c];
                                    y[c] = if v > 0.0 { v } else { 0.0 * v };
                                }
                            }
                        }
                        Some(shortcut) => {
                            let other = shortcut[b * image..(b + 1) * image].chunks_exact(channels);
                            for ((x, y), s) in pixels.zip(other) {
                                for c in 0..channels {
                                    let v = (x[c] - mean[c]) * spread[c] * weights[c]
                                        + biases[c]
                                        + s[c];
                                    y[c] = if v > 0.0 { v } else { 0.0 * v };
                                }
                            }
                        }
                    }
                }
            },
        );
        let output = from_values(out, &[source.len() / channels, channels]);
        let saved =
            Saved { x: x.clone(), weight: weight.clone(), output: output.clone(), statistics };
        (output, saved)
    }

    /// Gradients of x, weight, bias and shortcut.
    fn gradients(&self, saved: &Saved, gradient: FlexTensor) -> [FlexTensor; 4] {
        let (channels, image) = (self.channels, self.pixels * self.channels);
        let members = channels / self.groups;
        let weights = values(&saved.weight);
        let (source, output) = (values(&saved.x), values(&saved.output));
        let upstream = values(&gradient);
        let mut masked = vec![0f32; source.len()];
        let mut dx = vec![0f32; source.len()];
        let (mut dw, mut db) = (vec![0f32; channels], vec![0f32; channels]);
        vectorized(
            #[inline(always)]
            || {
                for ((d, &g), &y) in masked.iter_mut().zip(upstream).zip(output) {
                    *d = if y > 0.0 { g } else { 0.0 };
                }
                let (mut mean, mut spread) = (vec![0f32; channels], vec![0f32; channels]);
                let (mut sums, mut products) = (vec![0f32; channels], vec![0f32; channels]);
                for (b, groups) in saved.statistics.chunks_exact(self.groups).enumerate() {
                    let range = b * image..(b + 1) * image;
                    let (x, dy) = (&source[range.clone()], &masked[range.clone()]);
                    for (c, (m, s)) in mean.iter_mut().zip(&mut spread).enumerate() {
                        [*m, *s] = groups[c / members];
                    }
                    sums.fill(0.0);
                    products.fill(0.0);
                    for (x, dy) in x.chunks_exact(channels).zip(dy.chunks_exact(channels)) {
                        for c in 0..channels {
                            sums[c] += dy[c];
                            products[c] += dy[c] * ((x[c] - mean[c]) * spread[c]);
                        }
                    }
                    for c in 0..channels {
                        db[c] += sums[c];
                        dw[c] += products[c];
                        sums[c] *= weights[c];
                        products[c] *= weights[c];
                    }
                    self.group_means(&mut sums);
                    self.group_means(&mut products);
                    let pixels = x.chunks_exact(channels).zip(dy.chunks_exact(channels));
                    for ((x, dy), dx) in pixels.zip(dx[range].chunks_exact_mut(channels)) {
                        for c in 0..channels {
                            let hat = (x[c] - mean[c]) * spread[c];
                            dx[c] = spread[c] * (dy[c] * weights[c] - sums[c] - hat * products[c]);
                        }
                    }
                }
            },
        );
        let shape = [source.len() / channels, channels];
        [
            from_values(dx, &shape),
            from_values(dw, &[channels]),
            from_values(db, &[channels]),
            from_values(masked, &shape),
        ]
    }
}

impl FusedOp<3> for GroupNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight, bias]: &[FlexTensor; 3], keep: bool) -> (FlexTensor, Saved) {
        self.output([x, weight, bias], None, keep)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        _wanted: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [dx, dw, db, _] = self.gradients(&saved, gradient);
        [Some(dx), Some(dw), Some(db)]
    }
}

impl FusedOp<4> for GroupNorm {
    type Saved = Saved;

    fn forward(
        &self,
        [x, weight, bias, shortcut]: &[FlexTensor; 4],
        keep: bool,
    ) -> (FlexTensor, Saved) {
        self.output([x, weight, bias], Some(shortcut), keep)
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        _wanted: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        self.gradients(&saved, gradient).map(Some)
    }
}

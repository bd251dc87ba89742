//! 2-D convolution as one matrix product over gathered patches.
//!
//! Activations are matrices `[batch · height · width, channels]`, so the product's result is the next
//! layer's input as it stands: no layout copies, which is where burn's own convolution spends its
//! time on a processor.

use burn::backend::flex::FlexTensor;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{DType, Tensor};

use super::fused::{
    FusedOp, apply, contiguous, from_values, input, is_fusable, matmul, reshaped, transposed,
    values,
};
use super::vector::vectorized;

/// Order of the elements of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PixelLayout {
    /// `[channels, height, width]`: images as data sets give them.
    ChannelsFirst,
    /// `[height, width, channels]`: everything inside the model.
    ChannelsLast,
}

/// A convolution's sizes. The kernel is square, the padding is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Convolution {
    /// Images.
    pub(crate) batch: usize,
    /// Rows of the input.
    pub(crate) height: usize,
    /// Columns of the input.
    pub(crate) width: usize,
    /// Channels of the input.
    pub(crate) channels: usize,
    /// Channels of the output.
    pub(crate) outputs: usize,
    /// Rows and columns of the kernel.
    pub(crate) kernel: usize,
    /// Step between patches.
    pub(crate) stride: usize,
    /// Zeros on every side.
    pub(crate) padding: usize,
    /// How the input lies in memory.
    pub(crate) layout: PixelLayout,
}

impl Convolution {
    /// Rows and columns of the output.
    pub(crate) fn output_size(&self) -> (usize, usize) {
        let along = |n: usize| (n + 2 * self.padding - self.kernel) / self.stride + 1;
        (along(self.height), along(self.width))
    }

    /// Elements of one patch, in the order (row, column, channel).
    fn patch(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }

    fn output_rows(&self) -> usize {
        let (height, width) = self.output_size();
        self.batch * height * width
    }

    /// Distance in memory between neighbouring rows, columns and channels.
    fn strides(&self) -> [usize; 3] {
        match self.layout {
            PixelLayout::ChannelsFirst => [self.width, 1, self.height * self.width],
            PixelLayout::ChannelsLast => [self.width * self.channels, self.channels, 1],
        }
    }

    /// Calls `visit(start in the patch matrix, start in the image, channels' distance)` for every
    /// kernel cell of every patch that lies inside the image.
    #[inline(always)]
    fn visit_cells(&self, mut visit: impl FnMut(usize, usize)) {
        let (out_height, out_width) = self.output_size();
        let [row, column, _] = self.strides();
        let image = self.height * self.width * self.channels;
        let mut patch = 0;
        for b in 0..self.batch {
            for oy in 0..out_height {
                for ox in 0..out_width {
                    for ky in 0..self.kernel {
                        // Underflow wraps to a number beyond the image: outside as well.
                        let y = (oy * self.stride + ky).wrapping_sub(self.padding);
                        if y >= self.height {
                            continue;
                        }
                        for kx in 0..self.kernel {
                            let x = (ox * self.stride + kx).wrapping_sub(self.padding);
                            if x < self.width {
                                let cell = (ky * self.kernel + kx) * self.channels;
                                visit(patch + cell, b * image + y * row + x * column);
                            }
                        }
                    }
                    patch += self.patch();
                }
            }
        }
    }

    fn gather(&self, image: &[f32]) -> Vec<f32> {
        let mut patches = vec![0f32; self.output_rows() * self.patch()];
        let [_, _, distance] = self.strides();
        let channels = self.channels;
        vectorized(
            #[inline(always)]
            || {
                if distance == 1 {
                    self.visit_cells(|to, from| {
                        patches[to..to + channels].copy_from_slice(&image[from..from + channels]);
                    });
                } else {
                    self.visit_cells(|to, from| {
                        for c in 0..channels {
                            patches[to + c] = image[from + c * distance];
                        }
                    });
                }
            },
        );
        patches
    }

    fn scatter(&self, patches: &[f32]) -> Vec<f32> {
        let mut image = vec![0f32; self.batch * self.height * self.width * self.channels];
        let [_, _, distance] = self.strides();
        let channels = self.channels;
        vectorized(
            #[inline(always)]
            || {
                if distance == 1 {
                    self.visit_cells(|from, to| {
                        let source = &patches[from..from + channels];
                        for (d, &g) in image[to..to + channels].iter_mut().zip(source) {
                            *d += g;
                        }
                    });
                } else {
                    self.visit_cells(|from, to| {
                        for c in 0..channels {
                            image[to + c * distance] += patches[from + c];
                        }
                    });
                }
            },
        );
        image
    }

    /// Whether the patch matrix is the input itself.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1
            && self.stride == 1
            && self.padding == 0
            && self.layout == PixelLayout::ChannelsLast
    }
}

/// Convolves `x`, which holds `batch · height · width · channels` elements in any matrix shape.
/// `weight` holds `[kernel, kernel, channels, outputs]` flat. The result is
/// `[batch · height' · width', outputs]`.
pub(crate) fn convolution(x: Tensor<2>, weight: Tensor<1>, sizes: Convolution) -> Tensor<2> {
    if is_fusable(&x) && x.dtype() == DType::F32 {
        return apply(sizes, [input(x), input(weight)]);
    }
    composed(x, weight, sizes)
}

pub(super) fn composed(x: Tensor<2>, weight: Tensor<1>, sizes: Convolution) -> Tensor<2> {
    let Convolution { batch, height, width, channels, outputs, kernel, stride, padding, layout } =
        sizes;
    let image = match layout {
        PixelLayout::ChannelsFirst => x.reshape([batch, channels, height, width]),
        PixelLayout::ChannelsLast => {
            x.reshape([batch, height, width, channels]).permute([0, 3, 1, 2])
        }
    };
    let weight = weight.reshape([kernel, kernel, channels, outputs]).permute([3, 2, 0, 1]);
    let options = ConvOptions::new([stride, stride], [padding, padding], [1, 1], 1);
    let out = conv2d(image, weight, None, options);
    out.permute([0, 2, 3, 1]).reshape([sizes.output_rows(), outputs])
}

#[derive(Clone, Debug)]
pub(super) struct Saved {
    patches: FlexTensor,
    weight: FlexTensor,
    shape: Vec<usize>,
}

impl FusedOp<2> for Convolution {
    type Saved = Saved;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], _keep: bool) -> (FlexTensor, Saved) {
        let patches = if self.is_pointwise() {
            reshaped(x, &[self.output_rows(), self.patch()])
        } else {
            from_values(self.gather(values(x)), &[self.output_rows(), self.patch()])
        };
        let weight = reshaped(weight, &[self.patch(), self.outputs]);
        let out = matmul(patches.clone(), weight.clone());
        let shape = x.layout().shape().to_vec();
        (out, Saved { patches, weight, shape })
    }

    fn backward(
        &self,
        saved: Saved,
        gradient: FlexTensor,
        [want_x, want_weight]: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let dw = want_weight.then(|| {
            let product = contiguous(matmul(transposed(&saved.patches), gradient.clone()));
            reshaped(&product, &[self.patch() * self.outputs])
        });
        let dx = want_x.then(|| {
            let patches = contiguous(matmul(gradient, transposed(&saved.weight)));
            if self.is_pointwise() {
                reshaped(&patches, &saved.shape)
            } else {
                from_values(self.scatter(values(&patches)), &saved.shape)
            }
        });
        [dx, dw]
    }
}

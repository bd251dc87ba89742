//! A model is a list of blocks; each block is its own autograd graph.
//!
//! The training step is a loop over blocks (see `trainer`): detach the input, run `forward`, keep
//! (leaf, output); the backward pass seeds the output's gradient and takes the input's and the
//! parameters' gradients. So a block must touch nothing but its arguments: no global generator, no
//! state, no parameter of another block. Between blocks an activation is always a matrix
//! `[batch, features]`; a block reshapes inside (reshaping a contiguous tensor copies nothing).

use burn::tensor::{Int, Tensor};

/// How a parameter begins, as a pure function of (seed, parameter name).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform in ±bound.
    Uniform {
        /// Half the width.
        bound: f32,
    },
}

/// One parameter tensor of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in model files and checkpoints, unique in the model: `layers.3.attention.qkv.weight`.
    pub name: String,
    /// Its shape; the product is its length in the flat buffer.
    pub shape: Vec<usize>,
    /// How it begins.
    pub init: Init,
    /// Whether weight decay applies (matrices yes; biases, norms and embeddings no).
    pub decay: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What keys the random numbers of one forward pass: never the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKey {
    /// The job's seed.
    pub seed: u64,
    /// The optimiser step.
    pub step: u64,
    /// The microbatch within the step, over all lanes.
    pub microbatch: u64,
}

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Training: dropout and the like are on, keyed.
    Train(StepKey),
    /// Validation and serving.
    Evaluate,
}

/// What enters a block.
#[derive(Clone, Debug)]
pub enum BlockInput {
    /// The microbatch, for the first block: token ids `[batch, sequence]`.
    Tokens(Tensor<2, Int>),
    /// The microbatch (first block) or the previous block's output: `[batch, features]`.
    Features(Tensor<2>),
}

/// One segment of a model.
pub trait Block: Send {
    /// Name for logs and timings, such as `layers.3`.
    fn name(&self) -> &str;

    /// Its parameters, in the order in which `forward` takes them.
    fn params(&self) -> &[ParamSpec];

    /// Output `[batch, features]`. `params[i]` is flat, of length `self.params()[i].len()`: the
    /// block reshapes it.
    fn forward(&self, params: &[Tensor<1>], input: BlockInput, mode: Mode) -> Tensor<2>;
}

/// What the last block's output is compared with.
#[derive(Clone, Debug)]
pub enum Targets {
    /// One class per row of the output (image classification: `[batch]`; language model:
    /// `[batch × sequence]`, the output being reshaped to `[batch × sequence, vocabulary]`).
    Classes(Tensor<1, Int>),
}

/// A loss over one microbatch.
#[derive(Clone, Debug)]
pub struct LossOutput {
    /// Sum (not mean) of the loss over all counted elements, shape `[1]`, differentiable.
    pub sum: Tensor<1>,
    /// Elements that were counted: samples or tokens.
    pub count: u64,
    /// Further sums for metrics, such as the number of right answers; each divided by the global
    /// count after the reduction. The order is that of [`Model::sums`].
    pub sums: Vec<f64>,
}

/// A model: blocks in order, and the loss at the end.
pub struct Model {
    /// Blocks in forward order.
    pub blocks: Vec<Box<dyn Block>>,
    /// Names of the extra metric sums, such as `accuracy`.
    pub sums: Vec<String>,
    /// The loss over the last block's output.
    pub loss: fn(output: Tensor<2>, targets: &Targets, with_sums: bool) -> LossOutput,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let blocks: Vec<&str> = self.blocks.iter().map(|b| b.name()).collect();
        f.debug_struct("Model").field("blocks", &blocks).field("sums", &self.sums).finish()
    }
}

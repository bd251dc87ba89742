//! The blocks of the language model: embedding, layers, head. Between them an activation is
//! `[batch, sequence · width]`; inside, one row per position.
//!
//! Dropout acts on the embedding and on both residual branches, not on attention weights.

use burn::tensor::Tensor;

use crate::block::{Block, BlockInput, Mode, ParamSpec};
use crate::ops::{self, Activation};
use crate::transformer::architecture::Architecture;

/// Parameters of one dense layer or norm.
type Pair<'a> = [&'a Tensor<1>; 2];

/// A layer's parameters by role, in the order of [`Architecture::layer_params`].
pub(super) struct LayerParams<'a> {
    pub(super) attention_norm: Pair<'a>,
    pub(super) qkv: Pair<'a>,
    pub(super) output: Pair<'a>,
    pub(super) mlp_norm: Pair<'a>,
    pub(super) up: Pair<'a>,
    pub(super) down: Pair<'a>,
}

impl<'a> LayerParams<'a> {
    pub(super) fn new(params: &'a [Tensor<1>]) -> Self {
        let pair = |i: usize| [&params[2 * i], &params[2 * i + 1]];
        Self {
            attention_norm: pair(0),
            qkv: pair(1),
            output: pair(2),
            mlp_norm: pair(3),
            up: pair(4),
            down: pair(5),
        }
    }

    pub(super) fn queries_keys_values(&self, x: Tensor<2>) -> Tensor<2> {
        dense(norm(x, self.attention_norm), self.qkv, Activation::None)
    }

    pub(super) fn attention_output(&self, attended: Tensor<2>) -> Tensor<2> {
        dense(attended, self.output, Activation::None)
    }

    pub(super) fn mlp(&self, x: Tensor<2>) -> Tensor<2> {
        let up = dense(norm(x, self.mlp_norm), self.up, Activation::Gelu);
        dense(up, self.down, Activation::None)
    }
}

fn norm(x: Tensor<2>, [weight, bias]: Pair<'_>) -> Tensor<2> {
    ops::layer_norm(x, weight.clone(), bias.clone())
}

fn dense(x: Tensor<2>, [weight, bias]: Pair<'_>, activation: Activation) -> Tensor<2> {
    ops::linear(x, weight.clone(), Some(bias.clone()), activation)
}

/// Logits of every row.
pub(super) fn logits(params: &[Tensor<1>], x: Tensor<2>) -> Tensor<2> {
    let normed = norm(x, [&params[0], &params[1]]);
    ops::linear(normed, params[2].clone(), None, Activation::None)
}

fn features(input: BlockInput, block: &str) -> Tensor<2> {
    match input {
        BlockInput::Features(x) => x,
        BlockInput::Tokens(_) => panic!("block `{block}` takes features, not tokens"),
    }
}

/// Token and position embeddings.
pub(super) struct Embedding {
    architecture: Architecture,
    dropout: f32,
    params: Vec<ParamSpec>,
}

impl Embedding {
    pub(super) fn new(architecture: Architecture, dropout: f32) -> Self {
        Self { architecture, dropout, params: architecture.embedding_params() }
    }
}

impl Block for Embedding {
    fn name(&self) -> &str {
        "embedding"
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn forward(&self, params: &[Tensor<1>], input: BlockInput, mode: Mode) -> Tensor<2> {
        let BlockInput::Tokens(tokens) = input else {
            panic!("block `embedding` takes tokens, not features")
        };
        let [batch, sequence] = tokens.dims();
        let width = self.architecture.width;
        let x = ops::embedding(tokens, params[0].clone(), params[1].clone(), width);
        ops::dropout(x, self.dropout, "embedding", mode).reshape([batch, sequence * width])
    }
}

/// One pre-norm transformer layer: attention, then a perceptron, each added onto its input.
pub(super) struct Layer {
    architecture: Architecture,
    dropout: f32,
    name: String,
    params: Vec<ParamSpec>,
}

impl Layer {
    pub(super) fn new(architecture: Architecture, index: usize, dropout: f32) -> Self {
        let params = architecture.layer_params(index);
        Self { architecture, dropout, name: format!("layers.{index}"), params }
    }

    fn dropout(&self, x: Tensor<2>, branch: &str, mode: Mode) -> Tensor<2> {
        ops::dropout(x, self.dropout, &format!("{}.{branch}", self.name), mode)
    }
}

impl Block for Layer {
    fn name(&self) -> &str {
        &self.name
    }

    fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    fn forward(&self, params: &[Tensor<1>], input: BlockInput, mode: Mode) -> Tensor<2> {
        let Architecture { width, heads, .. } = self.architecture;
        let x = features(input, &self.name);
        let [batch, features] = x.dims();
        let sequence = features / width;
        let params = LayerParams::new(params);
        let x = x.reshape([batch * sequence, width]);
        let packed = params.queries_keys_values(x.clone());
        let attended = params.attention_output(ops::causal_attention(packed, sequence, heads));
        let x = x + self.dropout(attended, "attention", mode);
        let mlp = params.mlp(x.clone());
        (x + self.dropout(mlp, "mlp", mode)).reshape([batch, features])
    }
}

/// Final norm and the logits of the next token.
pub(super) struct Head {
    architecture: Architecture,
    params: Vec<ParamSpec>,
}

impl Head {
    pub(super) fn new(architecture: Architecture) -> Self {
        Self { architecture, params: architecture.head_params() }
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
        let Architecture { width, vocabulary, .. } = self.architecture;
        let x = features(input, "head");
        let [batch, features] = x.dims();
        let sequence = features / width;
        logits(params, x.reshape([batch * sequence, width])).reshape([batch, sequence * vocabulary])
    }
}

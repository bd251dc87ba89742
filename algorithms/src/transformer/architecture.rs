//! The sizes of a language model and the parameters that follow from them.

use serde::{Deserialize, Serialize};

use crate::block::{Block, Init, Model, ParamSpec};
use crate::loss::{SUMS, classification_loss};
use crate::transformer::blocks::{Embedding, Head, Layer};

/// Standard deviation of initial weights, as GPT-2.
const STD: f32 = 0.02;

/// What a language model consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Architecture {
    /// Transformer layers.
    pub(crate) layers: usize,
    /// Features per position; a multiple of `heads`.
    pub(crate) width: usize,
    /// Attention heads per layer.
    pub(crate) heads: usize,
    /// Longest context in tokens.
    pub(crate) sequence_length: usize,
    /// Different tokens.
    pub(crate) vocabulary: usize,
}

impl Architecture {
    /// Most layers: twice the deepest published models. Bounds what a damaged `model.json` builds.
    pub(crate) const LAYERS_MAX: usize = 256;

    /// The sizes, if they fit each other.
    pub(crate) fn checked(self) -> Result<Self, String> {
        let Self { width, heads, .. } = self;
        let smallest =
            self.layers.min(width).min(heads).min(self.sequence_length).min(self.vocabulary);
        if smallest == 0 {
            return Err(format!("a size is 0 in {self:?}"));
        }
        if self.layers > Self::LAYERS_MAX {
            return Err(format!("layers = {}, expected at most {}", self.layers, Self::LAYERS_MAX));
        }
        if !width.is_multiple_of(heads) {
            return Err(format!(
                "width = {width} is not a multiple of heads = {heads}: every head has the same size"
            ));
        }
        Ok(self)
    }

    /// The model: `embedding`, `layers.0` …, `head`.
    pub(crate) fn model(&self, dropout: f32) -> Model {
        let mut blocks: Vec<Box<dyn Block>> = vec![Box::new(Embedding::new(*self, dropout))];
        for index in 0..self.layers {
            blocks.push(Box::new(Layer::new(*self, index, dropout)));
        }
        blocks.push(Box::new(Head::new(*self)));
        Model { blocks, sums: SUMS.map(str::to_owned).to_vec(), loss: classification_loss }
    }

    pub(super) fn embedding_params(&self) -> Vec<ParamSpec> {
        let table = |name: &str, rows: usize| ParamSpec {
            decay: false,
            ..weight(&format!("embedding.{name}.weight"), rows, self.width, STD)
        };
        vec![table("tokens", self.vocabulary), table("positions", self.sequence_length)]
    }

    pub(super) fn layer_params(&self, index: usize) -> Vec<ParamSpec> {
        let width = self.width;
        // Every layer adds two branches onto the residual stream: keep its variance as deep as it
        // is (GPT-2, section 2.3).
        let residual = STD / (2.0 * self.layers as f32).sqrt();
        let name = |part: &str| format!("layers.{index}.{part}");
        let mut params = Vec::new();
        params.extend(norm(&name("attention.norm"), width));
        params.extend(dense(&name("attention.qkv"), width, 3 * width, STD));
        params.extend(dense(&name("attention.output"), width, width, residual));
        params.extend(norm(&name("mlp.norm"), width));
        params.extend(dense(&name("mlp.up"), width, 4 * width, STD));
        params.extend(dense(&name("mlp.down"), 4 * width, width, residual));
        params
    }

    pub(super) fn head_params(&self) -> Vec<ParamSpec> {
        let [scale, shift] = norm("head.norm", self.width);
        vec![scale, shift, weight("head.output.weight", self.width, self.vocabulary, STD)]
    }
}

fn weight(name: &str, rows: usize, columns: usize, std: f32) -> ParamSpec {
    ParamSpec {
        name: name.into(),
        shape: vec![rows, columns],
        init: Init::Normal { std },
        decay: true,
    }
}

fn vector(name: String, length: usize, init: Init) -> ParamSpec {
    ParamSpec { name, shape: vec![length], init, decay: false }
}

fn dense(name: &str, inputs: usize, outputs: usize, std: f32) -> [ParamSpec; 2] {
    [
        weight(&format!("{name}.weight"), inputs, outputs, std),
        vector(format!("{name}.bias"), outputs, Init::Zeros),
    ]
}

fn norm(name: &str, width: usize) -> [ParamSpec; 2] {
    [
        vector(format!("{name}.weight"), width, Init::Ones),
        vector(format!("{name}.bias"), width, Init::Zeros),
    ]
}

//! Forward and backward over explicit blocks.
//!
//! Each block is its own autograd graph: its input is detached, its output kept beside its input;
//! backward seeds the output's gradient with (output · gradient).sum() and takes the gradients of
//! the input and of the block's parameters. The caller sees gradients block by block, last block
//! first, so that reducing one block can overlap computing the one before.

use algorithms::{BlockInput, Microbatch, Mode, Model};
use burn::tensor::{Device, Tensor, TensorData};

use crate::parameters::Table;

/// Sums over one microbatch, added up over the global batch later.
#[derive(Clone, Debug, PartialEq)]
pub struct MicrobatchSums {
    /// Sum of the loss over counted elements.
    pub loss: f64,
    /// Counted elements.
    pub count: u64,
    /// The model's further sums.
    pub sums: Vec<f64>,
}

/// The tensors of one step's parameters: leaves shared by the step's microbatches.
pub struct Leaves {
    blocks: Vec<Vec<Tensor<1>>>,
}

impl Leaves {
    /// Copies the flat buffer into leaf tensors on `device`; with `gradients`, on its autograd twin.
    pub fn new(table: &Table, values: &[f32], device: &Device, gradients: bool) -> Self {
        let device = if gradients { device.clone().autodiff() } else { device.clone() };
        let leaf = |range: std::ops::Range<usize>| {
            let data = TensorData::new(values[range.clone()].to_vec(), [range.len()]);
            let tensor = Tensor::<1>::from_data(data, &device);
            if gradients { tensor.require_grad() } else { tensor }
        };
        let blocks = table
            .blocks
            .iter()
            .map(|block| {
                table.entries[block.clone()].iter().map(|entry| leaf(entry.range.clone())).collect()
            })
            .collect();
        Self { blocks }
    }
}

/// Loss without gradients, for validation.
pub fn evaluate(model: &Model, leaves: &Leaves, batch: Microbatch) -> MicrobatchSums {
    let mut input = batch.input;
    for (block, params) in model.blocks.iter().zip(&leaves.blocks) {
        input = BlockInput::Features(block.forward(params, input, Mode::Evaluate));
    }
    let output = features(input);
    let loss = (model.loss)(output, &batch.targets, true);
    MicrobatchSums { loss: scalar(loss.sum), count: loss.count, sums: loss.sums }
}

/// Where the gradients of a microbatch go.
pub trait GradientSink {
    /// Memory to which a block's gradients are added, and the flat index of its first element.
    fn place(&mut self, block: usize) -> (&mut [f32], usize);
    /// The block's gradients have been added; blocks come last to first.
    fn done(&mut self, block: usize);
    /// Whether the step is of no use any more; asked between blocks, so that a rank whose group
    /// broke does not first finish what it computes.
    fn is_abandoned(&self) -> bool;
}

/// Forward and backward of one microbatch; its gradients of the *sum* loss are added to `sink`,
/// block by block, the last block first. None when the sink says that the step is abandoned.
pub fn forward_backward(
    model: &Model,
    table: &Table,
    leaves: &Leaves,
    batch: Microbatch,
    mode: Mode,
    sink: &mut dyn GradientSink,
) -> Option<MicrobatchSums> {
    let mut tape: Vec<(Option<Tensor<2>>, Tensor<2>)> = Vec::with_capacity(model.blocks.len());
    let mut input = batch.input;
    for (index, (block, params)) in model.blocks.iter().zip(&leaves.blocks).enumerate() {
        // The data themselves need no gradient; every later input is a leaf of its own graph.
        let leaf = match &input {
            BlockInput::Features(x) if index > 0 => Some(x.clone()),
            _ => None,
        };
        if sink.is_abandoned() {
            return None;
        }
        let output = block.forward(params, input, mode);
        input = BlockInput::Features(output.clone().inner().autodiff().require_grad());
        tape.push((leaf, output));
    }
    drop(input);

    let Some((leaf, output)) = tape.pop() else {
        return Some(MicrobatchSums { loss: 0.0, count: 0, sums: Vec::new() });
    };
    let loss = (model.loss)(output, &batch.targets, true);
    let value = scalar(loss.sum.clone().inner());
    let mut seeded = (leaf, loss.sum);
    let mut whole = model.blocks.len();
    for index in (0..model.blocks.len()).rev() {
        if sink.is_abandoned() {
            return None;
        }
        let (leaf, root) = seeded;
        let mut gradients = root.backward();
        let entries = &table.entries[table.blocks[index].clone()];
        let (gradient, first) = sink.place(index);
        for (entry, tensor) in entries.iter().zip(&leaves.blocks[index]) {
            if let Some(found) = tensor.grad_remove(&mut gradients) {
                add(&mut gradient[entry.range.start - first..entry.range.end - first], found);
            }
        }
        whole = index;
        sink.done(index);
        let Some((next_leaf, output)) = tape.pop() else { break };
        let Some(upstream) = leaf.and_then(|leaf| leaf.grad_remove(&mut gradients)) else { break };
        seeded = (next_leaf, (output * upstream.autodiff()).sum());
    }
    // Blocks that the loss does not reach have gradients of zero; they are whole all the same.
    (0..whole).rev().for_each(|index| sink.done(index));
    Some(MicrobatchSums { loss: value, count: loss.count, sums: loss.sums })
}

/// Adds a gradient tensor to its place in the flat buffer.
fn add(sum: &mut [f32], tensor: Tensor<1>) {
    algorithms::with_slice(tensor, |values| {
        assert_eq!(values.len(), sum.len(), "a gradient has its parameter's length");
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += *value;
        }
    });
}

fn features(input: BlockInput) -> Tensor<2> {
    match input {
        BlockInput::Features(tensor) => tensor,
        BlockInput::Tokens(_) => unreachable!("a model has at least one block"),
    }
}

fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(tensor.into_scalar::<f32>())
}

//! How an operation over slices becomes a differentiable tensor operation on the processor.
//!
//! This file knows burn's autodiff; the operations beside it know only memory.

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};

type Tracked = FloatTensor<Autodiff<Flex>>;

/// An operation with one output and its gradient.
pub(super) trait FusedOp<const N: usize>: Clone + Debug + Send + 'static {
    /// What the backward pass needs.
    type Saved: Clone + Debug + Send + 'static;

    /// The output, and what the backward pass needs; with `keep` false nothing will be needed, so
    /// nothing should be computed for it.
    fn forward(&self, inputs: &[FlexTensor; N], keep: bool) -> (FlexTensor, Self::Saved);

    /// The gradients of the inputs, each in the shape of its input; `wanted[i]` says whether the
    /// i-th is used at all.
    fn backward(
        &self,
        saved: Self::Saved,
        gradient: FlexTensor,
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// An input whose number of dimensions no longer shows in its type.
pub(super) enum Input {
    Tracked(Box<Tracked>),
    Plain(FlexTensor),
}

/// Whether the slice form can be used: 32-bit floats on the processor, no recomputing autodiff.
pub(super) fn is_fusable<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32
        && tensor.device() == Device::flex()
        && (!tensor.is_autodiff() || tensor.clone().try_into_primitive::<Autodiff<Flex>>().is_ok())
}

/// Erases the number of dimensions of a tensor that [`is_fusable`].
pub(super) fn input<const D: usize>(tensor: Tensor<D>) -> Input {
    if tensor.is_autodiff() {
        let tracked = tensor.try_into_primitive::<Autodiff<Flex>>().expect("fusable, as checked");
        Input::Tracked(Box::new(tracked))
    } else {
        Input::Plain(tensor.try_into_primitive::<Flex>().expect("fusable, as checked"))
    }
}

#[derive(Debug)]
struct Node<O>(O);

impl<O: FusedOp<N>, const N: usize> Backward<Flex, N> for Node<O> {
    type State = O::Saved;

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let gradient = contiguous(gradients.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let results = self.0.backward(ops.state, gradient, wanted);
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                gradients.register::<Flex>(parent.id, result);
            }
        }
    }
}

/// Runs `op` and, when an input is tracked, records it.
pub(super) fn apply<O: FusedOp<N>, const N: usize, const D: usize>(
    op: O,
    inputs: [Input; N],
) -> Tensor<D> {
    if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
        let plain = inputs.map(|input| match input {
            Input::Plain(tensor) => contiguous(tensor),
            Input::Tracked(_) => unreachable!("all inputs are plain, as just checked"),
        });
        return Tensor::from_primitive::<Flex>(op.forward(&plain, false).0);
    }
    let mut guards = Vec::with_capacity(N);
    let primitives = inputs.map(|input| {
        let tracked = match input {
            Input::Tracked(tensor) => *tensor,
            Input::Plain(tensor) => Tracked::new(tensor),
        };
        let (primitive, guard) = tracked.into_parts();
        guards.push(guard);
        contiguous(primitive)
    });
    let guards: [_; N] = guards.try_into().expect("one guard per input");
    let prepared = Node(op.clone()).prepare::<NoCheckpointing>(guards).compute_bound().stateful();
    Tensor::from_primitive::<Autodiff<Flex>>(match prepared {
        OpsKind::Tracked(node) => {
            let (output, saved) = op.forward(&primitives, true);
            node.finish(saved, output)
        }
        OpsKind::UnTracked(node) => node.finish(op.forward(&primitives, false).0),
    })
}

/// The tensor with its elements in order and nothing else in its buffer, so that [`values`] and
/// [`values_mut`] see exactly its elements. Copies only when it must.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    let exact = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.bytes().len() == size_of::<f32>() * tensor.layout().num_elements();
    if exact { tensor } else { tensor.to_contiguous() }
}

/// The elements of a tensor that went through [`contiguous`].
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.storage::<f32>()
}

/// The elements, writable; copies first when another tensor shares them.
pub(super) fn values_mut(tensor: &mut FlexTensor) -> &mut [f32] {
    tensor.storage_mut::<f32>()
}

/// A tensor that takes over `values`.
pub(super) fn from_values(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

/// The same elements in another shape, without a copy.
pub(super) fn reshaped(tensor: &FlexTensor, shape: &[usize]) -> FlexTensor {
    tensor.reshape(Shape::from(shape.to_vec()))
}

/// A window into a tensor's buffer, without a copy.
pub(super) fn view(
    tensor: &FlexTensor,
    shape: &[usize],
    strides: &[usize],
    offset: usize,
) -> FlexTensor {
    let strides = strides.iter().map(|&stride| stride as isize).collect();
    let layout = Layout::new(Shape::from(shape.to_vec()), strides, offset);
    tensor.clone().with_layout(layout)
}

/// The transpose of a matrix, without a copy.
pub(super) fn transposed(tensor: &FlexTensor) -> FlexTensor {
    let dimensions = tensor.layout().num_dims();
    tensor.transpose(dimensions - 2, dimensions - 1)
}

/// Matrix product, batched over leading dimensions.
pub(super) fn matmul(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    burn::backend::flex::ops::matmul::matmul(a, b)
}

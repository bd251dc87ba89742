//! Between a tensor and plain memory, without a copy where the device's memory is ours.

use burn::backend::Flex;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// A tensor with a copy of `values`, shape `[values.len()]`.
pub fn tensor_from_slice(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

/// A tensor that takes over `values`; their number must be the product of `shape`.
pub(crate) fn tensor_from_vec<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The elements in row-major order. Copies nothing if the tensor is the only owner of its memory
/// and that memory can be taken over.
pub fn tensor_into_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    with_slice(tensor, <[f32]>::to_vec)
}

/// Lets `read` see the elements in row-major order. On the processor nothing is copied if the tensor
/// is contiguous.
pub fn with_slice<const D: usize, R>(tensor: Tensor<D>, read: impl FnOnce(&[f32]) -> R) -> R {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    if tensor.dtype() == DType::F32 && tensor.device() == Device::flex() {
        let primitive =
            tensor.try_into_primitive::<Flex>().expect("on the flex device, as checked");
        return match primitive.as_slice::<f32>() {
            Some(values) => read(values),
            None => read(primitive.to_contiguous().storage::<f32>()),
        };
    }
    let values = tensor.try_into_vec_as::<f32>().expect("a float tensor can be read as f32");
    read(&values)
}

/// Class or token ids as indices.
///
/// # Panics
/// If one is negative: data sets check their values when they are opened.
pub(crate) fn class_ids(ids: &Tensor<1, Int>) -> Vec<usize> {
    let data = ids.clone().try_into_vec_as::<i64>().expect("an integer tensor can be read as i64");
    data.into_iter().map(|id| usize::try_from(id).expect("data sets check their ids")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_read_in_row_major_order() {
        let device = Device::flex();
        let matrix = tensor_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &device).reshape([2, 3]);
        assert_eq!(tensor_into_vec(matrix.clone().transpose()), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let tail = matrix.clone().narrow(0, 1, 1);
        assert_eq!(with_slice(tail, <[f32]>::to_vec), [4.0, 5.0, 6.0]);
        assert_eq!(with_slice(matrix.autodiff(), <[f32]>::len), 6);
    }
}

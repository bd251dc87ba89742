//! Reads `model.safetensors` into the parameters of a model.

use burn::tensor::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use crate::block::Model;
use crate::error::AlgorithmError;
use crate::tensor::tensor_from_slice;

/// Name of the weights file in messages.
const FILE: &str = "model.safetensors";

fn refuse(message: String) -> AlgorithmError {
    AlgorithmError::Model { path: FILE.into(), message }
}

/// The parameters of every block, flat and in order, on `device`. Every tensor of the model must be
/// there with its shape as 32-bit floats, and nothing else.
pub(crate) fn load_weights(
    model: &Model,
    bytes: &[u8],
    device: &Device,
) -> Result<Vec<Vec<Tensor<1>>>, AlgorithmError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| refuse(format!("not a safetensors file: {error}")))?;
    let mut loaded = Vec::with_capacity(model.blocks.len());
    let mut expected = 0;
    for block in &model.blocks {
        let mut tensors = Vec::with_capacity(block.params().len());
        for spec in block.params() {
            let view = file
                .tensor(&spec.name)
                .map_err(|_| refuse(format!("tensor `{}` is missing", spec.name)))?;
            if view.dtype() != Dtype::F32 || view.shape() != spec.shape {
                return Err(refuse(format!(
                    "tensor `{}` is {:?} {:?}, expected F32 {:?}",
                    spec.name,
                    view.dtype(),
                    view.shape(),
                    spec.shape
                )));
            }
            // The file promises no alignment, so the numbers are read byte by byte.
            let (quads, _) = view.data().as_chunks::<4>();
            let values: Vec<f32> = quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect();
            if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
                return Err(refuse(format!("tensor `{}` holds {bad}", spec.name)));
            }
            tensors.push(tensor_from_slice(&values, device));
            expected += 1;
        }
        loaded.push(tensors);
    }
    if file.len() != expected {
        let known: Vec<&str> =
            model.blocks.iter().flat_map(|b| b.params()).map(|p| p.name.as_str()).collect();
        let extra = file.names().into_iter().find(|name| !known.contains(name)).unwrap_or_default();
        return Err(refuse(format!("tensor `{extra}` does not belong to this model")));
    }
    Ok(loaded)
}

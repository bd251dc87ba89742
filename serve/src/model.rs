//! Loads a trained model: `model.safetensors` and `model.json` side by side.

use std::path::Path;

use algorithms::{ModelDescriptor, Predictor};
use burn::tensor::Device;
use checkpoint::Store;
use sha2::{Digest, Sha256};

use crate::error::ServeError;

/// Weights, by name.
const WEIGHTS_FILE: &str = "model.safetensors";
/// What rebuilds the model around them.
const DESCRIPTOR_FILE: &str = "model.json";
/// A larger descriptor is some other file; it may hold a tokenizer.
const DESCRIPTOR_BYTES_MAX: usize = 64 << 20;

/// A model ready to answer.
pub struct LoadedModel {
    /// How it was rebuilt.
    pub descriptor: ModelDescriptor,
    /// What answers.
    pub predictor: Box<dyn Predictor>,
    /// SHA-256 of the weights file, hex.
    pub sha256: String,
}

impl std::fmt::Debug for LoadedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedModel")
            .field("algorithm", &self.descriptor.algorithm)
            .field("sha256", &self.sha256)
            .finish()
    }
}

/// From a folder, or from its weights file.
pub fn load_folder(path: &Path) -> Result<LoadedModel, ServeError> {
    let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(|source| ServeError::Unreadable { path, source })
    };
    build(&read(DESCRIPTOR_FILE)?, &read(WEIGHTS_FILE)?)
}

/// From the folder `key` of the cluster's store.
pub async fn load_from_store(store: &Store, key: &str) -> Result<LoadedModel, ServeError> {
    let descriptor = store.get(&format!("{key}/{DESCRIPTOR_FILE}")).await?;
    let weights = store.get(&format!("{key}/{WEIGHTS_FILE}")).await?;
    build(&descriptor, &weights)
}

fn build(descriptor: &[u8], weights: &[u8]) -> Result<LoadedModel, ServeError> {
    let malformed =
        |message: String| ServeError::Malformed { file: DESCRIPTOR_FILE.into(), message };
    if checkpoint::is_encrypted(descriptor) {
        return Err(malformed(
            "it is encrypted, as all models of a store with [store.encryption] are: name the \
             registered model, not its files"
                .into(),
        ));
    }
    if descriptor.len() > DESCRIPTOR_BYTES_MAX {
        return Err(malformed(format!("{} bytes, too large", descriptor.len())));
    }
    let descriptor: ModelDescriptor =
        serde_json::from_slice(descriptor).map_err(|e| malformed(e.to_string()))?;
    let algorithm = algorithms::algorithm(&descriptor.algorithm)?;
    let predictor = algorithm.predictor(&descriptor, weights, &Device::flex())?;
    let digest = Sha256::digest(weights);
    let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(LoadedModel { descriptor, predictor, sha256 })
}

//! Every algorithm by name.

use std::sync::Arc;

use api::document::unknown;
use api::schema::AlgorithmSchema;

use crate::algorithm::Algorithm;
use crate::block::{Model, ParamSpec};
use crate::error::AlgorithmError;
use crate::image::ImageClassification;
use crate::transformer::Transformer;

/// The algorithm of that name.
///
/// # Errors
/// [`AlgorithmError::Unknown`], which names the nearest one.
pub fn algorithm(name: &str) -> Result<Arc<dyn Algorithm>, AlgorithmError> {
    let mut known = Vec::new();
    for algorithm in all() {
        let schema = algorithm.schema();
        if schema.name == name {
            return Ok(algorithm);
        }
        known.push(schema.name);
    }
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    Err(AlgorithmError::Unknown(unknown("algorithm", name, &known)))
}

/// The schemas of all algorithms, sorted by name.
pub fn algorithms() -> Vec<AlgorithmSchema> {
    all().iter().map(|algorithm| algorithm.schema()).collect()
}

fn all() -> [Arc<dyn Algorithm>; 2] {
    [Arc::new(ImageClassification), Arc::new(Transformer)]
}

/// All parameters of a model in order, each with the index of its block.
pub fn model_params(model: &Model) -> Vec<(usize, ParamSpec)> {
    let mut params = Vec::new();
    for (index, block) in model.blocks.iter().enumerate() {
        params.extend(block.params().iter().map(|spec| (index, spec.clone())));
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_algorithm_names_the_nearest() {
        let Err(error) = algorithm("transfomer") else { panic!("found") };
        assert!(error.to_string().contains("did you mean `transformer`?"), "{error}");
        assert!(algorithm("image-classification").is_ok());
    }

    #[test]
    fn schemas_are_sorted_and_their_defaults_resolve() {
        let schemas = algorithms();
        assert!(schemas.is_sorted_by_key(|schema| schema.name.clone()));
        for schema in schemas {
            let resolved = schema.resolve(&Default::default()).expect("defaults are legal");
            assert_eq!(resolved.len(), schema.hyperparameters.len(), "{}", schema.name);
            let text = serde_json::to_string(&schema).expect("serialisable");
            let back: AlgorithmSchema = serde_json::from_str(&text).expect("readable");
            assert_eq!(back, schema);
        }
    }
}

//! What schemas of all algorithms share: the optimiser's hyperparameters, short constructors, and
//! typed access to resolved values.

use std::collections::BTreeMap;

use api::schema::{ChannelSchema, Direction, Hyperparameter, Kind, MetricSchema, Value};

use crate::error::AlgorithmError;

/// The optimiser's settings, the same for every algorithm; the trainer reads them.
pub fn optimizer_hyperparameters() -> Vec<Hyperparameter> {
    let adam = "adamw: decay rate of the running mean of";
    vec![
        choice("optimizer", &["adamw", "sgd"], "The update rule."),
        float("learning_rate", 1e-3, (1e-8, 10.0), true, "Peak learning rate."),
        float("beta1", 0.9, (0.0, 0.9999), false, &format!("{adam} gradients.")),
        float("beta2", 0.99, (0.0, 0.999_999), false, &format!("{adam} squared gradients.")),
        float("epsilon", 1e-8, (1e-16, 1.0), true, "adamw: added to the denominator."),
        float(
            "weight_decay",
            0.01,
            (0.0, 10.0),
            false,
            "Decoupled decay of weight matrices (not of biases, norms and embeddings).",
        ),
        float("momentum", 0.9, (0.0, 0.9999), false, "sgd: share of the last update kept."),
        choice(
            "schedule",
            &["cosine", "linear", "constant"],
            "How the learning rate falls after warmup, down to min_learning_rate_ratio at the end.",
        ),
        integer("warmup_steps", 20, (0, 1_000_000_000), "Steps of linear warmup from 0."),
        float(
            "min_learning_rate_ratio",
            0.1,
            (0.0, 1.0),
            false,
            "Learning rate at the end, as a share of the peak.",
        ),
        float(
            "clip_norm",
            1.0,
            (0.0, 1e9),
            true,
            "Largest norm of the whole gradient; larger ones are scaled down; 0: off.",
        ),
    ]
}

fn hyperparameter(name: &str, kind: Kind, default: Value, description: &str) -> Hyperparameter {
    let tunable = !matches!(kind, Kind::Text);
    Hyperparameter { name: name.into(), kind, default, description: description.into(), tunable }
}

pub(crate) fn integer(
    name: &str,
    default: i64,
    (min, max): (i64, i64),
    description: &str,
) -> Hyperparameter {
    hyperparameter(name, Kind::Integer { min, max }, Value::Integer(default), description)
}

pub(crate) fn float(
    name: &str,
    default: f64,
    (min, max): (f64, f64),
    log: bool,
    description: &str,
) -> Hyperparameter {
    hyperparameter(name, Kind::Float { min, max, log }, Value::Float(default), description)
}

pub(crate) fn boolean(name: &str, default: bool, description: &str) -> Hyperparameter {
    hyperparameter(name, Kind::Bool, Value::Bool(default), description)
}

pub(crate) fn text(name: &str, default: &str, description: &str) -> Hyperparameter {
    hyperparameter(name, Kind::Text, Value::Text(default.into()), description)
}

/// The first option is the default.
fn choice(name: &str, options: &[&str], description: &str) -> Hyperparameter {
    let options: Vec<String> = options.iter().map(|&o| o.to_owned()).collect();
    let default = Value::Text(options[0].clone());
    hyperparameter(name, Kind::Choice { options }, default, description)
}

/// The share of the training data held out when the job has no validation channel.
pub(crate) fn validation_fraction() -> Hyperparameter {
    float(
        "validation_fraction",
        0.0,
        (0.0, 0.5),
        false,
        "Share of the training data held out for validation when there is no validation channel; \
         0: no validation.",
    )
}

/// The channels `train` and `validation` with the same content types.
pub(crate) fn channels(content_types: &[&str], train: &str) -> Vec<ChannelSchema> {
    let content_types: Vec<String> = content_types.iter().map(|&t| t.to_owned()).collect();
    vec![
        ChannelSchema {
            name: "train".into(),
            required: true,
            content_types: content_types.clone(),
            description: train.into(),
        },
        ChannelSchema {
            name: "validation".into(),
            required: false,
            content_types,
            description: "Held-out data of the same form.".into(),
        },
    ]
}

/// Loss and accuracy, in training and validation; `unit` is what is counted.
pub(crate) fn classification_metrics(unit: &str) -> Vec<MetricSchema> {
    let metric = |name: &str, direction, description: String| MetricSchema {
        name: name.into(),
        direction,
        description,
    };
    let loss = |of: &str| format!("Cross-entropy per {unit} in nats, {of}.");
    let accuracy = |of: &str| format!("Share of {unit}s predicted right, {of}.");
    vec![
        metric("train:loss", Direction::Minimize, loss("over the last step")),
        metric("train:accuracy", Direction::Maximize, accuracy("over the last step")),
        metric("validation:loss", Direction::Minimize, loss("over the validation data")),
        metric("validation:accuracy", Direction::Maximize, accuracy("over the validation data")),
    ]
}

/// Resolved hyperparameters, read by type.
pub(crate) struct Settings<'a>(pub(crate) &'a BTreeMap<String, Value>);

impl Settings<'_> {
    fn get<T>(&self, name: &str, pick: impl Fn(&Value) -> Option<T>) -> Result<T, AlgorithmError> {
        let value = self.0.get(name).ok_or_else(|| {
            AlgorithmError::Hyperparameters(format!(
                "hyperparameter `{name}` is missing: the job was not resolved against the schema"
            ))
        })?;
        pick(value).ok_or_else(|| {
            AlgorithmError::Hyperparameters(format!(
                "hyperparameter `{name}` = `{value}` has the wrong type"
            ))
        })
    }

    pub(crate) fn size(&self, name: &str) -> Result<usize, AlgorithmError> {
        self.get(name, |value| match value {
            Value::Integer(v) => usize::try_from(*v).ok(),
            _ => None,
        })
    }

    pub(crate) fn number(&self, name: &str) -> Result<f32, AlgorithmError> {
        self.get(name, |value| match value {
            Value::Float(v) => Some(*v as f32),
            Value::Integer(v) => Some(*v as f32),
            _ => None,
        })
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, AlgorithmError> {
        self.get(name, |value| match value {
            Value::Bool(v) => Some(*v),
            _ => None,
        })
    }

    pub(crate) fn text(&self, name: &str) -> Result<String, AlgorithmError> {
        self.get(name, |value| match value {
            Value::Text(v) => Some(v.clone()),
            _ => None,
        })
    }
}

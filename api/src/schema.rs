//! The machine-readable description of an algorithm: what may be set, what must be fed, what is
//! reported. It drives the validation of `job.toml`, `cluster algorithms`, the docs, and later
//! tuning and the API gateway.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::document::unknown;

/// A hyperparameter's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Integer(i64),
    /// A number.
    Float(f64),
    /// A text; for [`Kind::Choice`] one of its options.
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(v) => write!(f, "{v}"),
            Self::Integer(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Text(v) => write!(f, "{v}"),
        }
    }
}

/// The type and range of a hyperparameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number within `min..=max`.
    Integer {
        /// Smallest legal value.
        min: i64,
        /// Largest legal value.
        max: i64,
    },
    /// A number within `min..=max`; a whole number is accepted too.
    Float {
        /// Smallest legal value.
        min: f64,
        /// Largest legal value.
        max: f64,
        /// Whether tuning should search it on a logarithmic scale.
        log: bool,
    },
    /// One of a list.
    Choice {
        /// The legal values.
        options: Vec<String>,
    },
    /// Any text, such as a path.
    Text,
}

/// One hyperparameter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyperparameter {
    /// The key under `[hyperparameters]`.
    pub name: String,
    /// Type and range.
    #[serde(flatten)]
    pub kind: Kind,
    /// Taken when the job does not set it.
    pub default: Value,
    /// One sentence for people.
    pub description: String,
    /// Whether tuning may vary it.
    pub tunable: bool,
}

/// One data channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChannelSchema {
    /// The key under `[channels]`.
    pub name: String,
    /// Whether a job must have it.
    pub required: bool,
    /// Accepted content types; the first is assumed when the job names none and the file name does
    /// not tell.
    pub content_types: Vec<String>,
    /// One sentence for people.
    pub description: String,
}

/// Whether a metric is better small or large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Smaller is better.
    Minimize,
    /// Larger is better.
    Maximize,
}

/// One reported metric, such as `validation:accuracy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricSchema {
    /// The name in metric streams.
    pub name: String,
    /// Which way is better.
    pub direction: Direction,
    /// One sentence for people.
    pub description: String,
}

/// The whole description of one algorithm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlgorithmSchema {
    /// The value of `algorithm` in job.toml.
    pub name: String,
    /// One sentence for people.
    pub description: String,
    /// What may be set.
    pub hyperparameters: Vec<Hyperparameter>,
    /// What must be fed.
    pub channels: Vec<ChannelSchema>,
    /// What is reported.
    pub metrics: Vec<MetricSchema>,
    /// What the served model accepts, by content type.
    pub request_types: Vec<String>,
}

/// A hyperparameter or channel that the algorithm's schema does not allow.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SchemaError {
    /// No such name.
    #[error("{0}")]
    Unknown(String),
    /// Wrong type or out of range.
    #[error("hyperparameter `{name}` is {found}, expected {expected}")]
    Value {
        /// Which one.
        name: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A required channel is missing.
    #[error(
        "algorithm `{algorithm}` needs the channel `{channel}`: add [channels.{channel}] with a uri"
    )]
    MissingChannel {
        /// Which algorithm.
        algorithm: String,
        /// Which channel.
        channel: String,
    },
    /// A channel's content type is not accepted.
    #[error("channel `{channel}` has content type `{found}`, expected one of {}", accepted.join(", "))]
    ContentType {
        /// Which channel.
        channel: String,
        /// What was found.
        found: String,
        /// What is accepted.
        accepted: Vec<String>,
    },
}

impl Kind {
    fn expected(&self) -> String {
        match self {
            Self::Bool => "true or false".into(),
            Self::Integer { min, max } => format!("a whole number from {min} to {max}"),
            Self::Float { min, max, .. } => format!("a number from {min} to {max}"),
            Self::Choice { options } => format!("one of {}", options.join(", ")),
            Self::Text => "a text".into(),
        }
    }

    /// The value in this kind's own type, or `None` when it does not fit.
    fn accept(&self, value: &Value) -> Option<Value> {
        match (self, value) {
            (Self::Bool, Value::Bool(_)) | (Self::Text, Value::Text(_)) => Some(value.clone()),
            (Self::Integer { min, max }, Value::Integer(v)) if (min..=max).contains(&v) => {
                Some(value.clone())
            }
            (Self::Float { min, max, .. }, Value::Float(v)) if v >= min && v <= max => {
                Some(value.clone())
            }
            (Self::Float { min, max, .. }, Value::Integer(v))
                if (*v as f64) >= *min && (*v as f64) <= *max =>
            {
                Some(Value::Float(*v as f64))
            }
            (Self::Choice { options }, Value::Text(v)) if options.contains(v) => {
                Some(value.clone())
            }
            _ => None,
        }
    }
}

impl AlgorithmSchema {
    /// Every hyperparameter with its value: the job's where it sets one, else the default.
    pub fn resolve(
        &self,
        given: &BTreeMap<String, Value>,
    ) -> Result<BTreeMap<String, Value>, SchemaError> {
        let names: Vec<&str> = self.hyperparameters.iter().map(|h| h.name.as_str()).collect();
        if let Some(name) = given.keys().find(|name| !names.contains(&name.as_str())) {
            let message = unknown(&format!("hyperparameter of `{}`:", self.name), name, &names);
            return Err(SchemaError::Unknown(message));
        }
        let mut resolved = BTreeMap::new();
        for parameter in &self.hyperparameters {
            let value = given.get(&parameter.name).unwrap_or(&parameter.default);
            let accepted = parameter.kind.accept(value).ok_or_else(|| SchemaError::Value {
                name: parameter.name.clone(),
                found: format!("`{value}`"),
                expected: parameter.kind.expected(),
            })?;
            resolved.insert(parameter.name.clone(), accepted);
        }
        Ok(resolved)
    }

    /// Checks the channels' names, presence and content types.
    pub fn check_channels(
        &self,
        given: &BTreeMap<String, crate::job::Channel>,
    ) -> Result<(), SchemaError> {
        let names: Vec<&str> = self.channels.iter().map(|c| c.name.as_str()).collect();
        if let Some(name) = given.keys().find(|name| !names.contains(&name.as_str())) {
            let message = unknown(&format!("channel of `{}`:", self.name), name, &names);
            return Err(SchemaError::Unknown(message));
        }
        for channel in &self.channels {
            let Some(found) = given.get(&channel.name) else {
                if channel.required {
                    return Err(SchemaError::MissingChannel {
                        algorithm: self.name.clone(),
                        channel: channel.name.clone(),
                    });
                }
                continue;
            };
            if let Some(content_type) = &found.content_type
                && !channel.content_types.contains(content_type)
            {
                return Err(SchemaError::ContentType {
                    channel: channel.name.clone(),
                    found: content_type.clone(),
                    accepted: channel.content_types.clone(),
                });
            }
        }
        Ok(())
    }
}

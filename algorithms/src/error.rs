//! What can go wrong between a job's data and its model, in words for the person who typed it.

use std::path::PathBuf;

/// Data that cannot be read or does not fit.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A path of a channel does not exist or cannot be read.
    #[error("channel `{channel}`: cannot read `{}`: {source}", path.display())]
    Unreadable {
        /// Which channel.
        channel: String,
        /// Which path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file's content is not what it should be.
    #[error("channel `{channel}`: `{}`: {message}", path.display())]
    Malformed {
        /// Which channel.
        channel: String,
        /// Which file.
        path: PathBuf,
        /// What was found, what was expected, where.
        message: String,
    },
    /// The data and the hyperparameters do not fit each other.
    #[error("{0}")]
    Mismatch(String),
}

/// An algorithm that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum AlgorithmError {
    /// No such algorithm.
    #[error("{0}")]
    Unknown(String),
    /// Its data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Its hyperparameters do not fit each other.
    #[error("{0}")]
    Hyperparameters(String),
    /// A model file cannot be used.
    #[error("model `{path}`: {message}")]
    Model {
        /// Which file.
        path: String,
        /// What was found, what was expected.
        message: String,
    },
}

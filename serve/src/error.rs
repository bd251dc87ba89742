//! What can go wrong between a model's files and its answers.

use std::net::SocketAddr;
use std::path::PathBuf;

use api::ExitClass;

/// A model that cannot be loaded, or a server that cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file of the model cannot be read.
    #[error("cannot read the model's file `{}`: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] checkpoint::StoreError),
    /// A file is not what it should be.
    #[error("`{file}`: {message}")]
    Malformed {
        /// Which file.
        file: String,
        /// What was found, what was expected.
        message: String,
    },
    /// The model's algorithm cannot load it.
    #[error(transparent)]
    Algorithm(#[from] algorithms::AlgorithmError),
    /// The port is taken, or the address is not this host's.
    #[error("cannot listen on {address}: {source}; choose another with --listen or serve.listen")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The model failed on a request; its process must be started anew.
    #[error("the model failed on a request: it {0}")]
    Model(String),
    /// The server broke.
    #[error("the server broke: {0}")]
    Server(String),
}

impl ServeError {
    /// The exit code's class.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Unreadable { .. } => ExitClass::NotFound,
            Self::Store(_) | Self::Listen { .. } => ExitClass::Unavailable,
            Self::Malformed { .. } | Self::Algorithm(_) => ExitClass::Corrupt,
            Self::Model(_) | Self::Server(_) => ExitClass::Internal,
        }
    }
}

//! Why a coordinator does not run, in one message for the person who started it.

use std::net::SocketAddr;
use std::path::PathBuf;

use api::config::ConfigError;
use api::connect::ConnectError;
use api::{ExitClass, NodeId};
use checkpoint::StoreError;

use crate::raft_node::StartError;
use crate::random::RandomError;

/// Why a coordinator did not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process has the address.
    #[error(
        "cannot listen on `{address}`: another process listens there, perhaps another coordinator; \
         stop it, or choose another address in coordinator.members"
    )]
    PortInUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on `{address}`: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The token cannot be sent.
    #[error("the cluster token is empty or not printable ASCII: check `cluster.token_file`")]
    Token,
    /// Certificates cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The object store refuses.
    #[error("object store `{uri}`: {source}")]
    Store {
        /// Which store.
        uri: String,
        /// Why.
        source: Box<StoreError>,
    },
    /// Raft's state cannot be used.
    #[error("cannot start raft in `{}`: {source}", dir.display())]
    Raft {
        /// Its folder.
        dir: PathBuf,
        /// Why.
        source: Box<StartError>,
    },
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The server ended by itself.
    #[error("the coordinator's server ended: {0}")]
    Serve(String),
    /// Raft ended by itself.
    #[error("raft of coordinator {node} {reason}")]
    RaftStopped {
        /// Which node.
        node: NodeId,
        /// Why.
        reason: String,
    },
}

impl CoordinatorError {
    /// The class of exit code that a command ends with.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Config(_) | Self::Token | Self::Connect(_) => ExitClass::Usage,
            Self::PortInUse { .. } | Self::Listen { .. } => ExitClass::Unavailable,
            Self::Store { source, .. } => match **source {
                StoreError::Denied { .. } => ExitClass::Denied,
                StoreError::Uri { .. } | StoreError::Settings(_) => ExitClass::Usage,
                _ => ExitClass::Unavailable,
            },
            Self::Raft { .. } | Self::Random(_) | Self::Serve(_) | Self::RaftStopped { .. } => {
                ExitClass::Internal
            }
        }
    }
}

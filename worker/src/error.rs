//! Why a worker cannot start or go on. What becomes of its tasks is no error but a fact.

use std::path::PathBuf;

use api::connect::ConnectError;
use checkpoint::StoreError;

/// A worker that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The cluster refuses this worker; trying again would end the same way.
    #[error(
        "the cluster refused this worker: {reason}; check cluster.id and the token file named by \
         cluster.token_file"
    )]
    Denied {
        /// What the coordinator said.
        reason: String,
    },
    /// Another worker uses the folder.
    #[error(
        "folder `{}` is in use by another worker: stop it first or give this one another folder",
        folder.display()
    )]
    Locked {
        /// The folder.
        folder: PathBuf,
    },
    /// Processes of a former incarnation do not end.
    #[error(
        "processes of a former worker did not end within {seconds} s of SIGKILL: {processes}; \
         they hold the devices this worker is to use, so restart the host"
    )]
    Strays {
        /// How long it waited.
        seconds: u64,
        /// Task and process id of each.
        processes: String,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Options(String),
    /// A part of the worker ended that must not.
    #[error("a part of the worker failed: {0}; this is a bug, please report it")]
    Bug(String),
    /// A file or folder cannot be used.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Certificates cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The object store's settings cannot be used.
    #[error("cannot open the object store: {0}")]
    Store(#[from] StoreError),
}

impl WorkerError {
    /// Whether starting again unchanged can help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Io { .. })
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
        source: std::io::Error,
    ) -> Self {
        Self::Io { action, path: path.into(), source }
    }
}

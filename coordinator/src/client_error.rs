//! Why a request to a cluster failed, said once, for the person who typed the command.

use std::error::Error;
use std::net::SocketAddr;

use api::ExitClass;
use api::connect::ConnectError;
use tonic::{Code, Status};

use crate::random::RandomError;

/// A request that a cluster did not fulfil.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No coordinator could be reached.
    #[error("no coordinator could be reached (tried {tried}): {problem}; is `cluster up` running?")]
    Unreachable {
        /// The addresses that were tried.
        tried: String,
        /// What the last one did.
        problem: String,
    },
    /// Coordinators answer but cannot act, such as without a majority.
    #[error("the cluster does not answer requests now: {0}")]
    Unavailable(String),
    /// An endpoint does not run yet.
    #[error("{0}")]
    EndpointWaits(String),
    /// The cluster token or a certificate was refused.
    #[error("{0}")]
    Denied(String),
    /// There is no such record.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken, or the state does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Certificates or token cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No coordinator's address was given.
    #[error("no coordinator's address is known: check coordinator.members")]
    NoAddress,
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// The answer is not one that this version understands.
    #[error("the coordinator's answer cannot be understood: {0}")]
    Protocol(String),
}

impl ClientError {
    /// The class of exit code that a command ends with.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Unreachable { .. } | Self::Unavailable(_) | Self::EndpointWaits(_) => {
                ExitClass::Unavailable
            }
            Self::Denied(_) => ExitClass::Denied,
            Self::NotFound(_) => ExitClass::NotFound,
            Self::Conflict(_) => ExitClass::Conflict,
            Self::Invalid(_) | Self::Connect(_) | Self::NoAddress => ExitClass::Usage,
            Self::Random(_) | Self::Protocol(_) => ExitClass::Internal,
        }
    }

    /// A final refusal.
    pub(crate) fn refused(status: &Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => Self::Denied(text),
            Code::NotFound => Self::NotFound(text),
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Self::Conflict(text),
            Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted => {
                Self::Invalid(text)
            }
            _ => Self::Protocol(format!("{}: {text}", status.code())),
        }
    }

    /// What remains when every attempt failed: `answered` tells whether a coordinator spoke.
    pub(crate) fn gave_up(tried: &[SocketAddr], status: &Status) -> Self {
        if came_from_coordinator(status) {
            return Self::Unavailable(status.message().to_owned());
        }
        let tried: Vec<String> = tried.iter().map(ToString::to_string).collect();
        Self::Unreachable { tried: tried.join(", "), problem: chain(status) }
    }
}

/// Whether trying again, perhaps elsewhere, can help. Requests are safe to repeat: they carry an id.
/// A connection that breaks shows as any of these.
pub(crate) fn is_retryable(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
    ) || (status.code() == Code::Internal && !came_from_coordinator(status))
}

/// A status that a coordinator sent has no local cause.
fn came_from_coordinator(status: &Status) -> bool {
    status.source().is_none() && status.code() != Code::DeadlineExceeded
}

/// The error and its causes, each said once.
fn chain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

//! What can go wrong in a group, in words that name the first cause: which rank, where, in which
//! call.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::{Generation, Rank};

use crate::call::CallSite;

/// A group that could not be formed, or a call that failed.
///
/// `Clone`, because a group that failed returns the same error from every later call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CollectiveError {
    /// Somebody called [`crate::AbortHandle::abort`].
    #[error("aborted: {reason}")]
    Aborted {
        /// What the caller of `abort` said.
        reason: String,
    },
    /// A peer's connection broke: its process or host is gone.
    #[error("lost {rank} at `{address}` during `{during}`: {cause}")]
    PeerLost {
        /// Who.
        rank: Rank,
        /// Where it was.
        address: SocketAddr,
        /// This rank's call.
        during: CallSite,
        /// What the connection said.
        cause: String,
    },
    /// A peer left the group while it was still needed.
    #[error("{rank} at `{address}` left the group, but `{during}` of this rank needs it")]
    PeerLeft {
        /// Who.
        rank: Rank,
        /// Where it was.
        address: SocketAddr,
        /// This rank's call.
        during: CallSite,
    },
    /// A peer failed first and said why.
    #[error("{rank} at `{address}` failed: {message}")]
    PeerFailed {
        /// Who.
        rank: Rank,
        /// Where it is.
        address: SocketAddr,
        /// Whom it blames, if not itself.
        culprit: Option<Rank>,
        /// Its error.
        message: String,
    },
    /// Two ranks made different calls, or wait for each other in calls that cannot meet.
    #[error(
        "{own} called `{ours}` but {rank} at `{address}` called `{theirs}`: all ranks must make \
         the same calls in the same order, with the same type, length and options"
    )]
    Mismatch {
        /// This rank.
        own: Rank,
        /// The peer.
        rank: Rank,
        /// Where it is.
        address: SocketAddr,
        /// What this rank called.
        ours: CallSite,
        /// What the peer called.
        theirs: CallSite,
    },
    /// A frame of another incarnation of the gang.
    #[error(
        "{rank} at `{address}` sent a frame of generation {found}, expected {expected}: it was \
         superseded or is ahead, and was refused"
    )]
    WrongGeneration {
        /// Who.
        rank: Rank,
        /// Where it is.
        address: SocketAddr,
        /// Its generation.
        found: Generation,
        /// This rank's.
        expected: Generation,
    },
    /// Bytes that are no frame of this protocol, or a frame at the wrong place.
    #[error("bad frame from {rank} at `{address}`: {message}")]
    Protocol {
        /// Who.
        rank: Rank,
        /// Where it is.
        address: SocketAddr,
        /// What was found, what was expected.
        message: String,
    },
    /// A call whose arguments do not fit each other.
    #[error("`{call}` is not a valid call: {message}")]
    InvalidCall {
        /// The call.
        call: CallSite,
        /// What was found, what was expected.
        message: String,
    },
    /// Group options that do not fit each other.
    #[error("the options of group `{group}` are not valid: {message}")]
    InvalidOptions {
        /// The group.
        group: String,
        /// What was found, what was expected.
        message: String,
    },
    /// A peer does not know the generation's secret.
    #[error(
        "{rank} at `{address}` does not know the secret of this generation: it is another job's \
         process or holds an old assignment"
    )]
    WrongSecret {
        /// Who was expected.
        rank: Rank,
        /// Where it was expected.
        address: SocketAddr,
    },
    /// A peer refused this rank, or is not a rank at all.
    #[error("cannot join {rank} at `{address}`: {reason}")]
    Refused {
        /// Who was expected.
        rank: Rank,
        /// Where it was expected.
        address: SocketAddr,
        /// What it said, or what is wrong with what it said.
        reason: String,
    },
    /// Not every peer was there in time.
    #[error("the group did not form within {waited:?}: missing {missing}")]
    ConnectTimeout {
        /// How long this rank waited.
        waited: Duration,
        /// Which peers, where, and what was last heard of each.
        missing: String,
    },
    /// The operating system refused a socket.
    #[error("cannot {doing}: {source}")]
    Socket {
        /// What was tried.
        doing: String,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// A library, or a function of it, that is not on this machine.
    #[error("`{what}` is not available: {message}")]
    Unavailable {
        /// Which.
        what: String,
        /// What was looked for, and what to do.
        message: String,
    },
    /// A call on device memory whose arguments do not fit each other.
    #[error("`{call}` is not a valid call on device memory: {message}")]
    InvalidDeviceCall {
        /// The call.
        call: String,
        /// What was found, what was expected.
        message: String,
    },
    /// NCCL refused a call, or found that the group is broken.
    #[error("{call} failed with NCCL error {code}: {message}")]
    Nccl {
        /// The function of NCCL, and the group.
        call: String,
        /// The `ncclResult_t`.
        code: i32,
        /// What NCCL says.
        message: String,
    },
    /// The CUDA driver refused a call.
    #[error("{call} failed with CUDA error {code}: {message}")]
    Cuda {
        /// The function of the driver.
        call: String,
        /// The `CUresult`.
        code: i32,
        /// What the driver says.
        message: String,
    },
}

impl CollectiveError {
    /// A refusal of the operating system.
    pub(crate) fn socket(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Socket { doing: doing.into(), source: Arc::new(source.into()) }
    }

    /// Something that is not on this machine.
    pub(crate) fn unavailable(what: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Unavailable { what: what.into(), message: message.into() }
    }

    /// Whether it was broken off by [`crate::AbortHandle::abort`].
    pub fn is_aborted(&self) -> bool {
        matches!(self, Self::Aborted { .. })
    }

    /// The peer that it is about, if it is about one: the first cause, as far as it is known.
    pub fn peer(&self) -> Option<Rank> {
        match self {
            Self::PeerFailed { culprit: Some(rank), .. }
            | Self::PeerLost { rank, .. }
            | Self::PeerLeft { rank, .. }
            | Self::PeerFailed { rank, .. }
            | Self::Mismatch { rank, .. }
            | Self::WrongGeneration { rank, .. }
            | Self::Protocol { rank, .. }
            | Self::WrongSecret { rank, .. }
            | Self::Refused { rank, .. } => Some(*rank),
            Self::Aborted { .. }
            | Self::InvalidCall { .. }
            | Self::InvalidOptions { .. }
            | Self::ConnectTimeout { .. }
            | Self::Socket { .. }
            | Self::Unavailable { .. }
            | Self::InvalidDeviceCall { .. }
            | Self::Nccl { .. }
            | Self::Cuda { .. } => None,
        }
    }

    /// Whether a new generation may do better: true for lost peers, false for wrong calls.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Aborted { .. }
            | Self::PeerLost { .. }
            | Self::PeerLeft { .. }
            | Self::PeerFailed { .. }
            | Self::ConnectTimeout { .. }
            | Self::WrongGeneration { .. }
            | Self::WrongSecret { .. }
            | Self::Refused { .. }
            | Self::Socket { .. }
            | Self::Cuda { .. } => true,
            // An invalid argument or usage stays one; whatever else NCCL says may pass.
            Self::Nccl { code, .. } => !matches!(code, 4 | 5),
            Self::Mismatch { .. }
            | Self::Protocol { .. }
            | Self::InvalidCall { .. }
            | Self::InvalidOptions { .. }
            | Self::Unavailable { .. }
            | Self::InvalidDeviceCall { .. } => false,
        }
    }
}

//! Breaking off a group from another thread.
//!
//! An abort sets the reason, wakes every `poll` of the group through a socket pair that is never
//! drained, tells the peers, and shuts the connections down. The first reason is kept.

use std::io::{IoSlice, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::connect::Connection;
use crate::error::CollectiveError;
use crate::frame::{FrameCodec, last_words};

/// Characters of a reason that are kept: it travels in errors and logs.
const REASON_CHARS_MAX: usize = 1000;

/// Aborts a group: cheap to clone, usable from any thread, before, during and after connecting.
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<AbortState>);

#[derive(Debug)]
pub(crate) struct AbortState {
    raised: AtomicBool,
    shared: Mutex<Shared>,
    /// Readable from the abort on.
    woken: UnixStream,
    wake: UnixStream,
}

#[derive(Debug, Default)]
struct Shared {
    reason: Option<String>,
    connections: Vec<Connection>,
    codec: Option<FrameCodec>,
}

impl AbortHandle {
    pub(crate) fn new() -> Result<Self, CollectiveError> {
        let failed = |source| CollectiveError::socket("make the abort pair", source);
        let (woken, wake) = UnixStream::pair().map_err(failed)?;
        wake.set_nonblocking(true).map_err(failed)?;
        Ok(Self(Arc::new(AbortState {
            raised: AtomicBool::new(false),
            shared: Mutex::default(),
            woken,
            wake,
        })))
    }

    /// Ends every blocked and every later call of the group with
    /// [`CollectiveError::Aborted`], at once.
    pub fn abort(&self, reason: &str) {
        let state = &self.0;
        let mut shared = state.lock();
        if shared.reason.is_none() {
            shared.reason = Some(reason.chars().take(REASON_CHARS_MAX).collect());
        }
        state.raised.store(true, Ordering::Release);
        // A full pair is a readable pair: nothing is lost if this does not fit.
        let _ = (&state.wake).write(&[1]);
        let Shared { reason, connections, codec } = &mut *shared;
        let words = codec.map(|codec| {
            let text = format!("aborted: {}", reason.as_deref().unwrap_or_default());
            last_words(&codec, None, &text)
        });
        for connection in connections.drain(..) {
            if let Some(words) = &words {
                // An error means that the connection is already gone.
                let _ = connection.words.write(&[IoSlice::new(words)]);
            }
            connection.words.shutdown(Shutdown::Both);
            connection.data.iter().for_each(|wire| wire.shutdown(Shutdown::Both));
        }
    }

    /// The reason, once aborted.
    pub(crate) fn raised(&self) -> Option<CollectiveError> {
        if !self.0.raised.load(Ordering::Acquire) {
            return None;
        }
        let reason = self.0.lock().reason.clone().unwrap_or_default();
        Some(CollectiveError::Aborted { reason })
    }

    /// Connections to shut down on an abort.
    pub(crate) fn watch(
        &self,
        codec: FrameCodec,
        connections: Vec<Connection>,
    ) -> Result<(), CollectiveError> {
        // Under the lock: an abort comes either before (seen here) or after (drains the list).
        let mut shared = self.0.lock();
        if let Some(reason) = shared.reason.clone() {
            return Err(CollectiveError::Aborted { reason });
        }
        shared.connections = connections;
        shared.codec = Some(codec);
        Ok(())
    }

    /// Lets go of the connections, so that closing them closes them.
    pub(crate) fn unwatch(&self) {
        self.0.lock().connections.clear();
    }

    /// What to poll for reading beside the sockets.
    pub(crate) fn wake_descriptor(&self) -> BorrowedFd<'_> {
        self.0.woken.as_fd()
    }
}

impl AbortState {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

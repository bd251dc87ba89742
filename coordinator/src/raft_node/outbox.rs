//! What waits to be sent to one peer, and what became of it. Shared by the raft thread, which never
//! waits, and the peer's transport task.
//!
//! Invariant: bounded in messages and bytes; when full the oldest goes, because raft repeats what
//! still matters. Reports to raft are flags and not messages, so they cannot be lost for want of
//! room: a lost snapshot report would stop replication to the peer for good.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::service::FRAME_BYTES_MAX;

/// Messages that may wait for one peer: more than raft has in flight ([`super::driver`]), so a
/// healthy peer never loses any.
const MESSAGES_MAX: usize = 512;
/// Bytes that may wait for one peer: one snapshot and the appends after it.
const BYTES_MAX: usize = 2 * FRAME_BYTES_MAX;

/// One encoded raft message.
pub(super) struct Outgoing {
    /// raft-rs's encoding.
    pub(super) bytes: Vec<u8>,
    /// raft must be told what became of it.
    pub(super) is_snapshot: bool,
}

/// What raft has to be told about a peer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reports {
    /// A message may have been lost.
    pub(super) unreachable: bool,
    /// A snapshot was handed to the connection.
    pub(super) snapshot_sent: bool,
    /// A snapshot was dropped before that.
    pub(super) snapshot_lost: bool,
    /// The peer says that this node's folder is not the one it knows.
    pub(super) folder_refused: Option<String>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Outgoing>,
    bytes: usize,
    reports: Reports,
}

impl State {
    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.queue.pop_front() {
            self.bytes -= oldest.bytes.len();
            self.reports.unreachable = true;
            self.reports.snapshot_lost |= oldest.is_snapshot;
        }
    }
}

/// The queue of one peer.
#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    filled: Notify,
}

impl Outbox {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way, so a poisoned queue is still a queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message; drops the oldest ones if there is no room.
    pub(super) fn push(&self, message: Outgoing) {
        let mut state = self.state();
        state.bytes += message.bytes.len();
        state.queue.push_back(message);
        while state.queue.len() > MESSAGES_MAX || state.bytes > BYTES_MAX {
            state.drop_oldest();
        }
        drop(state);
        self.filled.notify_one();
    }

    /// Waits until there is a message.
    pub(super) async fn filled(&self) {
        while self.state().queue.is_empty() {
            self.filled.notified().await;
        }
    }

    /// Takes the oldest message, waiting for one.
    pub(super) async fn pop(&self) -> Vec<u8> {
        loop {
            let taken = self.take();
            match taken {
                Some(bytes) => return bytes,
                None => self.filled.notified().await,
            }
        }
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        let message = state.queue.pop_front()?;
        state.bytes -= message.bytes.len();
        state.reports.snapshot_sent |= message.is_snapshot;
        Some(message.bytes)
    }

    /// Drops everything: the peer cannot be reached, and raft will have newer messages by then.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        while !state.queue.is_empty() {
            state.drop_oldest();
        }
        state.reports.unreachable = true;
    }

    /// Notes that the peer refuses this node for its folder.
    pub(super) fn refuse_folder(&self, message: String) {
        self.state().reports.folder_refused = Some(message);
    }

    /// Takes what raft has to be told.
    pub(super) fn reports(&self) -> Reports {
        std::mem::take(&mut self.state().reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(first: u8, length: usize) -> Outgoing {
        let mut bytes = vec![0; length];
        bytes[0] = first;
        Outgoing { bytes, is_snapshot: false }
    }

    #[test]
    fn a_full_queue_drops_the_oldest_and_says_so() {
        let outbox = Outbox::default();
        outbox.push(Outgoing { bytes: vec![1], is_snapshot: true });
        for _ in 0..MESSAGES_MAX - 1 {
            outbox.push(message(2, 1));
        }
        assert_eq!(outbox.reports(), Reports::default());
        outbox.push(message(3, 1));
        let lost = Reports { unreachable: true, snapshot_lost: true, ..Reports::default() };
        assert_eq!(outbox.reports(), lost);
        assert_eq!(outbox.take().map(|bytes| bytes[0]), Some(2));

        // By bytes: two frames of the largest size fit, the third pushes the others out.
        for first in [4, 5, 6] {
            outbox.push(message(first, FRAME_BYTES_MAX));
        }
        assert_eq!(outbox.take().map(|bytes| bytes[0]), Some(5));
        outbox.clear();
        assert!(outbox.take().is_none());
        assert!(outbox.reports().unreachable);
    }

    #[test]
    fn a_snapshot_that_was_taken_is_reported_as_sent() {
        let outbox = Outbox::default();
        outbox.push(Outgoing { bytes: vec![1], is_snapshot: true });
        assert!(outbox.take().is_some());
        assert_eq!(outbox.reports(), Reports { snapshot_sent: true, ..Reports::default() });
    }
}

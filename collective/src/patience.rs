//! How long a rank looks for bytes again and again before it lets the kernel wake it.
//!
//! A small message between two running ranks takes less time than falling asleep and being woken.
//! Only where every rank of this host has a core to itself: else the one that looks keeps the one
//! that should send from running.

use std::time::{Duration, Instant};

/// The time of several small messages; not noticed by anything that waits longer …
const MOST: Duration = Duration::from_micros(100);
/// … and the time of a few looks, where nothing came in time before.
const LEAST: Duration = Duration::from_micros(4);

/// How long a rank looks.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Absent: it never looks twice.
    limit: Option<Duration>,
}

impl Patience {
    /// For that many ranks on this host.
    pub(crate) fn for_ranks(here: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { limit: (here <= cores).then_some(MOST) }
    }

    /// Until when to look from now on.
    pub(crate) fn begin(&self) -> Option<Instant> {
        self.limit.map(|limit| Instant::now() + limit)
    }

    /// Something came in time.
    pub(crate) fn succeeded(&mut self) -> Option<Instant> {
        self.limit = self.limit.map(|limit| (limit * 2).min(MOST));
        self.begin()
    }

    /// Nothing came in time.
    pub(crate) fn failed(&mut self) {
        self.limit = self.limit.map(|limit| (limit / 2).max(LEAST));
    }
}

//! Workers that one job does not use for now: those that compute in another way or hold other data
//! than the job began with, and those on which its processes keep failing.
//!
//! Volatile, and carried from generation to generation: a new leader finds out again.

use std::collections::BTreeMap;

use api::ids::Name;

use super::decision::Millis;

/// A worker is left alone for this long after a failure; twice as long after each further one.
const WAIT_MS: u64 = 10_000;
/// At most that often twice as long: about 21 minutes.
const DOUBLINGS_MAX: u32 = 7;
/// A failure this long after the one before begins anew.
const FORGOTTEN_MS: u64 = 3_600_000;

/// What is known against workers.
#[derive(Clone, Debug, Default)]
pub(super) struct Shunned {
    unfit: BTreeMap<Name, String>,
    failing: BTreeMap<Name, Failing>,
}

/// Processes that ended by themselves without having been of use.
#[derive(Clone, Copy, Debug)]
struct Failing {
    times: u32,
    last: Millis,
}

impl Failing {
    fn wait_ms(self) -> u64 {
        WAIT_MS << self.times.saturating_sub(1).min(DOUBLINGS_MAX)
    }
}

impl Shunned {
    /// Whether the job may use the worker.
    pub(super) fn allows(&self, worker: &Name, now: Millis) -> bool {
        let waits =
            self.failing.get(worker).is_some_and(|found| now.since(found.last) < found.wait_ms());
        !waits && self.fits(worker)
    }

    /// Whether its processes can be ranks of the job at all.
    pub(super) fn fits(&self, worker: &Name) -> bool {
        !self.unfit.contains_key(worker)
    }

    /// The worker's processes can be no ranks of this job, whatever is tried. True when that is new.
    pub(super) fn is_unfit(&mut self, worker: &Name, why: &str) -> bool {
        self.unfit.insert(worker.clone(), why.to_owned()).is_none()
    }

    /// A process failed there; for how long the worker is left alone.
    pub(super) fn failed(&mut self, worker: &Name, now: Millis) -> u64 {
        let first = Failing { times: 0, last: now };
        let failing = self.failing.entry(worker.clone()).or_insert(first);
        if now.since(failing.last) >= FORGOTTEN_MS {
            failing.times = 0;
        }
        failing.times = failing.times.saturating_add(1);
        failing.last = now;
        failing.wait_ms()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_waited_for_longer_and_longer_and_forgotten_after_an_hour() {
        let worker: Name = "w1".parse().expect("a name");
        let mut shunned = Shunned::default();
        assert!(shunned.allows(&worker, Millis(0)));
        assert_eq!(shunned.failed(&worker, Millis(0)), 10_000);
        assert!(!shunned.allows(&worker, Millis(9_999)));
        assert!(shunned.allows(&worker, Millis(10_000)));
        assert_eq!(shunned.failed(&worker, Millis(10_000)), 20_000);
        let waits: Vec<u64> = (0..9).map(|_| shunned.failed(&worker, Millis(0))).collect();
        assert_eq!(waits.last(), Some(&1_280_000));
        assert_eq!(shunned.failed(&worker, Millis(3_600_000)), 10_000);
        assert!(shunned.is_unfit(&worker, "other data") && !shunned.is_unfit(&worker, "again"));
        assert!(!shunned.allows(&worker, Millis(u64::MAX)));
    }
}

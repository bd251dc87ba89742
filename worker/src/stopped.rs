//! Finds out that a task's process is stopped by a signal: it then neither ends nor says anything, and
//! whoever waits for it waits for ever.
//!
//! Only what was seen counts: a worker that was stopped itself, with its whole host perhaps, must not
//! take the time in between for its ranks'. And a process that computes between two looks, each of which
//! meets it stopped, is slow: it is no less alive for that.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::strays::stopped_by_signal;

/// Looks per time-out, so that it is exceeded by a quarter at most …
const LOOKS: u32 = 4;
/// … but no more often than this.
const LOOK_MIN: Duration = Duration::from_millis(10);

/// Looks at one process.
pub(crate) struct StopWatch {
    pid: u32,
    timeout: Duration,
    looks: tokio::time::Interval,
    looked: Instant,
    /// Processor time it had used when it was last seen stopped, in ticks.
    ticks: Option<u64>,
    /// How long it has been seen stopped.
    stopped: Duration,
}

impl StopWatch {
    /// Must be called within a runtime.
    pub(crate) fn new(pid: u32, timeout: Duration) -> Self {
        let mut looks = interval((timeout / LOOKS).max(LOOK_MIN));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { pid, timeout, looks, looked: Instant::now(), ticks: None, stopped: Duration::ZERO }
    }

    /// Returns when the process has been stopped for the time-out, never where that is zero, and says
    /// so. Nothing is lost when it is dropped half-way and called again.
    pub(crate) async fn stopped(&mut self) -> String {
        if self.timeout.is_zero() {
            std::future::pending::<()>().await;
        }
        while self.stopped < self.timeout {
            self.looks.tick().await;
            self.look(stopped_by_signal(self.pid), Instant::now());
        }
        let time = match self.timeout.subsec_millis() {
            0 => format!("{} s", self.timeout.as_secs()),
            _ => format!("{} ms", self.timeout.as_millis()),
        };
        format!("its process {} was stopped by a signal for {time}", self.pid)
    }

    /// `ticks`: the processor time that it has used, if it is stopped.
    fn look(&mut self, ticks: Option<u64>, now: Instant) {
        let passed = now.saturating_duration_since(std::mem::replace(&mut self.looked, now));
        let former = std::mem::replace(&mut self.ticks, ticks);
        self.stopped = match (ticks, former) {
            // Since the look before, or since some time after it: the first counts as it always did.
            (Some(_), None) => passed.min(self.looks.period()),
            (Some(ticks), Some(former)) if ticks == former => {
                self.stopped + passed.min(2 * self.looks.period())
            }
            (Some(_), Some(_)) | (None, _) => Duration::ZERO,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_time_that_was_seen_counts() {
        let mut watch = StopWatch::new(1, Duration::from_secs(2));
        let begin = watch.looked;
        let mut look = |ticks, at| {
            watch.look(ticks, begin + Duration::from_millis(at));
            watch.stopped.as_millis()
        };
        assert_eq!(look(Some(7), 500), 500);
        assert_eq!(look(Some(7), 1_000), 1_000);
        // It went on for a moment, as was seen …
        assert_eq!(look(None, 1_500), 0);
        assert_eq!(look(Some(7), 2_000), 500);
        // … and again, unseen.
        assert_eq!(look(Some(8), 2_500), 0);
        assert_eq!(look(Some(8), 3_000), 500);
        // This worker was stopped as well.
        assert_eq!(look(Some(8), 60_000), 1_500);
        assert_eq!(look(Some(8), 60_500), 2_000);
    }
}

//! How an owner thread waits: it looks, rests a little, and looks again.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use crate::nccl::batch::Command;

/// How long to rest between two looks: not at all at first, then a little, at last half a
/// millisecond.
#[derive(Default)]
pub(super) struct Pause {
    rounds: u32,
}

impl Pause {
    /// Looks without a rest: about what a small operation takes.
    const EAGER: u32 = 200;
    const SHORT: Duration = Duration::from_micros(50);
    const LONG: Duration = Duration::from_micros(500);

    fn length(&mut self) -> Option<Duration> {
        self.rounds = self.rounds.saturating_add(1);
        match self.rounds {
            0..=Self::EAGER => None,
            rounds if rounds < 2 * Self::EAGER => Some(Self::SHORT),
            _ => Some(Self::LONG),
        }
    }

    pub(super) fn sleep(&mut self) {
        match self.length() {
            None => std::thread::yield_now(),
            Some(length) => std::thread::sleep(length),
        }
    }

    /// The next command, if there is one by the end of the rest.
    pub(super) fn receive(
        &mut self,
        commands: &Receiver<Command>,
    ) -> Result<Command, RecvTimeoutError> {
        match self.length() {
            None => commands.try_recv().map_err(|error| match error {
                TryRecvError::Empty => {
                    std::thread::yield_now();
                    RecvTimeoutError::Timeout
                }
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            }),
            Some(length) => commands.recv_timeout(length),
        }
    }
}

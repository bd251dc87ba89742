//! The polite requests to stop as something to wait for: Ctrl-C and Ctrl-\, SIGTERM, and the end of the
//! terminal.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{CliError, Result};

/// Exit code of a process that a person broke off.
pub const EXIT_INTERRUPTED: i32 = 130;

/// What may have been told to leave alone, as `nohup` does before it starts a program.
const IGNORABLE: [SignalKind; 2] = [SignalKind::hangup(), SignalKind::quit()];

/// The polite requests to stop.
pub struct Signals {
    all: Vec<Signal>,
}

impl Signals {
    /// From now on they no longer end the process by themselves.
    pub fn new() -> Result<Self> {
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let heard = IGNORABLE.into_iter().filter(|kind| !is_in(ignored, *kind));
        let kinds = [SignalKind::interrupt(), SignalKind::terminate()].into_iter().chain(heard);
        let listen = |kind| {
            signal(kind).map_err(|e| CliError::internal(format!("cannot listen for signals: {e}")))
        };
        Ok(Self { all: kinds.map(listen).collect::<Result<_>>()? })
    }

    /// Runs `work` to its end; a signal ends the process at once meanwhile.
    pub async fn or_exit<T>(&mut self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            ended = work => ended,
            () = self.wait() => std::process::exit(EXIT_INTERRUPTED),
        }
    }

    /// Waits for any of them.
    pub async fn wait(&mut self) {
        std::future::poll_fn(|context| {
            let has_come = |signal: &mut Signal| signal.poll_recv(context).is_ready();
            match self.all.iter_mut().any(has_come) {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            }
        })
        .await;
    }
}

/// The mask of signals that a process ignores, from its /proc/PID/status.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn is_in(mask: u64, kind: SignalKind) -> bool {
    // Signals are counted from 1.
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_told_from_the_rest() {
        // As `nohup` leaves it.
        let mask = ignored("SigBlk:\t0000000000000000\nSigIgn:\t0000000000000001\n");
        assert!(is_in(mask, SignalKind::hangup()) && !is_in(mask, SignalKind::quit()));
        assert!(!is_in(ignored(""), SignalKind::hangup()));
        assert!(is_in(ignored("SigIgn:\t0000000000001004\n"), SignalKind::quit()));
    }
}

//! One fault done to a cluster of this host, and undone.
//!
//! Whatever can be undone is undone by dropping a value: a run that ends early, by Ctrl-C or an
//! error, drops what it holds. Only SIGKILL to this very process leaves faults behind.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::Name;
use chaos::{Fault, FaultKind, Role, Strike, Target};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::disk::Filling;
use super::link::{Cut, is_apart};
use crate::error::Result;
use crate::processes::{Process, Roles, ranks_of};

/// How often a slow process stops and goes on: short against a step, long against a time slice.
const CYCLE: Duration = Duration::from_millis(100);

/// What faults are aimed at.
pub struct Scene {
    /// The job whose ranks are struck.
    pub job: Name,
    /// All coordinators of the cluster.
    pub coordinators: Vec<SocketAddr>,
    /// The process that its folder names.
    pub whole: u32,
    /// The coordinators that ran on this host at the start.
    pub coordinators_here: usize,
    /// The store's server, if it runs on this host.
    pub store: Option<Process>,
    /// The folder to fill, if any.
    pub fill: Option<PathBuf>,
    /// Most bytes to fill it with.
    pub fill_bytes: u64,
    /// Processes that are stopped now and then by a fault that has not ended.
    pub claims: Claims,
}

/// What became of a strike.
pub enum Struck {
    /// It was done to this process, if to one; what there is to undo.
    Done(Option<Pid>, Option<Held>),
    /// It was not done, and why.
    Missed(String),
}

/// A fault that can be undone; dropping it does.
pub enum Held {
    /// A process stands still; only held to be dropped.
    Still {
        /// What lets it go on.
        _stopped: Stopped,
        /// Given up after that.
        _claim: Claim,
    },
    /// A process stands still for a part of the time.
    PartTime {
        /// The process.
        process: Process,
        /// For how much of the time.
        percent: u8,
        /// Given up at the end.
        _claim: Claim,
    },
    /// A disk fills.
    Filling(Filling),
    /// Links are down; only held to be dropped.
    Cut {
        /// What mends them.
        _cut: Cut,
    },
}

impl Held {
    /// Goes on with the fault for `lasts`, then undoes it.
    pub async fn last(mut self, lasts: Duration) {
        let end = tokio::time::Instant::now() + lasts;
        if let Self::Filling(filling) = &mut self {
            filling.fill().await;
        }
        if let Self::PartTime { process, percent, .. } = &self {
            let still = CYCLE * u32::from(*percent) / 100;
            while tokio::time::Instant::now() < end {
                let Ok(stopped) = Stopped::begin(*process) else { return };
                tokio::time::sleep(still).await;
                drop(stopped);
                tokio::time::sleep(CYCLE - still).await;
            }
        }
        tokio::time::sleep_until(end).await;
    }
}

/// A stopped process; goes on when dropped, if it is still there.
pub struct Stopped(Process);

impl Stopped {
    fn begin(process: Process) -> nix::Result<Self> {
        process.signal(Signal::SIGSTOP).map(|()| Self(process))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Gone meanwhile: its worker has killed it.
        let _ = self.0.signal(Signal::SIGCONT);
    }
}

/// Processes under a fault that stops them: a second one would end the first early.
#[derive(Clone, Default)]
pub struct Claims(Arc<Mutex<BTreeSet<Process>>>);

/// One of them; given up when dropped.
pub struct Claim(Claims, Process);

impl Claims {
    fn take(&self, process: Process) -> Option<Claim> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One that someone else has stopped is not ours to continue.
        (!process.is_stopped() && taken.insert(process)).then(|| Claim(self.clone(), process))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Scene {
    /// The cluster's roles on this host now.
    pub fn roles(&self) -> Roles {
        Roles::find(&self.coordinators, self.whole)
    }

    /// Does it, or says why not.
    ///
    /// # Errors
    /// Where a file or a link refuses what should have been possible.
    pub fn strike(&self, strike: &Strike) -> Result<Struck> {
        let Strike { fault, target, .. } = strike;
        match fault.kind {
            FaultKind::FillDisk => {
                let Some(folder) = &self.fill else { return Ok(missed("no folder is given")) };
                let filling = Filling::begin(folder, self.fill_bytes)?;
                Ok(Struck::Done(None, Some(Held::Filling(filling))))
            }
            FaultKind::Cut => {
                let Some(worker) = self.find(target) else { return Ok(nobody(target)) };
                let _cut = Cut::begin(&worker)?;
                Ok(Struck::Done(Some(worker.pid), Some(Held::Cut { _cut })))
            }
            FaultKind::KillCoordinator => Ok(self.kill_coordinator(target)),
            _ => Ok(match self.find(target) {
                Some(process) => self.signal(fault, process),
                None => nobody(target),
            }),
        }
    }

    /// The process that a target means now.
    fn find(&self, target: &Target) -> Option<Process> {
        let pick = |all: &[Process]| all.get(target.among(all.len())?).copied();
        match target.role {
            Role::Rank => {
                let ranks = ranks_of(self.job.as_str(), &self.roles().parents());
                pick(&ranks.into_iter().map(|(_, process)| process).collect::<Vec<_>>())
            }
            Role::Worker => pick(&self.roles().workers),
            Role::Link => {
                pick(&self.roles().workers.into_iter().filter(is_apart).collect::<Vec<_>>())
            }
            Role::Coordinator => pick(&self.roles().coordinators),
            Role::Store => self.store.filter(Process::is_alive),
            Role::Disk => None,
        }
    }

    fn signal(&self, fault: &Fault, process: Process) -> Struck {
        let pid = Some(process.pid);
        let done = match fault.kind {
            FaultKind::Kill => process.signal(Signal::SIGKILL).map(|()| None),
            kind => {
                let Some(claim) = self.claims.take(process) else {
                    return Struck::Missed(format!("process {} is stopped already", process.pid));
                };
                if matches!(kind, FaultKind::Slow | FaultKind::ThrottleStore) {
                    let percent = fault.stopped_percent;
                    Ok(Some(Held::PartTime { process, percent, _claim: claim }))
                } else {
                    let stopped = Stopped::begin(process);
                    stopped.map(|_stopped| Some(Held::Still { _stopped, _claim: claim }))
                }
            }
        };
        match done {
            Ok(held) => Struck::Done(pid, held),
            Err(errno) => Struck::Missed(format!("process {}: {}", process.pid, errno.desc())),
        }
    }

    /// Kills one as long as a majority of all is left, so that the cluster can still decide.
    fn kill_coordinator(&self, target: &Target) -> Struck {
        let here = self.roles().coordinators;
        let all = self.coordinators.len();
        let living = all.saturating_sub(self.coordinators_here.saturating_sub(here.len()));
        if living <= all / 2 + 1 {
            return missed(&format!(
                "{living} of {all} coordinators live: no majority would be left"
            ));
        }
        let Some(process) = target.among(here.len()).map(|index| here[index]) else {
            return nobody(target);
        };
        match process.signal(Signal::SIGKILL) {
            Ok(()) => Struck::Done(Some(process.pid), None),
            Err(errno) => missed(errno.desc()),
        }
    }
}

fn missed(why: &str) -> Struck {
    Struck::Missed(why.to_owned())
}

fn nobody(target: &Target) -> Struck {
    missed(&format!("no {} lives on this host now", target.role))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A process that waits for its input to end.
    fn idle() -> (Child, Process) {
        let mut command = Command::new("cat");
        let child = command.stdin(std::process::Stdio::piped()).spawn().expect("it starts");
        let process = Process::of(Pid::from_raw(child.id() as i32)).expect("it runs");
        (child, process)
    }

    #[test]
    fn what_is_stopped_goes_on_when_dropped_and_is_struck_once() {
        let (mut child, process) = idle();
        let claims = Claims::default();
        let claim = claims.take(process).expect("nobody has it");
        assert!(claims.take(process).is_none(), "one fault at a time");
        let _stopped = Stopped::begin(process).expect("ours");
        let still = Held::Still { _stopped, _claim: claim };
        // The signal is there before the state shows it.
        while !process.is_stopped() {
            std::thread::yield_now();
        }
        drop(still);
        while process.is_stopped() {
            std::thread::yield_now();
        }
        assert!(claims.take(process).is_some(), "given up");
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(!process.is_alive());
    }
}

//! One fault done to a cluster of this host, and undone.
//!
//! Whatever can be undone is undone by dropping a value: a run that ends early, by a signal or an
//! error, drops what it holds. Only SIGKILL to this very process leaves faults behind: processes that
//! are stopped, links that are down, the file that fills a disk.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::Name;
use chaos::{Fault, FaultKind, Role, Strike, Target};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::disk::Filling;
use super::link::{self, Cut, is_apart};
use crate::processes::{Process, Roles, listeners, ranks_of};

/// How often a slow process stops and goes on: short against a step, long against a time slice.
const CYCLE: Duration = Duration::from_millis(100);
/// A coordinator that does not take a connection within this time counts as gone.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// What faults are aimed at.
pub struct Scene {
    /// The job whose ranks are struck.
    pub job: Name,
    /// All coordinators of the cluster.
    pub coordinators: Vec<SocketAddr>,
    /// The process that its folder names.
    pub whole: u32,
    /// Where the store's server listens, if it runs on this host.
    pub store: Vec<SocketAddr>,
    /// The folder to fill, if any.
    pub fill: Option<PathBuf>,
    /// Most bytes to fill it with.
    pub fill_bytes: u64,
    /// What is under a fault that has not ended.
    pub claims: Claims,
    /// Coordinators that were killed; one may need a moment to be gone.
    pub killed: Mutex<Vec<Process>>,
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
    /// Processes stand still for a part of the time, all at once.
    PartTime {
        /// The processes.
        processes: Vec<Process>,
        /// For how much of the time.
        percent: u8,
        /// Given up at the end.
        _claims: Vec<Claim>,
    },
    /// A disk fills.
    Filling(Filling),
    /// Links are down; only held to be dropped.
    Cut {
        /// What mends them.
        _cut: Cut,
        /// Given up after that.
        _claim: Claim,
    },
}

impl Held {
    /// Goes on with the fault for `lasts`, then undoes it.
    pub async fn last(mut self, lasts: Duration) {
        if let Self::Filling(filling) = &mut self {
            filling.fill().await;
        }
        // It lasts from when the disk is full.
        let end = tokio::time::Instant::now() + lasts;
        if let Self::PartTime { processes, percent, .. } = &self {
            let still = CYCLE * u32::from(*percent) / 100;
            while tokio::time::Instant::now() < end {
                let stopped: Vec<Stopped> =
                    processes.iter().filter_map(|process| Stopped::begin(*process).ok()).collect();
                if stopped.is_empty() {
                    return;
                }
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

/// What is under a fault: a second one would end the first early, or find nothing to put back.
#[derive(Clone, Default)]
pub struct Claims(Arc<Mutex<BTreeSet<Claimed>>>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Claimed {
    Process(Process),
    Network(PathBuf),
}

/// One of them; given up when dropped.
pub struct Claim(Claims, Claimed);

impl Claims {
    fn take(&self, process: Process) -> Option<Claim> {
        // One that someone else has stopped is not ours to continue.
        (!process.is_stopped()).then(|| self.insert(Claimed::Process(process)))?
    }

    /// The network of a process, which others may share.
    fn take_network(&self, process: &Process) -> Option<Claim> {
        self.insert(Claimed::Network(link::namespace(process)?))
    }

    fn insert(&self, claimed: Claimed) -> Option<Claim> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(claimed.clone()).then(|| Claim(self.clone(), claimed))
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
    pub fn strike(&self, strike: &Strike) -> Struck {
        let Strike { fault, target, .. } = strike;
        match fault.kind {
            FaultKind::FillDisk => {
                let Some(folder) = &self.fill else { return missed("no folder is given") };
                match Filling::begin(folder, self.fill_bytes) {
                    Ok(filling) => Struck::Done(None, Some(Held::Filling(filling))),
                    // Full already, by another fault or otherwise.
                    Err(error) => missed(error.message()),
                }
            }
            FaultKind::Cut => {
                let Some(worker) = self.find(target) else { return nobody(target) };
                let Some(_claim) = self.claims.take_network(&worker) else {
                    return missed(&format!("the network of process {} is cut", worker.pid));
                };
                match Cut::begin(&worker) {
                    Ok(_cut) => Struck::Done(Some(worker.pid), Some(Held::Cut { _cut, _claim })),
                    // It has died just now, for instance; what was done is undone.
                    Err(error) => missed(error.message()),
                }
            }
            FaultKind::KillCoordinator => self.kill_coordinator(target),
            FaultKind::ThrottleStore => self.throttle(fault, &listeners(&self.store), target),
            FaultKind::Slow => match self.find(target) {
                Some(process) => self.throttle(fault, &[process], target),
                None => nobody(target),
            },
            _ => match self.find(target) {
                Some(process) => self.signal(fault, process),
                None => nobody(target),
            },
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
            Role::Store | Role::Disk => None,
        }
    }

    fn signal(&self, fault: &Fault, process: Process) -> Struck {
        let Some(_claim) = self.claims.take(process) else { return taken(process) };
        let done = match fault.kind {
            FaultKind::Kill => process.signal(Signal::SIGKILL).map(|()| None),
            _ => {
                let stopped = Stopped::begin(process);
                stopped.map(|_stopped| Some(Held::Still { _stopped, _claim }))
            }
        };
        match done {
            Ok(held) => Struck::Done(Some(process.pid), held),
            Err(errno) => missed(&format!("process {}: {}", process.pid, errno.desc())),
        }
    }

    /// Stops processes for a part of the time: all of a server, or nothing of it would be slower.
    fn throttle(&self, fault: &Fault, processes: &[Process], target: &Target) -> Struck {
        let Some(first) = processes.first() else { return nobody(target) };
        let mut claims = Vec::new();
        for process in processes {
            let Some(claim) = self.claims.take(*process) else { return taken(*process) };
            claims.push(claim);
        }
        let (processes, percent) = (processes.to_vec(), fault.stopped_percent);
        let held = Held::PartTime { processes, percent, _claims: claims };
        Struck::Done(Some(first.pid), Some(held))
    }

    /// Kills one as long as a majority of all is left, so that the cluster can still decide.
    fn kill_coordinator(&self, target: &Target) -> Struck {
        let mut killed = self.killed.lock().unwrap_or_else(PoisonError::into_inner);
        killed.retain(Process::is_alive);
        let mut here = self.roles().coordinators;
        here.retain(|process| !killed.contains(process));
        let all = self.coordinators.len();
        // One that was killed just now may still take connections.
        let living = answering(&self.coordinators).saturating_sub(killed.len());
        if living <= all / 2 + 1 {
            return missed(&format!(
                "{living} of {all} coordinators live: no majority would be left"
            ));
        }
        let Some(process) = target.among(here.len()).map(|index| here[index]) else {
            return nobody(target);
        };
        match process.signal(Signal::SIGKILL) {
            Ok(()) => {
                killed.push(process);
                Struck::Done(Some(process.pid), None)
            }
            Err(errno) => missed(errno.desc()),
        }
    }
}

/// How many of these take a connection, on this host or another: one that was lost before the run, or
/// elsewhere, is no part of a majority.
fn answering(addresses: &[SocketAddr]) -> usize {
    std::thread::scope(|scope| {
        let asked: Vec<_> = addresses
            .iter()
            .map(|at| scope.spawn(|| TcpStream::connect_timeout(at, ANSWER_WAIT).is_ok()))
            .collect();
        asked.into_iter().filter_map(|asked| asked.join().ok()).filter(|answers| *answers).count()
    })
}

fn missed(why: &str) -> Struck {
    Struck::Missed(why.to_owned())
}

fn taken(process: Process) -> Struck {
    missed(&format!("process {} is under another fault, or stopped", process.pid))
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

    fn eventually(condition: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !condition() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not come to that");
            std::thread::yield_now();
        }
    }

    fn scene(coordinators: Vec<SocketAddr>) -> Scene {
        Scene {
            job: "small".parse().expect("a name"),
            coordinators,
            whole: 0,
            store: Vec::new(),
            fill: None,
            fill_bytes: 0,
            claims: Claims::default(),
            killed: Mutex::default(),
        }
    }

    fn strike(kind: FaultKind, role: Role) -> Strike {
        let fault = Fault { kind, lasts: None, stopped_percent: 50 };
        Strike { at_ms: 0, fault, target: Target { role, place: 0 } }
    }

    fn why_missed(struck: Struck) -> String {
        match struck {
            Struck::Missed(why) => why,
            Struck::Done(pid, _) => panic!("{pid:?} was struck"),
        }
    }

    #[test]
    fn a_coordinator_that_was_dead_before_the_run_counts_for_no_majority() {
        let sockets = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
        let scene = scene(sockets.each_ref().map(|s| s.local_addr().expect("bound")).to_vec());
        let kill = strike(FaultKind::KillCoordinator, Role::Coordinator);
        // All answer, and none of them is a coordinator's process.
        assert_eq!(why_missed(scene.strike(&kill)), "no coordinator lives on this host now");
        let [first, _second, _third] = sockets;
        drop(first);
        let why = why_missed(scene.strike(&kill));
        assert_eq!(why, "2 of 3 coordinators live: no majority would be left");
    }

    #[test]
    fn a_disk_that_takes_no_file_is_a_miss() {
        let fill = Some(PathBuf::from("/proc/self"));
        let scene = Scene { fill, ..scene(Vec::new()) };
        let why = why_missed(scene.strike(&strike(FaultKind::FillDisk, Role::Disk)));
        assert!(why.contains("cannot make a file in `/proc/self`"), "{why}");
    }

    #[test]
    fn all_processes_of_a_server_are_claimed_or_none() {
        let [(mut first, one), (mut second, two)] = [idle(), idle()];
        let scene = scene(Vec::new());
        let Strike { fault, target, .. } = strike(FaultKind::ThrottleStore, Role::Store);
        let held = scene.claims.take(two).expect("nobody has it");
        let why = why_missed(scene.throttle(&fault, &[one, two], &target));
        assert_eq!(why, format!("process {} is under another fault, or stopped", two.pid));
        drop(held);
        let Struck::Done(pid, Some(held)) = scene.throttle(&fault, &[one, two], &target) else {
            panic!("both were free");
        };
        assert_eq!(pid, Some(one.pid));
        let Held::PartTime { processes, .. } = &held else { panic!("for a part of the time") };
        assert_eq!(processes, &[one, two]);
        assert!(scene.claims.take(one).is_none() && scene.claims.take(two).is_none());
        drop(held);
        for child in [&mut first, &mut second] {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    #[test]
    fn what_shares_a_network_is_cut_once() {
        let claims = Claims::default();
        let me = Process::of(Pid::this()).expect("it runs");
        let (mut child, other) = idle();
        let claim = claims.take_network(&me).expect("nobody has it");
        assert!(claims.take_network(&other).is_none(), "the same network");
        drop(claim);
        assert!(claims.take_network(&other).is_some());
        assert!(!is_apart(&other));
        child.kill().expect("it runs");
        child.wait().expect("it ends");
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
        eventually(|| process.is_stopped());
        drop(still);
        eventually(|| !process.is_stopped());
        assert!(claims.take(process).is_some(), "given up");
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(!process.is_alive());
    }
}

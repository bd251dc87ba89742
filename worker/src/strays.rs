//! Processes that a former incarnation of this worker left behind.
//!
//! Every live rank has a record: task, process id, when that process started (by the kernel's
//! clock) and the boot it belongs to. A rank gets its assignment only after its record is on disk,
//! so no rank computes unrecorded. A process is killed only if it is provably ours: the id *and*
//! the start time match, or, where the rank itself is gone and its children remain, they belong to
//! its process group and carry its environment.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use api::TaskId;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::error::WorkerError;
use crate::folder::{Folder, write_durably};

/// A process in an uninterruptible system call (a hung disk or driver) may take this long to die.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked at; the kernel offers no event for processes that are not our children.
const GONE_POLL: Duration = Duration::from_millis(10);
/// A larger record is not one of ours.
const RECORD_BYTES_MAX: u64 = 4 << 10;

/// What is remembered of a live rank.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RankRecord {
    task: TaskId,
    /// Process id, which is the process group's too.
    pid: i32,
    /// Field 22 of /proc/<pid>/stat: clock ticks after boot.
    start_ticks: u64,
    boot_id: String,
}

/// What /proc says of a process.
struct Process {
    pid: i32,
    group: i32,
    start_ticks: u64,
    is_zombie: bool,
    is_stopped: bool,
    is_traced: bool,
    /// Processor time of all its threads, in clock ticks.
    ticks: u64,
}

fn process(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything, so fields are counted from its last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    Some(Process {
        pid,
        is_zombie: matches!(*fields.first()?, "Z" | "X"),
        is_stopped: *fields.first()? == "T",
        is_traced: *fields.first()? == "t",
        ticks: fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?,
        group: fields.get(2)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Whether a process is stopped by a signal or a debugger, so that it can do nothing.
pub(crate) fn is_stopped(pid: u32) -> bool {
    let process = i32::try_from(pid).ok().and_then(process);
    process.is_some_and(|process| process.is_stopped || process.is_traced)
}

/// The processor time that a process has used, in clock ticks, if it is stopped by a signal. One that a
/// debugger holds has a person who minds it.
pub(crate) fn stopped_by_signal(pid: u32) -> Option<u64> {
    let process = i32::try_from(pid).ok().and_then(process)?;
    process.is_stopped.then_some(process.ticks)
}

fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

impl RankRecord {
    /// Describes a child that has not been reaped.
    pub(crate) fn of(task: &TaskId, pid: u32) -> std::io::Result<Self> {
        let missing = || std::io::Error::other(format!("/proc/{pid}/stat cannot be read"));
        let pid = i32::try_from(pid).map_err(|_| missing())?;
        let process = process(pid).ok_or_else(missing)?;
        let start_ticks = process.start_ticks;
        Ok(Self { task: task.clone(), pid, start_ticks, boot_id: boot_id() })
    }

    /// Puts it on disk before it returns.
    pub(crate) fn write(&self, path: &Path) -> std::io::Result<()> {
        write_durably(path, &serde_json::to_vec(self)?)
    }

    /// Its processes that still live.
    fn processes(&self) -> Vec<i32> {
        if self.boot_id != boot_id() {
            return Vec::new();
        }
        let leader = process(self.pid);
        let leader_is_ours = leader.as_ref().is_some_and(|p| p.start_ticks == self.start_ticks);
        let reused = leader.is_some() && !leader_is_ours;
        all_processes()
            .filter(|process| process.group == self.pid && !process.is_zombie)
            .filter(|process| leader_is_ours || (!reused && self.marks(process.pid)))
            .map(|process| process.pid)
            .collect()
    }

    /// Whether a process inherited the rank's environment.
    fn marks(&self, pid: i32) -> bool {
        let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { return false };
        let task = &self.task;
        let expected = [
            format!("COHORT_JOB={}", task.workload),
            format!("COHORT_GENERATION={}", task.generation.0),
            format!("RANK={}", task.rank.0),
        ];
        expected.iter().all(|e| environment.split(|b| *b == 0).any(|have| have == e.as_bytes()))
    }

    fn kill(&self) {
        let processes = self.processes();
        if processes.contains(&self.pid) {
            // The rank itself lives, so the group is certainly its own.
            ignore_gone(killpg(Pid::from_raw(self.pid), Signal::SIGKILL), self.pid);
        }
        for pid in processes {
            ignore_gone(kill(Pid::from_raw(pid), Signal::SIGKILL), pid);
        }
    }
}

fn ignore_gone(result: nix::Result<()>, pid: i32) {
    match result {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => warn!(pid, %errno, "cannot kill a process of a former worker"),
    }
}

fn all_processes() -> impl Iterator<Item = Process> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(process)
}

fn read_record(path: &Path) -> Option<RankRecord> {
    let length = fs::metadata(path).ok()?.len();
    let bytes = (length <= RECORD_BYTES_MAX).then(|| fs::read(path).ok()).flatten()?;
    serde_json::from_slice::<RankRecord>(&bytes).ok().filter(|record| record.pid > 1)
}

/// Kills what a former incarnation left, waits until it is gone and removes its records. Blocking;
/// to be called before anything is started, with the folder locked.
pub(crate) fn clear(folder: &Folder) -> Result<(), WorkerError> {
    let ranks = folder.ranks();
    let failed = |source| WorkerError::io("read folder", &ranks, source);
    let mut records = Vec::new();
    for entry in fs::read_dir(&ranks).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        match read_record(&path) {
            Some(record) => records.push((path, record)),
            None => {
                // Half-written before its rename, hence of a rank that never got an assignment.
                warn!(file = %path.display(), "removed a file that is not a rank's record");
                remove(&path)?;
            }
        }
    }
    for (_, record) in &records {
        let processes = record.processes();
        if !processes.is_empty() {
            info!(task = %record.task, ?processes, "killing what a former worker left running");
        }
    }
    let deadline = Instant::now() + GONE_TIMEOUT;
    loop {
        records.iter().for_each(|(_, record)| record.kill());
        let left: Vec<String> = records
            .iter()
            .flat_map(|(_, record)| {
                record.processes().into_iter().map(|pid| format!("{} (pid {pid})", record.task))
            })
            .collect();
        if left.is_empty() {
            break;
        }
        if Instant::now() >= deadline {
            return Err(WorkerError::Strays {
                seconds: GONE_TIMEOUT.as_secs(),
                processes: left.join(", "),
            });
        }
        std::thread::sleep(GONE_POLL);
    }
    records.iter().try_for_each(|(path, _)| remove(path))
}

fn remove(path: &Path) -> Result<(), WorkerError> {
    fs::remove_file(path).map_err(|source| WorkerError::io("remove", path, source))
}

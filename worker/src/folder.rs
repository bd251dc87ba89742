//! The worker's folder: one worker at a time, and files that are either whole or absent.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use api::TaskId;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::WorkerError;

/// Where things lie in the worker's folder, which it holds locked.
pub(crate) struct Folder {
    root: PathBuf,
    /// Released by the kernel when this process ends, however it ends; not inherited by ranks.
    _lock: Flock<File>,
}

impl Folder {
    /// Creates the folder and takes its lock.
    pub(crate) fn open(root: &Path) -> Result<Self, WorkerError> {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        for folder in [root.join("ranks"), root.join("logs")] {
            fs::create_dir_all(&folder)
                .map_err(|source| WorkerError::io("create folder", &folder, source))?;
        }
        let path = root.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| WorkerError::io("open", &path, source))?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => WorkerError::Locked { folder: root.clone() },
                    other => WorkerError::io("lock", &path, other.into()),
                },
            )?;
        Ok(Self { root, _lock: lock })
    }

    /// The record of a live rank.
    pub(crate) fn rank_record(&self, task: &TaskId) -> PathBuf {
        self.ranks().join(format!("{}.{}.{}.json", task.workload, task.generation, task.rank))
    }

    pub(crate) fn ranks(&self) -> PathBuf {
        self.root.join("ranks")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }
}

/// Where a task's output lies under the folder of logs.
pub(crate) fn log_folder(logs: &Path, task: &TaskId) -> PathBuf {
    logs.join(task.workload.as_str()).join(task.generation.to_string()).join(task.rank.to_string())
}

/// Writes a file that survives a crash whole or not at all.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

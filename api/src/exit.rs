//! Exit codes of `cluster`, by class of failure. Documented in `docs/cli.md`.

use serde::{Deserialize, Serialize};

/// Why a command ended, as the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitClass {
    /// It did what was asked.
    Success,
    /// Something failed that no other class names: a bug or the machine.
    Internal,
    /// The command line, a file or a value was wrong; nothing was done.
    Usage,
    /// The named job, model, worker or checkpoint does not exist.
    NotFound,
    /// The name is taken, or the state does not allow it.
    Conflict,
    /// No coordinator or object store could be reached.
    Unavailable,
    /// Credentials, certificate or cluster token were refused.
    Denied,
    /// The job ran and failed.
    JobFailed,
    /// The job was stopped before its end.
    JobStopped,
    /// Stored data is damaged: a checksum does not match.
    Corrupt,
}

impl ExitClass {
    /// The process's exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Internal => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unavailable => 5,
            Self::Denied => 6,
            Self::JobFailed => 7,
            Self::JobStopped => 8,
            Self::Corrupt => 9,
        }
    }
}

//! What can be done to a cluster, and to which part of it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A kind of fault, as `--faults` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// SIGKILL: the process is gone.
    Kill,
    /// SIGSTOP until the run ends: the process is there and does nothing.
    Stop,
    /// SIGSTOP, and SIGCONT after a while: a host that hung and came back.
    Freeze,
    /// Stopped for a share of each tenth of a second, for a while: a straggler.
    Slow,
    /// The network link of a worker's namespace is down for a while.
    Cut,
    /// A file of bounded size fills a folder for a while.
    FillDisk,
    /// The object store's server on this host is stopped for a share of the time, for a while.
    ThrottleStore,
    /// SIGKILL to a coordinator.
    KillCoordinator,
}

impl FaultKind {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 8] = [
        Self::Kill,
        Self::Stop,
        Self::Freeze,
        Self::Slow,
        Self::Cut,
        Self::FillDisk,
        Self::ThrottleStore,
        Self::KillCoordinator,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Freeze => "freeze",
            Self::Slow => "slow",
            Self::Cut => "cut",
            Self::FillDisk => "fill-disk",
            Self::ThrottleStore => "throttle-store",
            Self::KillCoordinator => "kill-coordinator",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no fault: expected kill, stop, freeze, slow, cut, fill-disk, throttle-store or \
     kill-coordinator"
)]
pub struct UnknownFault(String);

impl FromStr for FaultKind {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, UnknownFault> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| UnknownFault(text.to_owned()))
    }
}

/// A fault with its measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What it is.
    pub kind: FaultKind,
    /// How long it lasts until it is undone; none: kills are for good, a stop lasts as long as the
    /// run.
    #[serde(rename = "lasts_ms", with = "milliseconds")]
    pub lasts: Option<Duration>,
    /// Of each tenth of a second, the percentage that a slow process or a throttled store stands
    /// still; 0 for all other kinds.
    pub stopped_percent: u8,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.stopped_percent > 0 {
            write!(f, " by {} %", self.stopped_percent)?;
        }
        match self.lasts {
            Some(lasts) => write!(f, " for {:.1} s", lasts.as_secs_f64()),
            None => Ok(()),
        }
    }
}

/// Which processes a fault can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A rank of the job.
    Rank,
    /// A worker that is a process of its own.
    Worker,
    /// The network of a worker that has a namespace of its own.
    Link,
    /// A coordinator that is a process of its own.
    Coordinator,
    /// The server of the object store.
    Store,
    /// A folder.
    Disk,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rank => "rank",
            Self::Worker => "worker",
            Self::Link => "link",
            Self::Coordinator => "coordinator",
            Self::Store => "store",
            Self::Disk => "disk",
        })
    }
}

/// A word that names no role whose processes can be signalled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` cannot be signalled: expected rank or worker")]
pub struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;

    /// Of the roles, those that kill, stop, freeze and slow may be aimed at.
    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        match text {
            "rank" => Ok(Self::Rank),
            "worker" => Ok(Self::Worker),
            _ => Err(UnknownRole(text.to_owned())),
        }
    }
}

/// Whom a fault strikes. Gangs change while faults strike: a target is the `place`-th of those of
/// its role that live at that moment, counted around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// What it is.
    pub role: Role,
    /// Which one of them, from 0.
    pub place: u32,
}

impl Target {
    /// Its index among `count` living ones; none among none.
    pub fn among(&self, count: usize) -> Option<usize> {
        (self.place as usize).checked_rem(count)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Store | Role::Disk => write!(f, "{}", self.role),
            _ => write!(f, "{} #{}", self.role, self.place),
        }
    }
}

/// An optional duration as whole milliseconds.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::ref_option, reason = "the signature that serde calls")]
    pub fn serialize<S: Serializer>(
        span: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        span.map(|span| span.as_millis() as u64).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}

//! A schedule of faults out of a seed.
//!
//! The same options give the same plan on every machine: a run that found something can be run
//! again. What the plan cannot hold is whom a fault meets: processes are chosen by place among those
//! that live when it strikes.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::fault::{Fault, FaultKind, Role, Target};
use crate::random::Random;

/// Most strikes of a plan: a day of them, one a second.
const STRIKES_MAX: usize = 86_400;

/// How many there are to strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Targets {
    /// Ranks of the job at its largest; 0: they are not to be signalled.
    pub ranks: u32,
    /// Workers that are processes of their own; 0: they are not to be signalled.
    pub workers: u32,
    /// Workers whose network can be cut.
    pub links: u32,
    /// Coordinators that are processes of their own.
    pub coordinators: u32,
}

/// What a plan follows from.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Equal seeds give equal plans.
    pub seed: u64,
    /// Every fault strikes before it.
    pub duration: Duration,
    /// Mean time between two strikes. They are memoryless, as independent failures are: two may come
    /// at nearly the same time.
    pub every: Duration,
    /// The kinds to choose from, each as likely as its share of the list.
    pub faults: Vec<FaultKind>,
    /// Whom they can strike.
    pub targets: Targets,
}

/// One fault of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Strike {
    /// Milliseconds since the start of the run.
    pub at_ms: u64,
    /// What is done.
    #[serde(flatten)]
    pub fault: Fault,
    /// To whom.
    pub target: Target,
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:8.3} s  {}: {}", self.at_ms as f64 / 1e3, self.target, self.fault)
    }
}

/// A schedule of faults, in order of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The faults.
    pub strikes: Vec<Strike>,
}

impl Plan {
    /// The plan that follows from the options. Empty where no kind or no target is given, or the
    /// first strike falls beyond the duration.
    pub fn new(options: &PlanOptions) -> Self {
        let mut random = Random::new(options.seed);
        let mean_ms = (options.every.as_millis() as f64).max(1.0);
        let end_ms = options.duration.as_millis() as f64;
        let mut strikes = Vec::new();
        let mut at = random.exponential(mean_ms);
        while at < end_ms && strikes.len() < STRIKES_MAX {
            let Some(kind) = random.choose(&options.faults) else { break };
            let fault = measured(*kind, &mut random);
            if let Some(target) = target(*kind, options.targets, &mut random) {
                strikes.push(Strike { at_ms: at as u64, fault, target });
            }
            at += random.exponential(mean_ms);
        }
        Self { strikes }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.strikes.iter().try_for_each(|strike| writeln!(f, "{strike}"))
    }
}

/// The kind with a duration and a share. The spans lie on both sides of the second or two after
/// which a silent rank is given up, so that both what is waited for and what is not come up.
fn measured(kind: FaultKind, random: &mut Random) -> Fault {
    let (low_ms, high_ms) = match kind {
        FaultKind::Kill | FaultKind::Stop | FaultKind::KillCoordinator => (0, 0),
        FaultKind::Freeze => (200, 4_000),
        FaultKind::Slow | FaultKind::ThrottleStore => (2_000, 6_000),
        FaultKind::Cut => (500, 5_000),
        FaultKind::FillDisk => (2_000, 8_000),
    };
    // Drawn for every kind, so that one more kind in the list does not shift all that follows.
    let lasts = Duration::from_millis(random.between(low_ms, high_ms));
    let share = random.between(30, 80) as u8;
    let is_part_time = matches!(kind, FaultKind::Slow | FaultKind::ThrottleStore);
    Fault {
        kind,
        lasts: (high_ms > 0).then_some(lasts),
        stopped_percent: if is_part_time { share } else { 0 },
    }
}

/// Whom a fault of this kind strikes; nobody where there is nobody.
fn target(kind: FaultKind, targets: Targets, random: &mut Random) -> Option<Target> {
    let draw = random.bits();
    let place = |role, count: u32| {
        let place = draw.checked_rem(u64::from(count))? as u32;
        Some(Target { role, place })
    };
    match kind {
        FaultKind::Kill | FaultKind::Stop | FaultKind::Freeze | FaultKind::Slow => {
            let all = u64::from(targets.ranks) + u64::from(targets.workers);
            let chosen = draw.checked_rem(all)? as u32;
            Some(match chosen.checked_sub(targets.ranks) {
                None => Target { role: Role::Rank, place: chosen },
                Some(place) => Target { role: Role::Worker, place },
            })
        }
        FaultKind::Cut => place(Role::Link, targets.links),
        FaultKind::KillCoordinator => place(Role::Coordinator, targets.coordinators),
        FaultKind::FillDisk => Some(Target { role: Role::Disk, place: 0 }),
        FaultKind::ThrottleStore => Some(Target { role: Role::Store, place: 0 }),
    }
}

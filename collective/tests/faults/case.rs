//! One fault in the middle of one operation, and everything that must hold after it.

use std::thread;
use std::time::Duration;

use collective::{Operation, Transport};

use crate::census::holders;
use crate::gang::Gang;
use crate::message::{Command, Failure, Report};
use crate::network::Network;
use crate::plan::Figures;
use crate::process::Process;
use crate::random::Random;
use crate::step::{OPERATIONS, WORLD_MOST};

/// The faults come within this time after all ranks are inside the operation: many calls of small
/// payloads, some of large ones.
const MOMENT_MOST_US: u64 = 30_000;
/// What the coordinator says.
const REASON: &str = "superseded by g2";

/// What happens to a rank.
pub enum Fault {
    Kill,
    Stop,
    Cut(Network),
}

/// All that is random about a case.
pub struct Case {
    pub seed: u64,
    pub world: u32,
    pub operation: Operation,
    /// Several calls of any operations are under way instead.
    pub queued: bool,
    victim: u32,
    moment: Duration,
}

impl Case {
    /// Consecutive seeds take the operations in turn.
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let world = 2 + random.below(u64::from(WORLD_MOST) - 1) as u32;
        let turn = (seed % (OPERATIONS.len() as u64 + 1)) as usize;
        Self {
            seed,
            world,
            operation: OPERATIONS.get(turn).copied().unwrap_or(Operation::AllReduce),
            queued: turn == OPERATIONS.len(),
            victim: random.below(world.into()) as u32,
            moment: Duration::from_micros(random.below(MOMENT_MOST_US)),
        }
    }

    /// Runs it and checks everything but the times, which it returns.
    pub fn run(&self, fault: &Fault, transport: Transport) -> Figures {
        println!("{self}");
        let mut figures = Figures::default();
        let mut gang = Gang::start(self.world, transport, fault.network());
        gang.form(1);
        gang.members.iter_mut().for_each(|rank| rank.tell(&Command::Repeat { seed: self.seed }));
        for rank in &gang.members {
            let report = rank.hear();
            assert!(matches!(report, Report::Inside), "{report:?}");
        }
        // The stimulus, not a wait for anything.
        thread::sleep(self.moment);
        let mut victim = gang.members.remove(self.victim as usize);
        let since = fault.strike(self.victim, &mut victim, &mut gang);

        for rank in &mut gang.members {
            let failure = rank.hear_failure();
            assert!(failure.at >= since, "failed before the fault: {}", failure.error);
            self.check(fault, &failure);
            figures.errors.push(failure.at - since);
            rank.assert_clean();
        }
        figures.forms = gang.form(2);
        gang.sum();

        if fault.undo(self.victim, &victim) {
            // Nobody tells it: it finds out by itself, and those that went on notice nothing.
            let failure = victim.hear_failure();
            println!("  r{} came back to `{}`", self.victim, failure.error);
            victim.assert_clean();
            gang.sum();
            if gang.members.len() > 1 {
                gang.leave();
                gang.form_without(&mut victim, 3, 1);
                gang.sum();
                victim.assert_clean();
            }
        }
        gang.leave();
        let segments = std::mem::take(&mut gang.segments);
        drop((victim, gang));
        let holders = holders(&segments);
        assert!(holders.is_empty(), "shared memory of the groups is still mapped by {holders:?}");
        figures
    }

    fn check(&self, fault: &Fault, failure: &Failure) {
        let (error, victim) = (&failure.error, self.victim);
        match fault {
            Fault::Kill => {
                assert_eq!(failure.peer, Some(victim), "r{victim} was killed: {error}");
                let named = error.contains(&format!("r{victim} at `"));
                assert!(named, "r{victim} was killed: {error}");
            }
            // By its own abort, or by that of a peer which was faster.
            Fault::Stop | Fault::Cut(_) => {
                assert!(error.contains(&format!("aborted: {REASON}")), "{error}");
            }
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, world, victim, moment, .. } = self;
        let calls = if self.queued { "queued calls" } else { self.operation.name() };
        write!(f, "seed {seed}: {calls} of {world} ranks, r{victim} after {moment:?}")
    }
}

impl Fault {
    fn network(&self) -> Option<&Network> {
        match self {
            Self::Cut(network) => Some(network),
            Self::Kill | Self::Stop => None,
        }
    }

    /// Does it, and pushes an abort where it breaks nothing; since when errors are due.
    fn strike(&self, place: u32, victim: &mut Process, gang: &mut Gang) -> Duration {
        match self {
            Self::Kill => return victim.kill(),
            Self::Stop => victim.stop(),
            Self::Cut(network) => network.cut(place),
        }
        gang.abort(REASON)
    }

    /// Lets the rank come back, if it can.
    fn undo(&self, place: u32, victim: &Process) -> bool {
        match self {
            Self::Kill => return false,
            Self::Stop => victim.go_on(),
            Self::Cut(network) => network.mend(place),
        }
        true
    }
}

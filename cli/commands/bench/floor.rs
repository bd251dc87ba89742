//! The bare limits of the machine, measured in the same run: copying memory, and moving the same
//! bytes through sockets with nothing around them.

use serde::Serialize;

use super::gang::Gang;
use super::plan::{Case, Op, Plan};
use super::protocol::Work;
use super::samples::Samples;
use crate::error::Result;

/// How fast memory is copied. Bytes per second; each byte is read once and written once.
#[derive(Debug, Serialize)]
pub struct CopyLimit {
    /// Number of processes.
    pub ranks: u32,
    /// By one of them, alone.
    pub one: f64,
    /// By all at the same time, together.
    pub together: f64,
}

impl CopyLimit {
    /// Measures both.
    pub fn measure(gang: &mut Gang) -> Result<Self> {
        Ok(Self { ranks: gang.world(), one: gang.copy(false)?, together: gang.copy(true)? })
    }

    /// By each process, while all copy.
    pub fn each(&self) -> f64 {
        self.together / f64::from(self.ranks)
    }
}

/// Times a socket exchange of as many bytes as a case must move.
///
/// On a ring, where each process sends to the next what the bus factor counts and receives as much
/// from the previous; a broadcast is a chain, whose last process sends nothing and whose first
/// receives nothing; a barrier is one byte.
pub fn exchange(
    gang: &mut Gang,
    plan: &Plan,
    case: Case,
    time: impl Fn(&mut Gang, &Plan) -> Result<Samples>,
) -> Result<Samples> {
    let world = gang.world();
    let bytes = bytes(case, world);
    gang.prepare(|rank| Work::Exchange {
        send: if case.op == Op::Broadcast && rank + 1 == world { 0 } else { bytes },
        receive: if case.op == Op::Broadcast && rank == 0 { 0 } else { bytes },
    })?;
    time(gang, plan)
}

/// Bytes each process sends and receives at least.
fn bytes(case: Case, world: u32) -> u64 {
    ((case.bytes as f64 * case.op.bus_factor(world)).ceil() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_moves_what_the_bus_counts() {
        for (op, world, expected) in [
            (Op::AllReduce, 2, 1000),
            (Op::AllReduce, 4, 1500),
            (Op::AllGather, 4, 750),
            (Op::Broadcast, 4, 1000),
            (Op::Barrier, 4, 1),
        ] {
            assert_eq!(bytes(Case { op, bytes: 1000 }, world), expected, "{op} {world}");
        }
    }
}

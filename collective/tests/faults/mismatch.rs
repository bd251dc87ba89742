//! Ranks of which one makes other calls than the rest.

use collective::{ElementType, Operation, ReduceOp, Transport};

use crate::gang::Gang;
use crate::message::{Command, Failure};
use crate::plan::Figures;
use crate::random::Random;
use crate::step::{Step, WORLD_MOST};

/// With a type and a length.
const SIZED: [Operation; 8] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::Broadcast,
    Operation::Gather,
    Operation::Scatter,
    Operation::AllGather,
    Operation::AllToAll,
    Operation::ReduceLanes,
];
/// Those of them that have a reduction or a root to choose.
const OPTIONAL: usize = 5;
const UNSIZED: [Operation; 2] = [Operation::Barrier, Operation::GatherBytes];

#[derive(Clone, Copy, Debug)]
enum Difference {
    Operation,
    Order,
    Length,
    Element,
    /// Another reduction or root.
    Option,
    /// The next rank expects a message of another length; the others have no part in it.
    Message,
}

pub struct Mismatch {
    seed: u64,
    world: u32,
    difference: Difference,
    /// The rank that differs.
    odd: u32,
    /// What it calls.
    its: Vec<Step>,
    /// What the others call, or the next rank where it is about a message.
    others: Vec<Step>,
}

impl Mismatch {
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let world = 2 + random.below(u64::from(WORLD_MOST) - 1) as u32;
        let odd = random.below(world.into()) as u32;
        let difference = random.pick(&[
            Difference::Operation,
            Difference::Order,
            Difference::Length,
            Difference::Element,
            Difference::Option,
            Difference::Message,
        ]);
        let sized = match difference {
            Difference::Option => &SIZED[..OPTIONAL],
            _ => &SIZED,
        };
        let mut step = Step::draw(random.pick(sized), world, &mut random);
        let other = match difference {
            Difference::Operation | Difference::Order => {
                let any = [&SIZED[..], &UNSIZED].concat();
                let other = any.into_iter().filter(|other| *other != step.operation);
                Step::draw(random.pick(&other.collect::<Vec<_>>()), world, &mut random)
            }
            // What the ranks can divide stays so.
            Difference::Length | Difference::Message => {
                Step { len: step.len + world as usize, ..step }
            }
            Difference::Element => {
                // As many of a type that is not larger: buffers hold them.
                while step.element == ElementType::U8 {
                    step = Step::draw(step.operation, world, &mut random);
                }
                let fits = |other: &ElementType| {
                    *other != step.element && other.bytes() <= step.element.bytes()
                };
                let fitting: Vec<_> = ElementType::ALL.into_iter().filter(fits).collect();
                Step { element: random.pick(&fitting), ..step }
            }
            Difference::Option => Step {
                reduce: if step.reduce == ReduceOp::Sum { ReduceOp::Max } else { ReduceOp::Sum },
                root: (step.root + 1) % world,
                ..step
            },
        };
        let next = (odd + 1) % world;
        let (its, others) = match difference {
            Difference::Order => (vec![other, step], vec![step, other]),
            Difference::Message => (
                vec![Step { operation: Operation::Send, root: next, ..step }],
                vec![Step { operation: Operation::Recv, root: odd, ..other }],
            ),
            _ => (vec![other], vec![step]),
        };
        Self { seed, world, difference, odd, its, others }
    }

    /// The calls of a rank.
    pub fn steps_of(&self, rank: u32) -> &[Step] {
        let next = (self.odd + 1) % self.world;
        match self.difference {
            _ if rank == self.odd => &self.its,
            Difference::Message if rank != next => &[],
            _ => &self.others,
        }
    }

    /// Runs it and checks everything but the times, which it returns.
    pub fn run(&self, transport: Transport) -> Figures {
        let names = [self.its[0].text(), self.others[0].text()];
        let Self { seed, world, difference, odd, .. } = self;
        println!("seed {seed}: {difference:?} of r{odd} of {world} ranks: {}", names.join(", "));
        let mut gang = Gang::start(*world, transport, None);
        gang.form(1);
        gang.members.iter_mut().for_each(|rank| rank.tell(&Command::Differ { seed: *seed }));
        let failures: Vec<Failure> = gang.members.iter().map(|rank| rank.hear_failure()).collect();
        let all_there = failures.iter().map(|failure| failure.begun).max().unwrap_or_default();
        for (rank, failure) in failures.iter().enumerate() {
            for name in &names {
                let named = failure.error.contains(&format!("`{name}`"));
                assert!(named, "r{rank} does not name `{name}`: {}", failure.error);
            }
        }
        gang.members.iter_mut().for_each(|rank| rank.assert_clean());
        let errors = failures.iter().map(|failure| failure.at.saturating_sub(all_there));
        Figures { errors: errors.collect(), forms: Vec::new() }
    }
}

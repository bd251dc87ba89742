//! Scripts drawn from a seed: random worlds, types, lengths and operations against the reference.
//!
//! A failing seed is in the message; `COLLECTIVE_SEED` runs it alone.

use api::Rank;
use half::{bf16, f16};

use super::results::{SEED, assert_bits, data, tree_reduce_all};
use super::{Random, group};
use crate::element::Element;
use crate::{Buffer, BufferMut, Communicator, LaneTree, ProcessGroup, ReduceOp, chunk_range};

const SCRIPTS: u64 = 12;
const CALLS: usize = 25;

fn call<T: Element + Send>(rank: u32, random: &mut Random, communicator: &mut ProcessGroup)
where
    for<'a> Buffer<'a>: From<&'a Vec<T>>,
    for<'a> BufferMut<'a>: From<&'a mut Vec<T>>,
{
    let world = communicator.world_size();
    // Mostly small, sometimes of several segments.
    let most = [20, 3000, 40_000, 150_000][random.below(4) as usize];
    let len = random.below(most) as usize;
    let own = chunk_range(len, world, rank);
    let root = random.below(u64::from(world)) as u32;
    let salt = random.below(1000) as u32 * 16;
    let op = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min][random.below(3) as usize];
    let kind = random.below(7);
    let all: Vec<Vec<T>> = (0..world).map(|rank| data(salt + rank, len)).collect();
    let what = format!("operation {kind} {op:?} of {} × {len}, root {root}", T::TYPE);
    let mine = &all[rank as usize];
    let reduced = || tree_reduce_all(LaneTree::new(world).root(), &all, op);
    match kind {
        0 => {
            let mut buffer = mine.clone();
            communicator.all_reduce((&mut buffer).into(), op).unwrap();
            assert_bits(&buffer, &reduced(), &what);
        }
        1 => {
            let mut chunk = vec![T::zeroed(); own.len()];
            communicator.reduce_scatter(mine.into(), (&mut chunk).into(), op).unwrap();
            assert_bits(&chunk, &reduced()[own], &what);
        }
        2 => {
            let mut output = vec![T::zeroed(); len];
            let input = all[root as usize][own].to_vec();
            communicator.all_gather((&input).into(), (&mut output).into()).unwrap();
            assert_bits(&output, &all[root as usize], &what);
        }
        3 => {
            let mut buffer = mine.clone();
            communicator.broadcast((&mut buffer).into(), Rank(root)).unwrap();
            assert_bits(&buffer, &all[root as usize], &what);
        }
        4 => {
            let mut output = vec![T::zeroed(); len * world as usize];
            let at_root = (rank == root).then(|| (&mut output).into());
            communicator.gather(mine.into(), at_root, Rank(root)).unwrap();
            if rank == root {
                assert_bits(&output, &all.concat(), &what);
            }
        }
        5 if world > 1 => {
            let (to, from) = ((rank + 1) % world, (rank + world - 1) % world);
            let mut buffer = vec![T::zeroed(); len];
            communicator.send(mine.into(), Rank(to)).unwrap();
            communicator.recv((&mut buffer).into(), Rank(from)).unwrap();
            assert_bits(&buffer, &all[from as usize], &what);
        }
        _ => communicator.barrier().unwrap(),
    }
}

fn script(seed: u64) {
    println!("COLLECTIVE_SEED={seed}");
    let world = 1 + Random(seed).below(8) as u32;
    group(world, move |rank, communicator| {
        let mut random = Random(seed);
        for _ in 0..CALLS {
            match random.below(7) {
                0 => call::<f32>(rank, &mut random, communicator),
                1 => call::<f64>(rank, &mut random, communicator),
                2 => call::<i64>(rank, &mut random, communicator),
                3 => call::<u8>(rank, &mut random, communicator),
                4 => call::<bf16>(rank, &mut random, communicator),
                5 => call::<f16>(rank, &mut random, communicator),
                _ => call::<i32>(rank, &mut random, communicator),
            }
        }
    });
}

#[test]
pub(super) fn random_scripts_have_the_results_of_the_reference() {
    match std::env::var("COLLECTIVE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => script(seed),
        None => (0..SCRIPTS).for_each(|index| script(SEED + index)),
    }
}

super::also_over_memory_and_hosts!(random_scripts_have_the_results_of_the_reference,);

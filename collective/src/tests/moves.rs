//! Operations that move elements and add nothing: all to all, to a root, from a root; and subgroups.

use std::time::Instant;

use api::flight::FlightState;
use api::{Generation, Rank};
use half::{bf16, f16};

use super::results::{assert_bits, data};
use super::{HANG, group};
use crate::element::Element;
use crate::{Buffer, BufferMut, Communicator, FlightRecorder, Group, ReduceOp};

/// The elements that one rank has for another.
fn between<T: Element>(from: u32, to: u32, len: usize) -> Vec<T> {
    data(from * 100 + to, len)
}

/// How many of them, where that differs from pair to pair; some have nothing for each other.
fn count(from: u32, to: u32, len: usize) -> usize {
    len * (((from * 7 + to * 3) % 4) as usize)
}

fn check_moves<T: Element + Send>(rank: u32, communicator: &mut dyn Communicator)
where
    for<'a> Buffer<'a>: From<&'a Vec<T>>,
    for<'a> BufferMut<'a>: From<&'a mut Vec<T>>,
{
    let world = communicator.world_size();
    for len in [0, 1, 5003] {
        let what = format!("{} × {len} on {rank} of {world}", T::TYPE);
        let concat = |part: &dyn Fn(u32) -> Vec<T>| (0..world).flat_map(part).collect::<Vec<T>>();
        let input = concat(&|to| between(rank, to, len));
        let expected = concat(&|from| between(from, rank, len));
        let mut output = vec![T::zeroed(); len * world as usize];
        communicator.all_to_all((&input).into(), (&mut output).into()).unwrap();
        assert_bits(&output, &expected, &format!("all_to_all of {what}"));

        let send: Vec<usize> = (0..world).map(|to| count(rank, to, len)).collect();
        let receive: Vec<usize> = (0..world).map(|from| count(from, rank, len)).collect();
        let input = concat(&|to| between(rank, to, count(rank, to, len)));
        let expected = concat(&|from| between(from, rank, count(from, rank, len)));
        let mut output = vec![T::zeroed(); expected.len()];
        communicator.all_to_all_v((&input).into(), &send, (&mut output).into(), &receive).unwrap();
        assert_bits(&output, &expected, &format!("all_to_all_v of {what}"));

        for root in 0..world {
            let (all, own) = (concat(&|from| data(from, len)), data::<T>(rank, len));
            let mut output = vec![T::zeroed(); all.len()];
            let at_root = (rank == root).then(|| (&mut output).into());
            communicator.gather((&own).into(), at_root, Rank(root)).unwrap();
            if rank == root {
                assert_bits(&output, &all, &format!("gather of {what}"));
            }
            let mut part = vec![T::zeroed(); len];
            let at_root = (rank == root).then(|| (&all).into());
            communicator.scatter(at_root, (&mut part).into(), Rank(root)).unwrap();
            assert_bits(&part, &own, &format!("scatter of {what}"));
        }
    }
}

#[test]
fn elements_arrive_where_they_should() {
    for world in 1..=8 {
        group(world, |rank, communicator| {
            check_moves::<f32>(rank, communicator);
            check_moves::<f64>(rank, communicator);
            check_moves::<i64>(rank, communicator);
            check_moves::<u8>(rank, communicator);
            check_moves::<bf16>(rank, communicator);
            check_moves::<f16>(rank, communicator);
            check_moves::<i32>(rank, communicator);
        });
    }
}

#[test]
pub(super) fn subgroups_of_subgroups_work_beside_their_parents() {
    group(8, |rank, communicator| {
        let split = |rank: u32, by: u32, of: u32| Group {
            name: format!("every-{by}-{}", rank % by),
            ranks: (0..of).filter(|other| other % by == rank % by).collect(),
        };
        let recorder = FlightRecorder::new(Generation(3), Rank(rank), 8);
        communicator.set_recorder(recorder.clone());
        let mut half = communicator.subgroup(&split(rank, 2, 8)).unwrap();
        assert_eq!((half.rank(), half.world_size()), (Rank(rank / 2), 4));
        let mut quarter = half.subgroup(&split(rank / 2, 2, 4)).unwrap();
        assert_eq!((quarter.rank(), quarter.world_size()), (Rank(rank / 4), 2));
        for len in [3, 50_000] {
            let sum = |group: &mut dyn Communicator| {
                let mut buffer = vec![i64::from(rank); len];
                group.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
                assert!(buffer.iter().all(|value| *value == buffer[0]));
                buffer[0]
            };
            assert_eq!(sum(quarter.as_mut()), 2 * i64::from(rank % 4) + 4);
            assert_eq!(sum(half.as_mut()), 4 * i64::from(rank % 2) + 12);
            assert_eq!(sum(communicator), 28);
        }
        // Flight logs name the job's ranks, also of a group within a group.
        let log = recorder.snapshot();
        let found = log.groups.iter().find(|group| group.name == quarter.name()).unwrap();
        assert_eq!(found.members, [Rank(rank % 4), Rank(rank % 4 + 4)]);
        check_moves::<f32>(rank / 4, quarter.as_mut());
        check_moves::<f32>(rank / 2, half.as_mut());
    });
}

#[test]
pub(super) fn what_has_come_of_a_call_that_waits_is_in_the_flight_log() {
    const LEN: usize = 3 * crate::CHUNK_ALIGNMENT;
    let recorder = FlightRecorder::new(Generation(3), Rank(0), 3);
    group(3, move |rank, communicator| {
        let begun = Instant::now();
        match rank {
            0 => communicator.set_recorder(recorder.clone()),
            // Comes when the first has all of the second's part and waits for this one's.
            2 => loop {
                let log = recorder.snapshot();
                let (state, bytes) = (FlightState::Moving, 4 * LEN as u64 / 3);
                if log.entries.iter().any(|e| e.state == state && e.moved_bytes == bytes) {
                    break;
                }
                assert!(begun.elapsed() < HANG, "{:?}", log.entries);
                std::thread::yield_now();
            },
            _ => {}
        }
        communicator.all_gather_in_place((&mut vec![1.0f32; LEN]).into()).unwrap();
    });
}

super::also_over_memory_and_hosts!(
    elements_arrive_where_they_should,
    subgroups_of_subgroups_work_beside_their_parents,
    ; only memory:
    what_has_come_of_a_call_that_waits_is_in_the_flight_log,
);

//! Sums in a fixed order have the bits of the specification.

use collective::ElementType;
use collective::nccl::{DeviceMemory, DevicePartial, NcclGroup};
use collective::{
    Buffer, BufferMut, Communicator, LaneTree, Partial, ProcessGroup, ReduceOp, Subtree,
    chunk_range,
};

use half::{bf16, f16};

use crate::fake::{Counter, Fake};
use crate::ranks::{groups, options};

/// Empty, shorter than a world, below and above what every rank sums whole.
const LENGTHS: [usize; 4] = [0, 3, 1000, 40_001];

/// Numbers whose sum depends on the order.
fn noise(seed: u64, len: usize) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

pub fn floats(seed: u64, len: usize) -> Vec<f32> {
    let float = |bits: u64| {
        let scale = 10f32.powi((bits >> 60) as i32 - 8);
        ((bits & 0xff_ffff) as f32 / 16_777_216.0 - 0.5) * scale
    };
    noise(seed, len).map(float).collect()
}

pub fn doubles(seed: u64, len: usize) -> Vec<f64> {
    floats(seed, len).into_iter().map(|value| f64::from(value) * 1.1).collect()
}

pub fn integers(seed: u64, len: usize) -> Vec<i64> {
    noise(seed, len).map(|bits| bits as i64).collect()
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    noise(seed, len).map(|bits| bits as u8).collect()
}

fn words(seed: u64, len: usize) -> Vec<i32> {
    noise(seed, len).map(|bits| bits as i32).collect()
}

fn brains(seed: u64, len: usize) -> Vec<bf16> {
    floats(seed, len).into_iter().map(bf16::from_f32).collect()
}

fn halves(seed: u64, len: usize) -> Vec<f16> {
    floats(seed, len).into_iter().map(|value| f16::from_f32(value / 1e4)).collect()
}

pub fn check_all(group: &mut NcclGroup, control: &mut ProcessGroup) {
    let tree = LaneTree::new(8);
    for len in LENGTHS {
        check(group, control, len, &floats, true);
        check(group, control, len, &doubles, true);
        check(group, control, len, &integers, false);
        check(group, control, len, &bytes, false);
        check(group, control, len, &words, false);
        check(group, control, len, &brains, true);
        check(group, control, len, &halves, true);
        check_lanes(group, control, &tree, len);
    }
}

fn check<T: Copy + PartialEq + Default + 'static>(
    group: &mut NcclGroup,
    control: &mut ProcessGroup,
    len: usize,
    data: &dyn Fn(u64, usize) -> Vec<T>,
    divides: bool,
) where
    for<'a> Buffer<'a>: From<&'a Vec<T>>,
    for<'a> BufferMut<'a>: From<&'a mut Vec<T>>,
{
    let (rank, world) = (group.rank().0, group.world_size());
    let mut ops = vec![ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min];
    ops.extend(divides.then_some(ReduceOp::Avg));
    let mine = data(u64::from(rank) + 1, len);
    let element = Buffer::from(&mine).element();
    let memory = || DeviceMemory::new(group.device(), len * element.bytes()).unwrap();
    let (input, output) = (memory(), memory());
    let input = input.buffer(element, len).unwrap();
    let own = chunk_range(len, world, rank);
    for op in ops {
        let what = format!("{op:?} of {len} {element} on r{rank} of {world}");
        let mut expected = mine.clone();
        control.all_reduce((&mut expected).into(), op).unwrap();

        let output = output.buffer(element, len).unwrap();
        group.write(&input, (&mine).into()).unwrap();
        group.all_reduce_ordered(&input, &output, op).unwrap().wait().unwrap();
        let mut found = vec![T::default(); len];
        group.read(&output, (&mut found).into()).unwrap();
        assert!(found == expected, "all_reduce_ordered {what}");
        group.read(&input, (&mut found).into()).unwrap();
        assert!(found == mine, "the input of all_reduce_ordered {what}");

        let chunk = output.slice(0..own.len()).unwrap();
        group.reduce_scatter_ordered(&input, &chunk, op).unwrap().wait().unwrap();
        let mut found = vec![T::default(); own.len()];
        group.read(&chunk, (&mut found).into()).unwrap();
        assert!(found == expected[own.clone()], "reduce_scatter_ordered {what}");

        group.all_reduce_ordered(&input, &input, op).unwrap().wait().unwrap();
        let mut found = vec![T::default(); len];
        group.read(&input, (&mut found).into()).unwrap();
        assert!(found == expected, "all_reduce_ordered in place {what}");
    }
}

/// What a rank folded of its lanes.
pub fn lane_sums(tree: &LaneTree, rank: u32, world: u32, len: usize) -> Vec<(Subtree, Vec<f32>)> {
    let nodes = tree.owned_subtrees(tree.lanes_of(rank, world));
    nodes.into_iter().map(|node| (node, floats(u64::from(node.start) + 9, len))).collect()
}

/// The same to read, as a call takes them.
pub fn views(own: &[(Subtree, Vec<f32>)]) -> Vec<Partial<'_>> {
    own.iter().map(|(subtree, data)| Partial { subtree: *subtree, data: data.into() }).collect()
}

fn check_lanes(group: &mut NcclGroup, control: &mut ProcessGroup, tree: &LaneTree, len: usize) {
    let (rank, world) = (group.rank().0, group.world_size());
    let own = lane_sums(tree, rank, world, len);
    let mut expected = vec![0f32; len];
    control.reduce_lanes(tree, &views(&own), (&mut expected).into()).unwrap();
    let mut on_device = Vec::new();
    for (subtree, data) in &own {
        let memory = DeviceMemory::new(group.device(), 4 * len).unwrap();
        let buffer = memory.buffer(ElementType::F32, len).unwrap();
        group.write(&buffer, data.into()).unwrap();
        on_device.push(DevicePartial { subtree: *subtree, data: buffer });
    }
    let output = DeviceMemory::new(group.device(), 4 * len).unwrap();
    let output = output.buffer(ElementType::F32, len).unwrap();
    group.reduce_lanes(tree, &on_device, &output).unwrap().wait().unwrap();
    let mut found = vec![0f32; len];
    group.read(&output, (&mut found).into()).unwrap();
    assert!(found == expected, "reduce_lanes of {len} on r{rank} of {world}");
}

#[test]
fn sums_in_order_have_the_bits_of_the_specification() {
    for world in [1, 2, 3, 5, 8] {
        let Some(fake) = Fake::build(&format!("ordered-{world}"), &[]) else { return };
        let libraries = fake.open().unwrap();
        groups(&libraries, (world, 8), &options("world"), |mut group, control| {
            check_all(&mut group, control);
        });
        assert!(world == 1 || fake.count(Counter::Launches) > 0);
        assert_eq!(fake.count(Counter::UsesAfterEnd), 0);
    }
}

#[test]
fn without_kernels_the_host_adds_the_same_bits() {
    let Some(fake) = Fake::build("no-kernels", &[]) else { return };
    let libraries = fake.open().unwrap();
    fake.switch("fake_refuse_kernels", 1);
    groups(&libraries, (3, 8), &options("world"), |mut group, control| {
        check_all(&mut group, control);
    });
    assert_eq!(fake.count(Counter::Launches), 0);
}

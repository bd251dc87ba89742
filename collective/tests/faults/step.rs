//! One call of every rank, with random arguments that all ranks draw alike.

use collective::{
    BufferMut, Call, CallSite, CollectiveError, Communicator, ElementType, LaneTree, Operation,
    Partial, ReduceOp, chunk_range,
};

use crate::random::Random;

/// Most ranks of a case.
pub const WORLD_MOST: u32 = 5;
/// Small payloads are below this …
const SMALL_BYTES: u64 = 4 << 10;
/// … large ones between these: many windows of shared memory, more than sockets hold.
const LARGE_BYTES_LEAST: u64 = 256 << 10;
const LARGE_BYTES_MOST: u64 = 8 << 20;
/// Most that a rank may give to `gather_bytes`.
const GATHER_BYTES_MOST: usize = 4 << 20;
const LANES: u32 = 8;

/// Every operation; a `recv` comes with the `send` of a ring.
pub const OPERATIONS: [Operation; 12] = [
    Operation::AllReduce,
    Operation::AllReduceMany,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::AllToAll,
    Operation::Broadcast,
    Operation::Gather,
    Operation::Scatter,
    Operation::Send,
    Operation::Barrier,
    Operation::ReduceLanes,
    Operation::GatherBytes,
];

/// A call and its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub operation: Operation,
    pub element: ElementType,
    /// Elements as the call's text counts them.
    pub len: usize,
    pub reduce: ReduceOp,
    /// Or the peer of a message.
    pub root: u32,
}

impl Step {
    pub fn draw(operation: Operation, world: u32, random: &mut Random) -> Self {
        let element = random.pick(&ElementType::ALL);
        let bytes = match random.below(2) {
            0 => 1 + random.below(SMALL_BYTES),
            _ => LARGE_BYTES_LEAST + random.below(LARGE_BYTES_MOST - LARGE_BYTES_LEAST),
        };
        let per_rank = matches!(operation, Operation::Gather | Operation::Scatter);
        let whole = if per_rank { bytes / u64::from(world) } else { bytes };
        let mut len = (whole as usize / element.bytes()).max(1);
        if operation == Operation::AllToAll {
            len = len.next_multiple_of(world as usize);
        }
        let reduce = random.pick(&[ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min]);
        let root = random.below(world.into()) as u32;
        Self { operation, element, len, reduce, root }
    }

    /// How an error names it as the first call of a group.
    pub fn text(&self) -> String {
        let Self { operation, element, len, reduce, root } = *self;
        let plain = matches!(operation, Operation::Barrier | Operation::GatherBytes);
        let reduces = matches!(operation, Operation::AllReduce | Operation::ReduceScatter);
        let call = Call {
            operation,
            element: (!plain).then_some(element),
            reduce: match operation {
                Operation::ReduceLanes => Some(ReduceOp::Sum),
                _ => reduces.then_some(reduce),
            },
            detail: if operation == Operation::ReduceLanes { LANES } else { root },
            count: if plain { 0 } else { len as u64 },
        };
        CallSite { call, number: 0 }.to_string()
    }

    /// Makes the call where all ranks make the same; messages go round in a ring.
    pub fn run_by_all(
        &self,
        communicator: &mut dyn Communicator,
        memory: &mut Memory,
    ) -> Result<(), CollectiveError> {
        if self.operation != Operation::Send {
            return self.run(communicator, memory);
        }
        let (rank, world) = (communicator.rank().0, communicator.world_size());
        let (next, previous) = ((rank + 1) % world, (rank + world - 1) % world);
        Self { root: next, ..*self }.run(communicator, memory)?;
        Self { operation: Operation::Recv, root: previous, ..*self }.run(communicator, memory)
    }

    /// Makes the call as it is.
    pub fn run(
        &self,
        communicator: &mut dyn Communicator,
        memory: &mut Memory,
    ) -> Result<(), CollectiveError> {
        match self.element {
            ElementType::F32 => self.run_over::<f32>(communicator, memory),
            ElementType::F64 => self.run_over::<f64>(communicator, memory),
            ElementType::I64 => self.run_over::<i64>(communicator, memory),
            ElementType::U8 => self.run_over::<u8>(communicator, memory),
            ElementType::Bf16 => self.run_over::<half::bf16>(communicator, memory),
            ElementType::F16 => self.run_over::<half::f16>(communicator, memory),
            ElementType::I32 => self.run_over::<i32>(communicator, memory),
        }
    }

    fn run_over<T: bytemuck::Pod>(
        &self,
        communicator: &mut dyn Communicator,
        memory: &mut Memory,
    ) -> Result<(), CollectiveError>
    where
        for<'a> &'a [T]: Into<collective::Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        let (rank, world) = (communicator.rank(), communicator.world_size());
        let (len, op, root) = (self.len, self.reduce, api::Rank(self.root));
        let chunk = chunk_range(len, world, rank.0).len();
        let (input, output) = memory.elements::<T>();
        let whole = len * world as usize;
        match self.operation {
            Operation::AllReduce => communicator.all_reduce((&mut output[..len]).into(), op),
            Operation::AllReduceMany => {
                let (left, right) = output[..len].split_at_mut(len / 3);
                communicator.all_reduce_many(&mut [left.into(), right.into()], op)
            }
            Operation::ReduceScatter => {
                communicator.reduce_scatter(input[..len].into(), (&mut output[..chunk]).into(), op)
            }
            Operation::AllGather => {
                communicator.all_gather(input[..chunk].into(), (&mut output[..len]).into())
            }
            Operation::AllToAll => {
                communicator.all_to_all(input[..len].into(), (&mut output[..len]).into())
            }
            Operation::Broadcast => communicator.broadcast((&mut output[..len]).into(), root),
            Operation::Gather => {
                let at_root = (rank == root).then(|| (&mut output[..whole]).into());
                communicator.gather(input[..len].into(), at_root, root)
            }
            Operation::Scatter => {
                let at_root = (rank == root).then(|| input[..whole].into());
                communicator.scatter(at_root, (&mut output[..len]).into(), root)
            }
            Operation::Send => communicator.send(input[..len].into(), root),
            Operation::Recv => communicator.recv((&mut output[..len]).into(), root),
            Operation::Barrier => communicator.barrier(),
            Operation::ReduceLanes => {
                let tree = LaneTree::new(LANES);
                let partials: Vec<Partial<'_>> = tree
                    .owned_subtrees(tree.lanes_of(rank.0, world))
                    .into_iter()
                    .map(|subtree| Partial { subtree, data: input[..len].into() })
                    .collect();
                communicator.reduce_lanes(&tree, &partials, (&mut output[..len]).into())
            }
            Operation::GatherBytes => {
                let bytes: &[u8] = bytemuck::cast_slice(&input[..len]);
                let most = bytes.len().min(GATHER_BYTES_MOST);
                communicator.gather_bytes(&bytes[..most]).map(|_| ())
            }
            Operation::Leave | Operation::Join => unreachable!("no call"),
        }
    }
}

/// A rank's buffers, of zeros: only what calls do counts here.
pub struct Memory {
    input: Vec<u64>,
    output: Vec<u64>,
}

impl Memory {
    pub fn new() -> Self {
        // Lengths are rounded up, and mismatches add to them.
        let words = (LARGE_BYTES_MOST as usize + (64 << 10)) / size_of::<u64>();
        Self { input: vec![0; words], output: vec![0; words] }
    }

    fn elements<T: bytemuck::Pod>(&mut self) -> (&[T], &mut [T]) {
        (bytemuck::cast_slice(&self.input), bytemuck::cast_slice_mut(&mut self.output))
    }
}

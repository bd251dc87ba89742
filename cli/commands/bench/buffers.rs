//! The buffers of one collective on one rank: filled so that each result is known, run, compared.

use anyhow::{Result, bail};
use collective::{
    Buffer, BufferMut, Communicator, ElementType, LaneTree, Partial, ReduceOp, Subtree, chunk_range,
};
use half::{bf16, f16};

use super::plan::Op;

/// Lanes of a job, unless it has more ranks.
const LANES: u32 = 8;

/// A collective that is ready to run.
pub trait Collective {
    /// Calls it once.
    fn call(&mut self, group: &mut dyn Communicator) -> Result<()>;

    /// Fills the buffers with this rank's values.
    fn fill(&mut self);

    /// Compares what the first call made of them with what it must be.
    fn check(&self) -> Result<()>;

    /// Zeros, so that sums of sums stay what they are, however often they are taken.
    fn clear(&mut self);
}

/// Makes the buffers of a collective.
pub fn collective(
    op: Op,
    element: ElementType,
    elements: usize,
    rank: u32,
    world: u32,
) -> Box<dyn Collective> {
    fn of<T: Value>(op: Op, elements: usize, rank: u32, world: u32) -> Box<dyn Collective> {
        Box::new(Buffers::<T>::new(op, elements, rank, world))
    }
    let make = match element {
        ElementType::F32 => of::<f32>,
        ElementType::F64 => of::<f64>,
        ElementType::I64 => of::<i64>,
        ElementType::U8 => of::<u8>,
        ElementType::Bf16 => of::<bf16>,
        ElementType::F16 => of::<f16>,
        ElementType::I32 => of::<i32>,
    };
    make(op, elements, rank, world)
}

/// An element.
trait Value: Copy + PartialEq + std::fmt::Debug + Send + 'static {
    /// A whole number of at most 192, which every type holds exactly.
    fn of(number: u8) -> Self;
    fn view(data: &[Self]) -> Buffer<'_>;
    fn view_mut(data: &mut [Self]) -> BufferMut<'_>;
}

macro_rules! values {
    ($($element:ty: $of:expr),*) => {$(
        impl Value for $element {
            fn of(number: u8) -> Self {
                ($of)(number)
            }
            fn view(data: &[Self]) -> Buffer<'_> {
                data.into()
            }
            fn view_mut(data: &mut [Self]) -> BufferMut<'_> {
                data.into()
            }
        }
    )*};
}

values! {
    f32: f32::from, f64: f64::from, i64: i64::from, u8: u8::from, i32: i32::from,
    bf16: |number: u8| bf16::from_f32(f32::from(number)),
    f16: |number: u8| f16::from_f32(f32::from(number))
}

/// What `rank` brings at an index: 0 to 3, so that the sum over 64 ranks is exact in every type.
fn brought(rank: u32, index: usize) -> u8 {
    let mixed = (index as u32).wrapping_mul(0x9e37_79b1) ^ rank.wrapping_mul(0x85eb_ca6b);
    (mixed.wrapping_mul(0xc2b2_ae35) >> 30) as u8
}

/// The tree over a job's lanes, of which a rank has these.
fn lanes(rank: u32, world: u32) -> (LaneTree, Vec<Subtree>) {
    let tree = LaneTree::new(LANES.max(world));
    let subtrees = tree.owned_subtrees(tree.lanes_of(rank, world));
    (tree, subtrees)
}

struct Buffers<T> {
    op: Op,
    rank: u32,
    world: u32,
    /// Elements of the whole buffer.
    elements: usize,
    /// Empty where the operation works in place.
    input: Vec<T>,
    output: Vec<T>,
}

impl<T: Value> Buffers<T> {
    fn new(op: Op, elements: usize, rank: u32, world: u32) -> Self {
        let chunk = chunk_range(elements, world, rank).len();
        let (input, output) = match op {
            Op::AllReduce | Op::Broadcast => (0, elements),
            Op::ReduceScatter => (elements, chunk),
            Op::AllGather => (chunk, elements),
            Op::AllToAll => (elements, elements),
            Op::Barrier => (0, 0),
            Op::ReduceLanes => (lanes(rank, world).1.len() * elements, elements),
        };
        // Not zeros: pages of zeros may all be one page until they are written.
        let buffer = |len| vec![T::of(1); len];
        Self { op, rank, world, elements, input: buffer(input), output: buffer(output) }
    }

    fn chunk_start(&self) -> usize {
        chunk_range(self.elements, self.world, self.rank).start
    }

    /// What the output must hold, by index.
    fn expected(&self) -> Vec<T> {
        let (len, own) = (self.output.len(), self.chunk_start());
        let sum = |index| (0..self.world).map(|rank| brought(rank, index)).sum();
        let number: Box<dyn Fn(usize) -> u8> = match self.op {
            Op::AllReduce | Op::ReduceLanes => Box::new(sum),
            Op::ReduceScatter => Box::new(move |index| sum(own + index)),
            Op::AllGather => return self.gathered(),
            Op::AllToAll => {
                let (part, rank) = (len / self.world as usize, self.rank as usize);
                Box::new(move |index| brought((index / part) as u32, rank * part + index % part))
            }
            Op::Broadcast => Box::new(|index| brought(0, index)),
            Op::Barrier => Box::new(|_| 0),
        };
        (0..len).map(|index| T::of(number(index))).collect()
    }

    fn gathered(&self) -> Vec<T> {
        let of = |rank| {
            chunk_range(self.elements, self.world, rank)
                .map(move |index| T::of(brought(rank, index)))
        };
        (0..self.world).flat_map(of).collect()
    }
}

impl<T: Value> Collective for Buffers<T> {
    fn call(&mut self, group: &mut dyn Communicator) -> Result<()> {
        let (input, output) = (T::view(&self.input), T::view_mut(&mut self.output));
        match self.op {
            Op::AllReduce => group.all_reduce(output, ReduceOp::Sum),
            Op::ReduceScatter => group.reduce_scatter(input, output, ReduceOp::Sum),
            Op::AllGather => group.all_gather(input, output),
            Op::AllToAll => group.all_to_all(input, output),
            Op::Broadcast => group.broadcast(output, api::Rank(0)),
            Op::Barrier => group.barrier(),
            Op::ReduceLanes => {
                let (tree, subtrees) = lanes(self.rank, self.world);
                let parts = self.input.chunks(self.elements);
                let partials: Vec<Partial<'_>> = subtrees
                    .into_iter()
                    .zip(parts)
                    .map(|(subtree, part)| Partial { subtree, data: T::view(part) })
                    .collect();
                group.reduce_lanes(&tree, &partials, output)
            }
        }?;
        Ok(())
    }

    fn fill(&mut self) {
        let start = if self.op == Op::AllGather { self.chunk_start() } else { 0 };
        let rank = self.rank;
        for buffer in [&mut self.input, &mut self.output] {
            for (index, value) in buffer.iter_mut().enumerate() {
                *value = T::of(brought(rank, start + index));
            }
        }
        if self.op == Op::ReduceLanes {
            // The rank's first partial is what it brings.
            self.input[self.elements..].fill(T::of(0));
        }
    }

    fn check(&self) -> Result<()> {
        let expected = self.expected();
        let wrong = self.output.iter().zip(&expected).position(|(found, right)| found != right);
        if let Some(index) = wrong {
            bail!(
                "{} gave a wrong result: element {index} of {} is {:?}, expected {:?}",
                self.op,
                expected.len(),
                self.output[index],
                expected[index]
            );
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.input.fill(T::of(0));
        self.output.fill(T::of(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_result_is_named() {
        for op in Op::ALL.iter().copied().filter(|op| *op != Op::Barrier) {
            let mut buffers = Buffers::<f32>::new(op, 24, 1, 3);
            buffers.output = buffers.expected();
            assert!(buffers.check().is_ok(), "{op}");
            buffers.output[5] += 1.0;
            let message = buffers.check().unwrap_err().to_string();
            assert!(message.contains("wrong result: element 5"), "{op}: {message}");
        }
    }

    #[test]
    fn ranks_bring_different_values_and_their_largest_sum_is_exact_in_every_type() {
        let row = |rank| (0..64).map(|index| brought(rank, index)).collect::<Vec<_>>();
        for rank in 1..64 {
            assert_ne!(row(rank - 1), row(rank));
        }
        assert!((0..64).all(|rank| row(rank).iter().all(|value| *value <= 3)));
        assert_eq!(bf16::of(192).to_f32(), 192.0);
        assert_eq!(f16::of(192).to_f32(), 192.0);
    }
}

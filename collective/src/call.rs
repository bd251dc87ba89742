//! What a rank asked for, as every frame carries it, so that two ranks can compare their calls.
//!
//! 16 bytes on the wire. Two ranks agree when theirs are equal; when not, both name both.

use std::fmt;

use api::Rank;

use crate::buffer::{BufferMut, ElementType};
use crate::communicator::ReduceOp;

/// Bytes of an encoded call.
pub(crate) const CALL_BYTES: usize = 16;

/// Which method of the communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// No call: the process leaves the group.
    Leave = 0,
    /// [`crate::Communicator::all_reduce`]
    AllReduce = 1,
    /// [`crate::Communicator::reduce_scatter`]
    ReduceScatter = 2,
    /// [`crate::Communicator::all_gather`]
    AllGather = 3,
    /// [`crate::Communicator::broadcast`]
    Broadcast = 4,
    /// [`crate::Communicator::send`]
    Send = 5,
    /// [`crate::Communicator::recv`]
    Recv = 6,
    /// [`crate::Communicator::barrier`]
    Barrier = 7,
    /// [`crate::Communicator::gather_bytes`]
    GatherBytes = 8,
    /// [`crate::Communicator::reduce_lanes`]
    ReduceLanes = 9,
    /// [`crate::Communicator::all_to_all`] and [`crate::Communicator::all_to_all_v`]
    AllToAll = 10,
    /// [`crate::Communicator::gather`]
    Gather = 11,
    /// [`crate::Communicator::scatter`]
    Scatter = 12,
    /// [`crate::Communicator::all_reduce_many`]
    AllReduceMany = 13,
    /// No call: the ranks agree on how they share memory.
    Join = 14,
}

impl Operation {
    const ALL: [Self; 15] = [
        Self::Leave,
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::Broadcast,
        Self::Send,
        Self::Recv,
        Self::Barrier,
        Self::GatherBytes,
        Self::ReduceLanes,
        Self::AllToAll,
        Self::Gather,
        Self::Scatter,
        Self::AllReduceMany,
        Self::Join,
    ];

    /// Its name, as in the trait.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Leave => "leave",
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Send => "send",
            Self::Recv => "recv",
            Self::Barrier => "barrier",
            Self::GatherBytes => "gather_bytes",
            Self::ReduceLanes => "reduce_lanes",
            Self::AllToAll => "all_to_all",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::AllReduceMany => "all_reduce_many",
            Self::Join => "join",
        }
    }

    /// Whether it concerns two ranks only.
    pub fn is_point_to_point(self) -> bool {
        matches!(self, Self::Send | Self::Recv)
    }
}

/// A call with what must agree between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// Which method.
    pub operation: Operation,
    /// The type of the elements, if it has any.
    pub element: Option<ElementType>,
    /// How they are reduced, if they are.
    pub reduce: Option<ReduceOp>,
    /// The root, the peer, what [`crate::LaneTree`] says or a hash of the lengths, by method; else 0.
    pub detail: u32,
    /// Elements of the whole buffer (not of a chunk).
    pub count: u64,
}

impl Call {
    /// A call without elements.
    pub(crate) fn plain(operation: Operation) -> Self {
        Self { operation, element: None, reduce: None, detail: 0, count: 0 }
    }

    /// A call over elements.
    pub(crate) fn over(operation: Operation, element: ElementType, count: usize) -> Self {
        Self { element: Some(element), count: count as u64, ..Self::plain(operation) }
    }

    /// A reduction of several buffers as one; their lengths are compared through a hash.
    pub(crate) fn over_many(buffers: &[BufferMut<'_>], op: ReduceOp) -> Self {
        let Some(first) = buffers.first() else {
            return Self::plain(Operation::AllReduceMany).reducing(op);
        };
        let total = buffers.iter().map(BufferMut::len).sum();
        Self::over(Operation::AllReduceMany, first.element(), total)
            .reducing(op)
            .with_detail(lengths_hash(buffers.iter().map(BufferMut::len)))
    }

    /// The same with a reduction.
    pub(crate) fn reducing(self, op: ReduceOp) -> Self {
        Self { reduce: Some(op), ..self }
    }

    /// The same with a root, peer or number of lanes.
    pub(crate) fn with_detail(self, detail: u32) -> Self {
        Self { detail, ..self }
    }

    pub(crate) fn encode(&self) -> [u8; CALL_BYTES] {
        let mut bytes = [0; CALL_BYTES];
        bytes[0] = self.operation as u8;
        bytes[1] = self.element.map_or(0, |element| element as u8);
        bytes[2] = self.reduce.map_or(0, |reduce| reduce as u8);
        bytes[4..8].copy_from_slice(&self.detail.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; CALL_BYTES]) -> Option<Self> {
        let [operation, element, reduce, _, rest @ ..] = *bytes;
        let [d0, d1, d2, d3, count @ ..] = rest;
        Some(Self {
            operation: Operation::ALL.into_iter().find(|known| *known as u8 == operation)?,
            element: match element {
                0 => None,
                code => Some(ElementType::from_code(code)?),
            },
            reduce: match reduce {
                0 => None,
                code => Some(ReduceOp::ALL.into_iter().find(|op| *op as u8 == code)?),
            },
            detail: u32::from_le_bytes([d0, d1, d2, d3]),
            count: u64::from_le_bytes(count),
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.operation.name();
        let separator = match self.operation {
            Operation::Leave | Operation::Join => return f.write_str(name),
            Operation::Barrier | Operation::GatherBytes => return write!(f, "{name}()"),
            Operation::Broadcast | Operation::Recv | Operation::Scatter => " from ",
            Operation::Send | Operation::Gather => " to ",
            Operation::ReduceLanes => " over ",
            _ => "",
        };
        write!(f, "{name}({}", self.count)?;
        if let Some(element) = self.element {
            write!(f, " {element}")?;
        }
        if let Some(reduce) = self.reduce {
            f.write_str(match reduce {
                ReduceOp::Sum => ", sum",
                ReduceOp::Max => ", max",
                ReduceOp::Min => ", min",
                ReduceOp::Avg => ", average",
            })?;
        }
        f.write_str(separator)?;
        match self.operation {
            Operation::ReduceLanes => {
                write!(f, "{} lanes", self.detail as u16)?;
                match self.detail >> u16::BITS {
                    0 => f.write_str(")"),
                    idle => write!(f, ", none of {idle} ranks)"),
                }
            }
            _ if separator.is_empty() => f.write_str(")"),
            _ => write!(f, "{})", Rank(self.detail)),
        }
    }
}

/// Tells groups of tensors apart that have the same length together.
fn lengths_hash(lengths: impl Iterator<Item = usize>) -> u32 {
    let mut hasher = blake3::Hasher::new();
    lengths.for_each(|len| {
        hasher.update(&(len as u64).to_le_bytes());
    });
    let [a, b, c, d, ..] = *hasher.finalize().as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A call and its number: the collectives of a group and the messages of a pair are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallSite {
    /// What was called.
    pub call: Call,
    /// The how-manieth, from 0.
    pub number: u64,
}

impl fmt::Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.call, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane_tree::LaneTree;

    #[test]
    fn calls_read_well_and_survive_the_wire() {
        let cases = [
            (
                Call::over(Operation::AllReduce, ElementType::F32, 10).reducing(ReduceOp::Sum),
                "all_reduce(10 f32, sum)",
            ),
            (
                Call::over(Operation::Broadcast, ElementType::U8, 3).with_detail(2),
                "broadcast(3 u8 from r2)",
            ),
            (Call::over(Operation::Send, ElementType::F64, 1).with_detail(1), "send(1 f64 to r1)"),
            (
                Call::over(Operation::ReduceLanes, ElementType::F32, 7)
                    .reducing(ReduceOp::Sum)
                    .with_detail(8),
                "reduce_lanes(7 f32, sum over 8 lanes)",
            ),
            (
                Call::over(Operation::ReduceLanes, ElementType::F32, 7)
                    .reducing(ReduceOp::Sum)
                    .with_detail(LaneTree::new(8).without([Rank(2), Rank(0)]).detail()),
                "reduce_lanes(7 f32, sum over 8 lanes, none of 2 ranks)",
            ),
            (Call::plain(Operation::Barrier), "barrier()"),
            (Call::over(Operation::AllGather, ElementType::I64, 5), "all_gather(5 i64)"),
        ];
        for (call, shown) in cases {
            assert_eq!(call.to_string(), shown);
            assert_eq!(Call::decode(&call.encode()), Some(call));
        }
        for (index, code) in [(0, 15), (1, 8), (2, 5)] {
            let mut bytes = cases[0].0.encode();
            bytes[index] = code;
            assert_eq!(Call::decode(&bytes), None);
        }
    }
}

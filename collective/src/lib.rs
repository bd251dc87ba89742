//! Process groups: what the ranks of a job say to each other.
//!
//! [`Communicator`] is the contract, [`ProcessGroup`] its implementation over sockets and the
//! specification for every faster one. Sums follow a fixed binary tree ([`LaneTree`]), so their
//! bits depend on the data and never on timing or, for lanes, on the number of ranks. A call that
//! differs between ranks is an error on both, not a hang; a dead peer is named at once; an
//! [`AbortHandle`] breaks off whatever blocks. There is no timeout on a collective: a slow rank is
//! not a dead one.

#![deny(unsafe_code)]

mod abort;
mod axes;
mod buffer;
mod call;
mod carrier;
mod checks;
mod chunk;
mod combination;
mod combine;
mod communicator;
mod connect;
mod direct;
mod element;
mod error;
mod exchange;
mod flight;
mod frame;
mod group;
mod handshake;
mod hosts;
mod inbox;
mod lane_fold;
mod lane_tree;
mod link;
mod listener;
mod meter;
mod mixed;
pub mod nccl;
mod patience;
mod payload;
mod peers;
mod pipeline;
mod queue;
mod reduce;
mod schedule;
mod selection;
mod shared;
mod stripes;
mod tcp_options;
#[cfg(test)]
mod tests;
mod tls;
mod tuning;
mod verdict;
mod wire;

pub use abort::AbortHandle;
pub use axes::{AXES, Axis, Group, Mesh, MeshError};
pub use buffer::{Buffer, BufferMut, ElementType};
pub use call::{Call, CallSite, Operation};
pub use chunk::{CHUNK_ALIGNMENT, chunk_range};
pub use communicator::{Communicator, GroupOptions, Partial, ReduceOp, Reduction, Transport};
pub use error::CollectiveError;
pub use flight::{FlightRecorder, FlightSite, FlightToken};
pub use group::ProcessGroup;
pub use lane_fold::{LaneElement, LaneFold};
pub use lane_tree::{LaneTree, Subtree};
pub use listener::Listener;
pub use queue::{Queue, Turn, Work};
pub use selection::{Algorithm, Question, Rule, Selectable, Selection, SelectionError};
pub use tcp_options::TcpOptions;
pub use tls::{TlsError, TlsMaterial};
pub use tuning::Measurement;

//! NCCL: the collectives of GPUs, opened at run time.
//!
//! ```text
//! Libraries ─ Device ─ NcclGroup ─(bounded channel)▶ owner thread: communicator, stream, events
//!                         └─ NcclCommunicator: the crate's contract, for host memory
//! ```
//!
//! **Nothing is linked.** [`Libraries::open`] opens `libnccl.so.2` (or `libnccl.so`, or what
//! `COHORT_NCCL_LIBRARY` names) and `libcuda.so.1`; what is missing is a
//! [`crate::CollectiveError::Unavailable`] that says what to do. Versions in which an abort hangs
//! are refused ([`NcclVersion::refusal`]).
//!
//! **One thread per communicator.** [`NcclGroup`] is a handle: `&mut` gives its calls an order, a
//! channel brings them to the one thread that makes them. A call begins an operation; a [`Pending`]
//! waits for it. Communicators are non-blocking and their completion is polled, so an
//! [`crate::AbortHandle`] ends every wait in milliseconds; the thread then aborts the communicator,
//! at the one place that does (`comm.rs`).
//!
//! **Memory is kept, not borrowed.** A [`DeviceBuffer`] holds a share of its memory, which an
//! operation keeps until it has finished on the GPU. Races on device memory spoil numbers, never
//! the process.
//!
//! **Order against compute.** Operations run on a private stream. [`NcclGroup::wait_for`] puts them
//! after the compute work so far, [`NcclGroup::release`] puts later compute work after them: one
//! stream, or with [`Compute::Context`] all streams of the GPU (a driver for CUDA 12.5 or newer).
//!
//! **Sums.** [`NcclGroup::all_reduce`] adds in NCCL's order. The `_ordered` methods and
//! [`NcclGroup::reduce_lanes`] exchange partials and add them in the tree's order by kernels of
//! this crate (`sum.ptx`), with the bits of the CPU, except for the payload of a NaN. Cost: each
//! addition reads two buffers and writes one, and a rank needs memory for its range of every
//! partial.
//!
//! **Several ranks on one GPU** (tests): NCCL 2.30 or newer with `NCCL_MULTI_RANK_GPU_ENABLE=1` and
//! `NCCL_NVLS_ENABLE=0` in the environment of every rank, and few [`NcclOptions::max_ctas`] (4 to
//! 8). It is experimental in NCCL: about two ranks, and a GPU without room for the kernels of all
//! of them at once hangs. Without the variable such a group is refused by name.
//!
//! What NCCL cannot see: a rank that makes another call than its peers, or none. Operations on
//! device memory then wait until an abort; [`NcclCommunicator`] compares calls first.

mod batch;
mod calls;
mod close;
mod comm;
mod connect;
mod contract;
mod derive;
mod device;
mod element;
mod ffi;
mod group;
mod host;
mod kernel;
mod library;
mod memory;
mod operations;
mod ordered;
mod owner;
mod pause;
mod stream;
mod subgroup;
mod tree;
mod version;

pub use batch::Pending;
pub use calls::Calls;
pub use device::Device;
pub use group::{NcclGroup, NcclOptions};
pub use host::NcclCommunicator;
pub use library::{LIBRARY_VARIABLE, Libraries, LibraryPaths};
pub use memory::{DeviceBuffer, DeviceMemory};
pub use ordered::DevicePartial;
pub use stream::{Compute, ForeignStream};
pub use subgroup::Registration;
pub use version::{NcclVersion, OLDEST};

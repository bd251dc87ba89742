//! The communicator over sockets: the specification of every collective.
//!
//! Checks the arguments of a call, numbers it, and keeps the first error: a group that failed stays
//! failed.

use std::sync::Arc;

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::buffer::{Buffer, BufferMut};
use crate::call::{Call, CallSite, Operation};
use crate::chunk::chunk_range;
use crate::communicator::{Communicator, Partial, ReduceOp};
use crate::element::Element;
use crate::error::CollectiveError;
use crate::flight::FlightRecorder;
use crate::lane_tree::LaneTree;
use crate::mesh::Mesh;

/// A process group over TCP, made by [`crate::Listener::connect`].
///
/// Dropping it leaves the group: a peer that still needs this rank gets an error.
#[derive(Debug)]
pub struct TcpCommunicator {
    mesh: Mesh,
    /// Collectives called so far.
    number: u64,
    failed: Option<CollectiveError>,
    group: Arc<str>,
    recorder: FlightRecorder,
}

type Outcome<R> = Result<R, CollectiveError>;

/// Runs a body with `T` set to the element type of a buffer.
macro_rules! with_element {
    ($buffer:expr, $element:ident => $body:expr) => {
        match $buffer.element() {
            crate::buffer::ElementType::F32 => {
                type $element = f32;
                $body
            }
            crate::buffer::ElementType::F64 => {
                type $element = f64;
                $body
            }
            crate::buffer::ElementType::I64 => {
                type $element = i64;
                $body
            }
            crate::buffer::ElementType::U8 => {
                type $element = u8;
                $body
            }
        }
    };
}

impl TcpCommunicator {
    pub(crate) fn new(mesh: Mesh, group: &str) -> Self {
        let recorder = FlightRecorder::new(mesh.generation, Rank(mesh.rank), mesh.world);
        Self { mesh, number: 0, failed: None, group: group.into(), recorder }
    }

    /// From now on its calls are recorded there, together with those of the rank's other groups.
    pub fn set_recorder(&mut self, recorder: FlightRecorder) {
        self.recorder = recorder;
    }

    /// Numbers a collective and runs it.
    fn collective<R>(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut Mesh, CallSite) -> Outcome<R>,
    ) -> Outcome<R> {
        let site = CallSite { call, number: self.number };
        self.number += 1;
        self.mesh.remember(site);
        self.run(site, body)
    }

    /// Runs a call; its error ends the group.
    fn run<R>(
        &mut self,
        site: CallSite,
        body: impl FnOnce(&mut Mesh, CallSite) -> Outcome<R>,
    ) -> Outcome<R> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let token = self.recorder.begin(&self.group, self.mesh.generation, site);
        self.recorder.started(token);
        let result = match self.mesh.abort.raised() {
            Some(aborted) => Err(aborted),
            None => body(&mut self.mesh, site),
        };
        if result.is_ok() {
            self.recorder.finish(token, Ok(()));
        }
        result.map_err(|error| {
            // A connection that an abort shut down looks like a dead peer.
            let error = self.mesh.abort.raised().unwrap_or(error);
            tracing::debug!(rank = self.mesh.rank, call = %site, %error, "the group failed");
            self.recorder.finish(token, Err(&error.to_string()));
            self.mesh.give_up(&error);
            self.failed = Some(error.clone());
            error
        })
    }
}

fn invalid<R>(site: CallSite, message: impl Into<String>) -> Outcome<R> {
    Err(CollectiveError::InvalidCall { call: site, message: message.into() })
}

fn check_average<T: Element>(site: CallSite, op: ReduceOp) -> Outcome<()> {
    if op == ReduceOp::Avg && !T::DIVIDES {
        return invalid(
            site,
            format!("an average of {} would round: expected f32 or f64, or a sum", T::TYPE),
        );
    }
    Ok(())
}

fn typed<'a, T: Element>(site: CallSite, input: Buffer<'a>) -> Outcome<&'a [T]> {
    let found = input.element();
    match T::view(input) {
        Some(data) => Ok(data),
        None => invalid(site, format!("the input holds {found}, the output {}", T::TYPE)),
    }
}

fn typed_mut<'a, T: Element>(site: CallSite, output: BufferMut<'a>) -> Outcome<&'a mut [T]> {
    let found = output.element();
    match T::view_mut(output) {
        Some(data) => Ok(data),
        None => invalid(site, format!("the output holds {found}, the input {}", T::TYPE)),
    }
}

/// A buffer must be as long as this rank's chunk.
fn check_chunk(mesh: &Mesh, site: CallSite, what: &str, found: usize, len: usize) -> Outcome<()> {
    let expected = chunk_range(len, mesh.world, mesh.rank).len();
    if found != expected {
        let rank = Rank(mesh.rank);
        return invalid(
            site,
            format!("the {what} holds {found} elements, expected {expected}: the chunk of {rank}"),
        );
    }
    Ok(())
}

fn check_peer(mesh: &Mesh, site: CallSite, peer: Rank) -> Outcome<()> {
    if peer.0 >= mesh.world {
        return invalid(site, format!("{peer} is not below the world size of {}", mesh.world));
    }
    if site.call.operation.is_point_to_point() && peer.0 == mesh.rank {
        return invalid(site, format!("{peer} is this rank itself"));
    }
    Ok(())
}

fn check_partials(
    mesh: &Mesh,
    site: CallSite,
    tree: &LaneTree,
    partials: &[Partial<'_>],
    len: usize,
) -> Outcome<()> {
    if mesh.world > tree.lanes() {
        return invalid(
            site,
            format!("{} ranks share {} lanes: expected a lane per rank", mesh.world, tree.lanes()),
        );
    }
    let run = tree.lanes_of(mesh.rank, mesh.world);
    let expected = tree.owned_subtrees(run);
    if !partials.iter().map(|partial| partial.subtree).eq(expected.iter().copied()) {
        let shown = |nodes: &mut dyn Iterator<Item = String>| nodes.collect::<Vec<_>>().join(", ");
        let found = shown(&mut partials.iter().map(|partial| partial.subtree.to_string()));
        let expected = shown(&mut expected.iter().map(ToString::to_string));
        return invalid(site, format!("partials of lanes `{found}`, expected `{expected}`"));
    }
    for partial in partials {
        if partial.data.len() != len {
            return invalid(
                site,
                format!(
                    "the partial of lanes {} holds {} elements, the output {len}",
                    partial.subtree,
                    partial.data.len()
                ),
            );
        }
    }
    Ok(())
}

impl Communicator for TcpCommunicator {
    fn rank(&self) -> Rank {
        Rank(self.mesh.rank)
    }

    fn world_size(&self) -> u32 {
        self.mesh.world
    }

    fn generation(&self) -> Generation {
        self.mesh.generation
    }

    fn all_reduce(&mut self, buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, buffer.element(), buffer.len()).reducing(op);
        self.collective(call, |mesh, site| {
            with_element!(buffer, T => {
                check_average::<T>(site, op)?;
                mesh.all_reduce(site, op, typed_mut::<T>(site, buffer)?)
            })
        })
    }

    fn reduce_scatter(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceScatter, input.element(), input.len()).reducing(op);
        self.collective(call, |mesh, site| {
            check_chunk(mesh, site, "output", output.len(), input.len())?;
            with_element!(input, T => {
                check_average::<T>(site, op)?;
                let output = typed_mut::<T>(site, output)?;
                mesh.reduce_scatter(site, op, typed::<T>(site, input)?, output)
            })
        })
    }

    fn all_gather(&mut self, input: Buffer<'_>, output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, output.element(), output.len());
        self.collective(call, |mesh, site| {
            check_chunk(mesh, site, "input", input.len(), output.len())?;
            with_element!(output, T => {
                let (input, output) = (typed::<T>(site, input)?, typed_mut::<T>(site, output)?);
                let own = chunk_range(output.len(), mesh.world, mesh.rank);
                output[own].copy_from_slice(input);
                mesh.gather(site, 0, output, None)
            })
        })
    }

    fn broadcast(&mut self, buffer: BufferMut<'_>, root: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Broadcast, buffer.element(), buffer.len());
        self.collective(call.with_detail(root.0), |mesh, site| {
            check_peer(mesh, site, root)?;
            with_element!(buffer, T => mesh.broadcast(site, typed_mut::<T>(site, buffer)?, root.0))
        })
    }

    fn send(&mut self, buffer: Buffer<'_>, to: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Send, buffer.element(), buffer.len()).with_detail(to.0);
        let number = self.mesh.link(to).map_or(0, |link| link.messages_sent);
        self.run(CallSite { call, number }, |mesh, site| {
            check_peer(mesh, site, to)?;
            mesh.send(site, buffer.as_bytes(), to.0)?;
            mesh.link(to).into_iter().for_each(|link| link.messages_sent += 1);
            Ok(())
        })
    }

    fn recv(&mut self, mut buffer: BufferMut<'_>, from: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Recv, buffer.element(), buffer.len()).with_detail(from.0);
        let number = self.mesh.link(from).map_or(0, |link| link.messages_received);
        self.run(CallSite { call, number }, |mesh, site| {
            check_peer(mesh, site, from)?;
            mesh.recv(site, buffer.as_bytes_mut(), from.0)?;
            mesh.link(from).into_iter().for_each(|link| link.messages_received += 1);
            Ok(())
        })
    }

    fn barrier(&mut self) -> Outcome<()> {
        self.collective(Call::plain(Operation::Barrier), |mesh, site| {
            mesh.gather_bytes(site, &[], 0).map(|_| ())
        })
    }

    fn gather_bytes(&mut self, mine: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.collective(Call::plain(Operation::GatherBytes), |mesh, site| {
            let most = mesh.gather_bytes_max();
            if mine.len() > most {
                return invalid(site, format!("{} bytes, at most {most} are allowed", mine.len()));
            }
            mesh.gather_bytes(site, mine, most)
        })
    }

    fn reduce_lanes(
        &mut self,
        tree: &LaneTree,
        partials: &[Partial<'_>],
        output: BufferMut<'_>,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceLanes, output.element(), output.len())
            .reducing(ReduceOp::Sum)
            .with_detail(tree.lanes());
        self.collective(call, |mesh, site| {
            check_partials(mesh, site, tree, partials, output.len())?;
            with_element!(output, T => {
                let parts: Vec<&[T]> = partials
                    .iter()
                    .map(|partial| typed::<T>(site, partial.data))
                    .collect::<Outcome<_>>()?;
                mesh.reduce_lanes(site, tree, &parts, typed_mut::<T>(site, output)?)
            })
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        self.mesh.abort.clone()
    }
}

impl Drop for TcpCommunicator {
    fn drop(&mut self) {
        // A thread that panics has not left in good order: its peers see a broken connection.
        if self.failed.is_none() && !std::thread::panicking() {
            let call = Call::plain(Operation::Leave);
            self.mesh.leave(CallSite { call, number: self.number });
        } else {
            self.mesh.abort.unwatch();
        }
    }
}

//! The process group: checks the arguments of a call, numbers it, hands it to shared memory or to
//! the connections, and keeps the first error: a group that failed stays failed.

use std::net::IpAddr;
use std::sync::Arc;

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::axes::Group;
use crate::buffer::{Buffer, BufferMut};
use crate::call::{Call, CallSite, Operation};
use crate::carrier::Carrier;
use crate::checks::{
    Outcome, check_average, check_chunk, check_counts, check_equal, check_partials, check_parts,
    check_peer, invalid, typed, typed_mut,
};
use crate::chunk::chunk_range;
use crate::communicator::{Communicator, GroupOptions, Partial, ReduceOp, Reduction};
use crate::element::{Element, with_element};
use crate::error::CollectiveError;
use crate::flight::FlightRecorder;
use crate::lane_tree::LaneTree;
use crate::listener::Listener;
use crate::peers::{Parts, Peers};

/// A process group on this host's shared memory and over TCP, made by [`Listener::connect`].
///
/// Dropping it leaves the group: a peer that still needs this rank gets an error.
#[derive(Debug)]
pub struct ProcessGroup {
    core: Core,
    /// Collectives called so far.
    number: u64,
    failed: Option<CollectiveError>,
    options: GroupOptions,
    /// Where subgroups listen.
    address: IpAddr,
    name: Arc<str>,
    /// The job's ranks, in the order of this group's.
    members: Vec<Rank>,
    recorder: FlightRecorder,
}

/// What carries a call.
#[derive(Debug)]
pub(crate) struct Core {
    pub peers: Peers,
    pub carrier: Carrier,
}

/// Hands a call to what carries it.
macro_rules! carry {
    ($core:expr, $method:ident($($argument:expr),*)) => {
        match &mut $core.carrier {
            Carrier::Sockets => $core.peers.$method($($argument),*),
            Carrier::Memory(shared) => shared.$method(&mut $core.peers, $($argument),*),
            Carrier::Mixed(mixed) => mixed.$method(&mut $core.peers, $($argument),*),
        }
    };
}

impl ProcessGroup {
    pub(crate) fn new(
        peers: Peers,
        carrier: Carrier,
        options: GroupOptions,
        address: IpAddr,
    ) -> Self {
        let recorder = FlightRecorder::new(peers.generation, Rank(peers.rank), peers.world);
        let name = options.group.as_str().into();
        let members = (0..peers.world).map(Rank).collect();
        let core = Core { peers, carrier };
        Self { core, members, number: 0, failed: None, options, address, name, recorder }
    }

    /// From now on its calls are recorded there, together with those of the rank's other groups.
    pub fn set_recorder(&mut self, recorder: FlightRecorder) {
        self.recorder = recorder;
    }

    /// What moves the data: `shm`, `tcp`, or `shm+tcp` where only some ranks share a host.
    pub fn transport(&self) -> &'static str {
        self.core.carrier.name()
    }

    /// Numbers a collective and runs it.
    fn collective<R>(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut Core, CallSite) -> Outcome<R>,
    ) -> Outcome<R> {
        let site = CallSite { call, number: self.number };
        self.number += 1;
        self.core.peers.remember(site);
        self.run(site, body)
    }

    /// Runs a call; its error ends the group.
    fn run<R>(
        &mut self,
        site: CallSite,
        body: impl FnOnce(&mut Core, CallSite) -> Outcome<R>,
    ) -> Outcome<R> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let token = self.recorder.begin(&self.name, self.core.peers.generation, site);
        self.recorder.started(token);
        self.core.peers.meter.begin(&self.recorder, token);
        let result = match self.core.peers.abort.raised() {
            Some(aborted) => Err(aborted),
            None => body(&mut self.core, site),
        };
        if result.is_ok() {
            self.recorder.finish(token, Ok(()));
        }
        result.map_err(|error| {
            // A connection that an abort shut down looks like a dead peer.
            let error = self.core.peers.abort.raised().unwrap_or(error);
            let (rank, group) = (self.core.peers.rank, &self.options.group);
            tracing::debug!(%group, rank, call = %site, %error, "the group failed");
            self.recorder.finish(token, Err(&error.to_string()));
            self.core.peers.give_up(&error);
            self.core.carrier = Carrier::Sockets;
            self.failed = Some(error.clone());
            error
        })
    }

    /// What carries its calls, for tests that interfere.
    #[cfg(test)]
    pub(crate) fn parts(&mut self) -> (&mut Peers, &mut Carrier) {
        (&mut self.core.peers, &mut self.core.carrier)
    }

    /// Ends the connections without a word, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn vanish(mut self) {
        self.core.peers.abort.unwatch();
        self.core.peers.links.clear();
        std::mem::forget(self);
    }

    /// Listens for the members of a subgroup; this rank's place in it.
    fn listen_for(&mut self, group: &Group) -> Outcome<(Listener, u32)> {
        let wrong = |message: String| {
            Err(CollectiveError::InvalidOptions { group: group.name.clone(), message })
        };
        let world = self.core.peers.world;
        let Some(place) = group.ranks.iter().position(|rank| *rank == self.core.peers.rank) else {
            return wrong(format!(
                "r{} is not one of its ranks {:?}",
                self.core.peers.rank, group.ranks
            ));
        };
        if !group.ranks.is_sorted_by(|a, b| a < b) || group.ranks.iter().any(|rank| *rank >= world)
        {
            return wrong(format!(
                "its ranks {:?} are not in order and below the world size of {world}",
                group.ranks
            ));
        }
        let listener = Listener::bind(self.address)?.with_tcp(self.core.peers.tcp.clone());
        Ok((listener, place as u32))
    }
}

impl Communicator for ProcessGroup {
    fn rank(&self) -> Rank {
        Rank(self.core.peers.rank)
    }

    fn world_size(&self) -> u32 {
        self.core.peers.world
    }

    fn generation(&self) -> Generation {
        self.core.peers.generation
    }

    fn name(&self) -> &str {
        &self.options.group
    }

    fn all_reduce(&mut self, buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, buffer.element(), buffer.len()).reducing(op);
        self.collective(call, |core, site| {
            with_element!(buffer, T => {
                check_average(site)?;
                carry!(core, all_reduce(site, op, typed_mut::<T>(site, buffer)?))
            })
        })
    }

    fn all_reduce_into(
        &mut self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, input.element(), input.len()).reducing(op);
        self.collective(call, |core, site| {
            check_equal(site, input.len(), output.len())?;
            with_element!(input, T => {
                check_average(site)?;
                let output = typed_mut::<T>(site, output)?;
                output.copy_from_slice(typed::<T>(site, input)?);
                carry!(core, all_reduce(site, op, output))
            })
        })
    }

    fn all_reduce_many(&mut self, buffers: &mut [BufferMut<'_>], op: ReduceOp) -> Outcome<()> {
        let call = Call::over_many(buffers, op);
        if buffers.is_empty() {
            return self.collective(call, |core, site| carry!(core, barrier(site)));
        }
        self.collective(call, |core, site| {
            with_element!(buffers[0], T => {
                check_average(site)?;
                let mut parts: Vec<&mut [T]> = Vec::with_capacity(buffers.len());
                for buffer in buffers.iter_mut() {
                    parts.push(typed_mut::<T>(site, buffer.reborrow())?);
                }
                let mut together: Vec<T> = Vec::new();
                parts.iter().for_each(|part| together.extend_from_slice(part));
                carry!(core, all_reduce(site, op, &mut together))?;
                let mut rest = together.as_slice();
                for part in parts {
                    let (head, tail) = rest.split_at(part.len());
                    part.copy_from_slice(head);
                    rest = tail;
                }
                Ok(())
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
        self.collective(call, |core, site| {
            check_chunk(&core.peers, site, "output", output.len(), input.len())?;
            with_element!(input, T => {
                check_average(site)?;
                let output = typed_mut::<T>(site, output)?;
                carry!(core, reduce_scatter(site, op, typed::<T>(site, input)?, output))
            })
        })
    }

    fn reduce_scatter_in_place(&mut self, buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::ReduceScatter, buffer.element(), buffer.len());
        self.collective(call.reducing(op), |core, site| {
            with_element!(buffer, T => {
                check_average(site)?;
                let buffer = typed_mut::<T>(site, buffer)?;
                let own = chunk_range(buffer.len(), core.peers.world, core.peers.rank);
                let mut output = vec![<T as bytemuck::Zeroable>::zeroed(); own.len()];
                carry!(core, reduce_scatter(site, op, &*buffer, &mut output))?;
                buffer[own].copy_from_slice(&output);
                Ok(())
            })
        })
    }

    fn all_gather(&mut self, input: Buffer<'_>, output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, output.element(), output.len());
        self.collective(call, |core, site| {
            check_chunk(&core.peers, site, "input", input.len(), output.len())?;
            with_element!(output, T => {
                let (input, output) = (typed::<T>(site, input)?, typed_mut::<T>(site, output)?);
                let own = chunk_range(output.len(), core.peers.world, core.peers.rank);
                output[own].copy_from_slice(input);
                carry!(core, all_gather(site, output))
            })
        })
    }

    fn all_gather_in_place(&mut self, buffer: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, buffer.element(), buffer.len());
        self.collective(call, |core, site| {
            with_element!(buffer, T => carry!(core, all_gather(site, typed_mut::<T>(site, buffer)?)))
        })
    }

    fn all_to_all(&mut self, input: Buffer<'_>, output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllToAll, input.element(), input.len());
        self.collective(call, |core, site| {
            check_equal(site, input.len(), output.len())?;
            let world = core.peers.world as usize;
            check_parts(&core.peers, site, "input", input.len(), input.len() / world)?;
            let counts = vec![input.len() / world; world];
            with_element!(input, T => {
                let (input, output) = (typed::<T>(site, input)?, typed_mut::<T>(site, output)?);
                let parts = Parts::tiling(&core.peers, input, &counts, output, &counts);
                carry!(core, exchange_parts(site, parts))
            })
        })
    }

    fn all_to_all_v(
        &mut self,
        input: Buffer<'_>,
        send: &[usize],
        output: BufferMut<'_>,
        receive: &[usize],
    ) -> Outcome<()> {
        // Lengths differ between ranks: they are compared pair by pair.
        let call = Call::over(Operation::AllToAll, input.element(), 0).with_detail(1);
        self.collective(call, |core, site| {
            check_counts(&core.peers, site, "send", send, input.len())?;
            check_counts(&core.peers, site, "receive", receive, output.len())?;
            let own = core.peers.rank as usize;
            if send[own] != receive[own] {
                let (out, back) = (send[own], receive[own]);
                return invalid(
                    site,
                    format!("{out} elements to this rank itself, {back} from it"),
                );
            }
            with_element!(input, T => {
                let (input, output) = (typed::<T>(site, input)?, typed_mut::<T>(site, output)?);
                let parts = Parts::tiling(&core.peers, input, send, output, receive);
                carry!(core, exchange_parts(site, parts))
            })
        })
    }

    fn gather(
        &mut self,
        input: Buffer<'_>,
        output: Option<BufferMut<'_>>,
        root: Rank,
    ) -> Outcome<()> {
        let call = Call::over(Operation::Gather, input.element(), input.len());
        self.collective(call.with_detail(root.0), |core, site| {
            check_peer(&core.peers, site, root)?;
            let at_root = core.peers.rank == root.0;
            if output.is_some() != at_root {
                return invalid(site, "only the root gives an output, and it must");
            }
            with_element!(input, T => {
                let input = typed::<T>(site, input)?;
                let output = output.map(|output| typed_mut::<T>(site, output)).transpose()?;
                if let Some(output) = &output {
                    check_parts(&core.peers, site, "output", output.len(), input.len())?;
                }
                let parts = Parts::gathering(&core.peers, input, output, root.0);
                carry!(core, exchange_parts(site, parts))
            })
        })
    }

    fn scatter(
        &mut self,
        input: Option<Buffer<'_>>,
        output: BufferMut<'_>,
        root: Rank,
    ) -> Outcome<()> {
        let call = Call::over(Operation::Scatter, output.element(), output.len());
        self.collective(call.with_detail(root.0), |core, site| {
            check_peer(&core.peers, site, root)?;
            let at_root = core.peers.rank == root.0;
            if input.is_some() != at_root {
                return invalid(site, "only the root gives an input, and it must");
            }
            with_element!(output, T => {
                let output = typed_mut::<T>(site, output)?;
                let input = input.map(|input| typed::<T>(site, input)).transpose()?;
                if let Some(input) = &input {
                    check_parts(&core.peers, site, "input", input.len(), output.len())?;
                }
                let parts = Parts::scattering(&core.peers, input, output, root.0);
                carry!(core, exchange_parts(site, parts))
            })
        })
    }

    fn broadcast(&mut self, buffer: BufferMut<'_>, root: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Broadcast, buffer.element(), buffer.len());
        self.collective(call.with_detail(root.0), |core, site| {
            check_peer(&core.peers, site, root)?;
            with_element!(buffer, T => {
                carry!(core, broadcast(site, typed_mut::<T>(site, buffer)?, root.0))
            })
        })
    }

    fn send(&mut self, buffer: Buffer<'_>, to: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Send, buffer.element(), buffer.len()).with_detail(to.0);
        let number = self.core.peers.link(to).map_or(0, |link| link.messages_sent);
        self.run(CallSite { call, number }, |core, site| {
            check_peer(&core.peers, site, to)?;
            carry!(core, send(site, buffer.as_bytes(), to.0))?;
            core.peers.link(to).into_iter().for_each(|link| link.messages_sent += 1);
            Ok(())
        })
    }

    fn recv(&mut self, mut buffer: BufferMut<'_>, from: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Recv, buffer.element(), buffer.len()).with_detail(from.0);
        let number = self.core.peers.link(from).map_or(0, |link| link.messages_received);
        self.run(CallSite { call, number }, |core, site| {
            check_peer(&core.peers, site, from)?;
            carry!(core, recv(site, buffer.as_bytes_mut(), from.0))?;
            core.peers.link(from).into_iter().for_each(|link| link.messages_received += 1);
            Ok(())
        })
    }

    fn barrier(&mut self) -> Outcome<()> {
        self.collective(Call::plain(Operation::Barrier), |core, site| carry!(core, barrier(site)))
    }

    fn gather_bytes(&mut self, mine: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.collective(Call::plain(Operation::GatherBytes), |core, site| {
            let most = core.peers.gather_bytes_max();
            if mine.len() > most {
                return invalid(site, format!("{} bytes, at most {most} are allowed", mine.len()));
            }
            carry!(core, gather_bytes(site, mine, most))
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
            .with_detail(tree.detail());
        self.collective(call, |core, site| {
            check_partials(&core.peers, site, tree, partials, output.len())?;
            with_element!(output, T => {
                let parts: Vec<&[T]> = partials
                    .iter()
                    .map(|partial| typed::<T>(site, partial.data))
                    .collect::<Outcome<_>>()?;
                let output = typed_mut::<T>(site, output)?;
                match &core.carrier {
                    // The lanes of a rank in their order, then the ranks in whatever is fastest. In
                    // memory the fixed order is: partials are read where they are.
                    Carrier::Sockets if core.peers.reduction == Reduction::Fast => {
                        match parts.first() {
                            Some(first) => output.copy_from_slice(first),
                            None => output.fill(<T as bytemuck::Zeroable>::zeroed()),
                        }
                        for part in parts.iter().skip(1) {
                            let pairs = output.iter_mut().zip(*part);
                            pairs.for_each(|(sum, value)| *sum = sum.sum(*value));
                        }
                        core.peers.all_reduce(site, ReduceOp::Sum, output)
                    }
                    _ => carry!(core, reduce_lanes(site, tree, &parts, output)),
                }
            })
        })
    }

    fn subgroup(&mut self, group: &Group) -> Outcome<Box<dyn Communicator>> {
        let listening = self.listen_for(group);
        // A rank that cannot take part says so by no address: nobody waits for it.
        let address = listening.as_ref().map(|(listener, _)| listener.address().to_string());
        let addresses = self.gather_bytes(address.unwrap_or_default().as_bytes())?;
        let (listener, place) = listening?;
        let peers = group
            .ranks
            .iter()
            .map(|rank| {
                let text = String::from_utf8_lossy(&addresses[*rank as usize]).into_owned();
                text.parse().map_err(|_| CollectiveError::InvalidOptions {
                    group: group.name.clone(),
                    message: format!(
                        "r{rank} does not take part: it named `{text}` as its address"
                    ),
                })
            })
            .collect::<Outcome<Vec<_>>>()?;
        let options = GroupOptions {
            group: format!("{}/{}", self.options.group, group.name),
            rank: Rank(place),
            world_size: group.ranks.len() as u32,
            ..self.options.clone()
        };
        let mut subgroup = listener.connect(options, &peers)?;
        subgroup.members = group.ranks.iter().map(|rank| self.members[*rank as usize]).collect();
        self.recorder.join(&subgroup.name, subgroup.generation(), &subgroup.members);
        subgroup.set_recorder(self.recorder.clone());
        Ok(Box::new(subgroup))
    }

    fn abort_handle(&self) -> AbortHandle {
        self.core.peers.abort.clone()
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // A thread that panics has not left in good order: its peers see a broken connection.
        if self.failed.is_none() && !std::thread::panicking() {
            let call = Call::plain(Operation::Leave);
            self.core.peers.leave(CallSite { call, number: self.number });
        } else {
            self.core.peers.abort.unwatch();
        }
    }
}

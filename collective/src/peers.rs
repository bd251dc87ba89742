//! The connections of a rank to all others, and the few patterns of which every collective is made.
//!
//! Which bits come out is decided here: partials are folded by [`Plan`] in tree order, whether they
//! are summed chunk by chunk on their owners or, when small, wholly on every rank.

use api::{Generation, Rank};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use crate::abort::AbortHandle;
use crate::call::CallSite;
use crate::chunk::chunk_range;
use crate::combine::Plan;
use crate::communicator::ReduceOp;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::exchange::{Exchange, Sink, Transfer};
use crate::frame::{FrameCodec, FrameError, FrameKind, encode_site, last_words};
use crate::lane_tree::{LaneTree, Subtree};
use crate::link::Link;

/// Bytes up to which every rank sends its partials to all and sums alone: one exchange, not two.
const DIRECT_BYTES: usize = 16 << 10;
/// Bytes up to which a root sends its whole buffer to every rank; beyond, each rank gets a chunk
/// from the root and the ranks exchange chunks, so that the root's link is not the narrow place.
const BROADCAST_DIRECT_BYTES: usize = 256 << 10;
/// Collectives that are remembered for the message of a mismatch.
const RECENT_CALLS: usize = 16;
/// Most bytes that a rank may give to `gather_bytes`.
const GATHER_BYTES_MAX: usize = 4 << 20;
/// Most bytes that a rank may get from one `gather_bytes`.
const GATHER_TOTAL_BYTES_MAX: usize = 256 << 20;

/// Scratch memory in words, so that every element type is aligned in it. It grows to the largest
/// call and stays.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Vec<u64>);

impl Scratch {
    fn elements<T: Element>(&mut self, count: usize) -> &mut [T] {
        let words = (count * size_of::<T>()).div_ceil(size_of::<u64>());
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..words])[..count]
    }
}

/// What a rank sends to each rank and receives from each, itself included; none where it exchanges
/// nothing.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub send: Vec<Option<&'a [u8]>>,
    pub receive: Vec<Option<&'a mut [u8]>>,
}

impl<'a> Parts<'a> {
    /// Consecutive parts of two buffers, one per rank.
    pub(crate) fn tiling<T: Element>(
        peers: &Peers,
        mut input: &'a [T],
        send: &[usize],
        mut output: &'a mut [T],
        receive: &[usize],
    ) -> Self {
        let mut parts = Self::none(peers);
        for (rank, (out, back)) in send.iter().zip(receive).enumerate() {
            let (head, tail) = input.split_at(*out);
            input = tail;
            parts.send[rank] = Some(bytemuck::cast_slice(head));
            let (head, tail) = std::mem::take(&mut output).split_at_mut(*back);
            output = tail;
            parts.receive[rank] = Some(bytemuck::cast_slice_mut(head));
        }
        parts
    }

    /// Everyone's input to the root.
    pub(crate) fn gathering<T: Element>(
        peers: &Peers,
        input: &'a [T],
        output: Option<&'a mut [T]>,
        root: u32,
    ) -> Self {
        let mut parts = Self::none(peers);
        parts.send[root as usize] = Some(bytemuck::cast_slice(input));
        if let Some(mut rest) = output {
            for receive in &mut parts.receive {
                let (head, tail) = std::mem::take(&mut rest).split_at_mut(input.len());
                rest = tail;
                *receive = Some(bytemuck::cast_slice_mut(head));
            }
        }
        parts
    }

    /// A part of the root's input to everyone.
    pub(crate) fn scattering<T: Element>(
        peers: &Peers,
        input: Option<&'a [T]>,
        output: &'a mut [T],
        root: u32,
    ) -> Self {
        let mut parts = Self::none(peers);
        if let Some(input) = input {
            for (rank, send) in parts.send.iter_mut().enumerate() {
                let part = &input[rank * output.len()..(rank + 1) * output.len()];
                *send = Some(bytemuck::cast_slice(part));
            }
        }
        parts.receive[root as usize] = Some(bytemuck::cast_slice_mut(output));
        parts
    }

    fn none(peers: &Peers) -> Self {
        let world = peers.world as usize;
        Self { send: vec![None; world], receive: (0..world).map(|_| None).collect() }
    }
}

/// All connections of a rank.
#[derive(Debug)]
pub(crate) struct Peers {
    pub rank: u32,
    pub world: u32,
    pub generation: Generation,
    pub codec: FrameCodec,
    /// By rank; none at this rank's place, and nowhere once the group failed.
    pub links: Vec<Option<Link>>,
    pub abort: AbortHandle,
    /// The last collectives, the newest last: a peer may object to one that is over here.
    recent: VecDeque<CallSite>,
    received: Scratch,
    reduced: Scratch,
}

impl Peers {
    pub(crate) fn new(
        rank: u32,
        generation: Generation,
        codec: FrameCodec,
        links: Vec<Option<Link>>,
        abort: AbortHandle,
    ) -> Self {
        let world = links.len() as u32;
        let (recent, received, reduced) = Default::default();
        Self { rank, world, generation, codec, links, abort, recent, received, reduced }
    }

    /// Reduces `buffer` over ranks, in place on every rank.
    pub(crate) fn all_reduce<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        buffer: &mut [T],
    ) -> Result<(), CollectiveError> {
        let tree = LaneTree::new(self.world);
        let mut reduced = std::mem::take(&mut self.reduced);
        if size_of_val(buffer) <= DIRECT_BYTES {
            let output = reduced.elements(buffer.len());
            let whole = 0..buffer.len();
            self.reduce(site, op, &tree, &[buffer], |_| whole.clone(), output)?;
            buffer.copy_from_slice(output);
        } else {
            let len = buffer.len();
            let world = self.world;
            let own = chunk_range(len, world, self.rank);
            let output = reduced.elements(own.len());
            let chunk = |rank| chunk_range(len, world, rank);
            self.reduce(site, op, &tree, &[buffer], chunk, output)?;
            buffer[own].copy_from_slice(output);
            self.gather(site, 1, buffer, None)?;
        }
        self.reduced = reduced;
        Ok(())
    }

    /// Reduces `input` over ranks into this rank's chunk.
    pub(crate) fn reduce_scatter<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        input: &[T],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let tree = LaneTree::new(self.world);
        let (len, world) = (input.len(), self.world);
        self.reduce(site, op, &tree, &[input], |rank| chunk_range(len, world, rank), output)
    }

    /// Sums the partials of all ranks into `output`, on every rank.
    pub(crate) fn reduce_lanes<T: Element>(
        &mut self,
        site: CallSite,
        tree: &LaneTree,
        partials: &[&[T]],
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let (len, world) = (output.len(), self.world);
        if size_of_val(output) <= DIRECT_BYTES {
            return self.reduce(site, ReduceOp::Sum, tree, partials, |_| 0..len, output);
        }
        let own = chunk_range(len, world, self.rank);
        let chunk = |rank| chunk_range(len, world, rank);
        self.reduce(site, ReduceOp::Sum, tree, partials, chunk, &mut output[own])?;
        self.gather(site, 1, output, None)
    }

    /// Phase 0: every rank sends each peer that peer's range of its partials; `output` becomes the
    /// reduction of this rank's range.
    fn reduce<T: Element>(
        &mut self,
        site: CallSite,
        op: ReduceOp,
        tree: &LaneTree,
        partials: &[&[T]],
        range: impl Fn(u32) -> Range<usize>,
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        let nodes: Vec<Vec<Subtree>> = (0..self.world)
            .map(|rank| tree.owned_subtrees(tree.lanes_of(rank, self.world)))
            .collect();
        let own = range(self.rank);
        let foreign: usize = nodes.iter().map(Vec::len).sum::<usize>() - partials.len();
        let mut received = std::mem::take(&mut self.received);
        let mut rest = received.elements::<T>(foreign * own.len());
        let mut transfers = self.transfers();
        let mut places: Vec<(u32, Range<usize>)> = Vec::new();
        let mut place = 0;
        for rank in self.peers() {
            let count = nodes[rank as usize].len() * own.len();
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(count);
            rest = tail;
            places.push((rank, place..place + count));
            place += count;
            let theirs = range(rank);
            transfers[rank as usize] = Transfer {
                send: Some(
                    partials
                        .iter()
                        .map(|part| bytemuck::cast_slice(&part[theirs.clone()]))
                        .collect(),
                ),
                receive: Some(Sink::Exact(bytemuck::cast_slice_mut(part))),
            };
        }
        Exchange::run(self, site, 0, transfers)?;

        let all: &[T] = received.elements::<T>(foreign * own.len());
        let mut places = places.into_iter().peekable();
        let mut parts: Vec<&[T]> = Vec::with_capacity(foreign + partials.len());
        for (rank, nodes) in nodes.iter().enumerate() {
            match places.next_if(|(peer, _)| *peer as usize == rank) {
                // `chunks_exact` knows no chunk of nothing.
                Some((_, place)) if own.is_empty() => {
                    parts.extend(nodes.iter().map(|_| &all[place.clone()]));
                }
                Some((_, place)) => parts.extend(all[place].chunks_exact(own.len())),
                None => parts.extend(partials.iter().map(|part| &part[own.clone()])),
            }
        }
        let nodes = nodes.concat();
        let plan = Plan::new(tree, &nodes).expect("runs of lanes in rank order tile the tree");
        plan.run(&parts, output, op, self.world);
        self.received = received;
        Ok(())
    }

    /// Every rank sends its own chunk of `output` to all (but not to `except`, which has it).
    pub(crate) fn gather<T: Element>(
        &mut self,
        site: CallSite,
        phase: u8,
        output: &mut [T],
        except: Option<u32>,
    ) -> Result<(), CollectiveError> {
        let len = output.len();
        let mut transfers = self.transfers();
        let mut own: &[T] = &[];
        let mut rest = output;
        for rank in 0..self.world {
            let chunk = chunk_range(len, self.world, rank);
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(chunk.len());
            rest = tail;
            if rank == self.rank {
                own = part;
            } else if except != Some(self.rank) {
                let sink = Sink::Exact(bytemuck::cast_slice_mut(part));
                transfers[rank as usize].receive = Some(sink);
            }
        }
        for rank in self.peers().filter(|rank| except != Some(*rank)) {
            transfers[rank as usize].send = Some(vec![bytemuck::cast_slice(own)]);
        }
        Exchange::run(self, site, phase, transfers)
    }

    /// Copies the root's buffer to every rank.
    pub(crate) fn broadcast<T: Element>(
        &mut self,
        site: CallSite,
        buffer: &mut [T],
        root: u32,
    ) -> Result<(), CollectiveError> {
        let (len, world) = (buffer.len(), self.world);
        let direct = size_of_val(buffer) <= BROADCAST_DIRECT_BYTES;
        let range = |rank| if direct { 0..len } else { chunk_range(len, world, rank) };
        let mut transfers = self.transfers();
        if self.rank == root {
            for rank in self.peers() {
                let part = bytemuck::cast_slice(&buffer[range(rank)]);
                transfers[rank as usize].send = Some(vec![part]);
            }
        } else {
            let part = bytemuck::cast_slice_mut(&mut buffer[range(self.rank)]);
            transfers[root as usize].receive = Some(Sink::Exact(part));
        }
        Exchange::run(self, site, 0, transfers)?;
        if direct { Ok(()) } else { self.gather(site, 1, buffer, Some(root)) }
    }

    /// Every rank's chunk of `output` to all.
    pub(crate) fn all_gather<T: Element>(
        &mut self,
        site: CallSite,
        output: &mut [T],
    ) -> Result<(), CollectiveError> {
        self.gather(site, 0, output, None)
    }

    /// Returns when every rank is here.
    pub(crate) fn barrier(&mut self, site: CallSite) -> Result<(), CollectiveError> {
        self.gather_bytes(site, &[], 0).map(|_| ())
    }

    /// One part to and one from each rank, as far as there are any.
    pub(crate) fn exchange_parts(
        &mut self,
        site: CallSite,
        parts: Parts<'_>,
    ) -> Result<(), CollectiveError> {
        let own = self.rank as usize;
        let mut transfers = self.transfers();
        for (rank, (send, receive)) in parts.send.into_iter().zip(parts.receive).enumerate() {
            if rank == own {
                if let (Some(send), Some(receive)) = (send, receive) {
                    receive.copy_from_slice(send);
                }
                continue;
            }
            transfers[rank].send = send.map(|part| vec![part]);
            transfers[rank].receive = receive.map(Sink::Exact);
        }
        Exchange::run(self, site, 0, transfers)
    }

    /// One frame to one rank.
    pub(crate) fn send(
        &mut self,
        site: CallSite,
        bytes: &[u8],
        to: u32,
    ) -> Result<(), CollectiveError> {
        let mut transfers = self.transfers();
        transfers[to as usize].send = Some(vec![bytes]);
        Exchange::run(self, site, 0, transfers)
    }

    /// One frame from one rank.
    pub(crate) fn recv(
        &mut self,
        site: CallSite,
        bytes: &mut [u8],
        from: u32,
    ) -> Result<(), CollectiveError> {
        let mut transfers = self.transfers();
        transfers[from as usize].receive = Some(Sink::Exact(bytes));
        Exchange::run(self, site, 0, transfers)
    }

    /// Every rank's bytes on every rank; without bytes, a barrier.
    pub(crate) fn gather_bytes(
        &mut self,
        site: CallSite,
        mine: &[u8],
        most: usize,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut all = vec![Vec::new(); self.world as usize];
        all[self.rank as usize] = mine.to_vec();
        let mut transfers = self.transfers();
        for (rank, (transfer, bytes)) in transfers.iter_mut().zip(&mut all).enumerate() {
            if rank != self.rank as usize {
                transfer.send = Some(vec![mine]);
                transfer.receive = Some(Sink::Bounded(bytes, most));
            }
        }
        Exchange::run(self, site, 0, transfers)?;
        Ok(all)
    }

    /// Looks once for trouble, while this rank waits for a peer elsewhere.
    pub(crate) fn glance(
        &mut self,
        site: CallSite,
        waits_for: usize,
        waited: Duration,
    ) -> Result<(), CollectiveError> {
        Exchange::glance(self, site, waits_for, waited)
    }

    /// Most bytes of one rank in `gather_bytes`.
    pub(crate) fn gather_bytes_max(&self) -> usize {
        GATHER_BYTES_MAX.min(GATHER_TOTAL_BYTES_MAX / self.world as usize)
    }

    /// Remembers a collective that begins.
    pub(crate) fn remember(&mut self, site: CallSite) {
        if self.recent.len() == RECENT_CALLS {
            self.recent.pop_front();
        }
        self.recent.push_back(site);
    }

    /// What this rank called where a peer made that call; else what it calls now.
    pub(crate) fn counterpart(&self, site: CallSite, theirs: CallSite) -> CallSite {
        let collective = |site: &CallSite| !site.call.operation.is_point_to_point();
        let same = |own: &&CallSite| collective(&theirs) && own.number == theirs.number;
        self.recent.iter().find(same).copied().unwrap_or(site)
    }

    /// The connection to a rank, if it is a peer and the group has not failed.
    pub(crate) fn link(&mut self, rank: Rank) -> Option<&mut Link> {
        self.links.get_mut(rank.0 as usize)?.as_mut()
    }

    /// Who a peer is and where.
    ///
    /// # Panics
    /// If there is no connection to it.
    pub(crate) fn peer(&self, peer: usize) -> (Rank, SocketAddr) {
        let link = self.links[peer].as_ref().expect("an exchange is about a connected peer");
        (link.rank, link.address)
    }

    /// What it means that a peer's bytes are no frame of this group.
    pub(crate) fn frame_error(&self, peer: usize, error: &FrameError) -> CollectiveError {
        let (rank, address) = self.peer(peer);
        match *error {
            FrameError::Generation { found, expected } => {
                CollectiveError::WrongGeneration { rank, address, found, expected }
            }
            _ => CollectiveError::Protocol { rank, address, message: error.to_string() },
        }
    }

    /// Tells all peers that this rank's call failed and why, and gives the connections up.
    pub(crate) fn give_up(&mut self, error: &CollectiveError) {
        let failed = last_words(&self.codec, error.peer(), &error.to_string());
        for link in self.links.iter_mut().flatten() {
            match error {
                CollectiveError::Mismatch { rank, ours, theirs, .. } if *rank == link.rank => {
                    let theirs = encode_site(theirs);
                    let frame = self.codec.control(FrameKind::Mismatch, *ours, &theirs);
                    link.say_last_words(&frame);
                }
                _ => link.say_last_words(&failed),
            }
        }
        self.abort.unwatch();
        self.links.iter_mut().for_each(|link| *link = None);
    }

    /// Tells all peers that this rank leaves in good order.
    pub(crate) fn leave(&mut self, site: CallSite) {
        let frame = self.codec.control(FrameKind::Leave, site, &[]);
        for link in self.links.iter_mut().flatten() {
            if link.send_control(&frame).is_ok() {
                link.shut_writing();
            }
        }
        self.abort.unwatch();
    }

    fn transfers<'a>(&self) -> Vec<Transfer<'a>> {
        (0..self.world).map(|_| Transfer::default()).collect()
    }

    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let own = self.rank;
        (0..self.world).filter(move |rank| *rank != own)
    }
}

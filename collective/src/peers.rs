//! The connections of a rank to all others, and the patterns that reduce nothing.
//!
//! Reductions are in `reduce`; the state of each connection is in `link`.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::call::CallSite;
use crate::chunk::chunk_range;
use crate::combination::Combination;
use crate::communicator::Reduction;
use crate::element::Element;
use crate::error::CollectiveError;
use crate::exchange::{Exchange, Pending, Ready};
use crate::frame::{FrameCodec, FrameError, FrameKind, encode_site, last_words};
use crate::link::{Link, LinkError, Waiting};
use crate::meter::Meter;
use crate::patience::Patience;
use crate::payload::{Nothing, Payload, Sink, Transfers};
use crate::selection::Selection;
use crate::tcp_options::TcpOptions;

/// How long a rank that leaves waits for the others to leave.
const LINGER: Duration = Duration::from_millis(500);
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
    /// Memory for that many elements; what is in it is from earlier calls.
    pub(crate) fn elements<T: Element>(&mut self, count: usize) -> &mut [T] {
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
    /// Order of sums.
    pub reduction: Reduction,
    selection: Selection,
    /// How the connections were made: those of subgroups are made the same way.
    pub tcp: TcpOptions,
    /// How long an exchange looks for bytes before it sleeps.
    pub patience: Patience,
    /// How the partials of the last reduction combined.
    pub combination: Option<Combination>,
    /// What peers sent.
    pub received: Scratch,
    /// What becomes the result where it may not be reduced in its place.
    pub reduced: Scratch,
    /// Memory of the last exchange.
    pub pending: Vec<Pending>,
    pub ready: Vec<Ready>,
    /// Bytes of the call under way.
    pub meter: Meter,
    /// The last collectives, the newest last: a peer may object to one that is over here.
    recent: VecDeque<CallSite>,
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
        Self {
            rank,
            world,
            generation,
            codec,
            links,
            abort,
            reduction: Reduction::default(),
            selection: Selection::default(),
            tcp: TcpOptions::default(),
            patience: Patience::for_ranks(world as usize),
            combination: None,
            received: Scratch::default(),
            reduced: Scratch::default(),
            pending: Vec::new(),
            ready: Vec::new(),
            meter: Meter::default(),
            recent: VecDeque::new(),
        }
    }

    /// The same for the group's order of sums, how its connections were made, and where this rank
    /// is: peers of its own address share its cores.
    pub(crate) fn with(mut self, reduction: Reduction, tcp: TcpOptions, address: IpAddr) -> Self {
        let here = |link: &&Link| link.address.ip() == address || address.is_loopback();
        let peers = self.links.iter().flatten().filter(here).count();
        (self.reduction, self.patience) = (reduction, Patience::for_ranks(1 + peers));
        self.selection = tcp.selection.clone();
        self.tcp = tcp;
        self
    }

    /// Which algorithm carries which call.
    pub(crate) fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Every rank sends its own chunk of `output` to all (but not to `except`, which has it).
    pub(crate) fn gather<T: Element>(
        &mut self,
        site: CallSite,
        phase: u16,
        output: &mut [T],
        except: Option<u32>,
    ) -> Result<(), CollectiveError> {
        let len = output.len();
        let mut transfers = Transfers::none(self.world);
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
                transfers.receive[rank as usize] = Some(sink);
            }
        }
        for rank in self.peers().filter(|rank| except != Some(*rank)) {
            transfers.send[rank as usize] = Some(bytemuck::cast_slice(own));
        }
        Exchange::run(self, site, phase, &mut transfers)
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
        let mut transfers = Transfers::none(self.world);
        if self.rank == root {
            for rank in self.peers() {
                let part = bytemuck::cast_slice(&buffer[range(rank)]);
                transfers.send[rank as usize] = Some(part);
            }
        } else {
            let part = bytemuck::cast_slice_mut(&mut buffer[range(self.rank)]);
            transfers.receive[root as usize] = Some(Sink::Exact(part));
        }
        Exchange::run(self, site, 0, &mut transfers)?;
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
        let mut transfers = Transfers::none(self.world);
        for (rank, (send, receive)) in parts.send.into_iter().zip(parts.receive).enumerate() {
            if rank == own {
                if let (Some(send), Some(receive)) = (send, receive) {
                    receive.copy_from_slice(send);
                }
                continue;
            }
            transfers.send[rank] = send;
            transfers.receive[rank] = receive.map(Sink::Exact);
        }
        Exchange::run(self, site, 0, &mut transfers)
    }

    /// One frame to one rank. As its part it tells how many collectives this rank has called: a peer
    /// finds out if the message is in the way of one.
    pub(crate) fn send(
        &mut self,
        site: CallSite,
        bytes: &[u8],
        to: u32,
    ) -> Result<(), CollectiveError> {
        let mut transfers = Transfers::none(self.world);
        transfers.send[to as usize] = Some(bytes);
        self.send_payload(site, &mut transfers)
    }

    /// The same of a payload that goes to one rank.
    pub(crate) fn send_payload(
        &mut self,
        site: CallSite,
        payload: &mut dyn Payload,
    ) -> Result<(), CollectiveError> {
        let part = self.collectives() as u16;
        Exchange::run(self, site, part, payload)
    }

    /// One frame from one rank.
    pub(crate) fn recv(
        &mut self,
        site: CallSite,
        bytes: &mut [u8],
        from: u32,
    ) -> Result<(), CollectiveError> {
        let mut transfers = Transfers::none(self.world);
        transfers.receive[from as usize] = Some(Sink::Exact(bytes));
        Exchange::run(self, site, 0, &mut transfers)
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
        let mut transfers = Transfers::none(self.world);
        for (rank, bytes) in all.iter_mut().enumerate() {
            if rank != self.rank as usize {
                transfers.send[rank] = Some(mine);
                transfers.receive[rank] = Some(Sink::Bounded(bytes, most));
            }
        }
        Exchange::run(self, site, 0, &mut transfers)?;
        Ok(all)
    }

    /// Looks once at every connection, while this rank waits elsewhere: what is found is certain.
    pub(crate) fn glance(&mut self, site: CallSite) -> Result<(), CollectiveError> {
        Exchange::glance(self, site)
    }

    /// Why the peer that this rank waits for elsewhere will not come, as far as its connection says;
    /// no error if it has come meanwhile.
    pub(crate) fn find_blocked(
        &mut self,
        site: CallSite,
        peer: usize,
        waited: Duration,
    ) -> Result<(), CollectiveError> {
        let mut nothing = Nothing;
        Exchange::new(self, site, 0, &mut nothing).find_blocked(peer, waited)
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

    /// Collectives called so far.
    pub(crate) fn collectives(&self) -> u64 {
        self.recent.back().map_or(0, |site| site.number + 1)
    }

    /// Tells a peer that this rank is blocked until it sends something; whether it could be told.
    pub(crate) fn say_waiting(&mut self, site: CallSite, peer: usize) -> Result<bool, LinkError> {
        let (codec, collectives) = (self.codec, self.collectives());
        let Some(link) = self.links[peer].as_mut() else { return Ok(false) };
        let waiting = Waiting { site, frame: link.frames_received, collectives };
        link.send_control(&waiting.encode(&codec))
    }

    /// What this rank called where a peer made that call; else what it calls now.
    pub(crate) fn counterpart(&self, site: CallSite, theirs: CallSite) -> CallSite {
        if theirs.call.operation.is_point_to_point() {
            return site;
        }
        self.collective(theirs.number).unwrap_or(site)
    }

    /// One of the last collectives that this rank called.
    pub(crate) fn collective(&self, number: u64) -> Option<CallSite> {
        self.recent.iter().find(|site| site.number == number).copied()
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
        self.linger();
        self.abort.unwatch();
    }

    /// Reads what peers still say until they leave, too. Closing a connection on what was not read
    /// resets it, and a peer that is behind would take that for the loss of this rank.
    fn linger(&self) {
        let until = Instant::now() + LINGER;
        for link in self.links.iter().flatten() {
            link.discard(until);
        }
    }

    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let own = self.rank;
        (0..self.world).filter(move |rank| *rank != own)
    }
}

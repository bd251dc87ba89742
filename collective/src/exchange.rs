//! One exchange of frames: every rank sends some and waits for some, all at the same time.
//!
//! A single thread over non-blocking sockets: sending never waits for receiving, so no size of
//! payload can lock two ranks. Whatever it waits for, it looks at every connection: the end of any
//! peer, an error frame and a call that differs are found at once, also on ranks that exchange
//! nothing with the culprit. What is right and what is wrong about a frame is in `verdict`.
//!
//! Two ranks that wait for each other in calls that cannot meet (`recv` against `recv`, `recv`
//! against `barrier`) send nothing that could be compared. So a rank that was blocked for
//! [`WAITING_AFTER`] says for which frame it waits; a peer that has not sent that frame and itself
//! waits for this rank knows that neither can go on, and a peer that is in a later call knows that
//! the order of their calls differs, whoever that peer waits for. Longer cycles of point-to-point
//! calls are not found; an abort ends them.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::call::{CallSite, Operation};
use crate::error::CollectiveError;
use crate::frame::Header;
use crate::link::{Arrival, Link, LinkError, TURNS};
use crate::payload::{Nothing, Payload};
use crate::peers::Peers;

/// How long a rank is blocked before it tells whom it waits for: a person takes what comes within
/// 100 ms for at once, and a frame now and then costs a group whose ranks differ by more nothing.
pub(crate) const WAITING_AFTER: Duration = Duration::from_millis(40);
/// How often a blocked rank looks again at what it knows of its peers; costs nothing.
const WAITING_AGAIN: Duration = Duration::from_secs(1);
/// Descriptors that are polled without taking memory: groups of up to eight ranks.
const FEW_DESCRIPTORS: usize = 17;

/// What is ready of a peer's connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    peer: usize,
    data: PollFlags,
    words: bool,
}

/// How far the exchange with one peer is; whether its frame is sent is known to its link.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pending {
    /// The peer's frame has not wholly come.
    pub receiving: bool,
    /// It was compared with this call, and its length with what is waited for.
    pub accepted: bool,
    /// The peer knows that this rank is blocked.
    pub told: bool,
    /// The streams, as bits, that bring what there is no room for yet.
    stalled: u8,
    /// There was more than one turn could read.
    more: bool,
}

/// An exchange under way.
pub(crate) struct Exchange<'m> {
    pub(crate) peers: &'m mut Peers,
    pub(crate) site: CallSite,
    pub(crate) phase: u16,
    pub(crate) payload: &'m mut dyn Payload,
    pub(crate) pending: Vec<Pending>,
    ready: Vec<Ready>,
    /// What arrived made room or made something ready.
    advanced: bool,
}

impl<'m> Exchange<'m> {
    /// Exchanges one frame with every peer for which the payload has one, to the end.
    pub(crate) fn run(
        peers: &'m mut Peers,
        site: CallSite,
        phase: u16,
        payload: &'m mut dyn Payload,
    ) -> Result<(), CollectiveError> {
        let mut exchange = Self::new(peers, site, phase, payload);
        exchange.start()?;
        exchange.finish()?;
        let Self { peers, pending, ready, .. } = exchange;
        (peers.pending, peers.ready) = (pending, ready);
        Ok(())
    }

    /// Looks once at every connection, without waiting, for a call that waits elsewhere: what a peer
    /// says of its failure, its end, a frame of another call.
    pub(crate) fn glance(peers: &'m mut Peers, site: CallSite) -> Result<(), CollectiveError> {
        if let Some(aborted) = peers.abort.raised() {
            return Err(aborted);
        }
        let mut nothing = Nothing;
        let mut exchange = Exchange::new(peers, site, 0, &mut nothing);
        exchange.wait(Duration::ZERO)?;
        exchange.serve_ready()?;
        let Exchange { peers, pending, ready, .. } = exchange;
        (peers.pending, peers.ready) = (pending, ready);
        Ok(())
    }

    pub(crate) fn new(
        peers: &'m mut Peers,
        site: CallSite,
        phase: u16,
        payload: &'m mut dyn Payload,
    ) -> Self {
        // The memory of the last exchange: most are too short to take new.
        let (mut pending, ready) =
            (std::mem::take(&mut peers.pending), std::mem::take(&mut peers.ready));
        pending.clear();
        pending.resize(peers.links.len(), Pending::default());
        Self { peers, site, phase, payload, pending, ready, advanced: false }
    }

    /// Looks at what came early, and sends what the kernel takes.
    fn start(&mut self) -> Result<(), CollectiveError> {
        for peer in 0..self.pending.len() {
            self.pending[peer].receiving = self.payload.incoming(peer).is_some();
            let Some(link) = self.peers.links[peer].as_ref() else { continue };
            if let Some(header) = link.next_data().copied() {
                self.compare(peer, &header, self.pending[peer].receiving)?;
            }
        }
        let (codec, site, phase) = (self.peers.codec, self.site, self.phase);
        for peer in 0..self.pending.len() {
            let Some(link) = self.peers.links[peer].as_mut() else { continue };
            let outgoing = self.payload.outgoing(peer);
            if link.left && (outgoing.is_some() || self.pending[peer].receiving) {
                // Its last frame may have come before it left.
                self.take_ahead(peer)?;
                if outgoing.is_some() || self.pending[peer].receiving {
                    return Err(self.left(peer));
                }
                continue;
            }
            if let Some(bytes) = outgoing {
                link.begin(&codec, site, phase, bytes);
            }
            self.write(peer)?;
        }
        for peer in 0..self.pending.len() {
            self.take_ahead(peer)?;
            self.read_buffered(peer)?;
        }
        self.push()
    }

    pub(crate) fn is_done(&self, peer: usize) -> bool {
        !self.pending[peer].receiving
            && self.peers.links[peer].as_ref().is_none_or(|link| !link.is_sending())
    }

    fn finish(&mut self) -> Result<(), CollectiveError> {
        let mut timeout = WAITING_AFTER;
        let mut until = self.peers.patience.begin();
        while !(0..self.pending.len()).all(|peer| self.is_done(peer)) {
            if let Some(aborted) = self.peers.abort.raised() {
                return Err(aborted);
            }
            if let Some(end) = until {
                if self.sweep()? {
                    until = self.peers.patience.succeeded();
                } else if Instant::now() >= end {
                    self.peers.patience.failed();
                    until = None;
                }
                continue;
            }
            let soon = self.payload.beside(self.peers)?;
            self.wait(soon.unwrap_or(timeout).min(timeout))?;
            if let Some(aborted) = self.peers.abort.raised() {
                return Err(aborted);
            }
            if self.ready.is_empty() {
                self.tell_waiting()?;
                timeout = WAITING_AGAIN;
                continue;
            }
            self.serve_ready()?;
            until = self.peers.patience.begin();
        }
        Ok(())
    }

    /// Reads and writes without asking what is ready; whether anything came or went.
    fn sweep(&mut self) -> Result<bool, CollectiveError> {
        let mut progress = false;
        for peer in 0..self.pending.len() {
            if self.pending[peer].receiving {
                progress |= self.read(peer)?;
            }
            if self.peers.links[peer].as_ref().is_some_and(Link::is_sending) {
                self.write(peer)?;
                progress |= self.is_done(peer);
            }
        }
        self.push()?;
        Ok(progress)
    }

    /// Causes before consequences: what a peer says of its failure, then broken connections.
    fn serve_ready(&mut self) -> Result<(), CollectiveError> {
        let mut ready = std::mem::take(&mut self.ready);
        for ready in ready.iter().filter(|ready| ready.words) {
            self.hear(ready.peer)?;
        }
        for ready in ready.drain(..) {
            self.serve(ready.peer, ready.data)?;
            self.push()?;
        }
        self.ready = ready;
        Ok(())
    }

    /// After an advance: goes on with what had to wait for it.
    fn push(&mut self) -> Result<(), CollectiveError> {
        while std::mem::take(&mut self.advanced) {
            for peer in 0..self.pending.len() {
                self.pending[peer].stalled = 0;
                self.take_ahead(peer)?;
                if self.pending[peer].receiving {
                    self.read_buffered(peer)?;
                }
                if self.peers.links[peer].as_ref().is_some_and(Link::is_sending) {
                    self.write(peer)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until a connection is ready, an abort, or the timeout.
    fn wait(&mut self, timeout: Duration) -> Result<(), CollectiveError> {
        self.ready.clear();
        self.peers.meter.tell();
        let wake = self.peers.abort.wake_descriptor();
        let nothing = PollFd::new(wake, PollFlags::empty());
        let links = || self.peers.links.iter().enumerate();
        let most = 1 + links().flat_map(|(_, link)| link).map(|l| l.streams() + 1).sum::<usize>();
        let mut few: [PollFd<'_>; FEW_DESCRIPTORS] = std::array::from_fn(|_| nothing.clone());
        let mut many = Vec::new();
        let descriptors = if most <= few.len() {
            &mut few[..most]
        } else {
            many.resize(most, nothing);
            many.as_mut_slice()
        };
        descriptors[0] = PollFd::new(wake, PollFlags::POLLIN);
        let mut at = 1;
        for (peer, link) in links() {
            let Some(link) = link else { continue };
            for stream in 0..link.streams() {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, self.wants_read(peer, link, stream));
                flags.set(PollFlags::POLLOUT, self.wants_write(link, stream));
                // An end that is known is no news, and the first stream tells of it first.
                if !flags.is_empty() || (stream == 0 && !link.hung_up) {
                    descriptors[at] = PollFd::new(link.descriptor(stream), flags);
                }
                at += 1;
            }
            if !link.fell_silent {
                descriptors[at] = PollFd::new(link.words_descriptor(), PollFlags::POLLIN);
            }
            at += 1;
        }
        let again = self.pending.iter().any(|pending| pending.more);
        let timeout = if again { Duration::ZERO } else { timeout };
        match poll(descriptors, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(CollectiveError::socket("wait for peers", error)),
        }
        let mut at = 1;
        for (peer, link) in links() {
            let Some(link) = link else { continue };
            let (streams, words) = descriptors[at..=at + link.streams()].split_at(link.streams());
            at += link.streams() + 1;
            let mut data = streams
                .iter()
                .map(|stream| stream.revents().unwrap_or(PollFlags::POLLERR))
                .fold(PollFlags::empty(), PollFlags::union);
            data.set(
                PollFlags::POLLIN,
                data.contains(PollFlags::POLLIN) || self.pending[peer].more,
            );
            let words = words[0].any().unwrap_or(true);
            if words || !data.is_empty() {
                self.ready.push(Ready { peer, data, words });
            }
        }
        Ok(())
    }

    fn wants_read(&self, peer: usize, link: &Link, stream: usize) -> bool {
        let Pending { receiving, stalled, .. } = self.pending[peer];
        if (link.hung_up && !receiving) || !link.may_bring(stream) {
            return false;
        }
        match link.front {
            None => true,
            Some(_) if receiving => stalled & (1 << stream) == 0,
            Some(_) => link.may_read_ahead(self.site.call.operation == Operation::Send),
        }
    }

    fn wants_write(&self, link: &Link, stream: usize) -> bool {
        !link.hung_up && link.wants_write(stream)
    }

    fn serve(&mut self, peer: usize, flags: PollFlags) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_ref() else { return Ok(()) };
        let broken = flags.intersects(PollFlags::POLLERR | PollFlags::POLLHUP);
        let sending = link.is_sending();
        let reads = (0..link.streams()).any(|stream| self.wants_read(peer, link, stream));
        if reads && (broken || flags.contains(PollFlags::POLLIN)) {
            self.read(peer)?;
        }
        if flags.contains(PollFlags::POLLOUT) || (broken && sending) {
            self.write(peer)?;
        }
        if broken
            && !reads
            && let Some(link) = self.peers.links[peer].as_mut()
        {
            link.hung_up = true;
        }
        Ok(())
    }

    /// Looks at what was taken off the sockets before: no poll tells of it.
    fn read_buffered(&mut self, peer: usize) -> Result<(), CollectiveError> {
        if self.peers.links[peer].as_ref().is_some_and(Link::has_buffered) {
            self.read(peer)?;
        }
        Ok(())
    }

    /// Reads a few frames or pieces of frames from a peer; whether anything came.
    fn read(&mut self, peer: usize) -> Result<bool, CollectiveError> {
        let sending = self.site.call.operation == Operation::Send;
        let codec = self.peers.codec;
        let mut progress = false;
        self.pending[peer].more = false;
        for _ in 0..TURNS {
            let Some(link) = self.peers.links[peer].as_mut() else { return Ok(progress) };
            if let Some(front) = link.front {
                let awaited = self.pending[peer].receiving && link.ahead.is_empty();
                if awaited && !link.reads_early() {
                    let came = self.read_payload(peer, &front)?;
                    progress |= came;
                    let over = !self.pending[peer].receiving;
                    let Some(link) = self.peers.links[peer].as_ref() else { return Ok(progress) };
                    // What follows the awaited frame has time, unless it is here already.
                    if !came || (over && !link.has_buffered()) {
                        return Ok(progress);
                    }
                } else if link.may_read_ahead(sending) {
                    let whole =
                        link.read_ahead(&codec).map_err(|error| self.broken(peer, error))?;
                    if !whole {
                        return Ok(progress);
                    }
                    progress = true;
                    self.take_ahead(peer)?;
                } else {
                    return Ok(progress);
                }
                continue;
            }
            match link.next_arrival(&codec) {
                Ok(Arrival::Nothing) => return Ok(progress),
                Ok(Arrival::Data(header)) => {
                    progress = true;
                    self.compare(peer, &header, self.pending[peer].receiving)?;
                }
                Ok(Arrival::Control(header, payload)) => self.control(peer, &header, &payload)?,
                Ok(Arrival::End) if link.left => {
                    link.hung_up = true;
                    return Ok(progress);
                }
                Ok(Arrival::End) => {
                    let error = LinkError::Broken("it closed the connection".to_owned());
                    return Err(self.broken(peer, error));
                }
                Err(error) => return Err(self.broken(peer, error)),
            }
        }
        self.pending[peer].more = self.pending[peer].stalled == 0;
        Ok(progress)
    }

    /// Reads on in the awaited payload; whether anything came.
    fn read_payload(&mut self, peer: usize, front: &Header) -> Result<bool, CollectiveError> {
        if !self.pending[peer].accepted {
            self.accept(peer, front)?;
        }
        let codec = self.peers.codec;
        let mut progress = false;
        let Some(link) = self.peers.links[peer].as_mut() else { return Ok(false) };
        for stream in 0..link.front_streams() {
            let range = match link.wanted(stream, &codec) {
                Ok(Some(range)) => range,
                Ok(None) => continue,
                Err(error) => return Err(self.broken(peer, error)),
            };
            let room = self.payload.room(peer, range.clone());
            if room.is_empty() {
                self.pending[peer].stalled |= 1 << stream;
                continue;
            }
            match link.fill(stream, room) {
                Ok(0) => {}
                Ok(read) => {
                    progress = true;
                    self.peers.meter.count(read);
                    self.advanced |= self.payload.arrived(peer, range.start..range.start + read);
                }
                Err(error) => return Err(self.broken(peer, error)),
            }
        }
        if link.end_front() {
            self.pending[peer].receiving = false;
            progress = true;
        }
        Ok(progress)
    }

    /// Takes the awaited frame from those that came early, as far as there is room.
    fn take_ahead(&mut self, peer: usize) -> Result<(), CollectiveError> {
        if !self.pending[peer].receiving {
            return Ok(());
        }
        let Some(header) = self.peers.links[peer]
            .as_ref()
            .and_then(|link| link.ahead.front().map(|early| early.header))
        else {
            return Ok(());
        };
        if !self.pending[peer].accepted {
            self.accept(peer, &header)?;
        }
        let Some(link) = self.peers.links[peer].as_mut() else { return Ok(()) };
        let Some(early) = link.ahead.front_mut() else { return Ok(()) };
        while early.taken < early.payload.len() {
            let rest = &early.payload[early.taken..];
            let room = self.payload.room(peer, early.taken..early.payload.len());
            let bytes = room.len().min(rest.len());
            if bytes == 0 {
                return Ok(());
            }
            room[..bytes].copy_from_slice(&rest[..bytes]);
            let range = early.taken..early.taken + bytes;
            early.taken = range.end;
            self.advanced |= self.payload.arrived(peer, range);
        }
        link.drop_ahead();
        self.pending[peer].receiving = false;
        Ok(())
    }

    fn write(&mut self, peer: usize) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_mut() else { return Ok(()) };
        link.write(peer, self.payload).map_err(|error| self.broken(peer, error))
    }

    /// Tells every peer from which nothing has come that this rank is blocked.
    fn tell_waiting(&mut self) -> Result<(), CollectiveError> {
        for peer in 0..self.pending.len() {
            self.find_behind(peer)?;
            if !self.is_blocked_on(peer) {
                continue;
            }
            self.find_deadlock(peer)?;
            if self.pending[peer].told {
                continue;
            }
            match self.peers.say_waiting(self.site, peer) {
                Ok(sent) => self.pending[peer].told = sent,
                Err(error) => return Err(self.broken(peer, error)),
            }
        }
        Ok(())
    }
}

//! One exchange of frames: every rank sends some and waits for some, all at the same time.
//!
//! A single thread over non-blocking sockets: sending never waits for receiving, so no size of
//! payload can lock two ranks. Whatever it waits for, it looks at every connection: the end of any
//! peer, an error frame and a call that differs are found at once, also on ranks that exchange
//! nothing with the culprit.
//!
//! Two ranks that wait for each other in calls that cannot meet (`recv` against `recv`, `recv`
//! against `barrier`) send nothing that could be compared. So a rank that was blocked for
//! [`WAITING_AFTER`] says for which frame it waits; a peer that has not sent that frame and itself
//! waits for this rank knows that neither can go on. Longer cycles of point-to-point calls are not
//! found; an abort ends them.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::call::{Call, CallSite, Operation};
use crate::error::CollectiveError;
use crate::frame::{FrameError, FrameKind, Header, decode_last_words, decode_site};
use crate::link::{Arrival, Link, LinkError, Sending, TURNS, Words};
use crate::peers::Peers;

/// How long a rank is blocked before it tells whom it waits for: longer than most steps of a
/// healthy group differ, short for a person.
const WAITING_AFTER: Duration = Duration::from_millis(40);
/// How long a rank waits for the last words of a peer whose data connection broke. A process that
/// is killed ends both at once; only a host that vanishes in this moment makes it wait.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(1);
/// How often a blocked rank looks again at what it knows of its peers; costs nothing.
const WAITING_AGAIN: Duration = Duration::from_secs(1);

/// Where a payload goes.
#[derive(Debug)]
pub(crate) enum Sink<'a> {
    /// Memory of exactly the payload's length.
    Exact(&'a mut [u8]),
    /// A vector that takes the payload's length, up to a bound.
    Bounded(&'a mut Vec<u8>, usize),
}

/// What to exchange with one peer.
#[derive(Debug, Default)]
pub(crate) struct Transfer<'a> {
    /// The payload for it, as parts of memory.
    pub send: Option<Vec<&'a [u8]>>,
    /// Where its payload goes.
    pub receive: Option<Sink<'a>>,
}

#[derive(Default)]
struct Pending<'a> {
    sending: Option<Sending<'a>>,
    receive: Option<Sink<'a>>,
    /// The front frame was compared with this call, and the sink fits it.
    accepted: bool,
    told: bool,
}

impl Pending<'_> {
    fn is_done(&self) -> bool {
        self.sending.is_none() && self.receive.is_none()
    }
}

/// What is ready of a peer's connections.
#[derive(Clone, Copy, Debug)]
struct Ready {
    data: PollFlags,
    words: bool,
}

/// An exchange under way.
pub(crate) struct Exchange<'m, 'a> {
    peers: &'m mut Peers,
    site: CallSite,
    phase: u8,
    pending: Vec<Pending<'a>>,
}

impl<'m, 'a> Exchange<'m, 'a> {
    /// Exchanges one frame per transfer (indexed by rank; this rank's own is empty), to the end.
    pub(crate) fn run(
        peers: &'m mut Peers,
        site: CallSite,
        phase: u8,
        transfers: Vec<Transfer<'a>>,
    ) -> Result<(), CollectiveError> {
        assert_eq!(transfers.len(), peers.links.len(), "one transfer per rank");
        let pending = transfers
            .into_iter()
            .map(|transfer| Pending {
                sending: transfer.send.map(|parts| Sending::new(&peers.codec, phase, site, parts)),
                receive: transfer.receive,
                accepted: false,
                told: false,
            })
            .collect();
        let mut exchange = Self { peers, site, phase, pending };
        exchange.start()?;
        exchange.finish()
    }

    /// Looks once at every connection, without waiting, for a call that waits elsewhere: what a peer
    /// says of its failure, its end, a frame of another call. `waits_for` is the peer it waits for.
    pub(crate) fn glance(
        peers: &'m mut Peers,
        site: CallSite,
        waits_for: usize,
        waited: Duration,
    ) -> Result<(), CollectiveError> {
        let pending = (0..peers.links.len()).map(|_| Pending::default()).collect();
        let mut exchange = Self { peers, site, phase: 0, pending };
        if let Some(aborted) = exchange.peers.abort.raised() {
            return Err(aborted);
        }
        let mut ready = Vec::new();
        exchange.wait(Duration::ZERO, &mut ready)?;
        for (peer, ready) in &ready {
            if ready.words {
                exchange.hear(*peer)?;
            }
        }
        for (peer, ready) in ready.drain(..) {
            exchange.serve(peer, ready.data)?;
        }
        let Some(link) = exchange.peers.links[waits_for].as_ref() else { return Ok(()) };
        if link.left {
            return Err(exchange.left(waits_for));
        }
        if waited < WAITING_AFTER {
            return Ok(());
        }
        // What it sends, nobody here receives; and where it is blocked in a call over its connection,
        // it waits for a frame that this rank, which waits in shared memory, will not send.
        let sent = link.next_data().map(|header| header.site);
        let blocked = link.waiting.filter(|(_, number)| *number == link.frames_sent);
        match sent.or(blocked.map(|(theirs, _)| theirs)) {
            Some(theirs) => Err(exchange.mismatch(waits_for, theirs)),
            None => Ok(()),
        }
    }

    /// Looks at what came early, and sends what the kernel takes.
    fn start(&mut self) -> Result<(), CollectiveError> {
        for peer in 0..self.pending.len() {
            let Some(link) = self.peers.links[peer].as_ref() else { continue };
            if let Some(header) = link.next_data().copied() {
                self.compare(peer, &header, self.pending[peer].receive.is_some())?;
            }
        }
        for peer in 0..self.pending.len() {
            if self.peers.links[peer].is_none() {
                continue;
            }
            self.take_ahead(peer)?;
            if self.peers.links[peer].as_ref().is_some_and(|link| link.left)
                && !self.pending[peer].is_done()
            {
                return Err(self.left(peer));
            }
            self.write(peer)?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), CollectiveError> {
        let mut timeout = WAITING_AFTER;
        let mut ready = Vec::with_capacity(self.pending.len());
        while !self.pending.iter().all(Pending::is_done) {
            self.wait(timeout, &mut ready)?;
            if let Some(aborted) = self.peers.abort.raised() {
                return Err(aborted);
            }
            if ready.is_empty() {
                self.tell_waiting()?;
                timeout = WAITING_AGAIN;
                continue;
            }
            // Causes before consequences: what a peer says of its failure, then broken connections.
            for (peer, ready) in &ready {
                if ready.words {
                    self.hear(*peer)?;
                }
            }
            for (peer, ready) in ready.drain(..) {
                self.serve(peer, ready.data)?;
            }
        }
        Ok(())
    }

    /// Waits until a connection is ready, an abort, or the timeout.
    fn wait(
        &self,
        timeout: Duration,
        ready: &mut Vec<(usize, Ready)>,
    ) -> Result<(), CollectiveError> {
        ready.clear();
        let mut peers = Vec::with_capacity(self.pending.len());
        let mut descriptors = Vec::with_capacity(2 * self.pending.len() + 1);
        descriptors.push(PollFd::new(self.peers.abort.wake_descriptor(), PollFlags::POLLIN));
        for (peer, link) in self.peers.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, self.wants_read(peer, link));
            flags.set(PollFlags::POLLOUT, self.wants_write(peer, link));
            peers.push(peer);
            // An end that is known is no news; the wake descriptor without flags stands for nothing.
            let nothing = PollFd::new(self.peers.abort.wake_descriptor(), PollFlags::empty());
            descriptors.push(match flags.is_empty() && link.hung_up {
                false => PollFd::new(link.descriptor(), flags),
                true => nothing.clone(),
            });
            descriptors.push(match link.fell_silent {
                false => PollFd::new(link.words_descriptor(), PollFlags::POLLIN),
                true => nothing,
            });
        }
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(CollectiveError::socket("wait for peers", error)),
        }
        for (peer, both) in peers.into_iter().zip(descriptors[1..].chunks_exact(2)) {
            let data = both[0].revents().unwrap_or(PollFlags::POLLERR);
            let words = both[1].any().unwrap_or(true);
            if words || !data.is_empty() {
                ready.push((peer, Ready { data, words }));
            }
        }
        Ok(())
    }

    fn wants_read(&self, peer: usize, link: &Link) -> bool {
        if link.hung_up && self.pending[peer].receive.is_none() {
            return false;
        }
        link.front.is_none()
            || self.pending[peer].receive.is_some()
            || link.may_read_ahead(self.site.call.operation == Operation::Send)
    }

    fn wants_write(&self, peer: usize, link: &Link) -> bool {
        !link.hung_up && (self.pending[peer].sending.is_some() || link.has_outbox())
    }

    fn serve(&mut self, peer: usize, flags: PollFlags) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_ref() else { return Ok(()) };
        let broken = flags.intersects(PollFlags::POLLERR | PollFlags::POLLHUP);
        let reads = self.wants_read(peer, link);
        if reads && (broken || flags.contains(PollFlags::POLLIN)) {
            self.read(peer)?;
        }
        if flags.contains(PollFlags::POLLOUT) || (broken && self.pending[peer].sending.is_some()) {
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

    /// Reads a few frames or pieces of frames from a peer.
    fn read(&mut self, peer: usize) -> Result<(), CollectiveError> {
        let sending = self.site.call.operation == Operation::Send;
        for _ in 0..TURNS {
            let codec = self.peers.codec;
            let Some(link) = self.peers.links[peer].as_mut() else { return Ok(()) };
            if let Some(front) = link.front {
                let awaited = self.pending[peer].receive.is_some() && link.ahead.is_empty();
                if awaited && !link.reads_early() {
                    if !self.read_payload(peer, &front)? {
                        return Ok(());
                    }
                } else if link.may_read_ahead(sending) {
                    let whole = link.read_ahead().map_err(|error| self.broken(peer, error))?;
                    if !whole {
                        return Ok(());
                    }
                    self.take_ahead(peer)?;
                } else {
                    return Ok(());
                }
                continue;
            }
            match link.next_arrival(&codec) {
                Ok(Arrival::Nothing) => return Ok(()),
                Ok(Arrival::Data(header)) => {
                    let awaited = self.pending[peer].receive.is_some();
                    self.compare(peer, &header, awaited)?;
                }
                Ok(Arrival::Control(header, payload)) => self.control(peer, &header, &payload)?,
                Ok(Arrival::End) if link.left => {
                    link.hung_up = true;
                    return Ok(());
                }
                Ok(Arrival::End) => {
                    let error = LinkError::Broken("it closed the connection".to_owned());
                    return Err(self.broken(peer, error));
                }
                Err(error) => return Err(self.broken(peer, error)),
            }
        }
        Ok(())
    }

    /// Reads on in the awaited payload; whether it is whole.
    fn read_payload(&mut self, peer: usize, front: &Header) -> Result<bool, CollectiveError> {
        if !self.pending[peer].accepted {
            self.accept(peer, front)?;
        }
        let (Some(link), Some(sink)) =
            (self.peers.links[peer].as_mut(), self.pending[peer].receive.as_mut())
        else {
            return Ok(false);
        };
        let buffer = match sink {
            Sink::Exact(buffer) => &mut **buffer,
            Sink::Bounded(buffer, _) => buffer.as_mut_slice(),
        };
        let before = link.front_read;
        match link.read_front(buffer) {
            Ok(true) => {
                self.pending[peer].receive = None;
                Ok(true)
            }
            // More may be there: take another turn if this one brought something.
            Ok(false) => Ok(link.front_read > before),
            Err(error) => Err(self.broken(peer, error)),
        }
    }

    /// Takes the awaited frame from those that came early.
    fn take_ahead(&mut self, peer: usize) -> Result<(), CollectiveError> {
        if self.pending[peer].receive.is_none() {
            return Ok(());
        }
        let Some((header, payload)) = self.peers.links[peer].as_mut().and_then(Link::take_ahead)
        else {
            return Ok(());
        };
        self.accept(peer, &header)?;
        match self.pending[peer].receive.take() {
            Some(Sink::Exact(buffer)) => buffer.copy_from_slice(&payload),
            Some(Sink::Bounded(buffer, _)) => *buffer = payload,
            None => {}
        }
        Ok(())
    }

    /// Compares the awaited frame with this call, and makes the sink fit it.
    fn accept(&mut self, peer: usize, header: &Header) -> Result<(), CollectiveError> {
        self.compare(peer, header, true)?;
        let found = usize::try_from(header.payload).unwrap_or(usize::MAX);
        let wrong = match self.pending[peer].receive.as_mut() {
            Some(Sink::Exact(buffer)) if buffer.len() != found => {
                Some(format!("expected {}", buffer.len()))
            }
            Some(Sink::Bounded(_, most)) if found > *most => {
                Some(format!("at most {most} are allowed"))
            }
            Some(Sink::Bounded(buffer, _)) => {
                buffer.resize(found, 0);
                None
            }
            _ => None,
        };
        if let Some(expected) = wrong {
            let message =
                format!("`{}` came with a payload of {found} bytes, {expected}", header.site);
            return Err(self.protocol(peer, message));
        }
        self.pending[peer].accepted = true;
        Ok(())
    }

    /// Whether the calls of two ranks can meet, given the peer's next data frame.
    fn compare(&self, peer: usize, header: &Header, awaited: bool) -> Result<(), CollectiveError> {
        let theirs = header.site;
        let point = theirs.call.operation.is_point_to_point();
        let meets = match (self.site.call.operation, awaited) {
            (Operation::Recv, true) => {
                theirs.call == self.sent_as() && theirs.number == self.site.number
            }
            (_, true) => theirs == self.site,
            (Operation::Send | Operation::Recv | Operation::Join, false) => true,
            (_, false) => {
                point
                    || theirs.number > self.site.number
                    || (theirs == self.site && header.phase >= self.phase)
            }
        };
        if !meets {
            if self.peers.counterpart(self.site, theirs) == theirs {
                let message =
                    format!("part {} of `{theirs}` came during `{}`", header.phase, self.site);
                return Err(self.protocol(peer, message));
            }
            return Err(self.mismatch(peer, theirs));
        }
        if awaited && header.phase != self.phase {
            let message =
                format!("part {} of `{theirs}` came, expected part {}", header.phase, self.phase);
            return Err(self.protocol(peer, message));
        }
        Ok(())
    }

    /// The call that a `recv` waits for.
    fn sent_as(&self) -> Call {
        Call { operation: Operation::Send, detail: self.peers.rank, ..self.site.call }
    }

    fn control(
        &mut self,
        peer: usize,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), CollectiveError> {
        match header.kind {
            FrameKind::Leave if !self.pending[peer].is_done() => Err(self.left(peer)),
            FrameKind::Waiting => {
                let Ok(number) = payload.try_into().map(u64::from_le_bytes) else {
                    let message = "a notice of waiting without a frame number".to_owned();
                    return Err(self.protocol(peer, message));
                };
                if let Some(link) = self.peers.links[peer].as_mut() {
                    link.waiting = Some((header.site, number));
                }
                self.find_deadlock(peer)
            }
            FrameKind::Leave => Ok(()),
            FrameKind::Mismatch | FrameKind::Failed | FrameKind::Data => {
                Err(self.protocol(peer, "last words among the frames of calls".to_owned()))
            }
        }
    }

    /// The error that a peer reported.
    fn told(&self, peer: usize, header: &Header, payload: &[u8]) -> CollectiveError {
        match (header.kind, decode_site(payload)) {
            (FrameKind::Mismatch, Some(ours)) => {
                let error = self.mismatch(peer, header.site);
                match error {
                    CollectiveError::Mismatch { own, rank, address, theirs, .. } => {
                        CollectiveError::Mismatch { own, rank, address, ours, theirs }
                    }
                    other => other,
                }
            }
            _ => {
                let (rank, address) = self.peers.peer(peer);
                let (culprit, message) = decode_last_words(payload);
                CollectiveError::PeerFailed { rank, address, culprit, message }
            }
        }
    }

    fn write(&mut self, peer: usize) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_mut() else { return Ok(()) };
        let result = match self.pending[peer].sending.as_mut() {
            Some(sending) => link.write(sending),
            None => link.flush().map(|_| ()),
        };
        if let Err(error) = result {
            return Err(self.broken(peer, error));
        }
        if self.pending[peer].sending.as_ref().is_some_and(Sending::is_done) {
            self.pending[peer].sending = None;
        }
        Ok(())
    }

    /// Tells every peer from which nothing has come that this rank is blocked.
    fn tell_waiting(&mut self) -> Result<(), CollectiveError> {
        for peer in 0..self.pending.len() {
            if !self.is_blocked_on(peer) {
                continue;
            }
            self.find_deadlock(peer)?;
            let (codec, site) = (self.peers.codec, self.site);
            let Some(link) = self.peers.links[peer].as_mut() else { continue };
            if self.pending[peer].told {
                continue;
            }
            let number = link.frames_received.to_le_bytes();
            let frame = codec.control(FrameKind::Waiting, site, &number);
            match link.send_control(&frame) {
                Ok(sent) => self.pending[peer].told = sent,
                Err(error) => return Err(self.broken(peer, error)),
            }
        }
        Ok(())
    }

    /// This rank has given the peer all it will, and has nothing of what it waits for.
    fn is_blocked_on(&self, peer: usize) -> bool {
        let pending = &self.pending[peer];
        pending.receive.is_some()
            && pending.sending.is_none()
            && self.peers.links[peer].as_ref().is_some_and(Link::is_silent)
    }

    /// Neither can go on if the peer waits for a frame that this rank has not sent, and this rank
    /// waits for the peer.
    fn find_deadlock(&self, peer: usize) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_ref() else { return Ok(()) };
        match link.waiting {
            Some((theirs, number)) if number == link.frames_sent && self.is_blocked_on(peer) => {
                Err(self.mismatch(peer, theirs))
            }
            _ => Ok(()),
        }
    }

    /// Looks at what a peer says on the connection for last words.
    fn hear(&mut self, peer: usize) -> Result<(), CollectiveError> {
        match self.read_words(peer) {
            Ok(Words::Nothing) => Ok(()),
            Ok(Words::Said(header, payload)) => Err(self.told(peer, &header, &payload)),
            // It left in good order, as its data connection says, or died: then that broke too.
            Ok(Words::Ended) => {
                if let Some(link) = self.peers.links[peer].as_mut() {
                    link.fell_silent = true;
                }
                Ok(())
            }
            // This connection is idle and so the one that keepalive watches: the host is gone.
            Ok(Words::Broken(cause)) => {
                let (rank, address) = self.peers.peer(peer);
                Err(CollectiveError::PeerLost { rank, address, during: self.site, cause })
            }
            Err(error) => Err(self.peers.frame_error(peer, &error)),
        }
    }

    fn read_words(&mut self, peer: usize) -> Result<Words, FrameError> {
        let codec = self.peers.codec;
        match self.peers.links[peer].as_mut() {
            Some(link) => link.read_words(&codec),
            None => Ok(Words::Nothing),
        }
    }

    /// What a broken connection means: the peer's last words, or if it has none, its death.
    fn broken(&mut self, peer: usize, error: LinkError) -> CollectiveError {
        let cause = match error {
            LinkError::Frame(error) => return self.peers.frame_error(peer, &error),
            LinkError::Broken(cause) => cause,
        };
        let deadline = Instant::now() + LAST_WORDS_WAIT;
        loop {
            match self.read_words(peer) {
                Ok(Words::Said(header, payload)) => return self.told(peer, &header, &payload),
                Ok(Words::Ended | Words::Broken(_)) => break,
                Ok(Words::Nothing) => {}
                Err(error) => return self.peers.frame_error(peer, &error),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.peers.abort.raised().is_some() {
                break;
            }
            let Some(link) = self.peers.links[peer].as_ref() else { break };
            let mut descriptors = [
                PollFd::new(self.peers.abort.wake_descriptor(), PollFlags::POLLIN),
                PollFd::new(link.words_descriptor(), PollFlags::POLLIN),
            ];
            let wait = left + Duration::from_millis(1);
            let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
            match poll(&mut descriptors, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return CollectiveError::socket("wait for a peer", error),
            }
        }
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::PeerLost { rank, address, during: self.site, cause }
    }

    fn mismatch(&self, peer: usize, theirs: CallSite) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        let own = api::Rank(self.peers.rank);
        let ours = self.peers.counterpart(self.site, theirs);
        CollectiveError::Mismatch { own, rank, address, ours, theirs }
    }

    fn protocol(&self, peer: usize, message: String) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::Protocol { rank, address, message }
    }

    fn left(&self, peer: usize) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::PeerLeft { rank, address, during: self.site }
    }
}

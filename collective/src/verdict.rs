//! What is right about a frame and what is wrong, and what a broken connection means.
//!
//! The half of an exchange that judges; `exchange` moves the bytes.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::call::{Call, CallSite, Operation};
use crate::error::CollectiveError;
use crate::exchange::{Exchange, WAITING_AFTER};
use crate::frame::{FrameError, FrameKind, Header, decode_last_words, decode_site, encode_site};
use crate::link::{Link, LinkError, Waiting, Words};
use crate::payload::Length;

/// How long a rank waits for the last words of a peer whose data connection broke. A process that
/// is killed ends both at once; only a host that vanishes in this moment makes it wait.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(1);

impl Exchange<'_> {
    /// Compares the awaited frame with this call and its length with what is waited for.
    pub(crate) fn accept(&mut self, peer: usize, header: &Header) -> Result<(), CollectiveError> {
        self.compare(peer, header, true)?;
        let found = usize::try_from(header.payload).unwrap_or(usize::MAX);
        let wrong = match self.payload.incoming(peer) {
            Some(Length::Exactly(bytes)) if bytes != found => Some(format!("expected {bytes}")),
            Some(Length::AtMost(most)) if found > most => {
                Some(format!("at most {most} are allowed"))
            }
            _ => None,
        };
        if let Some(expected) = wrong {
            let message =
                format!("`{}` came with a payload of {found} bytes, {expected}", header.site);
            return Err(self.protocol(peer, message));
        }
        self.payload.announce(peer, found);
        self.pending[peer].accepted = true;
        Ok(())
    }

    /// Whether the calls of two ranks can meet, given the peer's next data frame.
    pub(crate) fn compare(
        &mut self,
        peer: usize,
        header: &Header,
        awaited: bool,
    ) -> Result<(), CollectiveError> {
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
            return Err(self.differs(peer, theirs));
        }
        if awaited && !is_send(theirs) && header.phase != self.phase {
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

    pub(crate) fn control(
        &mut self,
        peer: usize,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), CollectiveError> {
        match header.kind {
            FrameKind::Leave if !self.is_done(peer) => Err(self.left(peer)),
            FrameKind::Waiting => {
                let Some(waiting) = Waiting::decode(header.site, payload) else {
                    let message = "a notice of waiting without its numbers".to_owned();
                    return Err(self.protocol(peer, message));
                };
                if let Some(link) = self.peers.links[peer].as_mut() {
                    link.waiting = Some(waiting);
                }
                self.find_behind(peer)?;
                self.find_deadlock(peer)
            }
            FrameKind::Leave => Ok(()),
            FrameKind::Mismatch | FrameKind::Failed | FrameKind::Data | FrameKind::Stripe => {
                Err(self.protocol(peer, "last words among the frames of calls".to_owned()))
            }
        }
    }

    /// The error that a peer reported.
    fn told(&self, peer: usize, header: &Header, payload: &[u8]) -> CollectiveError {
        match (header.kind, decode_site(payload)) {
            (FrameKind::Mismatch, Some(ours)) => {
                // Which of its collectives this rank called is known better here.
                let ours = match ours.call.operation.is_point_to_point() {
                    true => ours,
                    false => self.peers.counterpart(ours, header.site),
                };
                self.mismatch_of(peer, ours, header.site)
            }
            _ => {
                let (rank, address) = self.peers.peer(peer);
                let (culprit, message) = decode_last_words(payload);
                CollectiveError::PeerFailed { rank, address, culprit, message }
            }
        }
    }

    /// This rank has given the peer all it will, and has nothing of what it waits for.
    pub(crate) fn is_blocked_on(&self, peer: usize) -> bool {
        let blocked = |link: &Link| !link.is_sending() && link.is_silent();
        self.pending[peer].receiving && self.peers.links[peer].as_ref().is_some_and(blocked)
    }

    /// Neither can go on if the peer waits for a frame that this rank has not sent, and this rank
    /// waits for the peer.
    pub(crate) fn find_deadlock(&mut self, peer: usize) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_ref() else { return Ok(()) };
        match link.is_awaited() {
            Some(waiting) if self.is_blocked_on(peer) => Err(self.differs(peer, waiting.site)),
            _ => Ok(()),
        }
    }

    /// A peer that is stuck in a message to or from this rank, and has not called a collective that
    /// this rank has called: the order of their calls differs. Whoever waits for it need not be this
    /// rank, but nobody else can know.
    pub(crate) fn find_behind(&self, peer: usize) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[peer].as_ref() else { return Ok(()) };
        let called = self.peers.collectives();
        let receives = |waiting: &Waiting| waiting.site.call.operation == Operation::Recv;
        if let Some(waiting) = link.is_awaited().filter(receives)
            && waiting.collectives < called
        {
            return Err(self.behind(peer, waiting.site, waiting.collectives));
        }
        let stuck = !self.pending[peer].receiving && !link.may_read_ahead(false);
        match link.front {
            Some(Header { site, phase, .. }) if stuck && is_send(site) => {
                // So many as it told, modulo 2¹⁶: of a peer that is ahead, no more than a few
                // frames are unread.
                let fewer = (called as u16).wrapping_sub(phase);
                match i16::try_from(fewer) {
                    Ok(1..) => Err(self.behind(peer, site, called - u64::from(fewer))),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// A peer's message stands before the collective of that number, which this rank has called.
    fn behind(&self, peer: usize, theirs: CallSite, number: u64) -> CollectiveError {
        self.mismatch_of(peer, self.peers.collective(number).unwrap_or(self.site), theirs)
    }

    /// While this rank waits for a peer elsewhere: what the peer sends, nobody here receives, and
    /// where it is blocked in a call over its connection, it waits for a frame that this rank will
    /// not send; one that has left does nothing more.
    pub(crate) fn find_blocked(
        &self,
        waits_for: usize,
        waited: Duration,
    ) -> Result<(), CollectiveError> {
        let Some(link) = self.peers.links[waits_for].as_ref() else { return Ok(()) };
        if link.left {
            return Err(self.left(waits_for));
        }
        if waited < WAITING_AFTER {
            return Ok(());
        }
        (0..self.pending.len()).try_for_each(|peer| self.find_behind(peer))?;
        // It is in a call over its connection, or is stuck in a send that nobody here receives.
        let stuck = link.front.is_some() && !link.may_read_ahead(false);
        let sent = link
            .next_data()
            .filter(|header| stuck || !header.site.call.operation.is_point_to_point())
            .map(|header| header.site);
        match sent.or(link.is_awaited().map(|waiting| waiting.site)) {
            // Not asked: the peer may have come meanwhile, and then this is no error.
            Some(theirs) => Err(self.mismatch(waits_for, theirs)),
            None => Ok(()),
        }
    }

    /// Looks at what a peer says on the connection for last words.
    pub(crate) fn hear(&mut self, peer: usize) -> Result<(), CollectiveError> {
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
    pub(crate) fn broken(&mut self, peer: usize, error: LinkError) -> CollectiveError {
        let cause = match error {
            LinkError::Frame(error) => return self.peers.frame_error(peer, &error),
            LinkError::Broken(cause) => cause,
        };
        if let Some(said) = self.await_words(peer, LAST_WORDS_WAIT) {
            return said;
        }
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::PeerLost { rank, address, during: self.site, cause }
    }

    /// What a peer says of its failure within a time, if it says anything.
    fn await_words(&mut self, peer: usize, wait: Duration) -> Option<CollectiveError> {
        let deadline = Instant::now() + wait;
        loop {
            match self.read_words(peer) {
                Ok(Words::Said(header, payload)) => {
                    return Some(self.told(peer, &header, &payload));
                }
                Ok(Words::Ended | Words::Broken(_)) => return None,
                Ok(Words::Nothing) => {}
                Err(error) => return Some(self.peers.frame_error(peer, &error)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.peers.abort.raised().is_some() {
                return None;
            }
            let link = self.peers.links[peer].as_ref()?;
            let mut descriptors = [
                PollFd::new(self.peers.abort.wake_descriptor(), PollFlags::POLLIN),
                PollFd::new(link.words_descriptor(), PollFlags::POLLIN),
            ];
            let wait = left + Duration::from_millis(1);
            let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
            match poll(&mut descriptors, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Some(CollectiveError::socket("wait for a peer", error)),
            }
        }
    }

    /// A peer's call that cannot meet this one. A peer that is ahead made the call that differs
    /// before, and this rank may have no part in what that one sent: it is asked which call it was.
    fn differs(&mut self, peer: usize, theirs: CallSite) -> CollectiveError {
        let error = self.mismatch(peer, theirs);
        let counted = |site: CallSite| !site.call.operation.is_point_to_point();
        if counted(self.site) && counted(theirs) && theirs.number > self.site.number {
            let (codec, site) = (self.peers.codec, self.site);
            let question = codec.control(FrameKind::Mismatch, site, &encode_site(&theirs));
            if let Some(link) = self.peers.links[peer].as_ref() {
                link.say_last_words(&question);
            }
            return self.await_words(peer, WAITING_AFTER).unwrap_or(error);
        }
        error
    }

    fn mismatch(&self, peer: usize, theirs: CallSite) -> CollectiveError {
        self.mismatch_of(peer, self.peers.counterpart(self.site, theirs), theirs)
    }

    fn mismatch_of(&self, peer: usize, ours: CallSite, theirs: CallSite) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        let own = api::Rank(self.peers.rank);
        CollectiveError::Mismatch { own, rank, address, ours, theirs }
    }

    fn protocol(&self, peer: usize, message: String) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::Protocol { rank, address, message }
    }

    pub(crate) fn left(&self, peer: usize) -> CollectiveError {
        let (rank, address) = self.peers.peer(peer);
        CollectiveError::PeerLeft { rank, address, during: self.site }
    }
}

fn is_send(site: CallSite) -> bool {
    site.call.operation == Operation::Send
}

//! Forming the full mesh: each rank connects to the lower ones and accepts the higher ones.
//!
//! Each pair has a connection per [`Channel`]. One thread polls everything at once. A connection that
//! fails its handshake is closed and told why; it never fails the group, for anybody can connect to
//! a port. Only what a rank learns about the addresses it was *given* is final: a lower rank that
//! refuses it or cannot prove itself.

use std::io::{ErrorKind, IoSlice};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use api::Rank;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::abort::AbortHandle;
use crate::error::CollectiveError;
use crate::handshake::{
    Channel, ENCRYPTS, ENVELOPE_BYTES, Failure, Identity, Negotiation, Progress, body_bytes,
    encrypts, fresh_nonce, refusal,
};
use crate::tls::{Session, TlsMaterial};
use crate::wire::Wire;

/// Accepted connections in a handshake at one time; more wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// How long an accepted connection may take: a stranger holds a place for no longer.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Wait before the second attempt to connect to a peer that is not there yet; doubles …
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// … up to this.
const RETRY_MOST: Duration = Duration::from_millis(500);
/// Longest wait of one poll where no deadline is nearer (a timeout beyond any clock has none).
const POLL_MOST: Duration = Duration::from_secs(60);

/// One of the connections to a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    rank: u32,
    channel: Channel,
}

impl Slot {
    /// Slots in rank order, for pairs of that many streams.
    fn index(self, streams: u8) -> usize {
        self.rank as usize * channels(streams) + usize::from(self.channel.code())
    }
}

/// Connections of a pair.
fn channels(streams: u8) -> usize {
    1 + usize::from(streams)
}

/// The connections to a peer, authenticated and non-blocking.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// For frames of calls, the first stream first.
    pub data: Vec<Wire>,
    /// For why a rank failed.
    pub words: Wire,
}

/// A connection in its handshake.
struct Attempt {
    wire: Wire,
    from: SocketAddr,
    /// The lower rank that this rank connects to; none if accepted.
    target: Option<Slot>,
    negotiation: Negotiation,
    /// The kernel has not yet finished connecting.
    connecting: bool,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// Authenticated as this rank; over when the outbox is empty.
    joined: Option<Slot>,
    until: Option<Instant>,
}

/// How an attempt stands.
enum Standing {
    Pending,
    Joined(Slot),
    /// Not now: the peer is not there, or the connection broke.
    Broken(String),
    Failed(Failure),
}

#[derive(Clone, Debug)]
struct Retry {
    at: Instant,
    wait: Duration,
}

/// How much what was heard of a missing rank says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Weight {
    /// A connection broke.
    Broken,
    /// Somebody who may be that rank said why it cannot be.
    Said,
    /// It was said under the rank's name, or by the address where the rank should be.
    Named,
}

/// The forming of a group.
pub(crate) struct Formation<'a> {
    identity: &'a Identity,
    peers: &'a [SocketAddr],
    listener: &'a TcpListener,
    abort: &'a AbortHandle,
    tls: Option<&'a TlsMaterial>,
    timeout: Duration,
    deadline: Option<Instant>,
    /// By slot.
    joined: Vec<Option<Wire>>,
    attempts: Vec<Attempt>,
    /// By slot of a lower rank.
    retries: Vec<Retry>,
    /// What was last heard of each rank that is missing.
    heard: Vec<Option<(Weight, String)>>,
    refused: u64,
}

impl<'a> Formation<'a> {
    pub(crate) fn new(
        identity: &'a Identity,
        peers: &'a [SocketAddr],
        listener: &'a TcpListener,
        abort: &'a AbortHandle,
        tls: Option<&'a TlsMaterial>,
        timeout: Duration,
    ) -> Self {
        let retry = Retry { at: Instant::now(), wait: RETRY_FIRST };
        Self {
            identity,
            peers,
            listener,
            abort,
            tls,
            timeout,
            deadline: Instant::now().checked_add(timeout),
            joined: (0..peers.len() * channels(identity.streams)).map(|_| None).collect(),
            attempts: Vec::new(),
            retries: vec![retry; identity.rank as usize * channels(identity.streams)],
            heard: vec![None; peers.len()],
            refused: 0,
        }
    }

    /// Connections to all peers, by rank; none at this rank's place.
    pub(crate) fn run(mut self) -> Result<Vec<Option<Connection>>, CollectiveError> {
        while self.missing().next().is_some() {
            if let Some(aborted) = self.abort.raised() {
                return Err(aborted);
            }
            let now = Instant::now();
            if self.deadline.is_some_and(|deadline| deadline <= now) {
                return Err(self.timed_out());
            }
            self.expire(now);
            self.connect_due(now)?;
            let (ready, acceptable) = self.wait(now)?;
            // From the back, so that removing one does not move those still to be served.
            for index in ready.into_iter().rev() {
                self.serve(index)?;
            }
            if acceptable {
                self.accept()?;
            }
        }
        match self.abort.raised() {
            Some(aborted) => Err(aborted),
            None => {
                let per_peer = channels(self.identity.streams);
                let of_peer = |wires: &mut [Option<Wire>]| {
                    let (words, data) = wires.split_first_mut()?;
                    let data = data.iter_mut().map(Option::take).collect::<Option<Vec<_>>>()?;
                    Some(Connection { data, words: words.take()? })
                };
                Ok(self.joined.chunks_exact_mut(per_peer).map(of_peer).collect())
            }
        }
    }

    fn missing(&self) -> impl Iterator<Item = usize> {
        let own = self.identity.rank as usize;
        self.joined
            .chunks_exact(channels(self.identity.streams))
            .enumerate()
            .filter(move |(rank, streams)| *rank != own && streams.iter().any(Option::is_none))
            .map(|(rank, _)| rank)
    }

    fn timed_out(&self) -> CollectiveError {
        let missing = self
            .missing()
            .map(|rank| {
                let (name, address) = (Rank(rank as u32), self.peers[rank]);
                match &self.heard[rank] {
                    Some((_, heard)) => format!("{name} at `{address}` ({heard})"),
                    None => format!("{name} at `{address}`"),
                }
            })
            .collect::<Vec<_>>()
            .join(", ");
        CollectiveError::ConnectTimeout { waited: self.timeout, missing }
    }

    fn accepted(&self) -> usize {
        self.attempts.iter().filter(|attempt| attempt.target.is_none()).count()
    }

    /// Drops accepted connections that took too long.
    fn expire(&mut self, now: Instant) {
        self.attempts.retain(|attempt| {
            let keep = attempt.until.is_none_or(|until| now < until);
            if !keep {
                tracing::warn!(from = %attempt.from, "a connection did not finish its handshake");
            }
            keep
        });
    }

    /// Begins the connections whose time has come.
    fn connect_due(&mut self, now: Instant) -> Result<(), CollectiveError> {
        for rank in 0..self.identity.rank {
            for channel in Channel::all(self.identity.streams) {
                let slot = Slot { rank, channel };
                let busy = self.attempts.iter().any(|attempt| attempt.target == Some(slot));
                let index = slot.index(self.identity.streams);
                if busy || self.joined[index].is_some() || self.retries[index].at > now {
                    continue;
                }
                match begin(self.identity, self.tls, slot, self.peers[rank as usize])? {
                    Ok(attempt) => self.attempts.push(attempt),
                    Err(cause) => self.retry(slot, cause),
                }
            }
        }
        Ok(())
    }

    fn retry(&mut self, slot: Slot, cause: String) {
        let retry = &mut self.retries[slot.index(self.identity.streams)];
        retry.at = Instant::now() + retry.wait;
        retry.wait = (retry.wait * 2).min(RETRY_MOST);
        self.heard[slot.rank as usize] = Some((Weight::Named, cause));
    }

    /// Waits for something to do: which attempts, and whether a connection can be accepted.
    fn wait(&self, now: Instant) -> Result<(Vec<usize>, bool), CollectiveError> {
        let accepting = self.accepted() < HANDSHAKES_MAX;
        let mut descriptors = vec![PollFd::new(self.abort.wake_descriptor(), PollFlags::POLLIN)];
        let listening = if accepting { PollFlags::POLLIN } else { PollFlags::empty() };
        descriptors.push(PollFd::new(self.listener.as_fd(), listening));
        for attempt in &self.attempts {
            let mut flags = PollFlags::empty();
            // Encrypted, the one may need the other.
            flags.set(PollFlags::POLLIN, !attempt.connecting);
            flags.set(PollFlags::POLLOUT, attempt.connecting || attempt.is_writing());
            descriptors.push(PollFd::new(attempt.wire.descriptor(), flags));
        }
        let due = (self.retries.iter().zip(&self.joined))
            .filter(|(retry, joined)| joined.is_none() && retry.at > now)
            .map(|(retry, _)| retry.at);
        let wake = due
            .chain(self.attempts.iter().filter_map(|attempt| attempt.until))
            .chain(self.deadline)
            .min();
        let wait = wake.map_or(POLL_MOST, |wake| wake.saturating_duration_since(now));
        // Rounded up: a poll that ends a moment early would spin until the moment has passed.
        let wait = (wait + Duration::from_millis(1)).min(POLL_MOST);
        match poll(&mut descriptors, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(CollectiveError::socket("wait for peers", error)),
        }
        let is_ready = |descriptor: &PollFd<'_>| descriptor.any().unwrap_or(true);
        let ready = descriptors[2..]
            .iter()
            .enumerate()
            .filter(|(_, descriptor)| is_ready(descriptor))
            .map(|(index, _)| index)
            .collect();
        Ok((ready, accepting && is_ready(&descriptors[1])))
    }

    fn accept(&mut self) -> Result<(), CollectiveError> {
        while self.accepted() < HANDSHAKES_MAX {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_connection_error(&error) => continue,
                Err(error) => return Err(CollectiveError::socket("accept a peer", error)),
            };
            let session = self.tls.map(Session::accepting).transpose();
            let wire = match stream.set_nonblocking(true).and(session) {
                Ok(session) => Wire::new(stream, session),
                Err(error) => {
                    tracing::warn!(%from, %error, "cannot use an accepted connection");
                    continue;
                }
            };
            self.attempts.push(Attempt {
                wire,
                from,
                target: None,
                negotiation: Negotiation::accept(nonce()?),
                connecting: false,
                inbox: Vec::new(),
                outbox: Vec::new(),
                joined: None,
                until: Some(Instant::now() + HANDSHAKE_TIME),
            });
        }
        Ok(())
    }

    /// Lets an attempt go on.
    fn serve(&mut self, index: usize) -> Result<(), CollectiveError> {
        let standing = self.attempts[index].advance(self.identity);
        if matches!(standing, Standing::Pending) {
            return Ok(());
        }
        let attempt = self.attempts.swap_remove(index);
        match (standing, attempt.target) {
            (Standing::Pending, _) => Ok(()),
            (Standing::Joined(slot), _) => {
                // A higher rank that comes again has lost its first connection: the newest counts.
                self.joined[slot.index(self.identity.streams)] = Some(attempt.wire);
                Ok(())
            }
            (Standing::Broken(cause), Some(target)) => {
                self.retry(target, cause);
                Ok(())
            }
            (Standing::Failed(failure), Some(target)) => {
                let (rank, address) = (Rank(target.rank), self.peers[target.rank as usize]);
                Err(match failure {
                    Failure::WrongSecret => CollectiveError::WrongSecret { rank, address },
                    Failure::Refused(reason) => CollectiveError::Refused { rank, address, reason },
                })
            }
            (Standing::Broken(cause), None) => {
                self.note(&attempt, cause, false);
                Ok(())
            }
            (Standing::Failed(failure), None) => {
                let cause = match failure {
                    Failure::WrongSecret => "it does not know the secret".to_owned(),
                    Failure::Refused(reason) => reason,
                };
                self.note(&attempt, cause, true);
                Ok(())
            }
        }
    }

    /// Remembers why a connection that came in was dropped. What was said counts for more than that
    /// a connection broke.
    fn note(&mut self, attempt: &Attempt, cause: String, said: bool) {
        self.refused += 1;
        tracing::warn!(
            from = %attempt.from, claimed = attempt.negotiation.peer(), %cause,
            refused = self.refused, "a connection was refused"
        );
        let cause = format!("a connection from `{}` failed: {cause}", attempt.from);
        // A connection that said nothing of itself may have been that of any of the missing.
        let (ranks, weight) = match (attempt.negotiation.peer(), said) {
            (Some(rank), true) => (vec![rank as usize], Weight::Named),
            (Some(rank), false) => (vec![rank as usize], Weight::Broken),
            (None, said) => {
                let higher = |rank: &usize| *rank > self.identity.rank as usize;
                let weight = if said { Weight::Said } else { Weight::Broken };
                (self.missing().filter(higher).collect(), weight)
            }
        };
        for rank in ranks {
            // The newest of what a rank says under its name; else the first of the weightiest.
            let known = self.heard[rank].as_ref().is_some_and(|(known, _)| *known >= weight);
            if weight == Weight::Named || !known {
                self.heard[rank] = Some((weight, cause.clone()));
            }
        }
    }
}

/// Begins to connect to a lower rank; the inner error is a reason to try again.
fn begin(
    identity: &Identity,
    tls: Option<&TlsMaterial>,
    slot: Slot,
    address: SocketAddr,
) -> Result<Result<Attempt, String>, CollectiveError> {
    let (negotiation, hello) = Negotiation::connect(identity, slot.rank, slot.channel, nonce()?);
    let failed = |source| CollectiveError::socket("make a socket", source);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
        .map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    let connecting = match socket.connect(&address.into()) {
        Ok(()) => false,
        Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => true,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let session = tls.map(Session::connecting).transpose().map_err(failed)?;
    Ok(Ok(Attempt {
        wire: Wire::new(socket.into(), session),
        from: address,
        target: Some(slot),
        negotiation,
        connecting,
        inbox: Vec::new(),
        outbox: hello,
        joined: None,
        // A lower rank may be long in coming to its `connect`: the group's deadline holds.
        until: None,
    }))
}

fn nonce() -> Result<[u8; 32], CollectiveError> {
    fresh_nonce().map_err(|source| CollectiveError::socket("read `/dev/urandom`", source))
}

fn is_connection_error(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted
    )
}

impl Attempt {
    /// Goes on as far as the socket lets it.
    fn advance(&mut self, identity: &Identity) -> Standing {
        if self.connecting {
            let socket = self.wire.socket();
            match socket.take_error() {
                // A connection to a free port of this host can meet itself.
                Ok(None) if socket.local_addr().is_ok_and(|own| own == self.from) => {
                    return Standing::Broken("nobody listens there".to_owned());
                }
                Ok(None) => self.connecting = false,
                Ok(Some(error)) | Err(error) => return Standing::Broken(error.to_string()),
            }
        }
        loop {
            match self.flush() {
                Ok(true) => {
                    if let Some(slot) = self.joined {
                        return Standing::Joined(slot);
                    }
                }
                // An encrypted connection may have to read before it can write.
                Ok(false) if self.joined.is_some() => return Standing::Pending,
                Ok(false) => {}
                Err(error) => return broken(&error),
            }
            let (kind, body) = match self.read_message() {
                Ok(Some(message)) => message,
                Ok(None) => return Standing::Pending,
                Err(standing) => return standing,
            };
            match self.negotiation.receive(identity, kind, &body) {
                Progress::Answer(message) => self.outbox = message,
                Progress::Joined(rank, channel, message) => {
                    self.joined = Some(Slot { rank, channel });
                    self.outbox = message;
                }
                Progress::Failed(failure, message) => {
                    self.outbox = message;
                    // The refusal is a courtesy: it goes out now or not at all.
                    let _ = self.flush();
                    return Standing::Failed(failure);
                }
            }
        }
    }

    /// Something is still to be written.
    fn is_writing(&self) -> bool {
        !self.outbox.is_empty() || self.wire.has_unwritten()
    }

    /// Writes what is due; whether all is written.
    fn flush(&mut self) -> std::io::Result<bool> {
        self.wire.flush()?;
        while !self.outbox.is_empty() {
            match self.wire.write(&[IoSlice::new(&self.outbox)])? {
                0 => return Ok(false),
                written => drop(self.outbox.drain(..written)),
            }
        }
        Ok(!self.wire.has_unwritten())
    }

    /// Reads one message and not a byte more: frames may follow the last.
    fn read_message(&mut self) -> Result<Option<(u8, Vec<u8>)>, Standing> {
        loop {
            let need = match self.inbox.first_chunk::<ENVELOPE_BYTES>() {
                None => ENVELOPE_BYTES,
                Some(envelope) => {
                    let body = match body_bytes(envelope) {
                        Ok(body) => body,
                        Err(reason) => {
                            self.outbox = refusal(&reason);
                            // As above.
                            let _ = self.flush();
                            return Err(Standing::Failed(Failure::Refused(reason)));
                        }
                    };
                    ENVELOPE_BYTES + body
                }
            };
            // Without an envelope `need` is longer than what is there.
            if need == self.inbox.len() {
                let body = self.inbox.split_off(ENVELOPE_BYTES);
                let kind = self.inbox[5];
                self.inbox.clear();
                return Ok(Some((kind, body)));
            }
            let filled = self.inbox.len();
            self.inbox.resize(need, 0);
            let result = self.wire.read(&mut self.inbox[filled..]);
            let read = result.as_ref().ok().copied().flatten().unwrap_or(0);
            self.inbox.truncate(filled + read);
            match result {
                Ok(None) => return Ok(None),
                Ok(Some(1..)) => {}
                // An alert of TLS is shorter than an envelope.
                Ok(Some(0)) | Err(_) if encrypts(&self.inbox) => {
                    return Err(Standing::Failed(Failure::Refused(ENCRYPTS.to_owned())));
                }
                Ok(Some(0)) => {
                    let cause = "it closed the connection during the handshake";
                    return Err(Standing::Broken(cause.to_owned()));
                }
                Err(error) => return Err(broken(&error)),
            }
        }
    }
}

/// What an error of a connection means: certificates that do not fit will not fit the next time.
fn broken(error: &std::io::Error) -> Standing {
    match error.kind() {
        ErrorKind::InvalidData => Standing::Failed(Failure::Refused(error.to_string())),
        _ => Standing::Broken(error.to_string()),
    }
}

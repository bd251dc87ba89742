//! The authenticated connections to one peer: what has been read of them and what is being written.
//!
//! Not a protocol: it cuts the streams into frames and keeps those that came early; what a frame
//! means is decided in `exchange`. Never blocks.
//!
//! Frames follow each other on the first stream. The payload of a large one is shared by all
//! streams (see `stripes`); on each of the others its part has a header of its own, so that a
//! shifted stream is found.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use api::Rank;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use crate::call::CallSite;
use crate::connect::Connection;
use crate::frame::{CONTROL_BYTES_MAX, FrameCodec, FrameError, FrameKind, HEADER_BYTES, Header};
use crate::inbox::Inbox;
use crate::payload::{Payload, Slices};
use crate::stripes::Stripes;
use crate::wire::Wire;

/// Frames read before their call, in bytes per peer: small ones are taken off the stream, so that
/// what is behind them is compared early; large ones wait in the sockets.
const AHEAD_BYTES_MAX: usize = 64 << 10;
/// The same for messages that arrive while this rank is blocked in a send: without it two ranks
/// that send to each other would wait for ever.
pub(crate) const AHEAD_MESSAGE_BYTES_MAX: usize = 256 << 20;
/// Frames read before their call, in number: bounds the empty ones.
const AHEAD_FRAMES_MAX: usize = 1024;
/// Reads of one stream before the others get their turn.
pub(crate) const TURNS: usize = 4;
/// Bytes written to one stream before the others get their turn.
const WRITE_TURN_BYTES: usize = 1 << 20;

/// Why a connection is of no more use.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The connection broke.
    Broken(String),
    /// What came is not a frame of this group.
    Frame(FrameError),
}

impl From<std::io::Error> for LinkError {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error.to_string())
    }
}

/// What came next on the stream.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// Nothing yet.
    Nothing,
    /// The header of a data frame; it is now the link's `front`.
    Data(Header),
    /// A whole control frame.
    Control(Header, Vec<u8>),
    /// The orderly end of the stream.
    End,
}

/// What came on the connection for last words.
#[derive(Debug)]
pub(crate) enum Words {
    /// Nothing yet.
    Nothing,
    /// Why the peer failed.
    Said(Header, Vec<u8>),
    /// The end: nothing was said.
    Ended,
    /// The connection broke, other than by the peer's end.
    Broken(String),
}

/// A rank is blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// In this call …
    pub site: CallSite,
    /// … until it gets the data frame of this number.
    pub frame: u64,
    /// Collectives that it has called.
    pub collectives: u64,
}

impl Waiting {
    /// As a control frame says it.
    pub(crate) fn encode(&self, codec: &FrameCodec) -> Vec<u8> {
        let numbers = [self.frame, self.collectives].map(u64::to_le_bytes);
        codec.control(FrameKind::Waiting, self.site, &numbers.concat())
    }

    /// From a control frame's call and payload.
    pub(crate) fn decode(site: CallSite, payload: &[u8]) -> Option<Self> {
        let (frame, rest) = payload.split_first_chunk()?;
        let collectives = u64::from_le_bytes(rest.try_into().ok()?);
        Some(Self { site, frame: u64::from_le_bytes(*frame), collectives })
    }
}

/// A frame that was read before its call.
#[derive(Debug)]
pub(crate) struct Early {
    pub header: Header,
    pub payload: Vec<u8>,
    /// Bytes that its call has taken.
    pub taken: usize,
}

/// One of the connections for frames, with how far it is in the frames that come and go.
#[derive(Debug)]
struct Stream {
    wire: Wire,
    /// Bytes of this stream's part of the front's payload that were read.
    read: usize,
    /// The part's own header; unused on the first stream.
    mark: [u8; HEADER_BYTES],
    marked: usize,
    /// The header of what this stream sends.
    header: [u8; HEADER_BYTES],
    /// Bytes of header and part that were handed to the kernel, and all there are.
    written: usize,
    total: usize,
    /// More could go than the kernel took.
    full: bool,
}

/// The connections to a peer.
#[derive(Debug)]
pub(crate) struct Link {
    pub rank: Rank,
    pub address: SocketAddr,
    streams: Vec<Stream>,
    words: Wire,
    words_in: Vec<u8>,
    inbox: Inbox,
    /// A data frame whose header was read and whose payload is (partly) still on the streams.
    pub front: Option<Header>,
    stripes: Stripes,
    /// The front's payload where it is read before its call.
    early: Option<Vec<u8>>,
    /// Whole frames read before their call, in order; all of them come before the front.
    pub ahead: VecDeque<Early>,
    ahead_bytes: usize,
    /// The peer said that no frame follows.
    pub left: bool,
    /// Its connection for last words has ended.
    pub fell_silent: bool,
    /// Nothing more will come or go, though what was received may still be read.
    pub hung_up: bool,
    outbox: Vec<u8>,
    /// A data frame is on its way out; how it is shared by the streams.
    sending: Option<Stripes>,
    /// Data frames wholly handed to the kernel.
    pub frames_sent: u64,
    /// Data frames of which the header was read.
    pub frames_received: u64,
    /// `send`s to this peer.
    pub messages_sent: u64,
    /// `recv`s from this peer.
    pub messages_received: u64,
    /// What the peer waits for, as it last said.
    pub waiting: Option<Waiting>,
}

impl Stream {
    fn new(wire: Wire) -> Self {
        Self {
            wire,
            read: 0,
            mark: [0; HEADER_BYTES],
            marked: 0,
            header: [0; HEADER_BYTES],
            written: 0,
            total: 0,
            full: false,
        }
    }

    /// Writes what is ready of this stream's header and part.
    fn write(
        &mut self,
        index: usize,
        stripes: Stripes,
        peer: usize,
        payload: &dyn Payload,
    ) -> Result<(), LinkError> {
        self.full = false;
        let until = self.written + WRITE_TURN_BYTES;
        while self.written < self.total {
            let mut slices = Slices::new();
            let position = self.written.saturating_sub(HEADER_BYTES);
            if self.written < HEADER_BYTES {
                slices.push(&self.header[self.written..]);
            }
            if HEADER_BYTES + position < self.total {
                payload.ready(peer, stripes.locate(index, position), &mut slices);
            }
            let offered = slices.bytes();
            if offered == 0 {
                break;
            }
            let written = self.wire.write(slices.as_slice())?;
            self.written += written;
            if written < offered || self.written >= until {
                self.full = self.written < self.total;
                break;
            }
        }
        Ok(())
    }
}

impl Link {
    /// Takes over authenticated, non-blocking connections.
    pub(crate) fn new(rank: Rank, address: SocketAddr, connection: Connection) -> Self {
        Self {
            rank,
            address,
            streams: connection.data.into_iter().map(Stream::new).collect(),
            words: connection.words,
            words_in: Vec::new(),
            inbox: Inbox::default(),
            front: None,
            stripes: Stripes::default(),
            early: None,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            left: false,
            fell_silent: false,
            hung_up: false,
            outbox: Vec::new(),
            sending: None,
            frames_sent: 0,
            frames_received: 0,
            messages_sent: 0,
            messages_received: 0,
            waiting: None,
        }
    }

    /// Number of streams.
    pub(crate) fn streams(&self) -> usize {
        self.streams.len()
    }

    pub(crate) fn descriptor(&self, stream: usize) -> BorrowedFd<'_> {
        self.streams[stream].wire.descriptor()
    }

    /// Nothing of the peer's next data frame has arrived.
    pub(crate) fn is_silent(&self) -> bool {
        self.inbox.is_empty() && self.front.is_none() && self.ahead.is_empty()
    }

    /// The next data frame that this rank has not consumed, as far as it is known.
    pub(crate) fn next_data(&self) -> Option<&Header> {
        self.ahead.front().map(|early| &early.header).or(self.front.as_ref())
    }

    /// Something that was taken off the sockets waits to be looked at: no poll tells of it. A front
    /// without a payload is such a thing.
    pub(crate) fn has_buffered(&self) -> bool {
        self.front.is_some_and(|front| front.payload == 0)
            || !self.inbox.is_empty()
            || self.streams.iter().any(|stream| stream.wire.has_buffered())
    }

    /// Whether a stream may bring something of use: only the first brings frames of its own.
    pub(crate) fn may_bring(&self, stream: usize) -> bool {
        match self.front {
            None => stream == 0,
            Some(_) => self.streams[stream].read < self.stripes.part(stream),
        }
    }

    /// The peer waits for a frame that this rank has not begun to send.
    pub(crate) fn is_awaited(&self) -> Option<Waiting> {
        self.waiting.filter(|waiting| waiting.frame == self.frames_sent && !self.is_sending())
    }

    /// Whether the front may be taken off the stream before its call.
    pub(crate) fn may_read_ahead(&self, sending: bool) -> bool {
        let Some(front) = self.front else { return false };
        if self.early.is_some() {
            return true;
        }
        let most = if sending && front.site.call.operation.is_point_to_point() {
            AHEAD_MESSAGE_BYTES_MAX
        } else {
            AHEAD_BYTES_MAX
        };
        self.ahead.len() < AHEAD_FRAMES_MAX
            && usize::try_from(front.payload)
                .is_ok_and(|payload| payload <= most.saturating_sub(self.ahead_bytes))
    }

    /// Whether the front's payload goes to `ahead` and not to a caller's buffer.
    pub(crate) fn reads_early(&self) -> bool {
        self.early.is_some()
    }

    /// Reads on in the front's payload, into memory of the link; whether it is whole.
    ///
    /// Only where [`Link::may_read_ahead`] allows it: the length was bounded there.
    pub(crate) fn read_ahead(&mut self, codec: &FrameCodec) -> Result<bool, LinkError> {
        let Some(front) = self.front else { return Ok(false) };
        let mut payload = match self.early.take() {
            Some(payload) => payload,
            None => vec![0; front.payload as usize],
        };
        for stream in 0..self.stripes.used() {
            while let Some(range) = self.wanted(stream, codec)? {
                if self.fill(stream, &mut payload[range])? == 0 {
                    break;
                }
            }
        }
        if !self.end_front() {
            self.early = Some(payload);
            return Ok(false);
        }
        self.ahead_bytes += payload.len();
        self.ahead.push_back(Early { header: front, payload, taken: 0 });
        Ok(true)
    }

    /// Drops the oldest frame that was read before its call.
    pub(crate) fn drop_ahead(&mut self) {
        if let Some(early) = self.ahead.pop_front() {
            self.ahead_bytes -= early.payload.len();
        }
    }

    /// Streams that carry the front's payload.
    pub(crate) fn front_streams(&self) -> usize {
        if self.front.is_some() { self.stripes.used() } else { 0 }
    }

    /// Where in the front's payload the next bytes of a stream belong; none if its part is whole or
    /// has not begun.
    pub(crate) fn wanted(
        &mut self,
        stream: usize,
        codec: &FrameCodec,
    ) -> Result<Option<Range<usize>>, LinkError> {
        let read = self.streams[stream].read;
        if read == self.stripes.part(stream) || !(stream == 0 || self.read_mark(stream, codec)?) {
            return Ok(None);
        }
        Ok(Some(self.stripes.locate(stream, read)))
    }

    /// Reads the header of a part, and compares it with the front; whether it is whole.
    fn read_mark(&mut self, index: usize, codec: &FrameCodec) -> Result<bool, LinkError> {
        let stream = &mut self.streams[index];
        if stream.marked == HEADER_BYTES {
            return Ok(true);
        }
        while stream.marked < HEADER_BYTES {
            match stream.wire.read(&mut stream.mark[stream.marked..])? {
                None => return Ok(false),
                Some(0) => return Err(ended_inside()),
                Some(read) => stream.marked += read,
            }
        }
        let found = codec.decode(&stream.mark).map_err(LinkError::Frame)?;
        let part = self.stripes.part(index) as u64;
        let expected =
            self.front.map(|front| Header { kind: FrameKind::Stripe, payload: part, ..front });
        if Some(found) != expected {
            return Err(LinkError::Frame(FrameError::Stripe));
        }
        Ok(true)
    }

    /// Reads what is there of a stream's part of the front into memory that is not empty and no
    /// longer than [`Link::wanted`] said; how much.
    pub(crate) fn fill(&mut self, index: usize, memory: &mut [u8]) -> Result<usize, LinkError> {
        let stream = &mut self.streams[index];
        let read = if index == 0 {
            self.inbox.read(&stream.wire, memory)?
        } else {
            stream.wire.read(memory)?
        };
        if read == Some(0) {
            return Err(ended_inside());
        }
        stream.read += read.unwrap_or(0);
        Ok(read.unwrap_or(0))
    }

    /// Ends the front if its payload was read wholly; whether it was.
    pub(crate) fn end_front(&mut self) -> bool {
        let stripes = self.stripes;
        let mut streams = self.streams.iter().enumerate();
        let whole = streams.all(|(index, stream)| stream.read == stripes.part(index));
        if whole {
            self.front = None;
        }
        whole
    }

    /// Reads the next header, and a control frame's payload. Only while there is no front.
    pub(crate) fn next_arrival(&mut self, codec: &FrameCodec) -> Result<Arrival, LinkError> {
        let wire = &self.streams[0].wire;
        if !self.inbox.fill(wire, HEADER_BYTES)? {
            return match (self.inbox.has_ended(), self.inbox.is_empty()) {
                (false, _) => Ok(Arrival::Nothing),
                (true, true) => Ok(Arrival::End),
                (true, false) => Err(ended_inside()),
            };
        }
        let header = codec.decode(self.inbox.header()).map_err(LinkError::Frame)?;
        match header.kind {
            FrameKind::Data => {
                self.inbox.take(HEADER_BYTES);
                self.front = Some(header);
                let payload = usize::try_from(header.payload).unwrap_or(usize::MAX);
                self.stripes = Stripes::new(payload, self.streams.len());
                for stream in &mut self.streams {
                    (stream.read, stream.marked) = (0, 0);
                }
                self.frames_received += 1;
                Ok(Arrival::Data(header))
            }
            // A part belongs to the other streams.
            FrameKind::Stripe => Err(LinkError::Frame(FrameError::Stripe)),
            _ => {
                // `decode` bounds the payload of a control frame.
                let whole = HEADER_BYTES + header.payload as usize;
                if !self.inbox.fill(wire, whole)? {
                    let ended = self.inbox.has_ended();
                    return if ended { Err(ended_inside()) } else { Ok(Arrival::Nothing) };
                }
                let payload = self.inbox.take(whole)[HEADER_BYTES..].to_vec();
                self.left |= header.kind == FrameKind::Leave;
                Ok(Arrival::Control(header, payload))
            }
        }
    }

    /// What polls readable when the peer fails or ends.
    pub(crate) fn words_descriptor(&self) -> BorrowedFd<'_> {
        self.words.descriptor()
    }

    /// Reads why the peer failed, if it has said so.
    pub(crate) fn read_words(&mut self, codec: &FrameCodec) -> Result<Words, FrameError> {
        loop {
            let known = match self.words_in.first_chunk::<HEADER_BYTES>() {
                None => None,
                Some(header) => Some(codec.decode(header)?),
            };
            let payload = known.map_or(0, |header| header.payload);
            if payload > CONTROL_BYTES_MAX as u64 {
                let most = CONTROL_BYTES_MAX as u64;
                return Err(FrameError::Payload { found: payload, most });
            }
            let need = HEADER_BYTES + payload as usize;
            if let Some(header) = known
                && self.words_in.len() == need
            {
                return Ok(Words::Said(header, self.words_in.split_off(HEADER_BYTES)));
            }
            let filled = self.words_in.len();
            self.words_in.resize(need, 0);
            let result = self.words.read(&mut self.words_in[filled..]);
            self.words_in.truncate(filled + result.as_ref().ok().copied().flatten().unwrap_or(0));
            match result {
                Ok(None) => return Ok(Words::Nothing),
                Ok(Some(0)) => return Ok(Words::Ended),
                Ok(Some(_)) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Ok(Words::Ended);
                }
                Err(error) => return Ok(Words::Broken(error.to_string())),
            }
        }
    }

    /// Says why this rank failed, and ends all connections.
    pub(crate) fn say_last_words(&self, frame: &[u8]) {
        // An error means that the connection is already gone.
        let _ = self.words.write(&[IoSlice::new(frame)]);
        self.shut_writing();
    }

    /// Begins a data frame with a payload of that many bytes.
    ///
    /// # Panics
    /// If another is on its way.
    pub(crate) fn begin(&mut self, codec: &FrameCodec, site: CallSite, phase: u16, bytes: usize) {
        assert!(self.sending.is_none(), "one frame after another");
        let stripes = Stripes::new(bytes, self.streams.len());
        for (index, stream) in self.streams.iter_mut().enumerate().take(stripes.used()) {
            let part = stripes.part(index);
            let (kind, payload) = if index == 0 {
                (FrameKind::Data, bytes as u64)
            } else {
                (FrameKind::Stripe, part as u64)
            };
            stream.header = codec.encode(&Header { kind, phase, site, payload });
            (stream.written, stream.total, stream.full) = (0, HEADER_BYTES + part, false);
        }
        self.sending = Some(stripes);
    }

    /// A data frame is on its way out.
    pub(crate) fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Whether a stream waits until the kernel takes more.
    pub(crate) fn wants_write(&self, stream: usize) -> bool {
        let Stream { wire, full, .. } = &self.streams[stream];
        (self.sending.is_some() && *full)
            || wire.has_unwritten()
            || (stream == 0 && !self.outbox.is_empty())
    }

    /// Writes what the kernel takes now, control frames that are under way first.
    pub(crate) fn write(&mut self, peer: usize, payload: &dyn Payload) -> Result<(), LinkError> {
        if !self.flush()? {
            return Ok(());
        }
        let Some(stripes) = self.sending else { return Ok(()) };
        let mut done = true;
        for (index, stream) in self.streams.iter_mut().enumerate().take(stripes.used()) {
            stream.write(index, stripes, peer, payload)?;
            done &= stream.written == stream.total && !stream.wire.has_unwritten();
        }
        if done {
            self.sending = None;
            self.frames_sent += 1;
        }
        Ok(())
    }

    /// Sends a whole control frame as soon as the kernel takes it; whether it may be sent at all.
    ///
    /// It may not inside a data frame.
    pub(crate) fn send_control(&mut self, frame: &[u8]) -> Result<bool, LinkError> {
        if self.sending.is_some() {
            return Ok(false);
        }
        self.outbox.extend_from_slice(frame);
        self.flush()?;
        Ok(true)
    }

    /// Writes waiting control frames, and what the wires hold back; whether none is left.
    pub(crate) fn flush(&mut self) -> Result<bool, LinkError> {
        for stream in &self.streams {
            if stream.wire.has_unwritten() {
                stream.wire.flush()?;
            }
        }
        while !self.outbox.is_empty() {
            let written = self.streams[0].wire.write(&[IoSlice::new(&self.outbox)])?;
            if written == 0 {
                return Ok(false);
            }
            self.outbox.drain(..written);
        }
        Ok(true)
    }

    /// Tells the peer that nothing more will come; what was written still arrives.
    pub(crate) fn shut_writing(&self) {
        self.words.shutdown(Shutdown::Write);
        for stream in &self.streams {
            stream.wire.shutdown(Shutdown::Write);
        }
    }

    /// Reads and forgets what the peer still sends, until it has closed its side or that moment.
    pub(crate) fn discard(&self, until: Instant) {
        discard(self.words_descriptor(), until);
        (0..self.streams()).for_each(|stream| discard(self.descriptor(stream), until));
    }
}

/// Reads and forgets what comes on a connection, until its end or that moment.
fn discard(connection: BorrowedFd<'_>, until: Instant) {
    let mut forgotten = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now()).as_millis();
        let mut wanted = [PollFd::new(connection, PollFlags::POLLIN)];
        match poll(&mut wanted, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
            Ok(0) => return,
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        match read(connection, &mut forgotten) {
            Ok(0) => return,
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => return,
        }
    }
}

fn ended_inside() -> LinkError {
    LinkError::Broken("it ended inside a frame".to_owned())
}

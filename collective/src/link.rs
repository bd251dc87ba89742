//! One authenticated connection to a peer: what has been read of it and what is being written.
//!
//! Not a protocol: it cuts the stream into frames and keeps those that came early; what a frame
//! means is decided in `exchange`. Never blocks.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use api::Rank;
use nix::sys::socket::MsgFlags;
use socket2::SockRef;

use crate::call::CallSite;
use crate::connect::Connection;
use crate::frame::{CONTROL_BYTES_MAX, FrameCodec, FrameError, FrameKind, HEADER_BYTES, Header};

/// Frames read before their call, in bytes per peer: small ones are taken off the stream, so that
/// what is behind them is compared early; large ones wait in the sockets.
const AHEAD_BYTES_MAX: usize = 64 << 10;
/// The same for messages that arrive while this rank is blocked in a send: without it two ranks
/// that send to each other would wait for ever.
const AHEAD_MESSAGE_BYTES_MAX: usize = 256 << 20;
/// Frames read before their call, in number: bounds the empty ones.
const AHEAD_FRAMES_MAX: usize = 1024;
/// Memory ranges handed to the kernel in one call, well below its limit of 1,024.
const WRITE_SLICES: usize = 64;
/// Reads or writes of one connection before the others get their turn.
pub(crate) const TURNS: usize = 4;

/// Why a connection is of no more use.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The connection broke.
    Broken(String),
    /// What came is not a frame of this group.
    Frame(FrameError),
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

/// A frame on its way out.
#[derive(Debug)]
pub(crate) struct Sending<'a> {
    header: [u8; HEADER_BYTES],
    parts: Vec<&'a [u8]>,
    total: usize,
    written: usize,
}

impl<'a> Sending<'a> {
    /// A data frame whose payload is the parts, one after another.
    pub(crate) fn new(codec: &FrameCodec, phase: u8, site: CallSite, parts: Vec<&'a [u8]>) -> Self {
        let payload: usize = parts.iter().map(|part| part.len()).sum();
        let header = Header { kind: FrameKind::Data, phase, site, payload: payload as u64 };
        let header = codec.encode(&header);
        Self { header, parts, total: HEADER_BYTES + payload, written: 0 }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.written == self.total
    }
}

#[derive(Debug)]
struct Control {
    header: Header,
    payload: Vec<u8>,
    filled: usize,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub rank: Rank,
    pub address: SocketAddr,
    stream: Arc<TcpStream>,
    words: Arc<TcpStream>,
    words_in: Vec<u8>,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    control: Option<Control>,
    /// A data frame whose header was read and whose payload is (partly) still on the stream.
    pub front: Option<Header>,
    /// Bytes of the front's payload that were read.
    pub front_read: usize,
    /// The front's payload where it is read before its call.
    early: Option<Vec<u8>>,
    /// Whole frames read before their call, in order; all of them come before the front.
    pub ahead: VecDeque<(Header, Vec<u8>)>,
    ahead_bytes: usize,
    /// The peer said that no frame follows.
    pub left: bool,
    /// Its connection for last words has ended.
    pub fell_silent: bool,
    /// Nothing more will come or go, though what was received may still be read.
    pub hung_up: bool,
    outbox: Vec<u8>,
    mid_frame: bool,
    /// Data frames wholly handed to the kernel.
    pub frames_sent: u64,
    /// Data frames of which the header was read.
    pub frames_received: u64,
    /// `send`s to this peer.
    pub messages_sent: u64,
    /// `recv`s from this peer.
    pub messages_received: u64,
    /// The call in which the peer is blocked until it gets the data frame of this number.
    pub waiting: Option<(CallSite, u64)>,
}

impl Link {
    /// Takes over authenticated, non-blocking connections.
    pub(crate) fn new(rank: Rank, address: SocketAddr, connection: Connection) -> Self {
        Self {
            rank,
            address,
            stream: connection.data,
            words: connection.words,
            words_in: Vec::new(),
            header: [0; HEADER_BYTES],
            header_filled: 0,
            control: None,
            front: None,
            front_read: 0,
            early: None,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            left: false,
            fell_silent: false,
            hung_up: false,
            outbox: Vec::new(),
            mid_frame: false,
            frames_sent: 0,
            frames_received: 0,
            messages_sent: 0,
            messages_received: 0,
            waiting: None,
        }
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Nothing of the peer's next data frame has arrived.
    pub(crate) fn is_silent(&self) -> bool {
        self.header_filled == 0
            && self.control.is_none()
            && self.front.is_none()
            && self.ahead.is_empty()
    }

    /// The next data frame that this rank has not consumed, as far as it is known.
    pub(crate) fn next_data(&self) -> Option<&Header> {
        self.ahead.front().map(|(header, _)| header).or(self.front.as_ref())
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
    pub(crate) fn read_ahead(&mut self) -> Result<bool, LinkError> {
        let Some(front) = self.front else { return Ok(false) };
        let mut payload = match self.early.take() {
            Some(payload) => payload,
            None => vec![0; front.payload as usize],
        };
        while self.front_read < payload.len() {
            let read = read_some(&self.stream, &mut payload[self.front_read..])?;
            if read == 0 {
                self.early = Some(payload);
                return Ok(false);
            }
            self.front_read += read;
        }
        self.front = None;
        self.ahead_bytes += payload.len();
        self.ahead.push_back((front, payload));
        Ok(true)
    }

    /// Takes the oldest frame that was read before its call.
    pub(crate) fn take_ahead(&mut self) -> Option<(Header, Vec<u8>)> {
        let (header, payload) = self.ahead.pop_front()?;
        self.ahead_bytes -= payload.len();
        Some((header, payload))
    }

    /// Reads on in the front's payload, into a caller's buffer as long as it; whether it is whole.
    pub(crate) fn read_front(&mut self, buffer: &mut [u8]) -> Result<bool, LinkError> {
        if self.front_read < buffer.len() {
            self.front_read += read_some(&self.stream, &mut buffer[self.front_read..])?;
        }
        let whole = self.front_read == buffer.len();
        if whole {
            self.front = None;
        }
        Ok(whole)
    }

    /// Reads the next header, and a control frame's payload. Only while there is no front.
    pub(crate) fn next_arrival(&mut self, codec: &FrameCodec) -> Result<Arrival, LinkError> {
        if self.control.is_none() {
            while self.header_filled < HEADER_BYTES {
                match (&*self.stream).read(&mut self.header[self.header_filled..]) {
                    Ok(0) if self.header_filled == 0 => return Ok(Arrival::End),
                    Ok(0) => return Err(LinkError::Broken("it ended inside a frame".to_owned())),
                    Ok(read) => self.header_filled += read,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        return Ok(Arrival::Nothing);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(LinkError::Broken(error.to_string())),
                }
            }
            self.header_filled = 0;
            let header = codec.decode(&self.header).map_err(LinkError::Frame)?;
            if header.kind == FrameKind::Data {
                self.front = Some(header);
                self.front_read = 0;
                self.frames_received += 1;
                return Ok(Arrival::Data(header));
            }
            // `decode` bounds the payload of a control frame.
            let payload = vec![0; header.payload as usize];
            self.control = Some(Control { header, payload, filled: 0 });
        }
        let Some(mut control) = self.control.take() else { return Ok(Arrival::Nothing) };
        while control.filled < control.payload.len() {
            let read = read_some(&self.stream, &mut control.payload[control.filled..])?;
            if read == 0 {
                self.control = Some(control);
                return Ok(Arrival::Nothing);
            }
            control.filled += read;
        }
        if control.header.kind == FrameKind::Leave {
            self.left = true;
        }
        Ok(Arrival::Control(control.header, control.payload))
    }

    /// What polls readable when the peer fails or ends.
    pub(crate) fn words_descriptor(&self) -> BorrowedFd<'_> {
        self.words.as_fd()
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
            let result = (&*self.words).read(&mut self.words_in[filled..]);
            self.words_in.truncate(filled + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Ok(Words::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Words::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Ok(Words::Ended);
                }
                Err(error) => return Ok(Words::Broken(error.to_string())),
            }
        }
    }

    /// Says why this rank failed, and ends both connections.
    pub(crate) fn say_last_words(&self, frame: &[u8]) {
        // An error means that the connection is already gone.
        let _ = say(&self.words, frame);
        self.shut_writing();
    }

    /// Writes what the kernel takes now, control frames that are under way first.
    pub(crate) fn write(&mut self, sending: &mut Sending<'_>) -> Result<(), LinkError> {
        if !self.flush()? {
            return Ok(());
        }
        for _ in 0..TURNS {
            let written = {
                let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
                let used = remaining(sending, &mut slices);
                self.send_some(&slices[..used])?
            };
            sending.written += written;
            self.mid_frame = !sending.is_done();
            if sending.is_done() {
                self.frames_sent += 1;
                return Ok(());
            }
            if written == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends a whole control frame as soon as the kernel takes it; whether it may be sent at all.
    ///
    /// It may not inside a data frame.
    pub(crate) fn send_control(&mut self, frame: &[u8]) -> Result<bool, LinkError> {
        if self.mid_frame {
            return Ok(false);
        }
        self.outbox.extend_from_slice(frame);
        self.flush()?;
        Ok(true)
    }

    /// Whether control frames wait to be written.
    pub(crate) fn has_outbox(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Writes waiting control frames; whether none is left.
    pub(crate) fn flush(&mut self) -> Result<bool, LinkError> {
        while !self.outbox.is_empty() {
            let written = self.send_some(&[IoSlice::new(&self.outbox)])?;
            if written == 0 {
                return Ok(false);
            }
            self.outbox.drain(..written);
        }
        Ok(true)
    }

    /// Tells the peer that nothing more will come; what was written still arrives.
    pub(crate) fn shut_writing(&self) {
        // An error means that the connection is already gone.
        let _ = self.words.shutdown(Shutdown::Write);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Hands bytes to the kernel; 0 if it takes none now.
    fn send_some(&self, slices: &[IoSlice<'_>]) -> Result<usize, LinkError> {
        // Without this flag a write to a dead peer would raise SIGPIPE where a process has reset it.
        let flags = MsgFlags::MSG_NOSIGNAL.bits();
        loop {
            match SockRef::from(&*self.stream).send_vectored_with_flags(slices, flags) {
                Ok(written) => return Ok(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(LinkError::Broken(error.to_string())),
            }
        }
    }
}

/// Sends a small frame on a connection that carries nothing else.
pub(crate) fn say(words: &TcpStream, frame: &[u8]) -> std::io::Result<usize> {
    SockRef::from(words).send_with_flags(frame, MsgFlags::MSG_NOSIGNAL.bits())
}

/// The memory ranges of a frame that are still to be written; how many.
fn remaining<'b>(sending: &'b Sending<'_>, slices: &mut [IoSlice<'b>; WRITE_SLICES]) -> usize {
    let mut skip = sending.written;
    let mut used = 0;
    for part in std::iter::once(&sending.header[..]).chain(sending.parts.iter().copied()) {
        if skip >= part.len() {
            skip -= part.len();
        } else if let Some(slot) = slices.get_mut(used) {
            *slot = IoSlice::new(&part[skip..]);
            skip = 0;
            used += 1;
        }
    }
    used
}

/// Reads what is there into a buffer that is not empty; 0 if nothing is there yet.
fn read_some(mut stream: &TcpStream, buffer: &mut [u8]) -> Result<usize, LinkError> {
    loop {
        match stream.read(buffer) {
            Ok(0) => return Err(LinkError::Broken("it ended inside a frame".to_owned())),
            Ok(read) => return Ok(read),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(LinkError::Broken(error.to_string())),
        }
    }
}

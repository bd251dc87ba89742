//! A small buffer in front of the first stream: a header, its payload and what follows come with one
//! read where they are small. Large payloads bypass it.

use std::io;

use crate::frame::{CONTROL_BYTES_MAX, HEADER_BYTES};
use crate::wire::Wire;

/// Bytes taken at once: several frames of the small path.
const CAPACITY: usize = 16 << 10;
/// From this many bytes on, memory is filled by the kernel itself: a copy less counts for more than
/// a read less.
const BYPASS_BYTES_MIN: usize = 8 << 10;

const _: () = assert!(HEADER_BYTES + CONTROL_BYTES_MAX <= CAPACITY, "a control frame fits");

/// Bytes that came and were not asked for yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self { bytes: vec![0; CAPACITY].into_boxed_slice(), start: 0, end: 0, ended: false }
    }
}

impl Inbox {
    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Nothing waits here.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The stream has ended; what is here may still be taken.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The header that is next; only if that many bytes were filled.
    pub(crate) fn header(&self) -> &[u8; HEADER_BYTES] {
        self.bytes[self.start..self.end].first_chunk().expect("a whole header was filled")
    }

    /// Takes bytes that were filled.
    pub(crate) fn take(&mut self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.len(), "only what was filled is taken");
        self.start += bytes;
        &self.bytes[self.start - bytes..self.start]
    }

    /// Reads until that many bytes are here, as far as they have come; whether they are.
    pub(crate) fn fill(&mut self, wire: &Wire, bytes: usize) -> io::Result<bool> {
        while self.len() < bytes {
            if !self.read_some(wire)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads into memory, from here first: nothing if there is nothing yet, 0 at the end.
    pub(crate) fn read(&mut self, wire: &Wire, memory: &mut [u8]) -> io::Result<Option<usize>> {
        if self.is_empty() {
            if memory.len() >= BYPASS_BYTES_MIN {
                return wire.read(memory);
            }
            if !self.read_some(wire)? {
                return Ok(self.ended.then_some(0));
            }
        }
        let bytes = self.len().min(memory.len());
        memory[..bytes].copy_from_slice(self.take(bytes));
        Ok(Some(bytes))
    }

    /// Whether anything came.
    fn read_some(&mut self, wire: &Wire) -> io::Result<bool> {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
        }
        match wire.read(&mut self.bytes[self.end..])? {
            None => Ok(false),
            Some(0) => {
                self.ended = true;
                Ok(false)
            }
            Some(read) => {
                self.end += read;
                Ok(true)
            }
        }
    }
}

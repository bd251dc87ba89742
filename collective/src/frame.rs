//! The 64-byte header in front of everything that ranks send, and what may follow it.
//!
//! ```text
//!  0 magic  4 version  5 kind  6 phase          8 generation  16 group  24 call number
//! 32 call (operation, element, reduction, zero, detail, count)   48 payload bytes   56 checksum
//! ```
//! Little-endian. The payload is the elements' memory. Nothing is allocated from a length before
//! it was compared with what this rank expects. The checksum covers the header: a shifted stream
//! or a foreign writer is found before its numbers are used.

use api::{Generation, Name, Rank};

use crate::call::{CALL_BYTES, Call, CallSite, Operation};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 64;
/// Most bytes of elements in one frame: sixteen times the largest gradient we expect of one chunk,
/// and far below where `usize` arithmetic could wrap.
pub(crate) const DATA_BYTES_MAX: u64 = 1 << 40;
/// Most bytes that follow a control frame: an error's text and a call.
pub(crate) const CONTROL_BYTES_MAX: usize = 1024;
const MAGIC: [u8; 4] = *b"CHRT";
const VERSION: u8 = 2;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// Elements of a call.
    Data = 1,
    /// Last words: the sender's call differs from the receiver's, which is the payload.
    Mismatch = 2,
    /// Last words: the sender failed; the payload is whom it blames and its error's text.
    Failed = 3,
    /// The sender is blocked in this call until it gets the data frame whose number is the payload.
    Waiting = 4,
    /// The sender leaves the group; no frame follows.
    Leave = 5,
    /// A part of the elements of a call, on a stream that is not the first.
    Stripe = 6,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: FrameKind,
    /// Which exchange of the call.
    pub phase: u16,
    pub site: CallSite,
    pub payload: u64,
}

/// What every frame of a group carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameCodec {
    pub generation: Generation,
    pub group: u64,
}

/// Bytes that are not a frame of this group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("found `{found:02x?}` where a frame begins, expected `{expected:02x?}`", expected = MAGIC)]
    Magic { found: [u8; 4] },
    #[error(
        "found protocol version {found}, expected {expected}: all ranks must run the same release",
        expected = VERSION
    )]
    Version { found: u8 },
    #[error("the header's checksum is wrong")]
    Checksum,
    #[error("generation {found}, expected {expected}")]
    Generation { found: Generation, expected: Generation },
    #[error("the frame belongs to another group")]
    Group,
    #[error("unknown frame kind {0}")]
    Kind(u8),
    #[error("the header names no known call")]
    Call,
    #[error("a part of a payload came that does not belong to the frame on the first stream")]
    Stripe,
    #[error("a payload of {found} bytes was announced, at most {most} are allowed")]
    Payload { found: u64, most: u64 },
}

/// The number of a group: the same on all its ranks, another for every other group.
pub(crate) fn group_number(job: &Name, group: &str, world_size: u32) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for text in [job.as_str(), group] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(&world_size.to_le_bytes());
    first_eight(hasher.finalize())
}

fn first_eight(hash: blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn number_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

impl FrameCodec {
    pub(crate) fn encode(&self, header: &Header) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = header.kind as u8;
        bytes[6..8].copy_from_slice(&header.phase.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.group.to_le_bytes());
        bytes[24..32].copy_from_slice(&header.site.number.to_le_bytes());
        bytes[32..48].copy_from_slice(&header.site.call.encode());
        bytes[48..56].copy_from_slice(&header.payload.to_le_bytes());
        let checksum = first_eight(blake3::hash(&bytes[..56]));
        bytes[56..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(&self, bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let [a, b, c, d, version, kind, phase_low, phase_high, ..] = *bytes;
        if [a, b, c, d] != MAGIC {
            return Err(FrameError::Magic { found: [a, b, c, d] });
        }
        if version != VERSION {
            return Err(FrameError::Version { found: version });
        }
        if number_at(bytes, 56) != first_eight(blake3::hash(&bytes[..56])) {
            return Err(FrameError::Checksum);
        }
        let generation = Generation(number_at(bytes, 8));
        if generation != self.generation {
            let expected = self.generation;
            return Err(FrameError::Generation { found: generation, expected });
        }
        if number_at(bytes, 16) != self.group {
            return Err(FrameError::Group);
        }
        let kind = [
            FrameKind::Data,
            FrameKind::Mismatch,
            FrameKind::Failed,
            FrameKind::Waiting,
            FrameKind::Leave,
            FrameKind::Stripe,
        ]
        .into_iter()
        .find(|known| *known as u8 == kind)
        .ok_or(FrameError::Kind(kind))?;
        let mut call = [0; CALL_BYTES];
        call.copy_from_slice(&bytes[32..48]);
        let call = Call::decode(&call).ok_or(FrameError::Call)?;
        let payload = number_at(bytes, 48);
        let most = match kind {
            FrameKind::Data | FrameKind::Stripe => DATA_BYTES_MAX,
            _ => CONTROL_BYTES_MAX as u64,
        };
        if payload > most {
            return Err(FrameError::Payload { found: payload, most });
        }
        let site = CallSite { call, number: number_at(bytes, 24) };
        let phase = u16::from_le_bytes([phase_low, phase_high]);
        Ok(Header { kind, phase, site, payload })
    }

    /// A whole control frame: header and payload.
    pub(crate) fn control(&self, kind: FrameKind, site: CallSite, payload: &[u8]) -> Vec<u8> {
        let payload = &payload[..payload.len().min(CONTROL_BYTES_MAX)];
        let header = Header { kind, phase: 0, site, payload: payload.len() as u64 };
        let mut frame = self.encode(&header).to_vec();
        frame.extend_from_slice(payload);
        frame
    }
}

/// The frame of a rank that failed: whom it blames, if not itself, and its error's text.
pub(crate) fn last_words(codec: &FrameCodec, culprit: Option<Rank>, text: &str) -> Vec<u8> {
    let mut payload = culprit.map_or(u32::MAX, |rank| rank.0).to_le_bytes().to_vec();
    payload.extend_from_slice(text.as_bytes());
    let site = CallSite { call: Call::plain(Operation::Leave), number: 0 };
    codec.control(FrameKind::Failed, site, &payload)
}

/// What [`last_words`] put into a payload.
pub(crate) fn decode_last_words(payload: &[u8]) -> (Option<Rank>, String) {
    let Some((culprit, text)) = payload.split_first_chunk::<4>() else {
        return (None, "it gave no reason".to_owned());
    };
    let culprit = Some(u32::from_le_bytes(*culprit)).filter(|rank| *rank != u32::MAX);
    (culprit.map(Rank), String::from_utf8_lossy(text).into_owned())
}

/// A call site as the payload of a mismatch.
pub(crate) fn encode_site(site: &CallSite) -> Vec<u8> {
    [&site.call.encode()[..], &site.number.to_le_bytes()].concat()
}

/// The call site of a mismatch's payload.
pub(crate) fn decode_site(payload: &[u8]) -> Option<CallSite> {
    let (call, number) = payload.split_first_chunk::<CALL_BYTES>()?;
    let number = u64::from_le_bytes(number.try_into().ok()?);
    Some(CallSite { call: Call::decode(call)?, number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_and_every_flipped_bit_is_found() {
        let codec = FrameCodec { generation: Generation(7), group: 99 };
        let site = CallSite { call: Call::plain(Operation::Barrier), number: 12 };
        let header = Header { kind: FrameKind::Data, phase: 1, site, payload: 0 };
        let bytes = codec.encode(&header);
        assert_eq!(codec.decode(&bytes), Ok(header));
        for bit in 0..HEADER_BYTES * 8 {
            let mut broken = bytes;
            broken[bit / 8] ^= 1 << (bit % 8);
            assert!(codec.decode(&broken).is_err(), "bit {bit} was not noticed");
        }
        assert_eq!(decode_site(&encode_site(&site)), Some(site));
        assert_eq!(decode_site(&[0; 23]), None);
    }

    #[test]
    fn foreign_frames_and_hostile_lengths_are_refused() {
        let codec = FrameCodec { generation: Generation(7), group: 99 };
        let site = CallSite { call: Call::plain(Operation::Barrier), number: 0 };
        let header = |kind, payload| Header { kind, phase: 0, site, payload };
        let stale = FrameCodec { generation: Generation(6), ..codec };
        assert_eq!(
            codec.decode(&stale.encode(&header(FrameKind::Data, 0))),
            Err(FrameError::Generation { found: Generation(6), expected: Generation(7) })
        );
        let other = FrameCodec { group: 98, ..codec };
        assert_eq!(
            codec.decode(&other.encode(&header(FrameKind::Data, 0))),
            Err(FrameError::Group)
        );
        for (kind, most) in
            [(FrameKind::Data, DATA_BYTES_MAX), (FrameKind::Failed, CONTROL_BYTES_MAX as u64)]
        {
            for found in [most + 1, u64::MAX] {
                let bytes = codec.encode(&header(kind, found));
                assert_eq!(codec.decode(&bytes), Err(FrameError::Payload { found, most }));
            }
        }
    }
}

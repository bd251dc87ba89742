//! The bytes of a snapshot: a version byte and the records, compressed. Not where they are kept
//! (that is `storage`) and not how they travel.
//!
//! A snapshot travels inside raft's own message. That is acceptable because records are small facts
//! (a few KiB per job) and the size is bounded here; it holds up the peer's stream while it is sent,
//! at most [`SNAPSHOT_BYTES_MAX`]. Should records outgrow that, the bytes move to a side channel and
//! raft carries the metadata only.

use std::io::Read;

use coordinator_core::Records;

/// Largest compressed snapshot: some hundred thousand records, and a message a peer can take in one
/// piece.
pub(super) const SNAPSHOT_BYTES_MAX: usize = 64 << 20;
/// Largest snapshot before compression; a hostile one must not fill the memory.
const RECORDS_BYTES_MAX: usize = 512 << 20;
/// zstd's default: records are JSON, faster levels gain little.
const COMPRESSION_LEVEL: i32 = 3;
/// First byte.
const VERSION: u8 = 1;

/// Bytes that are no snapshot, or records that do not fit into one.
#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    /// More records than a snapshot may hold.
    #[error("the {what} snapshot has {found} bytes, expected at most {expected}")]
    TooLarge { what: &'static str, found: usize, expected: usize },
    /// Written by another version of the format.
    #[error("snapshot has format version {found:?}, expected {VERSION}: run a newer `cluster`")]
    Version { found: Option<u8> },
    /// The compressor or decompressor failed.
    #[error("snapshot is damaged: {0}")]
    Compression(#[from] std::io::Error),
    /// The records inside do not decode.
    #[error(transparent)]
    Records(#[from] coordinator_core::DecodeError),
}

/// Compresses the records.
pub(super) fn pack(records: &Records) -> Result<Vec<u8>, SnapshotError> {
    let plain = records.snapshot();
    if plain.len() > RECORDS_BYTES_MAX {
        let (found, expected) = (plain.len(), RECORDS_BYTES_MAX);
        return Err(SnapshotError::TooLarge { what: "uncompressed", found, expected });
    }
    let mut packed = vec![VERSION];
    zstd::stream::copy_encode(plain.as_slice(), &mut packed, COMPRESSION_LEVEL)?;
    if packed.len() > SNAPSHOT_BYTES_MAX {
        let (found, expected) = (packed.len(), SNAPSHOT_BYTES_MAX);
        return Err(SnapshotError::TooLarge { what: "compressed", found, expected });
    }
    Ok(packed)
}

/// Reads what [`pack`] wrote.
pub(super) fn unpack(packed: &[u8]) -> Result<Records, SnapshotError> {
    if packed.len() > SNAPSHOT_BYTES_MAX {
        let (found, expected) = (packed.len(), SNAPSHOT_BYTES_MAX);
        return Err(SnapshotError::TooLarge { what: "compressed", found, expected });
    }
    let Some((&VERSION, compressed)) = packed.split_first() else {
        return Err(SnapshotError::Version { found: packed.first().copied() });
    };
    let mut plain = Vec::new();
    let decoder = zstd::stream::Decoder::new(compressed)?;
    decoder.take(RECORDS_BYTES_MAX as u64 + 1).read_to_end(&mut plain)?;
    if plain.len() > RECORDS_BYTES_MAX {
        let (found, expected) = (plain.len(), RECORDS_BYTES_MAX);
        return Err(SnapshotError::TooLarge { what: "uncompressed", found, expected });
    }
    Ok(Records::restore(&plain)?)
}

#[cfg(test)]
mod tests {
    use coordinator_core::{RecordKey, Transaction, Write};

    use super::*;

    #[test]
    fn what_is_packed_unpacks_and_damage_is_an_error() {
        let mut records = Records::default();
        for index in 1..=50_u64 {
            let key = RecordKey { kind: "job".into(), id: format!("j{index}") };
            let json = format!("{{\"n\":{index}}}").into_bytes();
            let transaction = Transaction {
                request_id: format!("r{index}"),
                preconditions: Vec::new(),
                writes: vec![Write::Put { key, json }],
            };
            records.apply(index, &transaction);
        }
        let packed = pack(&records).expect("small");
        assert_eq!(unpack(&packed).expect("intact").snapshot(), records.snapshot());

        for cut in [0, 1, packed.len() / 2, packed.len() - 1] {
            assert!(unpack(&packed[..cut]).is_err(), "accepted {cut} of {} bytes", packed.len());
        }
        let mut newer = packed.clone();
        newer[0] = 9;
        let text = unpack(&newer).expect_err("another version").to_string();
        assert!(text.contains('9') && text.contains("newer"), "{text}");
    }
}

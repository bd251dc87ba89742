//! A transaction: preconditions and writes over records, made harmless to retry by a request id.
//!
//! It is the only thing a raft entry holds. It carries facts that were decided once, on the leader;
//! it never carries a decision to be taken while applying, and never a secret.

use std::fmt;

use bincode::{Decode, Encode};

/// Largest encoded transaction. A job's specification is the largest thing inside, and its file is
/// limited to 1 MiB; deletions of old checkpoints are a key each.
pub const TRANSACTION_BYTES_MAX: usize = 4 << 20;

/// Longest request id, in bytes: clients draw 128 bits, hex; thousands of them stay in memory.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// First byte of an encoded transaction.
const VERSION: u8 = 1;

/// Which record: its kind and, within the kind, its id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct RecordKey {
    /// One of `api::records::KIND_…`.
    pub kind: String,
    /// Unique within the kind.
    pub id: String,
}

impl RecordKey {
    /// The key of record `id` of `kind`.
    pub fn new(kind: impl Into<String>, id: impl Into<String>) -> Self {
        Self { kind: kind.into(), id: id.into() }
    }
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

/// What must hold of a record for the transaction to be applied.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Precondition {
    /// There is no such record.
    Absent(RecordKey),
    /// The record exists and was last written at this version.
    VersionIs(RecordKey, u64),
}

/// One change of one record.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Write {
    /// Create or replace.
    Put {
        /// Which record.
        key: RecordKey,
        /// The whole document. JSON, so that a field added by a later version is not lost by an
        /// older one.
        json: Vec<u8>,
    },
    /// Remove; removing an absent record is not an error.
    Delete {
        /// Which record.
        key: RecordKey,
    },
}

impl Write {
    /// The record it changes.
    pub fn key(&self) -> &RecordKey {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of its writes happen, or none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Transaction {
    /// Names the request it answers: applied a second time under the same id, it changes nothing
    /// and gives the first outcome again. Empty: not remembered.
    pub request_id: String,
    /// All must hold.
    pub preconditions: Vec<Precondition>,
    /// Applied in order.
    pub writes: Vec<Write>,
}

/// Bytes that are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Nothing at all.
    #[error("found no bytes, expected a {what}")]
    Empty {
        /// What was expected.
        what: &'static str,
    },
    /// Written by another version of the format.
    #[error("the {what} has format version {found}, expected {expected}: run a newer `cluster`")]
    Version {
        /// What was read.
        what: &'static str,
        /// Its first byte.
        found: u8,
        /// The version this binary reads.
        expected: u8,
    },
    /// Larger than anything this binary writes.
    #[error("the {what} has {found} bytes, expected at most {expected}")]
    TooLarge {
        /// What was read.
        what: &'static str,
        /// Its size.
        found: usize,
        /// The bound.
        expected: usize,
    },
    /// Damaged or cut.
    #[error("the {what} is damaged: {message}")]
    Malformed {
        /// What was read.
        what: &'static str,
        /// What the decoder found.
        message: String,
    },
}

/// The envelope's encoding. The limit makes a hostile length prefix an error and not an allocation.
pub(crate) const fn encoding() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<TRANSACTION_BYTES_MAX>,
> {
    bincode::config::standard().with_limit::<TRANSACTION_BYTES_MAX>()
}

/// Appends a value's encoding to `bytes`.
pub(crate) fn encode_into<T: Encode>(value: &T, bytes: &mut Vec<u8>) {
    let encoded = bincode::encode_to_vec(value, encoding());
    bytes.extend(encoded.expect("strings, numbers and lists of them always encode into memory"));
}

/// Reads one value from the front of `bytes` and moves past it.
pub(crate) fn decode_from<T: Decode<()>>(
    bytes: &mut &[u8],
    what: &'static str,
) -> Result<T, DecodeError> {
    let malformed =
        |e: bincode::error::DecodeError| DecodeError::Malformed { what, message: e.to_string() };
    let (value, used) = bincode::decode_from_slice(bytes, encoding()).map_err(malformed)?;
    *bytes = &bytes[used..];
    Ok(value)
}

/// Checks the first byte and moves past it.
pub(crate) fn expect_version(
    bytes: &mut &[u8],
    what: &'static str,
    expected: u8,
) -> Result<(), DecodeError> {
    let (&found, rest) = bytes.split_first().ok_or(DecodeError::Empty { what })?;
    if found != expected {
        return Err(DecodeError::Version { what, found, expected });
    }
    *bytes = rest;
    Ok(())
}

/// Refuses bytes left over after the last value.
pub(crate) fn expect_end(bytes: &[u8], what: &'static str) -> Result<(), DecodeError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let message = format!("{} bytes follow its end", bytes.len());
    Err(DecodeError::Malformed { what, message })
}

impl Transaction {
    /// A version byte and the fields, in a fixed binary form.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        encode_into(self, &mut bytes);
        bytes
    }

    /// Reads what [`Transaction::encode`] wrote.
    ///
    /// # Errors
    /// Bytes that are empty, of another version, longer than [`TRANSACTION_BYTES_MAX`], damaged, or
    /// followed by others.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        const WHAT: &str = "transaction";
        if bytes.len() > TRANSACTION_BYTES_MAX {
            let (found, expected) = (bytes.len(), TRANSACTION_BYTES_MAX);
            return Err(DecodeError::TooLarge { what: WHAT, found, expected });
        }
        let mut rest = bytes;
        expect_version(&mut rest, WHAT, VERSION)?;
        let transaction = decode_from(&mut rest, WHAT)?;
        expect_end(rest, WHAT)?;
        Ok(transaction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Transaction {
        let key = RecordKey::new("job", "digits");
        Transaction {
            request_id: "r1".into(),
            preconditions: vec![
                Precondition::Absent(key.clone()),
                Precondition::VersionIs(RecordKey::new("model", "m"), 300),
            ],
            writes: vec![
                Write::Put { key: key.clone(), json: b"{}".to_vec() },
                Write::Delete { key },
            ],
        }
    }

    #[test]
    fn what_is_encoded_reads_back() {
        let bytes = sample().encode();
        assert_eq!(Transaction::decode(&bytes), Ok(sample()));
    }

    #[test]
    fn no_cut_or_flipped_byte_panics_and_no_cut_is_accepted() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            assert!(Transaction::decode(&bytes[..length]).is_err(), "accepted {length} bytes");
        }
        for index in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[index] ^= 1 << bit;
                // Some flips give another valid transaction; none may panic or allocate wildly.
                let _ = Transaction::decode(&damaged);
            }
        }
        let mut longer = bytes.clone();
        longer.push(0);
        let error = Transaction::decode(&longer).expect_err("accepted a byte too many");
        assert_eq!(error.to_string(), "the transaction is damaged: 1 bytes follow its end");
    }

    #[test]
    fn a_hostile_length_prefix_is_an_error() {
        // Version, empty request id, then "2^63 preconditions".
        let mut bytes = vec![VERSION, 0, 253];
        bytes.extend((1u64 << 63).to_le_bytes());
        assert!(matches!(Transaction::decode(&bytes), Err(DecodeError::Malformed { .. })));
        let newer = Transaction::decode(&[9, 0, 0, 0]).expect_err("another version");
        assert!(newer.to_string().contains("format version 9, expected 1"), "{newer}");
        assert!(matches!(Transaction::decode(&[]), Err(DecodeError::Empty { .. })));
    }
}

//! The replicated state machine: typed, versioned records, and the outcomes of recent requests.
//!
//! Applying is trivial and the same on every version of the binary: check preconditions, write, or
//! do nothing and say why. It knows nothing of jobs or workers; documents are opaque JSON to it.
//! Invariant: the same transactions at the same indexes give the same records, byte for byte.

use std::borrow::Borrow;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use bincode::{Decode, Encode};
use serde::de::DeserializeOwned;

use crate::transaction::{
    DecodeError, Precondition, REQUEST_ID_BYTES_MAX, RecordKey, Transaction, Write, decode_from,
    encode_into, expect_end, expect_version,
};

/// At least this many of the newest request ids are remembered: a client that retries does so
/// within seconds, and a cluster commits far fewer transactions in that time.
pub const REQUESTS_REMEMBERED: usize = 10_000;

/// Request ids in one shared segment: cloning the records copies at most one segment.
const REQUESTS_PER_SEGMENT: usize = 250;

/// Largest snapshot read: a job's record is a few KiB, so this is far above the bounds on records.
pub const SNAPSHOT_BYTES_MAX: usize = 1 << 30;

/// First byte of a snapshot.
const SNAPSHOT_VERSION: u8 = 1;
const SNAPSHOT: &str = "snapshot of the records";

/// One record's document and when it was last written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Index of the log entry that wrote it: never the same twice, not even after a deletion.
    pub version: u64,
    /// The document.
    pub json: Arc<[u8]>,
}

/// What became of a transaction; the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// Every write was made.
    Committed,
    /// A precondition did not hold; nothing was written.
    Conflict {
        /// The record it was about.
        key: RecordKey,
        /// What was required.
        expected: String,
        /// What was found.
        found: String,
    },
}

/// A record that is not the document it should be.
#[derive(Debug, thiserror::Error)]
#[error("record `{key}` at version {version} is not a valid document: {source}")]
pub struct RecordError {
    /// Which record.
    pub key: RecordKey,
    /// Its version.
    pub version: u64,
    /// What the parser found.
    pub source: serde_json::Error,
}

/// A key that sorts and is looked up by its id, within one kind.
#[derive(Clone, Debug)]
struct ById(Arc<RecordKey>);

impl Borrow<str> for ById {
    fn borrow(&self) -> &str {
        &self.0.id
    }
}
impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for ById {}
impl PartialOrd for ById {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for ById {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.id.cmp(&other.0.id)
    }
}

/// The newest outcomes by request id, in shared segments from oldest to newest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Requests {
    segments: VecDeque<Arc<BTreeMap<String, Outcome>>>,
}

impl Requests {
    fn get(&self, id: &str) -> Option<&Outcome> {
        self.segments.iter().rev().find_map(|segment| segment.get(id))
    }

    fn remember(&mut self, id: String, outcome: Outcome) {
        if self.segments.back().is_none_or(|s| s.len() >= REQUESTS_PER_SEGMENT) {
            self.segments.push_back(Arc::default());
        }
        if self.segments.len() > 1 + REQUESTS_REMEMBERED / REQUESTS_PER_SEGMENT {
            self.segments.pop_front();
        }
        if let Some(newest) = self.segments.back_mut() {
            Arc::make_mut(newest).insert(id, outcome);
        }
    }
}

/// Every record of the cluster. A clone shares the documents, so that readers keep an old state at
/// the price of some pointers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    applied: u64,
    kinds: BTreeMap<String, Arc<BTreeMap<ById, Versioned>>>,
    requests: Requests,
}

impl Records {
    /// Applies the log entry at `index`. A request id seen before changes nothing and gives its
    /// first outcome again.
    ///
    /// # Panics
    /// When `index` was applied already: the storage below would have lost its place, and going on
    /// would let this node's records differ from the others'.
    pub fn apply(&mut self, index: u64, transaction: &Transaction) -> Outcome {
        assert!(
            index > self.applied,
            "log entry {index} was already applied (up to {}): the stored state is inconsistent",
            self.applied
        );
        self.applied = index;
        let id = &transaction.request_id;
        if id.len() > REQUEST_ID_BYTES_MAX {
            return Outcome::Conflict {
                key: RecordKey::new("request", id.chars().take(32).collect::<String>()),
                expected: format!("a request id of at most {REQUEST_ID_BYTES_MAX} bytes"),
                found: format!("{} bytes", id.len()),
            };
        }
        if let Some(outcome) = self.outcome(id) {
            return outcome.clone();
        }
        let failed = transaction.preconditions.iter().find_map(|p| self.check(p));
        let outcome = failed.unwrap_or_else(|| {
            transaction.writes.iter().for_each(|write| self.write(index, write));
            Outcome::Committed
        });
        if !id.is_empty() {
            self.requests.remember(id.clone(), outcome.clone());
        }
        outcome
    }

    /// The outcome of a request that was applied already, while it is remembered. The shell asks
    /// before it decides on a client's request, so that a retry gets the first answer.
    pub fn outcome(&self, request_id: &str) -> Option<&Outcome> {
        self.requests.get(request_id)
    }

    /// The index of the last applied entry; 0 before the first.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// The record `id` of `kind`.
    pub fn get(&self, kind: &str, id: &str) -> Option<&Versioned> {
        self.kinds.get(kind)?.get(id)
    }

    /// The record `id` of `kind`, parsed, with its version.
    ///
    /// # Errors
    /// When the document is not a `T`.
    pub fn read<T: DeserializeOwned>(
        &self,
        kind: &str,
        id: &str,
    ) -> Result<Option<(u64, T)>, RecordError> {
        let Some(Versioned { version, json }) = self.get(kind, id) else { return Ok(None) };
        let document = serde_json::from_slice(json).map_err(|source| RecordError {
            key: RecordKey::new(kind, id),
            version: *version,
            source,
        })?;
        Ok(Some((*version, document)))
    }

    /// The records of `kind` whose id begins with `id_prefix`, in order of their ids.
    pub fn list(
        &self,
        kind: &str,
        id_prefix: &str,
    ) -> impl Iterator<Item = (&RecordKey, &Versioned)> {
        let from = (Bound::Included(id_prefix), Bound::Unbounded);
        self.kinds
            .get(kind)
            .into_iter()
            .flat_map(move |records| records.range::<str, _>(from))
            .take_while(move |(key, _)| key.0.id.starts_with(id_prefix))
            .map(|(key, value)| (&*key.0, value))
    }

    /// How many records of `kind` there are.
    pub fn count(&self, kind: &str) -> usize {
        self.kinds.get(kind).map_or(0, |records| records.len())
    }

    fn check(&self, precondition: &Precondition) -> Option<Outcome> {
        let (key, expected) = match precondition {
            Precondition::Absent(key) => (key, None),
            Precondition::VersionIs(key, version) => (key, Some(*version)),
        };
        let found = self.get(&key.kind, &key.id).map(|v| v.version);
        let text = |version: Option<u64>| match version {
            Some(version) => format!("version {version}"),
            None => "absent".to_owned(),
        };
        (found != expected).then(|| Outcome::Conflict {
            key: key.clone(),
            expected: text(expected),
            found: text(found),
        })
    }

    fn write(&mut self, index: u64, write: &Write) {
        match write {
            Write::Put { key, json } => {
                let records = Arc::make_mut(self.kinds.entry(key.kind.clone()).or_default());
                let value = Versioned { version: index, json: json.as_slice().into() };
                records.insert(ById(Arc::new(key.clone())), value);
            }
            Write::Delete { key } => {
                if let Some(records) = self.kinds.get_mut(&key.kind) {
                    Arc::make_mut(records).remove(key.id.as_str());
                    // As a restored snapshot has it: no kinds without records.
                    if records.is_empty() {
                        self.kinds.remove(&key.kind);
                    }
                }
            }
        }
    }

    /// Everything, as bytes that [`Records::restore`] reads.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![SNAPSHOT_VERSION];
        let records = self.kinds.values().map(|records| records.len() as u64).sum::<u64>();
        let segments = self.requests.segments.len() as u64;
        encode_into(&(self.applied, records, segments), &mut bytes);
        for (key, Versioned { version, json }) in self.kinds.values().flat_map(|r| r.iter()) {
            encode_into(&*key.0, &mut bytes);
            encode_into(version, &mut bytes);
            // As a Vec: a document is at most one transaction long, so each piece has its bound.
            encode_into(&json.to_vec(), &mut bytes);
        }
        for segment in &self.requests.segments {
            encode_into(&**segment, &mut bytes);
        }
        bytes
    }

    /// Reads what [`Records::snapshot`] wrote.
    ///
    /// # Errors
    /// Bytes that are empty, of another version, longer than [`SNAPSHOT_BYTES_MAX`], damaged, or
    /// followed by others.
    pub fn restore(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > SNAPSHOT_BYTES_MAX {
            let (found, expected) = (bytes.len(), SNAPSHOT_BYTES_MAX);
            return Err(DecodeError::TooLarge { what: SNAPSHOT, found, expected });
        }
        let mut rest = bytes;
        expect_version(&mut rest, SNAPSHOT, SNAPSHOT_VERSION)?;
        let (applied, count, segments): (u64, u64, u64) = decode_from(&mut rest, SNAPSHOT)?;
        let mut records = Self { applied, ..Self::default() };
        // Pieces are read one by one: a wrong count meets the end of the bytes, not an allocation.
        for _ in 0..count {
            let key: RecordKey = decode_from(&mut rest, SNAPSHOT)?;
            let version: u64 = decode_from(&mut rest, SNAPSHOT)?;
            let json: Vec<u8> = decode_from(&mut rest, SNAPSHOT)?;
            let kind = Arc::make_mut(records.kinds.entry(key.kind.clone()).or_default());
            kind.insert(ById(Arc::new(key)), Versioned { version, json: json.into() });
        }
        for _ in 0..segments {
            let segment: BTreeMap<String, Outcome> = decode_from(&mut rest, SNAPSHOT)?;
            records.requests.segments.push_back(Arc::new(segment));
        }
        expect_end(rest, SNAPSHOT)?;
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(id: &str, request: &str, preconditions: Vec<Precondition>) -> Transaction {
        let write = Write::Put { key: RecordKey::new("job", id), json: b"{\"n\":1}".to_vec() };
        Transaction { request_id: request.into(), preconditions, writes: vec![write] }
    }

    #[test]
    fn a_request_is_applied_once_and_answered_twice() {
        let mut records = Records::default();
        let absent = vec![Precondition::Absent(RecordKey::new("job", "a"))];
        let transaction = put("a", "request-1", absent.clone());
        assert_eq!(records.apply(3, &transaction), Outcome::Committed);
        assert_eq!(records.apply(7, &transaction), Outcome::Committed);
        assert_eq!(records.get("job", "a").map(|v| v.version), Some(3));
        assert_eq!(
            (records.applied(), records.outcome("request-1")),
            (7, Some(&Outcome::Committed))
        );

        let Outcome::Conflict { expected, found, .. } = records.apply(8, &put("a", "r2", absent))
        else {
            panic!("the record is there already");
        };
        assert_eq!((expected.as_str(), found.as_str()), ("absent", "version 3"));
        let (_, document): (u64, BTreeMap<String, u32>) =
            records.read("job", "a").expect("readable").expect("present");
        assert_eq!(document["n"], 1);
        let error = records.read::<Vec<u32>>("job", "a").expect_err("not a list").to_string();
        assert!(
            error.starts_with("record `job/a` at version 3 is not a valid document"),
            "{error}"
        );
    }

    #[test]
    fn a_conflict_writes_nothing_and_a_version_is_never_reused() {
        let mut records = Records::default();
        let key = RecordKey::new("job", "a");
        records.apply(1, &put("a", "", vec![]));
        let delete = Transaction {
            writes: vec![Write::Delete { key: key.clone() }],
            ..put("a", "", vec![])
        };
        records.apply(2, &delete);
        assert!(records.get("job", "a").is_none());
        records.apply(3, &put("a", "", vec![]));
        let before = records.clone();
        let stale = put("a", "", vec![Precondition::VersionIs(key, 1)]);
        assert!(matches!(records.apply(4, &stale), Outcome::Conflict { .. }));
        assert_eq!(records.get("job", "a"), before.get("job", "a"));
        assert!(before.outcome("").is_none(), "an empty request id is not remembered");
    }

    #[test]
    fn listing_goes_by_prefix_and_order() {
        let mut records = Records::default();
        let ids = ["b/2", "a/1", "ab/1", "b/1", "b"];
        for (index, id) in ids.iter().enumerate() {
            records.apply(index as u64 + 1, &put(id, "", vec![]));
        }
        let list = |prefix: &str| -> Vec<String> {
            records.list("job", prefix).map(|(key, _)| key.id.clone()).collect()
        };
        assert_eq!(list("b/"), ["b/1", "b/2"]);
        assert_eq!(list(""), ["a/1", "ab/1", "b", "b/1", "b/2"]);
        assert_eq!((list("c"), records.count("job")), (vec![], 5));
        assert_eq!(records.list("model", "").count(), 0);
    }

    #[test]
    fn old_requests_are_forgotten_and_recent_ones_are_not() {
        let mut records = Records::default();
        let all = REQUESTS_REMEMBERED as u64 * 2;
        for index in 1..=all {
            records.apply(index, &put("a", &format!("r{index}"), vec![]));
        }
        let oldest_kept = all - REQUESTS_REMEMBERED as u64 + 1;
        assert!(records.outcome(&format!("r{oldest_kept}")).is_some());
        assert!(records.outcome("r1").is_none());
        let segments = records.requests.segments.len();
        assert!(segments <= 1 + REQUESTS_REMEMBERED / REQUESTS_PER_SEGMENT, "{segments} segments");
        let restored = Records::restore(&records.snapshot()).expect("restores");
        assert_eq!(restored, records);
    }

    #[test]
    fn a_damaged_snapshot_is_refused_without_panic() {
        let mut records = Records::default();
        records.apply(1, &put("a", "r1", vec![]));
        records.apply(2, &put("b", "r2", vec![]));
        let bytes = records.snapshot();
        for length in 0..bytes.len() {
            assert!(Records::restore(&bytes[..length]).is_err(), "accepted {length} bytes");
        }
        for index in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[index] ^= 0x80;
            let _ = Records::restore(&damaged);
        }
        let overlong = put("c", &"x".repeat(REQUEST_ID_BYTES_MAX + 1), vec![]);
        assert!(matches!(records.apply(3, &overlong), Outcome::Conflict { .. }));
        assert!(records.get("job", "c").is_none());
    }

    #[test]
    #[should_panic(expected = "already applied")]
    fn applying_an_old_entry_is_a_bug() {
        let mut records = Records::default();
        records.apply(2, &put("a", "", vec![]));
        records.apply(2, &put("a", "", vec![]));
    }
}

//! Raft's log, hard state and snapshot in redb.
//!
//! Invariants, each kept by writing what must agree in one durable transaction:
//! - truncated ≤ snapshot ≤ commit ≤ last entry, and entries are contiguous from truncated + 1;
//! - a [`Batch`] (one raft `Ready`) is wholly on disk before any of its promises leave the node;
//! - the records are not stored: they are the snapshot plus the committed entries after it, so that
//!   no crash can leave them ahead of the log or behind it.
//!
//! A change of the commit index alone is not written at once: raft allows it to lag (a restarted
//! node learns it again from the leader, or by being elected), and it saves an fsync per commit.

use std::collections::{BTreeMap, VecDeque};

use coordinator_core::Records;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, StorageError};
use redb::{ReadableDatabase, ReadableTable};

use super::folder::{
    Folder, FolderError, KEY_CONF_STATE, LOG, META, PEERS, SNAPSHOT, SNAPSHOT_ROW, damaged, list,
};
use super::options::RaftOptions;
use super::snapshot;

const KEY_HARD_STATE: &str = "hard_state";
const KEY_TRUNCATED: &str = "truncated";
const KEY_SNAPSHOT: &str = "snapshot";

/// A place in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    /// Index of the entry; 0: before the first.
    pub(super) index: u64,
    /// Term in which it was proposed.
    pub(super) term: u64,
}

/// What one raft `Ready` wants on disk.
pub(super) struct Batch<'a> {
    /// Replaces log and records.
    pub(super) snapshot: Option<&'a Snapshot>,
    /// Appended; they overwrite entries of the same and higher indexes.
    pub(super) entries: &'a [Entry],
    /// Term, vote and commit index.
    pub(super) hard_state: Option<&'a HardState>,
    /// False when nothing but the commit index changed.
    pub(super) must_sync: bool,
}

/// What is kept in memory of a stored entry, so that raft's frequent questions cost no read.
#[derive(Clone, Copy)]
struct Slot {
    term: u64,
    bytes: u64,
}

/// What the disk holds, as far as it is kept in memory.
struct Mirror {
    conf_state: ConfState,
    /// The newest; on disk its commit index may be older.
    hard_state: HardState,
    /// The entry before the first one kept.
    truncated: Position,
    /// Index 0: there is none yet.
    snapshot: SnapshotMetadata,
    slots: VecDeque<Slot>,
    log_bytes: u64,
    peers: BTreeMap<u64, u64>,
}

/// The stored log of one node.
pub(super) struct LogStore {
    folder: Folder,
    mirror: Mirror,
}

impl LogStore {
    /// Opens the folder; returns the records of the last snapshot too.
    pub(super) fn open(options: &RaftOptions) -> Result<(Self, Records), FolderError> {
        let folder = Folder::open(options)?;
        let (mirror, records) = load(&folder).map_err(|cause| folder.fault(cause))?;
        Ok((Self { folder, mirror }, records))
    }

    /// This folder's identity.
    pub(super) fn identity(&self) -> u64 {
        self.folder.identity
    }

    /// The folder identity of every peer heard from.
    pub(super) fn peers(&self) -> &BTreeMap<u64, u64> {
        &self.mirror.peers
    }

    /// The entry that the last snapshot ends with.
    pub(super) fn snapshot_position(&self) -> Position {
        Position { index: self.mirror.snapshot.index, term: self.mirror.snapshot.term }
    }

    /// The oldest entry kept, or the next one if there is none.
    pub(super) fn first(&self) -> u64 {
        self.mirror.truncated.index + 1
    }

    /// Bytes of the entries kept.
    pub(super) fn log_bytes(&self) -> u64 {
        self.mirror.log_bytes
    }

    /// Whether a snapshot's membership is this group's.
    pub(super) fn check_members(&self, metadata: &SnapshotMetadata) -> Result<(), String> {
        let mut found = metadata.get_conf_state().voters.clone();
        found.sort_unstable();
        if found == self.mirror.conf_state.voters {
            return Ok(());
        }
        let expected = list(&self.mirror.conf_state.voters);
        Err(format!("its members are {}, this group's are {expected}", list(&found)))
    }

    /// Remembers the identity of a peer's folder, durably, at the first contact.
    pub(super) fn remember_peer(&mut self, peer: u64, identity: u64) -> Result<(), FolderError> {
        let write = || -> Result<(), redb::Error> {
            let transaction = self.folder.database.begin_write()?;
            transaction.open_table(PEERS)?.insert(peer, identity)?;
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|cause| self.folder.fault(cause))?;
        self.mirror.peers.insert(peer, identity);
        Ok(())
    }

    /// Notes a commit index that raft says need not be stored at once.
    pub(super) fn note_commit(&mut self, commit: u64) {
        let hard_state = &mut self.mirror.hard_state;
        hard_state.commit = hard_state.commit.max(commit);
    }

    /// Makes a `Ready` durable, in one transaction.
    pub(super) fn persist(&mut self, batch: &Batch<'_>) -> Result<(), FolderError> {
        if let Some(hard_state) = batch.hard_state {
            self.mirror.hard_state = hard_state.clone();
        }
        if let Some(snapshot) = batch.snapshot {
            self.note_commit(snapshot.get_metadata().index);
        }
        if batch.snapshot.is_none() && batch.entries.is_empty() && !batch.must_sync {
            return Ok(());
        }
        let rows = self.check(batch).and_then(|()| encode(batch.entries));
        let written = rows.and_then(|rows| self.write(batch, &rows).map(|()| rows));
        let rows = written.map_err(|cause| self.folder.fault(cause))?;
        self.reflect(batch, &rows);
        Ok(())
    }

    /// Refuses entries that would leave a gap or reach into the snapshot: raft never asks for that,
    /// and a log with a gap would lose what was acknowledged.
    fn check(&self, batch: &Batch<'_>) -> Result<(), redb::Error> {
        let (truncated, last) = match batch.snapshot {
            Some(snapshot) => (snapshot.get_metadata().index, snapshot.get_metadata().index),
            None => (self.mirror.truncated.index, self.last()),
        };
        let Some(first) = batch.entries.first() else { return Ok(()) };
        let contiguous = batch.entries.windows(2).all(|pair| pair[0].index + 1 == pair[1].index);
        if first.index <= truncated || first.index > last + 1 || !contiguous {
            return Err(redb::Error::Corrupted(format!(
                "raft appends {} entries at {}, but the log runs from {} to {last}",
                batch.entries.len(),
                first.index,
                truncated + 1,
            )));
        }
        Ok(())
    }

    fn write(&self, batch: &Batch<'_>, rows: &[(u64, Vec<u8>)]) -> Result<(), redb::Error> {
        let transaction = self.folder.database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let mut log = transaction.open_table(LOG)?;
            if let Some(snapshot) = batch.snapshot {
                let metadata = snapshot.get_metadata();
                let position = Position { index: metadata.index, term: metadata.term };
                log.retain(|_, _| false)?;
                transaction.open_table(SNAPSHOT)?.insert(SNAPSHOT_ROW, snapshot.get_data())?;
                meta.insert(KEY_SNAPSHOT, message_bytes(KEY_SNAPSHOT, metadata)?.as_slice())?;
                meta.insert(KEY_TRUNCATED, position_bytes(position).as_slice())?;
            }
            if let Some((first, _)) = rows.first() {
                log.retain_in(*first.., |_, _| false)?;
            }
            for (index, bytes) in rows {
                log.insert(index, bytes.as_slice())?;
            }
            let hard_state = message_bytes(KEY_HARD_STATE, &self.mirror.hard_state)?;
            meta.insert(KEY_HARD_STATE, hard_state.as_slice())?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// Repeats in memory what [`Self::write`] did on disk.
    fn reflect(&mut self, batch: &Batch<'_>, rows: &[(u64, Vec<u8>)]) {
        let mirror = &mut self.mirror;
        if let Some(snapshot) = batch.snapshot {
            let metadata = snapshot.get_metadata();
            mirror.truncated = Position { index: metadata.index, term: metadata.term };
            mirror.snapshot = metadata.clone();
            mirror.slots.clear();
        }
        if let Some(first) = batch.entries.first() {
            mirror.slots.truncate((first.index - mirror.truncated.index - 1) as usize);
        }
        let slots = batch.entries.iter().zip(rows);
        let slot = |(entry, (_, bytes)): (&Entry, &(u64, Vec<u8>))| Slot {
            term: entry.term,
            bytes: bytes.len() as u64,
        };
        mirror.slots.extend(slots.map(slot));
        mirror.log_bytes = mirror.slots.iter().map(|slot| slot.bytes).sum();
    }

    /// Replaces the entries up to `keep_from` − 1 by a snapshot of the records at `applied`.
    ///
    /// Snapshot, truncation and a commit index that covers both are one transaction: a node that
    /// restarted with a commit index below its snapshot would be refused by raft for ever.
    pub(super) fn compact(
        &mut self,
        applied: Position,
        data: &[u8],
        keep_from: u64,
    ) -> Result<(), FolderError> {
        let truncated_index = keep_from.clamp(self.first(), applied.index + 1) - 1;
        let truncated = Position { index: truncated_index, term: self.term_at(truncated_index) };
        self.note_commit(applied.index);
        let mut metadata = SnapshotMetadata { index: applied.index, ..SnapshotMetadata::default() };
        metadata.term = applied.term;
        metadata.set_conf_state(self.mirror.conf_state.clone());
        let write = || -> Result<(), redb::Error> {
            let transaction = self.folder.database.begin_write()?;
            {
                let mut meta = transaction.open_table(META)?;
                let hard_state = message_bytes(KEY_HARD_STATE, &self.mirror.hard_state)?;
                meta.insert(KEY_HARD_STATE, hard_state.as_slice())?;
                meta.insert(KEY_SNAPSHOT, message_bytes(KEY_SNAPSHOT, &metadata)?.as_slice())?;
                meta.insert(KEY_TRUNCATED, position_bytes(truncated).as_slice())?;
                transaction.open_table(SNAPSHOT)?.insert(SNAPSHOT_ROW, data)?;
                transaction.open_table(LOG)?.retain_in(..=truncated.index, |_, _| false)?;
            }
            transaction.commit()?;
            Ok(())
        };
        write().map_err(|cause| self.folder.fault(cause))?;
        let mirror = &mut self.mirror;
        mirror.slots.drain(..(truncated.index - mirror.truncated.index) as usize);
        mirror.log_bytes = mirror.slots.iter().map(|slot| slot.bytes).sum();
        mirror.truncated = truncated;
        mirror.snapshot = metadata;
        Ok(())
    }

    /// Writes the commit index, so that the next start sees everything this one saw. Only a
    /// convenience of a clean stop.
    pub(super) fn flush(&mut self) -> Result<(), FolderError> {
        self.persist(&Batch { snapshot: None, entries: &[], hard_state: None, must_sync: true })
    }

    fn last(&self) -> u64 {
        self.mirror.truncated.index + self.mirror.slots.len() as u64
    }

    /// The term of an entry between truncated and last, both included; 0 elsewhere.
    fn term_at(&self, index: u64) -> u64 {
        let mirror = &self.mirror;
        match index.checked_sub(mirror.truncated.index) {
            Some(0) => mirror.truncated.term,
            Some(offset) => mirror.slots.get(offset as usize - 1).map_or(0, |slot| slot.term),
            None => 0,
        }
    }

    fn read_entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, redb::Error> {
        let transaction = self.folder.database.begin_read()?;
        let log = transaction.open_table(LOG)?;
        let mut entries = Vec::new();
        let mut bytes = 0_u64;
        for row in log.range(low..high)? {
            let (index, value) = row?;
            bytes = bytes.saturating_add(value.value().len() as u64);
            // raft asks for at least one entry, however large.
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(decode_entry(index.value(), value.value())?);
        }
        Ok(entries)
    }

    fn read_snapshot(&self) -> Result<Snapshot, redb::Error> {
        let transaction = self.folder.database.begin_read()?;
        let data = transaction.open_table(SNAPSHOT)?.get(SNAPSHOT_ROW)?;
        let data = data.ok_or_else(|| damaged(KEY_SNAPSHOT, &"its data is missing"))?;
        let mut snapshot = Snapshot::default();
        snapshot.set_data(data.value().to_vec().into());
        snapshot.set_metadata(self.mirror.snapshot.clone());
        Ok(snapshot)
    }
}

/// raft treats any error but its own as fatal, which is right: this is the disk failing.
fn fatal(cause: redb::Error) -> raft::Error {
    raft::Error::Store(StorageError::Other(Box::new(cause)))
}

impl raft::Storage for LogStore {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let mirror = &self.mirror;
        Ok(RaftState::new(mirror.hard_state.clone(), mirror.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        self.read_entries(low, high, max_size.into().unwrap_or(u64::MAX)).map_err(fatal)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.mirror.truncated.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if index > self.last() {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        Ok(self.term_at(index))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let index = self.mirror.snapshot.index;
        if index == 0 || index < request_index {
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        self.read_snapshot().map_err(fatal)
    }
}

fn message_bytes<M: protobuf::Message>(key: &str, message: &M) -> Result<Vec<u8>, redb::Error> {
    message.write_to_bytes().map_err(|cause| damaged(key, &cause))
}

fn encode(entries: &[Entry]) -> Result<Vec<(u64, Vec<u8>)>, redb::Error> {
    entries.iter().map(|entry| Ok((entry.index, message_bytes("log entry", entry)?))).collect()
}

fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, redb::Error> {
    let entry = Entry::parse_from_bytes(bytes).map_err(|cause| damaged("log entry", &cause))?;
    if entry.index != index {
        return Err(damaged("log entry", &format!("entry {} is stored at {index}", entry.index)));
    }
    Ok(entry)
}

fn position_bytes(position: Position) -> Vec<u8> {
    [position.index.to_le_bytes(), position.term.to_le_bytes()].concat()
}

fn decode_position(key: &str, bytes: &[u8]) -> Result<Position, redb::Error> {
    let (words, rest) = bytes.as_chunks::<8>();
    match (words, rest) {
        ([index, term], []) => {
            Ok(Position { index: u64::from_le_bytes(*index), term: u64::from_le_bytes(*term) })
        }
        _ => Err(damaged(key, &format!("{} bytes instead of 16", bytes.len()))),
    }
}

/// Reads the folder and checks every invariant of this file: what fails here would panic in raft.
fn load(folder: &Folder) -> Result<(Mirror, Records), redb::Error> {
    let transaction = folder.database.begin_read()?;
    let meta = transaction.open_table(META)?;
    let read = |key| -> Result<Option<Vec<u8>>, redb::Error> {
        Ok(meta.get(key)?.map(|value| value.value().to_vec()))
    };
    let conf_state = parse::<ConfState>(KEY_CONF_STATE, read(KEY_CONF_STATE)?)?;
    let hard_state = parse::<HardState>(KEY_HARD_STATE, read(KEY_HARD_STATE)?)?;
    let snapshot = parse::<SnapshotMetadata>(KEY_SNAPSHOT, read(KEY_SNAPSHOT)?)?;
    let truncated = match read(KEY_TRUNCATED)? {
        Some(bytes) => decode_position(KEY_TRUNCATED, &bytes)?,
        None => Position::default(),
    };
    let mut slots = VecDeque::new();
    for row in transaction.open_table(LOG)?.iter()? {
        let (index, value) = row?;
        let entry = decode_entry(index.value(), value.value())?;
        let expected = truncated.index + 1 + slots.len() as u64;
        if entry.index != expected {
            let found = format!("found entry {}, expected entry {expected}", entry.index);
            return Err(damaged("log", &found));
        }
        slots.push_back(Slot { term: entry.term, bytes: value.value().len() as u64 });
    }
    let last = truncated.index + slots.len() as u64;
    let order = [truncated.index, snapshot.index, hard_state.commit, last];
    if !order.is_sorted() {
        return Err(redb::Error::Corrupted(format!(
            "expected truncated ≤ snapshot ≤ commit ≤ last entry, found {order:?}"
        )));
    }
    let records = match snapshot.index {
        0 => Records::default(),
        _ => {
            let data = transaction.open_table(SNAPSHOT)?.get(SNAPSHOT_ROW)?;
            let data = data.ok_or_else(|| damaged(KEY_SNAPSHOT, &"its data is missing"))?;
            snapshot::unpack(data.value()).map_err(|cause| damaged(KEY_SNAPSHOT, &cause))?
        }
    };
    let mut peers = BTreeMap::new();
    for row in transaction.open_table(PEERS)?.iter()? {
        let (peer, identity) = row?;
        peers.insert(peer.value(), identity.value());
    }
    let log_bytes = slots.iter().map(|slot| slot.bytes).sum();
    let mirror = Mirror { conf_state, hard_state, truncated, snapshot, slots, log_bytes, peers };
    Ok((mirror, records))
}

/// A stored message, or the default of one never written.
fn parse<M: protobuf::Message>(key: &str, bytes: Option<Vec<u8>>) -> Result<M, redb::Error> {
    M::parse_from_bytes(&bytes.unwrap_or_default()).map_err(|cause| damaged(key, &cause))
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;

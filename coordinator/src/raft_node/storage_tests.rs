//! The stored log against a model of it, across restarts; and what raft itself makes of it.

use std::path::Path;
use std::time::Duration;

use api::config::{Member, TlsSection};
use api::{NodeId, Secret};
use coordinator_core::{RecordKey, Transaction, Write};
use raft::{RawNode, Storage};

use super::super::logger::logger;
use super::*;

fn options(dir: &Path) -> RaftOptions {
    let address = "127.0.0.1:7070".parse().expect("an address");
    RaftOptions {
        node: NodeId(1),
        members: [1, 2, 3].map(|id| Member { node: NodeId(id), address }).to_vec(),
        dir: dir.to_owned(),
        cluster_id: "test".into(),
        election_timeout: Duration::from_secs(1),
        heartbeat_interval: Duration::from_millis(100),
        snapshot_entries: 8,
        seed: 1,
        tls: TlsSection::default(),
        token: Secret::new("token"),
    }
}

fn open(dir: &Path) -> (LogStore, Records) {
    LogStore::open(&options(dir)).expect("opens")
}

fn transaction(index: u64) -> Transaction {
    let key = RecordKey { kind: "n".into(), id: format!("{index:06}") };
    Transaction {
        request_id: format!("r{index}"),
        preconditions: Vec::new(),
        writes: vec![Write::Put { key, json: b"{}".to_vec() }],
    }
}

fn entry(index: u64, term: u64) -> Entry {
    let data = transaction(index).encode().into();
    Entry { index, term, data, ..Entry::default() }
}

fn hard_state(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit, ..HardState::default() }
}

fn append(store: &mut LogStore, entries: &[Entry], hard_state: &HardState) {
    let batch = Batch { snapshot: None, entries, hard_state: Some(hard_state), must_sync: true };
    store.persist(&batch).expect("persists");
}

fn terms(store: &LogStore) -> Vec<(u64, u64)> {
    let (first, last) = (store.first(), store.last());
    let entries = store.entries(first, last + 1, None, GetEntriesContext::empty(false));
    let entries = entries.expect("in range");
    for entry in &entries {
        assert_eq!(store.term(entry.index), Ok(entry.term));
    }
    entries.iter().map(|entry| (entry.index, entry.term)).collect()
}

/// What a restart of the process would do next: raft-rs panics on a state that it cannot be in.
fn raft_accepts(store: LogStore) {
    let applied = store.snapshot_position().index;
    let config = raft::Config { id: 1, applied, ..raft::Config::default() };
    RawNode::new(&config, store, &logger()).expect("raft accepts the stored state");
}

#[test]
fn what_is_persisted_is_there_after_a_restart_and_a_conflict_cuts_the_tail() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, records) = open(dir.path());
    assert_eq!(records.applied(), 0);
    let identity = store.identity();
    let first: Vec<_> = (1..=5).map(|index| entry(index, 1)).collect();
    append(&mut store, &first, &hard_state(1, 2));
    append(&mut store, &[entry(4, 2)], &hard_state(2, 3));
    store.remember_peer(2, 77).expect("remembers");
    let expected = vec![(1, 1), (2, 1), (3, 1), (4, 2)];
    assert_eq!(terms(&store), expected);
    drop(store);

    let (store, _) = open(dir.path());
    assert_eq!(terms(&store), expected);
    assert_eq!(store.identity(), identity);
    assert_eq!(store.peers().get(&2), Some(&77));
    let state = store.initial_state().expect("readable");
    assert_eq!(state.hard_state, hard_state(2, 3));
    assert_eq!(state.conf_state.voters, [1, 2, 3]);
    raft_accepts(store);
}

#[test]
fn entries_stop_at_the_size_limit_but_give_at_least_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, _) = open(dir.path());
    let entries: Vec<_> = (1..=4).map(|index| entry(index, 1)).collect();
    append(&mut store, &entries, &hard_state(1, 0));
    let size = entries[0].write_to_bytes().expect("encodes").len() as u64;
    let read = |max: u64| {
        store.entries(1, 5, Some(max), GetEntriesContext::empty(false)).expect("in range").len()
    };
    assert_eq!((read(0), read(2 * size), read(2 * size + 1), read(u64::MAX)), (1, 2, 2, 4));
}

#[test]
fn a_compacted_log_restarts_even_if_its_commit_index_was_never_stored() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, mut records) = open(dir.path());
    let entries: Vec<_> = (1..=10).map(|index| entry(index, 1)).collect();
    // The commit index on disk stays 0: changes of it alone are not written.
    append(&mut store, &entries, &hard_state(1, 0));
    for index in 1..=8 {
        records.apply(index, &transaction(index));
    }
    let data = snapshot::pack(&records).expect("small");
    store.compact(Position { index: 8, term: 1 }, &data, 5).expect("compacts");
    let compacted = Err(raft::Error::Store(StorageError::Compacted));
    assert_eq!(store.entries(4, 6, None, GetEntriesContext::empty(false)), compacted);
    assert_eq!((store.term(4), store.first_index()), (Ok(1), Ok(5)));
    drop(store);

    let (store, restored) = open(dir.path());
    assert_eq!(restored.snapshot(), records.snapshot());
    assert_eq!(terms(&store).first(), Some(&(5, 1)));
    assert_eq!(store.initial_state().expect("readable").hard_state.commit, 8);
    let sent = store.snapshot(0, 2).expect("there is one");
    assert_eq!(sent.get_metadata().index, 8);
    assert_eq!(sent.get_data(), data.as_slice());
    raft_accepts(store);
}

#[test]
fn a_received_snapshot_replaces_the_log_in_one_step() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, mut records) = open(dir.path());
    append(&mut store, &[entry(1, 1), entry(2, 1)], &hard_state(1, 1));
    records.apply(40, &transaction(40));
    let mut received = Snapshot::default();
    received.set_data(snapshot::pack(&records).expect("small").into());
    received.mut_metadata().index = 40;
    received.mut_metadata().term = 3;
    received.mut_metadata().mut_conf_state().voters = vec![1, 2, 3];
    assert_eq!(store.check_members(received.get_metadata()), Ok(()));
    let batch = Batch {
        snapshot: Some(&received),
        entries: &[entry(41, 3)],
        hard_state: Some(&hard_state(3, 40)),
        must_sync: true,
    };
    store.persist(&batch).expect("persists");
    drop(store);

    let (store, restored) = open(dir.path());
    assert_eq!(restored.snapshot(), records.snapshot());
    assert_eq!(terms(&store), [(41, 3)]);
    assert_eq!(store.term(40), Ok(3));
    raft_accepts(store);
}

#[test]
fn a_gap_is_refused_and_a_foreign_snapshot_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, _) = open(dir.path());
    append(&mut store, &[entry(1, 1)], &hard_state(1, 1));
    let batch =
        Batch { snapshot: None, entries: &[entry(3, 1)], hard_state: None, must_sync: true };
    let text = store.persist(&batch).expect_err("a gap").to_string();
    assert!(text.contains("at 3") && text.contains("from 1 to 1"), "{text}");
    let mut metadata = SnapshotMetadata::default();
    metadata.mut_conf_state().voters = vec![1, 2, 4];
    let text = store.check_members(&metadata).expect_err("other members");
    assert!(text.contains("n4") && text.contains("n3"), "{text}");
}

#[test]
fn a_folder_serves_one_process_and_only_its_own_node() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = open(dir.path());
    let refusal = |options: &RaftOptions| match LogStore::open(options) {
        Ok(_) => panic!("opened {options:?}"),
        Err(cause) => cause.to_string(),
    };
    let text = refusal(&options(dir.path()));
    assert!(text.contains("in use by another process"), "{text}");
    drop(store);

    let node = RaftOptions { node: NodeId(2), ..options(dir.path()) };
    let text = refusal(&node);
    assert!(text.contains("belongs to node n1") && text.contains("n2"), "{text}");
    let cluster = RaftOptions { cluster_id: "other".into(), ..options(dir.path()) };
    let text = refusal(&cluster);
    assert!(text.contains("`test`") && text.contains("`other`"), "{text}");
    let mut fewer = options(dir.path());
    fewer.members.pop();
    let text = refusal(&fewer);
    assert!(text.contains("n1, n2, n3") && text.contains("says n1, n2:"), "{text}");
    // A moved member is no other member.
    let mut moved = options(dir.path());
    moved.members[2].address = "127.0.0.1:9999".parse().expect("an address");
    assert!(LogStore::open(&moved).is_ok());
}

#[test]
fn a_damaged_file_is_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let (mut store, _) = open(dir.path());
    let entries: Vec<_> = (1..=200).map(|index| entry(index, 1)).collect();
    append(&mut store, &entries, &hard_state(1, 200));
    drop(store);
    let file = dir.path().join("raft.redb");
    let intact = std::fs::read(&file).expect("readable");
    // The text of an entry, in every copy of its page.
    let needle = b"000150";
    let places: Vec<_> =
        intact.windows(needle.len()).enumerate().filter(|(_, w)| w == needle).collect();
    assert!(!places.is_empty());
    let mut damaged = intact.clone();
    places.iter().for_each(|(place, _)| damaged[*place] ^= 0xff);
    std::fs::write(&file, damaged).expect("writable");
    let Err(error) = LogStore::open(&options(dir.path())) else { panic!("opened a damaged log") };
    assert!(matches!(error, FolderError::Database { .. }), "{error}");
}

/// Random appends, overwrites, compactions and restarts, each compared with a model.
#[test]
fn random_histories_equal_their_model() {
    for seed in 0..4_u64 {
        println!("seed {seed}");
        let mut state = seed;
        let mut draw = move |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let dir = tempfile::tempdir().expect("a folder");
        let (mut store, mut records) = open(dir.path());
        // Model: the terms of all entries ever agreed on, what is truncated and what is applied.
        let (mut log, mut truncated, mut applied, mut term) = (vec![0_u64], 0_u64, 0_u64, 1_u64);
        for _ in 0..60 {
            match draw(4) {
                0 | 1 => {
                    term += draw(2);
                    let last = log.len() as u64 - 1;
                    let first = last + 1 - draw(last - applied + 1);
                    let count = 1 + draw(6);
                    log.truncate(first as usize);
                    log.extend((0..count).map(|_| term));
                    let entries: Vec<_> =
                        (first..first + count).map(|index| entry(index, term)).collect();
                    append(&mut store, &entries, &hard_state(term, applied));
                }
                2 => {
                    let last = log.len() as u64 - 1;
                    for index in applied + 1..=applied + draw(last - applied + 1) {
                        records.apply(index, &transaction(index));
                        applied = index;
                    }
                    if applied > store.snapshot_position().index {
                        let keep_from = truncated + 1 + draw(applied - truncated + 1);
                        let position = Position { index: applied, term: log[applied as usize] };
                        let data = snapshot::pack(&records).expect("small");
                        store.compact(position, &data, keep_from).expect("compacts");
                        truncated = keep_from - 1;
                    }
                }
                _ => {
                    let at_snapshot = store.snapshot_position();
                    drop(store);
                    let (reopened, restored) = open(dir.path());
                    store = reopened;
                    assert_eq!(store.snapshot_position(), at_snapshot);
                    assert_eq!(restored.applied(), at_snapshot.index);
                    // The log brings back what was applied since.
                    let mut replayed = restored;
                    let from = at_snapshot.index + 1;
                    let range =
                        store.entries(from, applied + 1, None, GetEntriesContext::empty(false));
                    let range = if from <= applied { range.expect("in range") } else { Vec::new() };
                    for entry in range {
                        let transaction = Transaction::decode(&entry.data).expect("ours");
                        replayed.apply(entry.index, &transaction);
                    }
                    assert_eq!(replayed.snapshot(), records.snapshot());
                }
            }
            let model = (truncated + 1..log.len() as u64).map(|index| (index, log[index as usize]));
            assert_eq!(terms(&store), model.collect::<Vec<_>>());
        }
        raft_accepts(store);
    }
}

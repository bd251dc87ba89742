//! The raft thread: feeds raft-rs with messages, proposals and ticks, and carries out what it asks.
//!
//! Invariant, the order of one `Ready`: send what may go at once → snapshot, entries and hard state
//! in one durable transaction → apply what was committed → send what had to wait for the disk →
//! advance. A reply to a proposal goes out after the records and the status that include it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use api::NodeId;
use coordinator_core::{DecodeError, Outcome, Records, Transaction};
use protobuf::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{RawNode, SnapshotStatus, StateRole};
use tokio::sync::oneshot;

use super::folder::FolderError;
use super::handle::{Input, Proposal, ProposeError, RaftStatus, Shared};
use super::options::RaftOptions;
use super::outbox::{Outbox, Outgoing};
use super::snapshot;
use super::storage::{Batch, LogStore, Position};

/// Inputs handled before the disk is written once for all of them.
const INPUTS_PER_TURN: usize = 256;
/// Bytes of proposals in one append, as far as they are several.
const PROPOSED_BYTES_MAX: usize = 1 << 20;
/// Bytes of entries after which a snapshot replaces the older half, however few they are.
const LOG_BYTES_MAX: u64 = 64 << 20;
/// New entries that a snapshot is worth when only the log's size asks for it.
const SNAPSHOT_WORTH: u64 = 16;

/// Why the node cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fatal {
    /// The disk failed.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// raft-rs failed.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// A committed entry is not what this binary reads.
    #[error("log entry {index}: {cause}")]
    Entry { index: u64, cause: DecodeError },
    /// A committed entry changes the membership.
    #[error("log entry {index} changes the membership: run the version of `cluster` that wrote it")]
    MembershipChange { index: u64 },
    /// A snapshot that was checked on receipt cannot be read.
    #[error("snapshot at entry {index}: {cause}")]
    Snapshot { index: u64, cause: snapshot::SnapshotError },
    /// The leader knows that this node once had more on disk.
    #[error(
        "the leader knows that {node} had log entry {expected}, but its log ends with {found}: its \
         folder was lost or restored from an old copy. It may have forgotten its votes, so it must \
         not take part under its old id"
    )]
    LostLog { node: NodeId, expected: u64, found: u64 },
    /// A peer knows another folder of this node.
    #[error(
        "{message}: the folder of {node} was lost or replaced. It may have forgotten its votes, so \
         it must not take part under its old id; bring the old folder back"
    )]
    LostFolder { node: NodeId, message: String },
}

/// A proposal in the log, waiting to be applied.
struct Pending {
    term: u64,
    proposal: Proposal,
}

/// An answer to a proposal, held back until the records are published.
struct Answer {
    reply: oneshot::Sender<Result<Outcome, ProposeError>>,
    result: Result<Outcome, ProposeError>,
}

/// What a driver is made of.
pub(super) struct DriverParts {
    pub(super) options: RaftOptions,
    pub(super) raw: RawNode<LogStore>,
    pub(super) shared: Arc<Shared>,
    pub(super) outboxes: BTreeMap<u64, Arc<Outbox>>,
    pub(super) inputs: Receiver<Input>,
}

/// The state of the raft thread.
pub(super) struct Driver {
    parts: DriverParts,
    applied: Position,
    /// By log index.
    pending: BTreeMap<u64, Pending>,
    answers: Vec<Answer>,
    /// Records of a snapshot that raft was given and has not asked to apply yet.
    received: Option<(Position, Records)>,
    /// A snapshot that could not be made is tried again after as many entries as one covers.
    snapshot_retry: u64,
}

impl Driver {
    pub(super) fn new(parts: DriverParts) -> Self {
        let applied = parts.raw.store().snapshot_position();
        Self {
            parts,
            applied,
            pending: BTreeMap::new(),
            answers: Vec::new(),
            received: None,
            snapshot_retry: 0,
        }
    }

    /// Runs until it is asked to stop.
    pub(super) fn run(mut self) -> Result<(), Fatal> {
        if self.parts.options.members.len() == 1 {
            // Nobody else can win: no reason to wait for an election timeout.
            self.parts.raw.campaign()?;
        }
        self.settle()?;
        let interval = self.parts.options.heartbeat_interval;
        let mut next_tick = Instant::now() + interval;
        while !self.parts.shared.stopping.load(Ordering::Acquire) {
            self.take_inputs(next_tick.saturating_duration_since(Instant::now()))?;
            self.take_reports()?;
            let now = Instant::now();
            if now >= next_tick {
                self.fix_election_timeout();
                self.parts.raw.tick();
                // After a stall (a slow disk, a stopped process) one tick, not all that were missed:
                // they would look like a silent leader before its messages are read.
                next_tick = (next_tick + interval).max(now + interval / 2);
            }
            self.settle()?;
        }
        self.parts.raw.mut_store().flush()?;
        Ok(())
    }

    /// Waits for an input until `patience` is over; then takes what else is there.
    fn take_inputs(&mut self, patience: Duration) -> Result<(), Fatal> {
        // An error is always a timeout: a sender lives in `shared`, which this thread holds.
        let mut next = self.parts.inputs.recv_timeout(patience).ok();
        let mut proposals = Vec::new();
        let mut taken = 0;
        while let Some(input) = next {
            match input {
                Input::Message { identity, message, _room } => self.step(identity, *message)?,
                Input::Propose(proposal) => proposals.push(proposal),
                Input::Wake => {}
            }
            taken += 1;
            next = if taken < INPUTS_PER_TURN { self.parts.inputs.try_recv().ok() } else { None };
        }
        self.propose(proposals)
    }

    /// Hands a peer's message to raft.
    fn step(&mut self, identity: u64, message: Message) -> Result<(), Fatal> {
        if !self.know_peer(message.from, identity)? {
            return Ok(());
        }
        match message.get_msg_type() {
            MessageType::MsgHeartbeat => self.check_log(&message)?,
            MessageType::MsgSnapshot => {
                if let Err(cause) = self.receive_snapshot(&message) {
                    tracing::error!(from = %NodeId(message.from), %cause, "refused a snapshot");
                    return Ok(());
                }
            }
            _ => {}
        }
        match self.parts.raw.step(message) {
            Ok(()) => Ok(()),
            Err(raft::Error::StepPeerNotFound | raft::Error::ProposalDropped) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Remembers a peer's folder at the first contact; false when it is not the one known. The
    /// service checks too, but messages may have been under way.
    fn know_peer(&mut self, peer: u64, identity: u64) -> Result<bool, Fatal> {
        match self.parts.raw.store().peers().get(&peer) {
            Some(known) => Ok(*known == identity),
            None => {
                self.parts.raw.mut_store().remember_peer(peer, identity)?;
                let identities = &self.parts.shared.identities;
                let mut identities = identities.lock().unwrap_or_else(PoisonError::into_inner);
                identities.insert(peer, identity);
                Ok(true)
            }
        }
    }

    /// A heartbeat's commit index never exceeds what this node said it has on disk. If it does, that
    /// disk is gone; raft-rs would panic.
    fn check_log(&self, message: &Message) -> Result<(), Fatal> {
        let raft = &self.parts.raw.raft;
        let found = raft.raft_log.last_index();
        if message.term >= raft.term && message.commit > found {
            let node = self.parts.options.node;
            return Err(Fatal::LostLog { node, expected: message.commit, found });
        }
        Ok(())
    }

    /// Reads a snapshot before raft sees it, so that a bad one is refused while it can be.
    fn receive_snapshot(&mut self, message: &Message) -> Result<(), String> {
        let snapshot = message.get_snapshot();
        let metadata = snapshot.get_metadata();
        self.parts.raw.store().check_members(metadata)?;
        let records = snapshot::unpack(snapshot.get_data()).map_err(|cause| cause.to_string())?;
        self.received = Some((Position { index: metadata.index, term: metadata.term }, records));
        Ok(())
    }

    /// Tells raft what the transport found out.
    fn take_reports(&mut self) -> Result<(), Fatal> {
        for (peer, outbox) in &self.parts.outboxes {
            let reports = outbox.reports();
            if let Some(message) = reports.folder_refused {
                return Err(Fatal::LostFolder { node: self.parts.options.node, message });
            }
            if reports.unreachable {
                self.parts.raw.report_unreachable(*peer);
            }
            if reports.snapshot_lost {
                self.parts.raw.report_snapshot(*peer, SnapshotStatus::Failure);
            } else if reports.snapshot_sent {
                self.parts.raw.report_snapshot(*peer, SnapshotStatus::Finish);
            }
        }
        Ok(())
    }

    /// Appends proposals to the log, several in one raft message, if this node leads. They are never
    /// forwarded: who decided on another node's records must not commit here.
    fn propose(&mut self, mut proposals: Vec<Proposal>) -> Result<(), Fatal> {
        while !proposals.is_empty() {
            let raft = &self.parts.raw.raft;
            if raft.state != StateRole::Leader {
                let leader = known(raft.leader_id);
                proposals.drain(..).for_each(|p| self.answers.push(not_leader(p, leader)));
                break;
            }
            let rest = proposals.split_off(batch_length(&proposals));
            self.propose_batch(std::mem::replace(&mut proposals, rest))?;
        }
        Ok(())
    }

    fn propose_batch(&mut self, mut batch: Vec<Proposal>) -> Result<(), Fatal> {
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.parts.options.node.0;
        let entry = |proposal: &mut Proposal| {
            let data = std::mem::take(&mut proposal.data).into();
            Entry { data, ..Entry::default() }
        };
        message.set_entries(batch.iter_mut().map(entry).collect::<Vec<_>>().into());
        let raw = &mut self.parts.raw;
        match raw.step(message) {
            Ok(()) => {}
            Err(raft::Error::ProposalDropped) => {
                // Too many uncommitted bytes: no majority answers. Nothing was written.
                let leader = known(raw.raft.leader_id);
                self.answers.extend(batch.into_iter().map(|p| not_leader(p, leader)));
                return Ok(());
            }
            Err(cause) => return Err(cause.into()),
        }
        let (term, last) = (raw.raft.term, raw.raft.raft_log.last_index());
        let first = last + 1 - batch.len() as u64;
        let pending = batch.into_iter().map(|proposal| Pending { term, proposal });
        self.pending.extend((first..).zip(pending));
        Ok(())
    }

    /// Carries out everything raft asks for, then publishes the result.
    fn settle(&mut self) -> Result<(), Fatal> {
        while self.parts.raw.has_ready() {
            self.handle_ready()?;
        }
        // A snapshot that raft did not want.
        self.received = None;
        self.compact()?;
        self.publish();
        Ok(())
    }

    fn handle_ready(&mut self) -> Result<(), Fatal> {
        let mut ready = self.parts.raw.ready();
        self.send(ready.take_messages());

        let snapshot = (!ready.snapshot().is_empty()).then(|| ready.snapshot().clone());
        let batch = Batch {
            snapshot: snapshot.as_ref(),
            entries: ready.entries(),
            hard_state: ready.hs(),
            must_sync: ready.must_sync(),
        };
        self.parts.raw.mut_store().persist(&batch)?;
        if let Some(snapshot) = &snapshot {
            self.apply_snapshot(snapshot)?;
        }
        self.apply(&ready.take_committed_entries())?;
        self.send(ready.take_persisted_messages());

        let mut light = self.parts.raw.advance(ready);
        if let Some(commit) = light.commit_index() {
            self.parts.raw.mut_store().note_commit(commit);
        }
        self.send(light.take_messages());
        self.apply(&light.take_committed_entries())?;
        self.parts.raw.advance_apply();
        Ok(())
    }

    fn send(&self, messages: Vec<Message>) {
        for message in messages {
            let Some(outbox) = self.parts.outboxes.get(&message.to) else { continue };
            match message.write_to_bytes() {
                Ok(bytes) => {
                    let is_snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
                    outbox.push(Outgoing { bytes, is_snapshot });
                }
                // raft repeats what is not acknowledged.
                Err(cause) => tracing::error!(%cause, "cannot encode a raft message"),
            }
        }
    }

    fn apply_snapshot(&mut self, snapshot: &raft::eraftpb::Snapshot) -> Result<(), Fatal> {
        let metadata = snapshot.get_metadata();
        let position = Position { index: metadata.index, term: metadata.term };
        let records = match self.received.take() {
            Some((received, records)) if received == position => records,
            _ => snapshot::unpack(snapshot.get_data())
                .map_err(|cause| Fatal::Snapshot { index: position.index, cause })?,
        };
        *self.records_mut() = Arc::new(records);
        self.applied = position;
        tracing::info!(node = %self.parts.options.node, index = position.index, "took a snapshot over");
        Ok(())
    }

    /// Applies committed entries, all of them before any reader sees the records again.
    fn apply(&mut self, entries: &[Entry]) -> Result<(), Fatal> {
        let Some(last) = entries.last() else { return Ok(()) };
        let mut transactions = Vec::with_capacity(entries.len());
        for entry in entries {
            let index = entry.index;
            if entry.get_entry_type() != EntryType::EntryNormal {
                return Err(Fatal::MembershipChange { index });
            }
            // A leader begins its term with an empty entry.
            let decoded = (!entry.data.is_empty()).then(|| Transaction::decode(&entry.data));
            transactions.push(decoded.transpose().map_err(|cause| Fatal::Entry { index, cause })?);
        }
        let mut outcomes = Vec::with_capacity(entries.len());
        {
            let mut slot = self.records_mut();
            let records = Arc::make_mut(&mut slot);
            for (entry, transaction) in entries.iter().zip(&transactions) {
                outcomes.push(transaction.as_ref().map(|t| records.apply(entry.index, t)));
            }
        }
        self.applied = Position { index: last.index, term: last.term };
        for (entry, outcome) in entries.iter().zip(outcomes) {
            let Some(pending) = self.pending.remove(&entry.index) else { continue };
            let result = match outcome {
                Some(outcome) if entry.term == pending.term => Ok(outcome),
                // Another leader's entry took the place: the proposal is gone.
                _ => Err(ProposeError::NotLeader { leader: known(self.parts.raw.raft.leader_id) }),
            };
            self.answers.push(Answer { reply: pending.proposal.reply, result });
        }
        Ok(())
    }

    fn records_mut(&self) -> std::sync::RwLockWriteGuard<'_, Arc<Records>> {
        self.parts.shared.records.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the older half of a long log by a snapshot.
    fn compact(&mut self) -> Result<(), Fatal> {
        let store = self.parts.raw.store();
        let keep = self.parts.options.snapshot_entries / 2;
        let truncated = store.first() - 1;
        let in_log = self.applied.index - truncated;
        let since_snapshot = self.applied.index - store.snapshot_position().index;
        let long = in_log >= self.parts.options.snapshot_entries && since_snapshot > 0;
        let heavy = store.log_bytes() >= LOG_BYTES_MAX && since_snapshot >= SNAPSHOT_WORTH;
        if !(long || heavy) || self.applied.index < self.snapshot_retry {
            return Ok(());
        }
        let records = Arc::clone(&self.records_mut());
        let data = match snapshot::pack(&records) {
            Ok(data) => data,
            Err(cause) => {
                // The log stays whole, so nothing is lost yet, but it grows.
                tracing::error!(%cause, "cannot make a snapshot: the raft log keeps growing");
                self.snapshot_retry = self.applied.index + self.parts.options.snapshot_entries;
                return Ok(());
            }
        };
        drop(records);
        let keep_from = self.applied.index - keep.min(in_log / 2) + 1;
        self.parts.raw.mut_store().compact(self.applied, &data, keep_from)?;
        tracing::debug!(index = self.applied.index, bytes = data.len(), "made a snapshot");
        Ok(())
    }

    /// Publishes status and applied index, then answers proposals.
    fn publish(&mut self) {
        let raft = &self.parts.raw.raft;
        let leads = raft.state == StateRole::Leader;
        let status = RaftStatus {
            node: self.parts.options.node,
            leader: known(raft.leader_id),
            term: raft.term,
            is_leader: leads && self.applied.term == raft.term,
            commit_index: raft.raft_log.committed,
            applied_index: self.applied.index,
            first_index: self.parts.raw.store().first(),
        };
        self.end_pending(leads.then_some(raft.term));
        let shared = &self.parts.shared;
        shared.status.send_if_modified(|published| {
            let changed = *published != status;
            if published.leader != status.leader {
                let leader = status.leader.map(|leader| leader.to_string()).unwrap_or_default();
                tracing::info!(node = %status.node, term = status.term, %leader, "raft leader changed");
            }
            *published = status;
            changed
        });
        shared.applied.send_if_modified(|applied| {
            let changed = *applied != self.applied.index;
            *applied = self.applied.index;
            changed
        });
        for answer in self.answers.drain(..) {
            // The caller may have given up.
            let _ = answer.reply.send(answer.result);
        }
    }

    /// Ends the proposals of a leadership that is over: they may commit under the next leader or be
    /// overwritten, this node cannot tell.
    fn end_pending(&mut self, leading_term: Option<u64>) {
        let over = |pending: &Pending| Some(pending.term) != leading_term;
        for (_, pending) in self.pending.extract_if(.., |_, pending| over(pending)) {
            let result = Err(ProposeError::Timeout);
            self.answers.push(Answer { reply: pending.proposal.reply, result });
        }
    }

    /// Replaces raft-rs's thread-local random timeout by one that depends only on the seed, this
    /// node and the term. A new term follows every split vote, so ties do not repeat.
    fn fix_election_timeout(&mut self) {
        let options = &self.parts.options;
        let raft = &mut self.parts.raw.raft;
        let ticks = raft.election_timeout();
        let timeout = election_timeout(options.seed, options.node, raft.term, ticks);
        raft.set_randomized_election_timeout(timeout);
    }
}

/// Between one and two election timeouts of `ticks` each, by seed, node and term.
fn election_timeout(seed: u64, node: NodeId, term: u64, ticks: usize) -> usize {
    let draw = mix(mix(seed ^ mix(node.0)) ^ term);
    ticks + (draw % ticks as u64) as usize
}

/// SplitMix64's output function (Steele, Lea, Flood 2014).
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// raft's 0 is nobody.
fn known(leader: u64) -> Option<NodeId> {
    (leader != raft::INVALID_ID).then_some(NodeId(leader))
}

fn not_leader(proposal: Proposal, leader: Option<NodeId>) -> Answer {
    Answer { reply: proposal.reply, result: Err(ProposeError::NotLeader { leader }) }
}

/// How many of the first proposals go into one append: as many as fit, at least one.
fn batch_length(proposals: &[Proposal]) -> usize {
    let mut bytes = 0_usize;
    let fits = |proposal: &&Proposal| {
        bytes = bytes.saturating_add(proposal.data.len());
        bytes <= PROPOSED_BYTES_MAX
    };
    proposals.iter().take_while(fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn election_timeouts_are_repeatable_in_range_and_rarely_tie() {
        let mut ties = 0;
        for term in 0..1000 {
            let draw = |node| election_timeout(42, NodeId(node), term, 10);
            assert_eq!(draw(1), draw(1));
            assert!((1..=3).all(|node| (10..20).contains(&draw(node))), "term {term}");
            ties += usize::from(draw(1) == draw(2));
        }
        // One in ten, as for independent draws.
        assert!((50..150).contains(&ties), "{ties} ties in 1000 terms");
    }
}

//! Lays the flight logs of a gang side by side: who waits in which call, for whom, whose calls
//! disagree, and who has no log.
//!
//! A plain function of the logs. Collectives are lined up by group and number, messages by pair,
//! direction and number. A group is its name and its members, so that two groups of one name with
//! different members are kept apart. Times are each log's own: a log tells how long before it was
//! taken something happened, so hosts' clocks need not agree.

use std::collections::{BTreeMap, BTreeSet};

use api::finding::{Behind, CallOf, CompletedBy, Finding, RankFlight};
use api::flight::{FlightCall, FlightDetail, FlightEntry, FlightGroup, FlightLog, FlightState};
use api::{Generation, Rank};

/// What the logs of generation `generation` say; `ranks` has every rank of the gang.
pub fn findings(generation: Generation, ranks: &[RankFlight]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut logs = BTreeMap::new();
    for RankFlight { rank, absent, log, .. } in ranks {
        match log {
            None => found.push(Finding::Silent { rank: *rank, why: absent.clone() }),
            Some(log) if log.generation != generation => {
                let (found_in, expected) = (log.generation, generation);
                let rank = *rank;
                found.push(Finding::OtherGeneration { rank, found: found_in, expected });
            }
            Some(log) => drop(logs.insert(*rank, log)),
        }
    }
    let gang = Gang { generation, all: ranks.iter().map(|flight| flight.rank).collect(), logs };
    let groups = gang.groups();
    let messages = gang.messages();
    let mismatches: Vec<Option<Finding>> = groups.iter().map(Group::mismatch).collect();
    found.extend(mismatches.iter().flatten().cloned());
    found.extend(messages.mismatches());
    for (group, mismatch) in groups.iter().zip(&mismatches) {
        found.extend(group.waits(mismatch.as_ref()));
        found.extend(group.outside());
    }
    found.extend(messages.waits(&gang));
    found.extend(gang.ends());
    found
}

/// Who holds up a gang that does not move, by its findings: a rank that tells nothing, one that was
/// left behind, or the one that the others wait for and that has come least far.
pub fn suspect(findings: &[Finding]) -> Option<Rank> {
    let silent = findings.iter().find_map(|finding| match finding {
        Finding::Silent { rank, .. } | Finding::OtherGeneration { rank, .. } => Some(*rank),
        _ => None,
    });
    silent.or_else(|| {
        findings.iter().find_map(|finding| match finding {
            Finding::Waiting { behind, .. } => {
                behind.iter().min_by_key(|rank| rank.completed).map(|rank| rank.rank)
            }
            Finding::Mismatch { calls, .. } => {
                let fewest = calls.iter().min_by_key(|call| call.ranks.len())?;
                fewest.ranks.first().copied()
            }
            _ => None,
        })
    })
}

/// The logs of one generation.
struct Gang<'a> {
    generation: Generation,
    all: Vec<Rank>,
    logs: BTreeMap<Rank, &'a FlightLog>,
}

/// One group with what is known of its members.
struct Group<'a, 'g> {
    gang: &'g Gang<'a>,
    name: &'a str,
    members: Vec<Rank>,
    /// The members with a log, whether or not they have used the group.
    known: BTreeMap<Rank, Member<'a>>,
}

/// Where one member is.
struct Member<'a> {
    log: &'a FlightLog,
    completed: Option<u64>,
    completed_ns: Option<u64>,
    /// The collective of this group that it is in or has failed in.
    inside: Option<&'a FlightEntry>,
    /// The number of the collective that it is in, or comes to next.
    next: u64,
    /// Collectives of the group that it remembers.
    entries: Vec<&'a FlightEntry>,
}

impl<'a> Gang<'a> {
    fn groups(&self) -> Vec<Group<'a, '_>> {
        let mut keys: BTreeSet<(&'a str, Vec<Rank>)> = BTreeSet::new();
        for log in self.logs.values() {
            for group in log.groups.iter().filter(|group| group.generation == self.generation) {
                // One that was used for messages only has no position.
                if group.called > 0 {
                    keys.insert((&group.name, self.members(group)));
                }
            }
        }
        let of = |(name, members): (&'a str, Vec<Rank>)| {
            let member = |rank: &Rank| {
                let log: &'a FlightLog = self.logs.get(rank)?;
                Some((*rank, self.member(log, name, &members)))
            };
            let known = members.iter().filter_map(member).collect();
            Group { gang: self, name, members, known }
        };
        keys.into_iter().map(of).collect()
    }

    fn members(&self, group: &FlightGroup) -> Vec<Rank> {
        if group.members.is_empty() { self.all.clone() } else { group.members.clone() }
    }

    fn member(&self, log: &'a FlightLog, name: &str, members: &[Rank]) -> Member<'a> {
        let is_own = |group: &&FlightGroup| {
            group.name == name
                && group.generation == self.generation
                && self.members(group) == members
        };
        let group = log.groups.iter().find(is_own);
        let entries: Vec<&FlightEntry> = log
            .entries
            .iter()
            .filter(|entry| group.is_some() && self.is_of(entry, name) && !entry.is_message())
            .collect();
        let pending = entries.iter().filter(|entry| entry.state.is_pending());
        let failed = || entries.iter().find(|entry| entry.state == FlightState::Failed);
        let inside = pending.min_by_key(|entry| entry.sequence).or_else(failed).copied();
        let called = group.map_or(0, |group| group.called);
        Member {
            log,
            completed: group.and_then(|group| group.completed),
            completed_ns: group.and_then(|group| group.completed_ns),
            next: inside.map_or(called, |entry| entry.sequence),
            inside,
            entries,
        }
    }

    fn is_of(&self, entry: &FlightEntry, group: &str) -> bool {
        entry.group == group && entry.generation == self.generation
    }

    /// The rank in the gang of a rank within the group that an entry is of.
    fn peer(&self, log: &FlightLog, entry: &FlightEntry, within: u32) -> Rank {
        let is_own = |group: &&FlightGroup| {
            group.name == entry.group && group.generation == entry.generation
        };
        let members = log.groups.iter().find(is_own).map(|group| group.members.as_slice());
        let member = members.and_then(|members| members.get(within as usize));
        member.copied().unwrap_or(Rank(within))
    }

    /// The messages that a log remembers.
    fn messages_of(&self, rank: Rank, log: &'a FlightLog) -> Vec<Message<'a>> {
        let message = |entry: &'a FlightEntry| {
            let (peer, sends) = match entry.call.detail? {
                FlightDetail::To(peer) => (peer, true),
                FlightDetail::From(peer) => (peer, false),
                FlightDetail::Root(_) | FlightDetail::Lanes(_) => return None,
            };
            let peer = self.peer(log, entry, peer);
            (entry.generation == self.generation).then_some(Message { rank, peer, sends, entry })
        };
        log.entries.iter().filter_map(message).collect()
    }

    fn messages(&self) -> Messages<'a> {
        let all = self.logs.iter().flat_map(|(rank, log)| self.messages_of(*rank, log));
        let mut ends: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for message in all {
            let Message { rank, peer, sends, entry } = message;
            let end = End { group: &entry.group, rank, peer, sends };
            ends.entry(end).or_default().insert(entry.sequence, message);
        }
        Messages { ends }
    }

    /// A rank that others wait for; `member`: in a collective of this group.
    fn behind(&self, rank: Rank, member: Option<&Member<'_>>) -> Behind {
        let Some(log) = self.logs.get(&rank) else {
            return Behind {
                rank,
                has_log: false,
                completed: None,
                completed_nanoseconds: None,
                inside: None,
                tag: String::new(),
            };
        };
        let last = log.last_completed();
        let (completed, completed_ns) = match member {
            Some(member) => (member.completed, member.completed_ns),
            None => (last.map(|entry| entry.sequence), last.and_then(|entry| entry.ended_ns)),
        };
        let inside = log.current().filter(|entry| entry.state.is_pending());
        let inside = inside.map(|entry| {
            let time = api::finding::seconds(inside_for(log, entry));
            format!("`{}` {entry} for {time}", entry.group)
        });
        Behind {
            rank,
            has_log: true,
            completed,
            completed_nanoseconds: completed_ns.map(|time| log.taken_ns.saturating_sub(time)),
            inside,
            tag: log.tag.clone(),
        }
    }

    /// How ranks ended, the same words told once.
    fn ends(&self) -> Vec<Finding> {
        let mut ends: Vec<(&str, Vec<Rank>)> = Vec::new();
        for (rank, log) in &self.logs {
            let Some(why) = log.ending.as_deref() else { continue };
            match ends.iter_mut().find(|(known, _)| *known == why) {
                Some((_, ranks)) => ranks.push(*rank),
                None => ends.push((why, vec![*rank])),
            }
        }
        let told = |(why, ranks): (&str, Vec<Rank>)| Finding::Ended { ranks, why: why.to_owned() };
        ends.into_iter().map(told).collect()
    }
}

impl Group<'_, '_> {
    /// The first number under which members called different things.
    fn mismatch(&self) -> Option<Finding> {
        let mut calls: BTreeMap<u64, Vec<CallOf>> = BTreeMap::new();
        for (rank, member) in &self.known {
            for entry in &member.entries {
                let called = calls.entry(entry.sequence).or_default();
                match called.iter_mut().find(|known| known.call == entry.call) {
                    Some(known) => known.ranks.push(*rank),
                    None => called.push(CallOf { ranks: vec![*rank], call: entry.call.clone() }),
                }
            }
        }
        let (sequence, calls) = calls.into_iter().find(|(_, called)| called.len() > 1)?;
        Some(Finding::Mismatch { group: self.name.to_owned(), sequence, calls })
    }

    /// Every call that members are in, the latest first: those in it wait for those before it. One
    /// whose calls disagree is told by its `mismatch`.
    fn waits(&self, mismatch: Option<&Finding>) -> Vec<Finding> {
        let inside = self.known.values().filter_map(|member| member.inside);
        let mut sites: BTreeSet<u64> = inside.map(|entry| entry.sequence).collect();
        if let Some(Finding::Mismatch { sequence, .. }) = mismatch {
            sites.remove(sequence);
        }
        sites.into_iter().rev().filter_map(|sequence| self.wait(sequence)).collect()
    }

    fn wait(&self, sequence: u64) -> Option<Finding> {
        let (mut ranks, mut behind, mut done) = (Vec::new(), Vec::new(), Vec::new());
        let mut at: Option<&FlightEntry> = None;
        let mut nanoseconds = 0;
        let mut state = FlightState::Queued;
        for rank in &self.members {
            let Some(member) = self.known.get(rank) else {
                behind.push(self.gang.behind(*rank, None));
                continue;
            };
            match member.inside.filter(|entry| entry.sequence == sequence) {
                Some(entry) => {
                    ranks.push(*rank);
                    at = at.or(Some(entry));
                    nanoseconds = nanoseconds.max(inside_for(member.log, entry));
                    state = further(state, entry.state);
                }
                None if member.next > sequence => done.push(*rank),
                None => behind.push(self.gang.behind(*rank, Some(member))),
            }
        }
        let call = at?.call.clone();
        let group = self.name.to_owned();
        Some(Finding::Waiting { group, sequence, call, ranks, state, nanoseconds, behind, done })
    }

    /// That no member is in a call.
    fn outside(&self) -> Option<Finding> {
        if self.known.values().any(|member| member.inside.is_some()) {
            return None;
        }
        let mut completed: BTreeMap<Option<u64>, Vec<Rank>> = BTreeMap::new();
        for (rank, member) in &self.known {
            completed.entry(member.completed).or_default().push(*rank);
        }
        let by = |(completed, ranks)| CompletedBy { ranks, completed };
        let completed = completed.into_iter().map(by).collect();
        Some(Finding::Outside { group: self.name.to_owned(), completed })
    }
}

/// One end of a pair's messages in one direction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct End<'a> {
    group: &'a str,
    rank: Rank,
    peer: Rank,
    sends: bool,
}

impl End<'_> {
    fn other(self) -> Self {
        Self { rank: self.peer, peer: self.rank, sends: !self.sends, ..self }
    }
}

/// All messages, by their end and number.
struct Messages<'a> {
    ends: BTreeMap<End<'a>, BTreeMap<u64, Message<'a>>>,
}

impl Messages<'_> {
    /// Messages whose two ends disagree on what is sent: the first of each pair and direction.
    fn mismatches(&self) -> Vec<Finding> {
        let mut found = Vec::new();
        for (end, sent) in self.ends.iter().filter(|(end, _)| end.sends) {
            let Some(taken) = self.ends.get(&end.other()) else { continue };
            let pairs = sent.iter().filter_map(|(number, sent)| Some((sent, taken.get(number)?)));
            let shape = |message: &Message<'_>| {
                (message.entry.call.count, message.entry.call.element.clone())
            };
            let first = pairs.into_iter().find(|(sent, taken)| shape(sent) != shape(taken));
            found.extend(first.map(|(sent, taken)| Finding::Mismatch {
                group: end.group.to_owned(),
                sequence: sent.entry.sequence,
                calls: [sent, taken].map(Message::call_of).into(),
            }));
        }
        found
    }

    /// Messages that one end is in, and where the other end is.
    fn waits(&self, gang: &Gang<'_>) -> Vec<Finding> {
        let mut found = Vec::new();
        for (end, messages) in &self.ends {
            let theirs = self.ends.get(&end.other());
            let last = theirs.and_then(|theirs| theirs.keys().last().copied());
            let inside = messages.values().filter(|m| m.entry.state != FlightState::Completed);
            for message in inside {
                let (entry, number) = (message.entry, message.entry.sequence);
                let meets = theirs.and_then(|theirs| theirs.get(&number));
                let is_done = last.is_some_and(|last| last > number)
                    || meets.is_some_and(|other| other.entry.state == FlightState::Completed);
                let is_late = !is_done && meets.is_none();
                found.push(Finding::Waiting {
                    group: entry.group.clone(),
                    sequence: number,
                    call: message.call(),
                    ranks: vec![end.rank],
                    state: entry.state,
                    nanoseconds: inside_for(gang.logs[&end.rank], entry),
                    behind: is_late.then(|| gang.behind(end.peer, None)).into_iter().collect(),
                    done: is_done.then_some(end.peer).into_iter().collect(),
                });
            }
        }
        found
    }
}

/// One end of a message between two ranks.
struct Message<'a> {
    rank: Rank,
    peer: Rank,
    sends: bool,
    entry: &'a FlightEntry,
}

impl Message<'_> {
    /// The call with its peer's rank in the gang.
    fn call(&self) -> FlightCall {
        let detail = match self.sends {
            true => FlightDetail::To(self.peer.0),
            false => FlightDetail::From(self.peer.0),
        };
        FlightCall { detail: Some(detail), ..self.entry.call.clone() }
    }

    fn call_of(&self) -> CallOf {
        CallOf { ranks: vec![self.rank], call: self.call() }
    }
}

/// How long a rank has been, or was, in an operation.
fn inside_for(log: &FlightLog, entry: &FlightEntry) -> u64 {
    entry.ended_ns.unwrap_or(log.taken_ns).saturating_sub(entry.since_ns())
}

/// The state to tell of several: that something failed, else how far the furthest came.
fn further(one: FlightState, other: FlightState) -> FlightState {
    let order = |state: FlightState| match state {
        FlightState::Queued => 0,
        FlightState::Started => 1,
        FlightState::Moving => 2,
        FlightState::Completed => 3,
        FlightState::Failed => 4,
    };
    if order(other) > order(one) { other } else { one }
}

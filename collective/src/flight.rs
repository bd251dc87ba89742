//! The flight recorder: the last operations of a process over all of its groups, in a ring of fixed
//! size, readable from any thread at any time.
//!
//! Recording an operation takes two short turns of one mutex and three looks at the clock, and
//! allocates nothing unless the operation fails. An operation that has not ended is not overwritten
//! by later ones while any other can be: what a process hangs in is always in its log.

use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use api::flight::{
    FLIGHT_ENTRIES_MAX, FLIGHT_ERROR_BYTES_MAX, FLIGHT_TAG_BYTES_MAX, FlightCall, FlightDetail,
    FlightEntry, FlightGroup, FlightLog, FlightState,
};
use api::{Generation, Rank};

use crate::call::{CallSite, Operation};
use crate::communicator::ReduceOp;

/// Groups whose position is remembered; the one used longest ago goes first.
const GROUPS_MAX: usize = 64;

/// What is recorded of a call. `Copy` and without owned text, so that recording allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlightSite {
    /// The how-manieth, from 0: of the group, or for a message of its pair and direction.
    pub sequence: u64,
    /// Such as `all-reduce`.
    pub operation: &'static str,
    /// Such as `f32`.
    pub element: Option<&'static str>,
    /// Such as `sum`.
    pub reduce: Option<&'static str>,
    /// Elements of the whole buffer.
    pub count: u64,
    /// Bytes of the whole buffer.
    pub bytes: u64,
    /// Root, peer or lanes; `To` and `From` make it a message between two ranks.
    pub detail: Option<FlightDetail>,
}

/// Names an operation that was begun; of no use to another recorder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an operation that is begun must be finished"]
pub struct FlightToken {
    index: usize,
    serial: u64,
}

/// Records the operations of a process; cheap to clone, all clones write to one ring.
#[derive(Clone)]
pub struct FlightRecorder {
    shared: Arc<Shared>,
}

struct Shared {
    began: Instant,
    began_ms: u64,
    ring: Mutex<Ring>,
}

struct Ring {
    place: Place,
    tag: Tag,
    slots: Box<[Option<Slot>]>,
    /// Operations begun so far.
    serial: u64,
    next: usize,
    groups: Vec<Track>,
}

/// Whose recorder it is.
struct Place {
    generation: Generation,
    rank: Rank,
    world_size: u32,
    host: String,
}

struct Slot {
    serial: u64,
    group: Arc<str>,
    generation: Generation,
    site: FlightSite,
    state: FlightState,
    queued_ns: u64,
    /// 0 while it has not happened: the recorder began before.
    started_ns: u64,
    moving_ns: u64,
    ended_ns: u64,
    moved_bytes: u64,
    tag: Tag,
    error: Option<Box<str>>,
}

/// How far one group came.
struct Track {
    name: Arc<str>,
    generation: Generation,
    members: Box<[Rank]>,
    called: u64,
    completed: Option<(u64, u64)>,
    /// The serial of its last operation.
    used: u64,
}

/// A short text in place.
#[derive(Clone, Copy)]
struct Tag {
    bytes: [u8; FLIGHT_TAG_BYTES_MAX],
    length: u8,
}

const _: () = assert!(FLIGHT_TAG_BYTES_MAX <= u8::MAX as usize);

impl Tag {
    const EMPTY: Self = Self { bytes: [0; FLIGHT_TAG_BYTES_MAX], length: 0 };

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..usize::from(self.length)]).into_owned()
    }
}

impl Write for Tag {
    /// Never fails: what has no room is left out, at a character's border.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let begin = usize::from(self.length);
        let text = cut(text, FLIGHT_TAG_BYTES_MAX - begin);
        self.bytes[begin..begin + text.len()].copy_from_slice(text.as_bytes());
        // Within the bound that is asserted above.
        self.length += text.len() as u8;
        Ok(())
    }
}

/// The longest beginning of at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

impl FlightRecorder {
    /// A recorder of [`FLIGHT_ENTRIES_MAX`] operations.
    pub fn new(generation: Generation, rank: Rank, world_size: u32) -> Self {
        Self::with_capacity(generation, rank, world_size, FLIGHT_ENTRIES_MAX)
    }

    /// A recorder of so many operations, at least one and at most [`FLIGHT_ENTRIES_MAX`].
    pub fn with_capacity(
        generation: Generation,
        rank: Rank,
        world_size: u32,
        entries: usize,
    ) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let ring = Ring {
            place: Place { generation, rank, world_size, host: host.trim().to_owned() },
            tag: Tag::EMPTY,
            slots: (0..entries.clamp(1, FLIGHT_ENTRIES_MAX)).map(|_| None).collect(),
            serial: 0,
            next: 0,
            groups: Vec::new(),
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began_ms = since_epoch.as_millis() as u64;
        let shared = Shared { began: Instant::now(), began_ms, ring: Mutex::new(ring) };
        Self { shared: Arc::new(shared) }
    }

    /// The process goes on as part of another gang; what it recorded before stays.
    pub fn enter(&self, generation: Generation, rank: Rank, world_size: u32) {
        let mut ring = self.lock();
        let place = &mut ring.place;
        (place.generation, place.rank, place.world_size) = (generation, rank, world_size);
    }

    /// Tells who a group's members are, in the order of their ranks within it. Without this a group
    /// is taken to hold every rank of the gang.
    pub fn join(&self, group: &Arc<str>, generation: Generation, members: &[Rank]) {
        let mut ring = self.lock();
        let serial = ring.serial;
        let track = ring.track(group, generation, serial);
        track.members = members.into();
    }

    /// Says what the process is doing; operations that begin from now on carry it. `format_args!`
    /// does it without allocating.
    pub fn set_tag(&self, tag: impl fmt::Display) {
        let mut text = Tag::EMPTY;
        // Never fails by itself; a Display that does leaves what it has written.
        let _ = write!(text, "{tag}");
        self.lock().tag = text;
    }

    /// An operation is handed over.
    pub fn begin(
        &self,
        group: &Arc<str>,
        generation: Generation,
        site: impl Into<FlightSite>,
    ) -> FlightToken {
        let (site, queued_ns) = (site.into(), self.now());
        let mut ring = self.lock();
        ring.serial += 1;
        let serial = ring.serial;
        if !site.is_message() {
            let track = ring.track(group, generation, serial);
            track.called = track.called.max(site.sequence.saturating_add(1));
        }
        let index = ring.free_slot();
        let tag = ring.tag;
        ring.slots[index] = Some(Slot {
            serial,
            group: Arc::clone(group),
            generation,
            site,
            state: FlightState::Queued,
            queued_ns,
            started_ns: 0,
            moving_ns: 0,
            ended_ns: 0,
            moved_bytes: 0,
            tag,
            error: None,
        });
        FlightToken { index, serial }
    }

    /// Whether both write to one ring.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Its turn has come.
    pub fn started(&self, token: FlightToken) {
        let now = self.now();
        if let Some(slot) = self.lock().slot(token) {
            slot.state = FlightState::Started;
            slot.started_ns = now;
        }
    }

    /// So many more bytes of it have moved.
    pub fn moved(&self, token: FlightToken, bytes: u64) {
        let now = self.now();
        if let Some(slot) = self.lock().slot(token) {
            if slot.moving_ns == 0 {
                slot.moving_ns = now;
            }
            slot.state = FlightState::Moving;
            slot.moved_bytes = slot.moved_bytes.saturating_add(bytes);
        }
    }

    /// It has ended, well or not.
    pub fn finish(&self, token: FlightToken, result: Result<(), &str>) {
        let now = self.now();
        let mut ring = self.lock();
        let Some(slot) = ring.slot(token) else { return };
        slot.ended_ns = now;
        let Err(error) = result else {
            slot.state = FlightState::Completed;
            if !slot.site.is_message() {
                let (group, generation) = (Arc::clone(&slot.group), slot.generation);
                let sequence = slot.site.sequence;
                let track = ring.track(&group, generation, token.serial);
                if track.completed.is_none_or(|(last, _)| last < sequence) {
                    track.completed = Some((sequence, now));
                }
            }
            return;
        };
        slot.state = FlightState::Failed;
        slot.error = Some(cut(error, FLIGHT_ERROR_BYTES_MAX).into());
    }

    /// Everything that is remembered.
    pub fn snapshot(&self) -> FlightLog {
        self.last(FLIGHT_ENTRIES_MAX)
    }

    /// The last operations, so many at most, and those that have not ended.
    pub fn last(&self, entries: usize) -> FlightLog {
        let ring = self.lock();
        let taken_ns = self.now();
        let mut slots: Vec<&Slot> = ring.slots.iter().flatten().collect();
        slots.sort_unstable_by_key(|slot| slot.serial);
        let surplus = slots.len().saturating_sub(entries);
        let kept = slots.iter().enumerate();
        let kept = kept.filter(|(index, slot)| *index >= surplus || slot.state.is_pending());
        FlightLog {
            generation: ring.place.generation,
            rank: ring.place.rank,
            world_size: ring.place.world_size,
            host: ring.place.host.clone(),
            began_ms: self.shared.began_ms,
            taken_ns,
            recorded: ring.serial,
            tag: ring.tag.text(),
            groups: ring.groups.iter().map(Track::describe).collect(),
            entries: kept.map(|(_, slot)| slot.describe()).collect(),
            ending: None,
        }
    }

    fn now(&self) -> u64 {
        // At least 1: 0 stands for what has not happened.
        u64::try_from(self.shared.began.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // Whole after every statement that can panic: there is none within a change.
        self.shared.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for FlightRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlightRecorder").field("recorded", &self.lock().serial).finish()
    }
}

impl Ring {
    /// Where the next operation goes: past those that have not ended, unless all are such.
    fn free_slot(&mut self) -> usize {
        let length = self.slots.len();
        let first = self.next;
        let is_free =
            |index: &usize| self.slots[*index].as_ref().is_none_or(|slot| !slot.state.is_pending());
        let index = (first..length).chain(0..first).find(is_free).unwrap_or(first);
        self.next = (index + 1) % length;
        index
    }

    /// The slot of an operation that is still remembered.
    fn slot(&mut self, token: FlightToken) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(token.index)?.as_mut()?;
        (slot.serial == token.serial).then_some(slot)
    }

    fn track(&mut self, group: &Arc<str>, generation: Generation, serial: u64) -> &mut Track {
        let is_it = |track: &Track| track.generation == generation && track.name == *group;
        let known = self.groups.iter().position(is_it);
        let index = known.unwrap_or_else(|| {
            if self.groups.len() >= GROUPS_MAX {
                let oldest = self.groups.iter().enumerate().min_by_key(|(_, track)| track.used);
                let oldest = oldest.map_or(0, |(index, _)| index);
                self.groups.swap_remove(oldest);
            }
            self.groups.push(Track {
                name: Arc::clone(group),
                generation,
                members: Box::default(),
                called: 0,
                completed: None,
                used: serial,
            });
            self.groups.len() - 1
        });
        let track = &mut self.groups[index];
        track.used = track.used.max(serial);
        track
    }
}

impl Track {
    fn describe(&self) -> FlightGroup {
        FlightGroup {
            name: self.name.to_string(),
            generation: self.generation,
            members: self.members.to_vec(),
            called: self.called,
            completed: self.completed.map(|(sequence, _)| sequence),
            completed_ns: self.completed.map(|(_, time)| time),
        }
    }
}

impl Slot {
    fn describe(&self) -> FlightEntry {
        let happened = |time: u64| (time > 0).then_some(time);
        let site = &self.site;
        FlightEntry {
            group: self.group.to_string(),
            generation: self.generation,
            sequence: site.sequence,
            call: FlightCall {
                operation: site.operation.to_owned(),
                element: site.element.map(str::to_owned),
                reduce: site.reduce.map(str::to_owned),
                count: site.count,
                bytes: site.bytes,
                detail: site.detail,
            },
            state: self.state,
            queued_ns: self.queued_ns,
            started_ns: happened(self.started_ns),
            moving_ns: happened(self.moving_ns),
            ended_ns: happened(self.ended_ns),
            moved_bytes: self.moved_bytes,
            tag: self.tag.text(),
            error: self.error.as_deref().map(str::to_owned),
        }
    }
}

impl FlightSite {
    fn is_message(&self) -> bool {
        matches!(self.detail, Some(FlightDetail::To(_) | FlightDetail::From(_)))
    }
}

impl From<CallSite> for FlightSite {
    fn from(CallSite { call, number }: CallSite) -> Self {
        let detail = call.detail;
        let (operation, detail) = match call.operation {
            Operation::Leave => ("leave", None),
            Operation::AllReduce => ("all-reduce", None),
            Operation::ReduceScatter => ("reduce-scatter", None),
            Operation::AllGather => ("all-gather", None),
            Operation::Broadcast => ("broadcast", Some(FlightDetail::Root(detail))),
            Operation::Send => ("send", Some(FlightDetail::To(detail))),
            Operation::Recv => ("recv", Some(FlightDetail::From(detail))),
            Operation::Barrier => ("barrier", None),
            Operation::GatherBytes => ("gather-bytes", None),
            Operation::ReduceLanes => ("reduce-lanes", Some(FlightDetail::Lanes(detail))),
            Operation::AllToAll => ("all-to-all", None),
            Operation::Gather => ("gather", Some(FlightDetail::Root(detail))),
            Operation::Scatter => ("scatter", Some(FlightDetail::Root(detail))),
            Operation::AllReduceMany => ("all-reduce-many", None),
            Operation::Join => ("join", None),
        };
        let reduce = call.reduce.map(|op| match op {
            ReduceOp::Sum => "sum",
            ReduceOp::Max => "max",
            ReduceOp::Min => "min",
            ReduceOp::Avg => "average",
        });
        let size = call.element.map_or(0, |element| element.bytes() as u64);
        Self {
            sequence: number,
            operation,
            element: call.element.map(|element| element.name()),
            reduce,
            count: call.count,
            bytes: call.count.saturating_mul(size),
            detail,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::buffer::ElementType;
    use crate::call::Call;

    const G: Generation = Generation(3);

    fn site(number: u64) -> CallSite {
        let call = Call::over(Operation::AllReduce, ElementType::F32, 1024).reducing(ReduceOp::Sum);
        CallSite { call, number }
    }

    #[test]
    fn an_operation_is_told_in_every_state() {
        let recorder = FlightRecorder::new(G, Rank(1), 4);
        let data: Arc<str> = "data".into();
        recorder.join(&data, G, &[Rank(1), Rank(3)]);
        recorder.set_tag(format_args!("step {}", 17));
        let first = recorder.begin(&data, G, site(0));
        recorder.started(first);
        recorder.finish(first, Ok(()));
        let second = recorder.begin(&data, G, site(1));
        assert_eq!(recorder.snapshot().entries[1].state, FlightState::Queued);
        recorder.started(second);
        recorder.moved(second, 40);
        recorder.moved(second, 2);
        let log = recorder.snapshot();
        assert_eq!((log.generation, log.rank, log.world_size, log.recorded), (G, Rank(1), 4, 2));
        let current = log.current().expect("one is under way");
        assert_eq!(current.to_string(), "#1 all-reduce f32 × 1024 (sum)");
        assert_eq!((current.state, current.moved_bytes), (FlightState::Moving, 42));
        assert_eq!((current.call.bytes, current.tag.as_str()), (4096, "step 17"));
        let times = [Some(current.queued_ns), current.started_ns, current.moving_ns];
        assert!(times.is_sorted() && times[0] > Some(0), "{times:?}");
        let group = &log.groups[0];
        assert_eq!((group.called, group.completed, group.members.len()), (2, Some(0), 2));
        recorder.finish(second, Err("lost r3"));
        let log = recorder.snapshot();
        assert_eq!(log.entries[1].error.as_deref(), Some("lost r3"));
        assert_eq!(log.current().map(|entry| entry.state), Some(FlightState::Failed));
        assert_eq!(log.groups[0].completed, Some(0));
    }

    #[test]
    fn the_ring_keeps_the_last_operations_and_those_that_have_not_ended() {
        let recorder = FlightRecorder::with_capacity(G, Rank(0), 2, 4);
        let data: Arc<str> = "data".into();
        let hangs = recorder.begin(&data, G, site(0));
        for number in 1..10 {
            let token = recorder.begin(&data, G, site(number));
            recorder.finish(token, Ok(()));
        }
        let numbers = |log: FlightLog| log.entries.iter().map(|e| e.sequence).collect::<Vec<_>>();
        assert_eq!(numbers(recorder.snapshot()), [0, 7, 8, 9]);
        assert_eq!(numbers(recorder.last(1)), [0, 9]);
        recorder.finish(hangs, Ok(()));
        assert_eq!(recorder.snapshot().groups[0].completed, Some(9), "a late end is no step back");
        // More under way than fit: the oldest give way, and their ends are ignored.
        let tokens: Vec<FlightToken> =
            (10..16).map(|number| recorder.begin(&data, G, site(number))).collect();
        for token in tokens {
            recorder.finish(token, Ok(()));
        }
        let log = recorder.snapshot();
        assert_eq!((log.entries.len(), log.recorded), (4, 16));
        assert!(log.current().is_none(), "{log:?}");
    }

    #[test]
    fn texts_are_cut_at_a_character_and_groups_are_bounded() {
        let recorder = FlightRecorder::new(G, Rank(0), 2);
        recorder.set_tag("ä".repeat(FLIGHT_TAG_BYTES_MAX));
        assert_eq!(recorder.snapshot().tag, "ä".repeat(FLIGHT_TAG_BYTES_MAX / 2));
        let data: Arc<str> = "data".into();
        let token = recorder.begin(&data, G, site(0));
        recorder.finish(token, Err(&"ö".repeat(FLIGHT_ERROR_BYTES_MAX)));
        let log = recorder.snapshot();
        let length = log.entries[0].error.as_ref().map(String::len);
        assert_eq!(length, Some(FLIGHT_ERROR_BYTES_MAX));
        for number in 0..2 * GROUPS_MAX as u64 {
            let group: Arc<str> = format!("group {number}").into();
            let token = recorder.begin(&group, G, site(0));
            recorder.finish(token, Ok(()));
        }
        let log = recorder.snapshot();
        assert_eq!(log.groups.len(), GROUPS_MAX);
        assert!(log.groups.iter().all(|group| group.name != "data"));
    }

    /// The largest log fits a message of a rank with room to spare.
    #[test]
    fn the_largest_log_fits_a_message() {
        let recorder = FlightRecorder::new(G, Rank(0), 2);
        recorder.set_tag("\"".repeat(FLIGHT_TAG_BYTES_MAX));
        let data: Arc<str> = "data".into();
        for number in 0..2 * FLIGHT_ENTRIES_MAX as u64 {
            let token = recorder.begin(&data, G, site(number));
            recorder.finish(token, Err(&"\"".repeat(FLIGHT_ERROR_BYTES_MAX)));
        }
        let json = serde_json::to_vec(&recorder.snapshot()).expect("serialises");
        assert!(json.len() < api::session::MESSAGE_BYTES_MAX / 2, "{}", json.len());
    }

    /// The fastest of many batches, so that a busy machine does not matter.
    #[test]
    fn recording_costs_well_below_a_microsecond() {
        const BATCH: u32 = 1_000;
        let recorder = FlightRecorder::new(G, Rank(0), 2);
        let data: Arc<str> = "data".into();
        let mut best = Duration::MAX;
        for batch in 0..200_u64 {
            let begun = Instant::now();
            for number in 0..u64::from(BATCH) {
                let token = recorder.begin(&data, G, site(batch * u64::from(BATCH) + number));
                recorder.started(token);
                recorder.finish(token, Ok(()));
            }
            best = best.min(begun.elapsed() / BATCH);
        }
        eprintln!("one operation is recorded in {best:?}; a slot has {} bytes", size_of::<Slot>());
        assert!(best < Duration::from_micros(1), "{best:?}");
    }
}

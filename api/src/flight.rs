//! A rank's flight log: the last collective operations of one process, over all of its groups, and
//! what the process says it was doing.
//!
//! Recorded in memory by `collective`, asked for while the rank runs, kept in the object store when
//! it fails or is killed. Never in the transaction log. Everything in it is bounded, so that the
//! logs of a large gang fit one answer.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{Generation, Rank};

/// Operations that a rank remembers: some steps' worth.
pub const FLIGHT_ENTRIES_MAX: usize = 512;
/// Longest tag, in bytes; a longer one is cut.
pub const FLIGHT_TAG_BYTES_MAX: usize = 48;
/// Longest error text of an entry, in bytes; a longer one is cut.
pub const FLIGHT_ERROR_BYTES_MAX: usize = 512;
/// Largest kept log that is read back, in bytes: well above what the bounds before allow.
pub const FLIGHT_LOG_BYTES_MAX: u64 = 4 << 20;

/// What one process remembers of its collective operations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlightLog {
    /// The gang's incarnation.
    pub generation: Generation,
    /// The process.
    pub rank: Rank,
    /// Ranks in the gang.
    pub world_size: u32,
    /// Its host's name.
    pub host: String,
    /// When the recorder began: milliseconds since the Unix epoch, by the host's clock. Every other
    /// time counts nanoseconds from then, by a clock that does not jump.
    pub began_ms: u64,
    /// When this log was taken.
    pub taken_ns: u64,
    /// Operations recorded so far; `entries` holds the last ones.
    pub recorded: u64,
    /// What the process was doing when the log was taken.
    pub tag: String,
    /// The groups that it has used.
    pub groups: Vec<FlightGroup>,
    /// The last operations, in the order in which they began.
    pub entries: Vec<FlightEntry>,
    /// Why there is no later log: the rank's error, or why it was killed. Absent in a running one.
    pub ending: Option<String>,
}

/// How far a process came in one group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlightGroup {
    /// The group's name.
    pub name: String,
    /// The incarnation that it was formed under.
    pub generation: Generation,
    /// Its members in the order of their ranks within it; empty: every rank of the gang.
    pub members: Vec<Rank>,
    /// Collectives that have begun; messages between two ranks are not counted.
    pub called: u64,
    /// The last collective that was completed, by its number from 0.
    pub completed: Option<u64>,
    /// When it was completed.
    pub completed_ns: Option<u64>,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlightEntry {
    /// The group's name.
    pub group: String,
    /// The incarnation that the group was formed under.
    pub generation: Generation,
    /// Its number from 0: within the group, or for a message within its pair and direction.
    pub sequence: u64,
    /// What was called.
    pub call: FlightCall,
    /// How far it came.
    pub state: FlightState,
    /// When it was handed over.
    pub queued_ns: u64,
    /// When its turn came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ns: Option<u64>,
    /// When its first data moved, where that is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_ns: Option<u64>,
    /// When it was completed or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ns: Option<u64>,
    /// Bytes moved so far, where that is recorded.
    #[serde(default)]
    pub moved_bytes: u64,
    /// What the process was doing.
    #[serde(default)]
    pub tag: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What was called, as far as it must agree between ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlightCall {
    /// Such as `all-reduce`.
    pub operation: String,
    /// The type of the elements, such as `f32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub element: Option<String>,
    /// How they are reduced, such as `sum`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce: Option<String>,
    /// Elements of the whole buffer.
    pub count: u64,
    /// Bytes of the whole buffer.
    pub bytes: u64,
    /// Its root, its peer or its lanes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<FlightDetail>,
}

/// What a call names besides its buffer. Ranks are those within the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlightDetail {
    /// The rank that everybody gets it from.
    Root(u32),
    /// A message to this rank.
    To(u32),
    /// A message from this rank.
    From(u32),
    /// The lanes that are summed.
    Lanes(u32),
}

/// How far an operation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlightState {
    /// Handed over; others are before it.
    Queued,
    /// Its turn has come: it waits for its peers.
    Started,
    /// Data is on its way.
    Moving,
    /// Done.
    Completed,
    /// It failed, and its group with it.
    Failed,
}

impl FlightState {
    /// Whether it has not ended.
    pub fn is_pending(self) -> bool {
        matches!(self, Self::Queued | Self::Started | Self::Moving)
    }
}

impl FlightLog {
    /// The operation that this process is in: of those that have not ended the oldest, else the
    /// last one when it failed.
    pub fn current(&self) -> Option<&FlightEntry> {
        let failed = || self.entries.last().filter(|entry| entry.state == FlightState::Failed);
        self.entries.iter().find(|entry| entry.state.is_pending()).or_else(failed)
    }

    /// The operation that was completed last, if it is remembered.
    pub fn last_completed(&self) -> Option<&FlightEntry> {
        let completed = |entry: &&FlightEntry| entry.state == FlightState::Completed;
        self.entries.iter().filter(completed).max_by_key(|entry| entry.ended_ns)
    }

    /// How long before the log was taken that was.
    pub fn ago(&self, time_ns: u64) -> Duration {
        Duration::from_nanos(self.taken_ns.saturating_sub(time_ns))
    }

    /// Keeps the last operations only.
    pub fn keep_last(&mut self, entries: usize) {
        let surplus = self.entries.len().saturating_sub(entries);
        self.entries.drain(..surplus);
    }
}

impl FlightEntry {
    /// Whether it concerns two ranks only.
    pub fn is_message(&self) -> bool {
        matches!(self.call.detail, Some(FlightDetail::To(_) | FlightDetail::From(_)))
    }

    /// Since when it is where it is.
    pub fn since_ns(&self) -> u64 {
        self.started_ns.unwrap_or(self.queued_ns)
    }
}

impl fmt::Display for FlightState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queued => "queued",
            Self::Started => "started",
            Self::Moving => "moving",
            Self::Completed => "completed",
            Self::Failed => "failed",
        })
    }
}

impl fmt::Display for FlightCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.operation)?;
        if let Some(element) = &self.element {
            write!(f, " {element} × {}", self.count)?;
        }
        match &self.detail {
            Some(FlightDetail::Root(rank) | FlightDetail::From(rank)) => {
                write!(f, " from rank {rank}")?;
            }
            Some(FlightDetail::To(rank)) => write!(f, " to rank {rank}")?,
            Some(FlightDetail::Lanes(_)) | None => {}
        }
        match (&self.reduce, &self.detail) {
            (Some(reduce), Some(FlightDetail::Lanes(lanes))) => {
                write!(f, " ({reduce} over {lanes} lanes)")
            }
            (Some(reduce), _) => write!(f, " ({reduce})"),
            (None, _) => Ok(()),
        }
    }
}

impl fmt::Display for FlightEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} {}", self.sequence, self.call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(operation: &str, detail: Option<FlightDetail>) -> FlightCall {
        let element = Some("f32".to_owned());
        FlightCall {
            operation: operation.into(),
            element,
            count: 7,
            bytes: 28,
            detail,
            reduce: None,
        }
    }

    #[test]
    fn calls_read_well() {
        let sum = |call: FlightCall| FlightCall { reduce: Some("sum".into()), ..call };
        for (call, shown) in [
            (sum(call("all-reduce", None)), "all-reduce f32 × 7 (sum)"),
            (call("broadcast", Some(FlightDetail::Root(2))), "broadcast f32 × 7 from rank 2"),
            (call("send", Some(FlightDetail::To(1))), "send f32 × 7 to rank 1"),
            (
                sum(call("reduce-lanes", Some(FlightDetail::Lanes(8)))),
                "reduce-lanes f32 × 7 (sum over 8 lanes)",
            ),
            (FlightCall { operation: "barrier".into(), ..FlightCall::default() }, "barrier"),
        ] {
            assert_eq!(call.to_string(), shown);
        }
    }

    #[test]
    fn a_log_of_another_version_is_read_as_far_as_it_is_known() {
        let text = r#"{"generation":3,"rank":1,"novelty":true,"entries":[{"group":"data",
            "generation":3,"sequence":5,"call":{"operation":"send","detail":{"to":2}},
            "state":"moving","queued_ns":10}]}"#;
        let log: FlightLog = serde_json::from_str(text).expect("parses");
        assert_eq!(log.current().map(ToString::to_string).as_deref(), Some("#5 send to rank 2"));
        assert!(log.entries[0].is_message());
    }
}

//! Parcae's traces: nodes that come and go by name, one event a line.
//!
//! Each line of `aws/traces/*/trace_{hh,hl,lh,ll}_*.txt` of <https://github.com/JF-D/Parcae> is a
//! JSON array `[milliseconds, operation, {"nodes": [names], "duration": milliseconds, …}]`. The
//! operations `add` and `remove` change the set of nodes; `no-op` and `migration` do not. Lines that
//! begin with `#` are passed over, as its replayer does; so are other keys, the strategies it chose.
//! The last line's `duration` ends the trace.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::trace::{Change, END_MS_MAX, NODES_MAX, Trace, TraceError};

#[derive(Deserialize, Serialize)]
struct Event(u64, Operation, Details);

#[derive(Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Operation {
    Add,
    Remove,
    NoOp,
    Migration,
}

#[derive(Deserialize, Serialize)]
struct Details {
    nodes: Vec<String>,
    duration: u64,
}

/// Reads a trace.
///
/// # Errors
/// Names the line, what was found there and what was expected.
pub fn parse(text: &str) -> Result<Trace, TraceError> {
    let mut present = BTreeSet::new();
    let mut changes: Vec<Change> = Vec::new();
    let mut end_ms = 0;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let begins = line.trim_start();
        if begins.starts_with('#') || begins.is_empty() {
            continue;
        }
        let Event(at_ms, operation, details) =
            serde_json::from_str(line).map_err(|error| expected(number, &error))?;
        check_time(number, at_ms, &changes)?;
        apply(number, operation, details.nodes, &mut present)?;
        let nodes = present.len() as u32;
        if changes.is_empty() && at_ms > 0 {
            changes.push(Change { at_ms: 0, nodes: 0 });
        }
        changes.push(Change { at_ms, nodes });
        if details.duration == 0 || details.duration > END_MS_MAX {
            let text = format!("duration {}, expected 1 ms to ten years", details.duration);
            return Err(TraceError::new(number, text));
        }
        end_ms = at_ms + details.duration;
    }
    Ok(Trace::new(changes, end_ms))
}

fn expected(line: usize, error: &serde_json::Error) -> TraceError {
    let error = TraceError::json(line, error);
    let what = format!(
        "{}; expected [milliseconds, \"add\" | \"remove\" | \"no-op\" | \"migration\", \
         {{\"nodes\": [names], \"duration\": milliseconds}}]",
        error.what
    );
    TraceError { what, ..error }
}

fn check_time(line: usize, at_ms: u64, changes: &[Change]) -> Result<(), TraceError> {
    if at_ms > END_MS_MAX {
        return Err(TraceError::new(line, format!("{at_ms} ms, expected at most ten years")));
    }
    match changes.last() {
        Some(before) if at_ms <= before.at_ms => Err(TraceError::new(
            line,
            format!("{at_ms} ms, expected more than the {} ms of the event before", before.at_ms),
        )),
        _ => Ok(()),
    }
}

fn apply(
    line: usize,
    operation: Operation,
    nodes: Vec<String>,
    present: &mut BTreeSet<String>,
) -> Result<(), TraceError> {
    for node in nodes {
        let wrong = match operation {
            Operation::Add if present.contains(&node) => "is added and is there already",
            Operation::Remove if !present.contains(&node) => "is removed and is not there",
            Operation::NoOp | Operation::Migration => "changes in an event that changes no node",
            Operation::Add => {
                present.insert(node);
                continue;
            }
            Operation::Remove => {
                present.remove(&node);
                continue;
            }
        };
        return Err(TraceError::new(line, format!("node `{node}` {wrong}")));
    }
    if present.len() > NODES_MAX as usize {
        return Err(TraceError::new(line, format!("expected at most {NODES_MAX} nodes")));
    }
    Ok(())
}

/// The node counts of equally long ticks as such a file. Those that go are the oldest, those that
/// come are new ones.
pub fn format(tick_ms: u64, counts: &[u32]) -> String {
    let mut text = String::new();
    let (mut oldest, mut next) = (0u64, 0u64);
    for (index, &count) in counts.iter().enumerate() {
        let (before, count) = (next - oldest, u64::from(count));
        let (operation, range) = match count {
            _ if count > before => (Operation::Add, next..next + count - before),
            _ if count < before => (Operation::Remove, oldest..oldest + before - count),
            _ => (Operation::NoOp, 0..0),
        };
        match operation {
            Operation::Add => next = range.end,
            Operation::Remove => oldest = range.end,
            _ => {}
        }
        let nodes = range.map(|number| format!("node-{number}")).collect();
        let event = Event(index as u64 * tick_ms, operation, Details { nodes, duration: tick_ms });
        let line = serde_json::to_string(&event);
        text += &line.expect("names and numbers are always JSON");
        text.push('\n');
    }
    text
}

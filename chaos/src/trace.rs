//! How many nodes there were at which time, as a cloud's spot market gave and took them.
//!
//! Two published formats are read, told apart by their first character: [`crate::skypilot`], one
//! JSON object, and [`crate::parcae`], one JSON array a line. Both become changes of one count: which
//! node it was that came or went is not kept, because a probe of availability does not know.

use serde::Serialize;

use crate::{parcae, skypilot};

/// Most nodes of a trace: beyond any published one, and far from where sums could overflow.
pub(crate) const NODES_MAX: u32 = 1_000_000;
/// Longest trace: ten years, in milliseconds.
pub(crate) const END_MS_MAX: u64 = 10 * 365 * 86_400_000;

/// A trace that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct TraceError {
    /// The line, from 1.
    pub line: usize,
    /// What was found and what was expected.
    pub what: String,
}

impl TraceError {
    pub(crate) fn new(line: usize, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }

    /// From a JSON error of text that begins at `line`.
    pub(crate) fn json(line: usize, error: &serde_json::Error) -> Self {
        let text = error.to_string();
        // The parser names its own line, which is not the file's where lines are read one by one.
        let what = text.split(" at line ").next().unwrap_or_default();
        let line = line + error.line().saturating_sub(1);
        Self::new(line, format!("column {}: {what}", error.column()))
    }
}

/// From a time on there are so many nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Milliseconds since the trace's start.
    pub at_ms: u64,
    /// Nodes from then on.
    pub nodes: u32,
}

/// The number of nodes over a window of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    /// The first is at 0; later ones are later and differ from the one before.
    changes: Vec<Change>,
    /// Milliseconds from the start to the end of the window.
    end_ms: u64,
}

/// What a trace is like.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// Hours from its start to its end.
    pub hours: f64,
    /// Most nodes at any time.
    pub peak: u32,
    /// Nodes in the mean over time.
    pub mean: f64,
    /// The part of the time without any node.
    pub zero: f64,
    /// Times at which nodes were lost, an event for each.
    pub drops: usize,
    /// Nodes lost in all.
    pub lost: u64,
    /// Times at which nodes came, without those at the start.
    pub grows: usize,
}

impl Trace {
    /// From changes in order of time; equal neighbours become one.
    ///
    /// # Panics
    /// If the first change is not at 0, one is not later than the one before, or the end is not
    /// after the last: readers check that and name the line.
    pub fn new(changes: impl IntoIterator<Item = Change>, end_ms: u64) -> Self {
        let mut kept: Vec<Change> = Vec::new();
        let mut last_ms = None;
        for change in changes {
            assert!(last_ms.map_or(change.at_ms == 0, |last| change.at_ms > last), "in order");
            last_ms = Some(change.at_ms);
            if kept.last().is_none_or(|before| before.nodes != change.nodes) {
                kept.push(change);
            }
        }
        assert!(last_ms.is_some_and(|last| last < end_ms), "it ends after its last change");
        Self { changes: kept, end_ms }
    }

    /// Reads either format.
    ///
    /// # Errors
    /// Names the line, what was found there and what was expected.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        // Some editors begin a file with a mark of its encoding.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut lines = text.lines().enumerate();
        let first = lines.find_map(|(index, line)| {
            let line = line.trim_start();
            let first = line.chars().next().filter(|&c| c != '#')?;
            Some((index + 1, first))
        });
        match first {
            Some((_, '{')) => skypilot::parse(text),
            Some((_, '[')) => parcae::parse(text),
            Some((line, other)) => Err(TraceError::new(
                line,
                format!(
                    "found `{other}`, expected `{{` of a SkyPilot trace (one object with \
                     metadata.gap_seconds and data) or `[` of a Parcae trace (one array a line)"
                ),
            )),
            None => Err(TraceError::new(1, "found nothing, expected a trace")),
        }
    }

    /// When the number of nodes changes, in order of time; the first is at 0.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Milliseconds from the start to the end of the window.
    pub fn end_ms(&self) -> u64 {
        self.end_ms
    }

    /// Stretches of constant nodes: milliseconds of their start, of their end, and nodes.
    pub fn stretches(&self) -> impl Iterator<Item = (u64, u64, u32)> + '_ {
        let ends = self.changes.iter().skip(1).map(|change| change.at_ms).chain([self.end_ms]);
        self.changes.iter().zip(ends).map(|(change, end)| (change.at_ms, end, change.nodes))
    }

    /// The same with every count multiplied so that the peak is `peak_max`, if it is more now: some
    /// node stays where there was one. Small drops may vanish by that.
    #[must_use]
    pub fn scaled_to(&self, peak_max: u32) -> Self {
        let peak = self.statistics().peak;
        if peak <= peak_max || peak == 0 {
            return self.clone();
        }
        let scaled = self.changes.iter().map(|change| {
            let exact = u64::from(change.nodes) * u64::from(peak_max);
            let rounded = (exact + u64::from(peak) / 2) / u64::from(peak);
            let nodes = (rounded as u32).max(u32::from(change.nodes > 0));
            Change { nodes, ..*change }
        });
        Self::new(scaled, self.end_ms)
    }

    /// What it is like.
    pub fn statistics(&self) -> Statistics {
        let (mut node_ms, mut zero_ms, mut peak) = (0.0, 0, 0);
        for (start, end, nodes) in self.stretches() {
            node_ms += (end - start) as f64 * f64::from(nodes);
            zero_ms += if nodes == 0 { end - start } else { 0 };
            peak = peak.max(nodes);
        }
        let pairs = || self.changes.iter().zip(self.changes.iter().skip(1));
        let losses = || pairs().filter(|(before, after)| after.nodes < before.nodes);
        let end = self.end_ms as f64;
        Statistics {
            hours: end / 3.6e6,
            peak,
            mean: node_ms / end,
            zero: zero_ms as f64 / end,
            drops: losses().count(),
            lost: losses().map(|(before, after)| u64::from(before.nodes - after.nodes)).sum(),
            grows: pairs().filter(|(before, after)| after.nodes > before.nodes).count(),
        }
    }
}

//! SkyPilot's spot traces: how many instances of a kind could be had, probe by probe.
//!
//! One JSON object, as <https://github.com/skypilot-org/spot-traces> describes it:
//! `{"metadata": {"gap_seconds": 300}, "data": [0, 3, 16]}`. Each number is the count at one probe and
//! holds until the next. `data` may also be a list of such lists, one for each zone or node, which
//! are added up. Other keys are passed over.

use std::fmt;

use serde::de::{Deserializer, Error, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize};

use crate::trace::{Change, END_MS_MAX, NODES_MAX, Trace, TraceError};

#[derive(Deserialize)]
struct File {
    metadata: Metadata,
    data: Counts,
}

#[derive(Deserialize)]
struct Metadata {
    gap_seconds: Gap,
}

/// Reads a trace.
///
/// # Errors
/// Names the line, what was found there and what was expected.
pub fn parse(text: &str) -> Result<Trace, TraceError> {
    // Comments are no JSON, but a sample says in one where it comes from; their lines stay, empty.
    let without: String = text
        .split_inclusive('\n')
        .map(|line| if line.trim_start().starts_with('#') { "\n" } else { line })
        .collect();
    let file: File = serde_json::from_str(&without).map_err(|error| TraceError::json(1, &error))?;
    let (gap_ms, counts) = (file.metadata.gap_seconds.0, file.data.0);
    let end_ms = (counts.len() as u64).saturating_mul(gap_ms);
    if end_ms > END_MS_MAX {
        let days = end_ms / 86_400_000;
        return Err(TraceError::new(
            1,
            format!("the trace has {days} days, expected at most ten years"),
        ));
    }
    let changes = counts
        .into_iter()
        .enumerate()
        .map(|(index, nodes)| Change { at_ms: index as u64 * gap_ms, nodes });
    Ok(Trace::new(changes, end_ms))
}

/// Counts at a fixed distance as such a file, one line.
pub fn format(gap_seconds: u32, counts: &[u32]) -> String {
    #[derive(Serialize)]
    struct Document<'a> {
        metadata: serde_json::Value,
        data: &'a [u32],
    }
    let metadata = serde_json::json!({ "gap_seconds": gap_seconds });
    let text = serde_json::to_string(&Document { metadata, data: counts });
    text.expect("numbers under fixed keys are always JSON") + "\n"
}

/// Milliseconds between two probes.
struct Gap(u64);

impl<'de> Deserialize<'de> for Gap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        let is_sane = (0.001..=86_400.0).contains(&seconds);
        if !is_sane {
            return Err(D::Error::invalid_value(
                Unexpected::Float(seconds),
                &"a gap of 0.001 to 86400 seconds",
            ));
        }
        Ok(Self((seconds * 1e3).round() as u64))
    }
}

/// `data`, rows added up.
struct Counts(Vec<u32>);

impl<'de> Deserialize<'de> for Counts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(CountsVisitor)
    }
}

struct CountsVisitor;

impl<'de> Visitor<'de> for CountsVisitor {
    type Value = Counts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`data` as a list of numbers of nodes, or of one such list per zone or node")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Counts, A::Error> {
        let mut sums: Vec<u32> = Vec::new();
        let mut rows = 0;
        while let Some(item) = items.next_element::<Item>()? {
            match item {
                Item::Count(count) if rows == 0 => sums.push(count),
                Item::Row(row) if rows == 0 && sums.is_empty() => (sums, rows) = (row, 1),
                Item::Row(row) if row.len() == sums.len() && rows > 0 => {
                    rows += 1;
                    for (sum, count) in sums.iter_mut().zip(row) {
                        *sum = sum.saturating_add(count).min(NODES_MAX);
                    }
                }
                Item::Row(row) if rows > 0 => {
                    let text = format!(
                        "list {} of `data` has {} probes, expected {} as the first has",
                        rows + 1,
                        row.len(),
                        sums.len()
                    );
                    return Err(A::Error::custom(text));
                }
                _ => return Err(A::Error::custom("`data` mixes numbers and lists")),
            }
        }
        if sums.is_empty() {
            return Err(A::Error::custom("`data` is empty, expected at least one probe"));
        }
        Ok(Counts(sums))
    }
}

/// One probe, or the probes of one zone or node.
enum Item {
    Count(u32),
    Row(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a number of nodes, 0 to {NODES_MAX}")
    }

    fn visit_u64<E: Error>(self, count: u64) -> Result<Item, E> {
        let count = u32::try_from(count).ok().filter(|&count| count <= NODES_MAX);
        count
            .map(Item::Count)
            .ok_or_else(|| E::custom(format!("expected at most {NODES_MAX} nodes")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Item, A::Error> {
        let mut row = Vec::new();
        while let Some(item) = items.next_element::<Item>()? {
            match item {
                Item::Count(count) => row.push(count),
                Item::Row(_) => return Err(A::Error::custom("lists in lists of `data`")),
            }
        }
        Ok(Item::Row(row))
    }
}

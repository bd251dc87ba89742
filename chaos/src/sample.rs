//! Traces of our own, made from a seed, with the statistics of published ones.
//!
//! The published files are not ours to ship. What is reproduced is what decides a job's goodput: how
//! often nodes go, how many at a time, for how long there is none.

use crate::random::Random;
use crate::trace::{Trace, TraceError};
use crate::{parcae, skypilot};

/// A sample trace as a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The file's name.
    pub file: &'static str,
    /// Its text, in the format that its published model has.
    pub text: String,
}

impl Sample {
    /// As a trace.
    ///
    /// # Errors
    /// Never for one of [`samples`].
    pub fn trace(&self) -> Result<Trace, TraceError> {
        Trace::parse(&self.text)
    }
}

/// An hour of 60-second ticks, as Parcae cut them out of a longer record.
struct Hour {
    file: &'static str,
    start: u32,
    peak: u32,
    drops: u32,
    lost: u32,
    grows: u32,
    gained: u32,
}

/// Named after the model's: availability high or low, then preemptions many or few. The counts are
/// those of its files for BERT.
const HOURS: [Hour; 4] = [
    Hour { file: "parcae-hh.txt", start: 32, peak: 32, drops: 9, lost: 19, grows: 7, gained: 16 },
    Hour { file: "parcae-hl.txt", start: 27, peak: 32, drops: 6, lost: 11, grows: 4, gained: 7 },
    Hour { file: "parcae-lh.txt", start: 18, peak: 21, drops: 8, lost: 18, grows: 12, gained: 17 },
    Hour { file: "parcae-ll.txt", start: 18, peak: 18, drops: 3, lost: 4, grows: 0, gained: 0 },
];

/// Seconds between two probes, and their number: eleven days, as the model's shortest.
const GAP_SECONDS: u32 = 300;
const PROBES: usize = 3247;
/// Nodes asked for.
const NODES: u32 = 16;

/// The sample traces: one of eleven days and four of an hour.
pub fn samples(seed: u64) -> Vec<Sample> {
    let mut random = Random::new(seed);
    let counts = probes(&mut random);
    let mut samples =
        vec![Sample { file: "sky-16.json", text: skypilot::format(GAP_SECONDS, &counts) }];
    for hour in &HOURS {
        let text = parcae::format(60_000, &ticks(hour, &mut random));
        samples.push(Sample { file: hour.file, text });
    }
    samples
}

/// What a zone has: nothing, all that is asked for, or some.
#[derive(Clone, Copy, PartialEq)]
enum Stock {
    None,
    All,
    Some,
}

/// Availability of 16 nodes, probe by probe: a chain over the three states of a zone's stock. Means
/// of stays and odds of the next state lie between those of the model's three zones.
fn probes(random: &mut Random) -> Vec<u32> {
    let mut counts = Vec::with_capacity(PROBES);
    let mut stock = Stock::None;
    while counts.len() < PROBES {
        // A probe was repeated over three or four ticks, so nothing is seen to last less.
        let (mean, next) = match stock {
            Stock::None => (24.0, [(Stock::All, 60), (Stock::Some, 40)]),
            Stock::All => (20.0, [(Stock::None, 50), (Stock::Some, 50)]),
            Stock::Some => (1.0, [(Stock::None, 50), (Stock::All, 50)]),
        };
        let stay = 3 + random.exponential(mean - 1.0) as usize;
        let nodes = match stock {
            Stock::None => 0,
            Stock::All => NODES,
            Stock::Some => random.between(1, u64::from(NODES) - 1) as u32,
        };
        counts.extend(std::iter::repeat_n(nodes, stay.min(PROBES - counts.len())));
        let draw = random.below(100);
        stock = if draw < next[0].1 { next[0].0 } else { next[1].0 };
    }
    counts
}

/// The node counts of an hour's minutes.
fn ticks(hour: &Hour, random: &mut Random) -> Vec<u32> {
    let events = hour.drops + hour.grows;
    // At distinct minutes, none in the first five, in which a job could not have begun.
    let mut minutes: Vec<usize> = (5..60).collect();
    for index in (1..minutes.len()).rev() {
        minutes.swap(index, random.below(index as u64 + 1) as usize);
    }
    minutes.truncate(events as usize);
    minutes.sort_unstable();
    let mut losses = parts(hour.lost, hour.drops, random);
    let mut gains = parts(hour.gained, hour.grows, random);
    let mut nodes = hour.start;
    let mut changes = Vec::new();
    for minute in minutes {
        let room = hour.peak.saturating_sub(nodes);
        let may_grow = gains.last().is_some_and(|&gain| gain <= room);
        let left = (losses.len() + gains.len()) as u64;
        let grows = may_grow && (random.below(left) >= losses.len() as u64 || losses.is_empty());
        if grows {
            nodes += gains.pop().unwrap_or(0);
        } else if let Some(loss) = losses.pop() {
            nodes = nodes.saturating_sub(loss).max(1);
        }
        changes.push((minute, nodes));
    }
    let mut counts = Vec::with_capacity(60);
    let (mut nodes, mut changes) = (hour.start, changes.into_iter().peekable());
    for minute in 0..60 {
        if let Some((_, changed)) = changes.next_if(|(at, _)| *at == minute) {
            nodes = changed;
        }
        counts.push(nodes);
    }
    counts
}

/// `total` as `count` parts of at least one each.
fn parts(total: u32, count: u32, random: &mut Random) -> Vec<u32> {
    let mut parts = vec![1; count as usize];
    for _ in count..total {
        let index = random.below(u64::from(count)) as usize;
        parts[index] += 1;
    }
    parts
}

//! What watchers of a job see: its newest events, kept while this coordinator leads.
//!
//! Feeds are a recent window, never the record of what happened: metrics of earlier steps may be
//! missing. Status events come from committed records only, each with its record's version.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::Name;
use api::events::JobEvent;
use tokio::sync::watch;

/// Step metrics kept per job: enough for a curve in a terminal.
const STEPS_MAX: usize = 512;
/// Other events kept per job: notes, evaluations, checkpoints and state changes are rare.
const OTHERS_MAX: usize = 256;
/// Jobs with a feed; the ones without news for the longest lose theirs first.
const FEEDS_MAX: usize = 1024;
/// Events handed to a watcher at once, so that no watcher copies a whole feed under the lock.
const BATCH_MAX: usize = 128;

/// One event with its position in the job's feed.
#[derive(Clone, Debug)]
pub(crate) struct FeedEntry {
    /// Position, counted from 0 over the feed's life.
    index: u64,
    /// The record's version, for status events.
    pub(crate) version: Option<u64>,
    /// What happened.
    pub(crate) event: Arc<JobEvent>,
}

struct Feed {
    steps: VecDeque<FeedEntry>,
    others: VecDeque<FeedEntry>,
    next: u64,
    changed: watch::Sender<u64>,
    touched: u64,
}

impl Feed {
    fn new() -> Self {
        let (changed, _) = watch::channel(0);
        Self { steps: VecDeque::new(), others: VecDeque::new(), next: 0, changed, touched: 0 }
    }

    fn push(&mut self, event: JobEvent, version: Option<u64>) {
        let (events, max) = match event {
            JobEvent::Step(_) => (&mut self.steps, STEPS_MAX),
            _ => (&mut self.others, OTHERS_MAX),
        };
        if events.len() == max {
            events.pop_front();
        }
        events.push_back(FeedEntry { index: self.next, version, event: Arc::new(event) });
        self.next += 1;
        self.changed.send_replace(self.next);
    }

    /// Up to [`BATCH_MAX`] events from `cursor` on, in order.
    fn read(&self, cursor: u64) -> Vec<FeedEntry> {
        let from = |events: &VecDeque<FeedEntry>| events.partition_point(|e| e.index < cursor);
        let mut steps = self.steps.range(from(&self.steps)..).peekable();
        let mut others = self.others.range(from(&self.others)..).peekable();
        let mut batch = Vec::new();
        while batch.len() < BATCH_MAX {
            let step_first = match (steps.peek(), others.peek()) {
                (Some(step), Some(other)) => step.index < other.index,
                (step, _) => step.is_some(),
            };
            match if step_first { steps.next() } else { others.next() } {
                Some(entry) => batch.push(entry.clone()),
                None => break,
            }
        }
        batch
    }
}

/// The feeds of all jobs.
#[derive(Default)]
pub(crate) struct Feeds {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    feeds: HashMap<Name, Feed>,
    clock: u64,
}

impl State {
    fn feed(&mut self, job: &Name) -> &mut Feed {
        self.clock += 1;
        if !self.feeds.contains_key(job) && self.feeds.len() >= FEEDS_MAX {
            let idle = self.feeds.iter().filter(|(_, feed)| feed.changed.receiver_count() == 0);
            let oldest = idle.min_by_key(|(_, feed)| feed.touched).map(|(name, _)| name.clone());
            if let Some(oldest) = oldest {
                self.feeds.remove(&oldest);
            }
        }
        let feed = self.feeds.entry(job.clone()).or_insert_with(Feed::new);
        feed.touched = self.clock;
        feed
    }
}

impl Feeds {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole after every statement, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event; `version` is that of the record behind a status event.
    pub(crate) fn publish(&self, job: &Name, event: JobEvent, version: Option<u64>) {
        self.lock().feed(job).push(event, version);
    }

    /// A reader that begins with what the window still holds.
    pub(crate) fn subscribe(self: &Arc<Self>, job: &Name) -> FeedReader {
        let changed = self.lock().feed(job).changed.subscribe();
        FeedReader { feeds: Arc::clone(self), job: job.clone(), cursor: 0, changed }
    }
}

/// One watcher's position in a job's feed.
pub(crate) struct FeedReader {
    feeds: Arc<Feeds>,
    job: Name,
    cursor: u64,
    changed: watch::Receiver<u64>,
}

impl FeedReader {
    /// The next events in order; empty when there are none yet. A reader that falls behind the
    /// window misses what left it.
    pub(crate) fn read(&mut self) -> Vec<FeedEntry> {
        self.changed.mark_unchanged();
        let batch = self.feeds.lock().feeds.get(&self.job).map(|feed| feed.read(self.cursor));
        let batch = batch.unwrap_or_default();
        if let Some(last) = batch.last() {
            self.cursor = last.index + 1;
        }
        batch
    }

    /// Returns when there may be more to read.
    pub(crate) async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            // The feed was dropped; the watcher ends by other means.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use api::Generation;
    use api::events::{StepMetrics, StepTime};
    use api::ids::Step;

    use super::*;

    fn step(step: u64) -> JobEvent {
        JobEvent::Step(StepMetrics {
            step: Step(step),
            last_step: Step(1_000),
            epoch: 0.0,
            loss: 1.0,
            learning_rate: 0.1,
            gradient_norm: 1.0,
            samples_per_second: 1.0,
            tokens_per_second: 0.0,
            time: StepTime::default(),
            memory_bytes: 0,
            slowest: None,
        })
    }

    fn drain(reader: &mut FeedReader) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let batch = reader.read();
            if batch.is_empty() {
                return seen;
            }
            seen.extend(batch.iter().map(|entry| match &*entry.event {
                JobEvent::Step(metrics) => metrics.step.to_string(),
                JobEvent::Note { text, .. } => text.clone(),
                other => format!("{other:?}"),
            }));
        }
    }

    #[test]
    fn a_late_watcher_gets_the_newest_steps_and_all_notes_in_order() {
        let feeds = Arc::new(Feeds::default());
        let job: Name = "a".parse().expect("a name");
        for number in 1..=600 {
            feeds.publish(&job, step(number), None);
            if number == 10 || number == 590 {
                let text = format!("note {number}");
                let note = JobEvent::Note { generation: Generation(1), rank: None, text };
                feeds.publish(&job, note, None);
            }
        }
        let mut reader = feeds.subscribe(&job);
        let seen = drain(&mut reader);
        assert_eq!(seen.len(), STEPS_MAX + 2);
        assert_eq!(seen[..2], ["note 10".to_owned(), "s89".to_owned()]);
        assert_eq!(seen[seen.len() - 11..][..2], ["note 590".to_owned(), "s591".to_owned()]);
        feeds.publish(&job, step(601), None);
        assert_eq!(drain(&mut reader), ["s601"]);
    }

    #[test]
    fn feeds_are_bounded_and_the_idle_ones_go_first() {
        let feeds = Arc::new(Feeds::default());
        let name = |n: usize| format!("job-{n}").parse::<Name>().expect("a name");
        let watched = feeds.subscribe(&name(0));
        for number in 1..=FEEDS_MAX + 10 {
            feeds.publish(&name(number), step(1), None);
        }
        let state = feeds.lock();
        assert_eq!(state.feeds.len(), FEEDS_MAX);
        assert!(state.feeds.contains_key(&watched.job), "a watched feed was dropped");
        assert!(!state.feeds.contains_key(&name(1)), "the oldest idle feed was kept");
    }
}

//! The one thread that computes: it checks what arrives, picks a piece, computes it, and looks
//! again.
//!
//! A piece is a batch of images from as many jobs as are waiting, each with an equal share, or one
//! text. Between pieces, and between the tokens of a text, callers who have left are dropped. A
//! model that panics is suspect: its callers are told, and nothing is computed any more.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use algorithms::{Predictor, Request};

use crate::metrics::Metrics;
use crate::queue::{Job, QueueOptions, Refusal, Shared};

/// The computing thread's own.
pub(crate) struct Compute {
    predictor: Box<dyn Predictor>,
    shared: Arc<Shared>,
    options: QueueOptions,
    metrics: Arc<Metrics>,
    /// Jobs the model is busy with; here, and not on the stack, so that a panic leaves them to be
    /// told.
    busy: Vec<Job>,
}

impl Compute {
    pub(crate) fn new(
        predictor: Box<dyn Predictor>,
        shared: Arc<Shared>,
        options: QueueOptions,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { predictor, shared, options, metrics, busy: Vec::new() }
    }

    /// Computes until the queue is closed or the model fails.
    pub(crate) fn run(mut self) {
        // What a panic leaves behind is only told and dropped, never computed with.
        let ended = catch_unwind(AssertUnwindSafe(|| self.turns()));
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => self.shared.set_broken(reason),
            Err(payload) => self.shared.set_broken(format!("panicked: {}", text_of(&*payload))),
        }
        self.busy.drain(..).for_each(|job| job.refuse(Refusal::Broken));
        self.shared.refuse_all();
    }

    fn turns(&mut self) -> Result<(), String> {
        while self.shared.wait() {
            self.admit();
            let front = |jobs: &mut std::collections::VecDeque<Job>| jobs.front().map(images_ahead);
            let left = match self.shared.with_ready(front) {
                None => continue,
                Some(0) => self.generate(),
                Some(_) => self.predict()?,
            };
            // Whoever came meanwhile goes before those who have had a turn.
            self.admit();
            left.into_iter().for_each(|job| self.shared.ready(job));
        }
        Ok(())
    }

    /// Checks what has arrived, so that mistakes wait for nobody's computation but one piece.
    fn admit(&mut self) {
        while let Some(job) = self.shared.next_arrived() {
            self.busy.push(job);
            let mistake = self.busy.last().and_then(|job| {
                let mut requests = job.waiting().iter().enumerate();
                requests.find_map(|(at, request)| {
                    let error = self.predictor.check(request).err()?;
                    Some(Refusal::Mistake { at, error })
                })
            });
            let Some(job) = self.busy.pop() else { return };
            match mistake {
                Some(mistake) => job.refuse(mistake),
                None => self.shared.ready(job),
            }
        }
    }

    /// Computes a batch of images; returns the jobs that have more.
    fn predict(&mut self) -> Result<Vec<Job>, String> {
        let batch_max = self.options.batch_max;
        let deadline = Instant::now() + self.options.batch_wait;
        let waiting = |shared: &Shared| -> usize {
            shared.with_ready(|jobs| jobs.iter().map(images_ahead).sum())
        };
        while waiting(&self.shared) < batch_max && self.shared.wait_for_arrival(deadline) {
            self.admit();
        }
        self.busy = self.shared.with_ready(|jobs| {
            let run = jobs.iter().take_while(|job| images_ahead(job) > 0).count();
            jobs.drain(..run.min(batch_max)).collect()
        });
        let shares = shares(&self.busy.iter().map(images_ahead).collect::<Vec<_>>(), batch_max);
        let mut requests = Vec::with_capacity(batch_max);
        for (job, share) in self.busy.iter_mut().zip(&shares) {
            requests.extend(job.take(*share));
        }
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        self.metrics.batch(requests.len());
        let asked = requests.len();
        let answers = self.predictor.predict(requests);
        if answers.len() != asked {
            return Err(format!("gave {} answers to {asked} requests", answers.len()));
        }
        let mut answers = answers.into_iter();
        let jobs = self.busy.drain(..).zip(shares);
        let left = jobs.map(|(job, share)| job.absorb(answers.by_ref().take(share).collect()));
        Ok(left.flatten().collect())
    }

    /// Generates the next text of the first job; returns the job if it has more.
    fn generate(&mut self) -> Vec<Job> {
        self.busy = self.shared.with_ready(|jobs| jobs.pop_front()).into_iter().collect();
        let Some(Request::Generate(input)) = self.busy.first_mut().and_then(Job::next) else {
            return Vec::new();
        };
        let Some(job) = self.busy.first() else { return Vec::new() };
        self.metrics.batch(1);
        let ended = self.predictor.generate(&input, &mut |text| job.emit(text));
        self.busy.pop().and_then(|job| job.absorb(vec![ended])).into_iter().collect()
    }
}

/// Images among a job's next requests; 0: a text is next.
fn images_ahead(job: &Job) -> usize {
    job.waiting().iter().take_while(|request| matches!(request, Request::Image(_))).count()
}

/// Deals `max` places out, one each in turn, to jobs that could use `wanted` of them.
fn shares(wanted: &[usize], max: usize) -> Vec<usize> {
    let mut shares = vec![0; wanted.len()];
    let mut left = max.min(wanted.iter().sum());
    while left > 0 {
        for (share, wanted) in shares.iter_mut().zip(wanted) {
            if *share < *wanted && left > 0 {
                *share += 1;
                left -= 1;
            }
        }
    }
    shares
}

/// What a panic said.
fn text_of(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_dealt_evenly() {
        for (wanted, max, expected) in [
            (&[1024][..], 32, &[32][..]),
            (&[1024, 1, 1], 32, &[30, 1, 1]),
            (&[5, 5, 5], 7, &[3, 2, 2]),
            (&[1, 1, 1], 2, &[1, 1, 0]),
            (&[2, 3], 32, &[2, 3]),
            (&[], 32, &[]),
        ] {
            assert_eq!(shares(wanted, max), expected, "{wanted:?} of {max}");
        }
    }
}

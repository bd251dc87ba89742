//! The bounded queue between connections and the one thread that computes.
//!
//! A *job* is one body's requests on their way to answers. It waits here until it is picked, is
//! computed in pieces, and between two pieces waits here again, behind whoever came meanwhile; so
//! no body keeps the model for itself. What is done to jobs is in `compute`.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use algorithms::{GenerateInput, Predictor, Request, RequestError, Response};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::compute::Compute;
use crate::metrics::Metrics;

/// Pieces of a streamed text besides one a token: the rest of an unfinished character, and the end.
const STREAM_PIECES_SPARE: usize = 2;

/// Why a job has no answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The caller's mistake.
    Mistake {
        /// Which request of the body, from 0.
        at: usize,
        /// What is wrong with it.
        error: RequestError,
    },
    /// The model failed while it computed this job.
    Broken,
    /// The server stopped before the job's turn.
    Closed,
}

/// Answers in the order of the requests, or why there are none.
pub type Answer = Result<Vec<Response>, Refusal>;

/// A piece of a streamed answer.
#[derive(Debug)]
pub enum Piece {
    /// Some more text.
    Text(String),
    /// The end: the whole answer, or why there is none.
    End(Result<Response, Refusal>),
}

/// No room in the queue, or nobody computes any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Try again in a moment.
    Full,
    /// The server is stopping or broken.
    Closed,
}

/// How the computing thread batches.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Most requests computed together.
    pub batch_max: usize,
    /// Longest wait for others to join.
    pub batch_wait: Duration,
    /// Jobs that may wait.
    pub queue_max: usize,
}

/// Hands requests to the computing thread, which ends when this is dropped.
pub struct Queue {
    shared: Arc<Shared>,
}

impl Queue {
    /// Starts the computing thread around a model.
    pub fn start(
        predictor: Box<dyn Predictor>,
        options: QueueOptions,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            queue_max: options.queue_max.max(1),
            broken: CancellationToken::new(),
            broken_reason: OnceLock::new(),
        });
        let compute = Compute::new(predictor, Arc::clone(&shared), options, metrics);
        std::thread::Builder::new().name("predict".into()).spawn(move || compute.run())?;
        Ok(Self { shared })
    }

    /// Queues requests to be computed, together with others. `share` is what their body holds of
    /// the byte budget. Dropping the receiver gives the job up.
    pub fn ask(
        &self,
        requests: Vec<Request>,
        share: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<Answer>, Refused> {
        let (sender, receiver) = oneshot::channel();
        self.shared.add(Job::new(requests, Reply::Whole(sender), share))?;
        Ok(receiver)
    }

    /// Queues a text to be generated piece by piece. The channel has room for all of it: the model
    /// waits for no reader. Dropping the receiver ends the generation.
    pub fn stream(
        &self,
        input: GenerateInput,
        share: OwnedSemaphorePermit,
    ) -> Result<mpsc::Receiver<Piece>, Refused> {
        let (sender, receiver) = mpsc::channel(input.max_tokens as usize + STREAM_PIECES_SPARE);
        self.shared.add(Job::new(vec![Request::Generate(input)], Reply::Pieces(sender), share))?;
        Ok(receiver)
    }

    /// Jobs waiting now.
    pub fn depth(&self) -> usize {
        self.shared.lock().depth()
    }

    /// Cancelled when the model fails.
    pub fn broken(&self) -> &CancellationToken {
        &self.shared.broken
    }

    /// How the model failed, if it did.
    pub fn broken_reason(&self) -> Option<&str> {
        self.shared.broken_reason.get().map(String::as_str)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// One body's requests on their way to answers.
pub(crate) struct Job {
    requests: std::vec::IntoIter<Request>,
    answers: Vec<Response>,
    reply: Reply,
    /// Given back when the job is dropped.
    _share: OwnedSemaphorePermit,
}

enum Reply {
    Whole(oneshot::Sender<Answer>),
    Pieces(mpsc::Sender<Piece>),
}

impl Job {
    fn new(requests: Vec<Request>, reply: Reply, share: OwnedSemaphorePermit) -> Self {
        Self { requests: requests.into_iter(), answers: Vec::new(), reply, _share: share }
    }

    /// Requests not yet taken, in order.
    pub(crate) fn waiting(&self) -> &[Request] {
        self.requests.as_slice()
    }

    /// Takes the next request.
    pub(crate) fn next(&mut self) -> Option<Request> {
        self.requests.next()
    }

    /// Takes the next requests.
    pub(crate) fn take(&mut self, count: usize) -> impl Iterator<Item = Request> {
        self.requests.by_ref().take(count)
    }

    /// Whether the caller is gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.reply {
            Reply::Whole(sender) => sender.is_closed(),
            Reply::Pieces(sender) => sender.is_closed(),
        }
    }

    /// Hands over a piece of text; breaks when nobody waits for the rest.
    pub(crate) fn emit(&self, text: &str) -> ControlFlow<()> {
        let Reply::Pieces(sender) = &self.reply else {
            return if self.is_abandoned() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            };
        };
        // The last place is the end's; a model that emits more pieces than it was asked for tokens
        // is broken off.
        if sender.capacity() > 1 && sender.try_send(Piece::Text(text.to_owned())).is_ok() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }

    /// Takes the results of requests taken before. The job comes back while there are more; the
    /// first mistake ends it.
    pub(crate) fn absorb(mut self, results: Vec<Result<Response, RequestError>>) -> Option<Self> {
        for result in results {
            match result {
                Ok(answer) => self.answers.push(answer),
                Err(error) => {
                    let at = self.answers.len();
                    self.refuse(Refusal::Mistake { at, error });
                    return None;
                }
            }
        }
        if !self.waiting().is_empty() {
            return Some(self);
        }
        let answers = std::mem::take(&mut self.answers);
        self.finish(Ok(answers));
        None
    }

    /// Ends the job without answers.
    pub(crate) fn refuse(self, refusal: Refusal) {
        self.finish(Err(refusal));
    }

    fn finish(self, answer: Answer) {
        // Where the receiver is gone, so is the answer.
        match self.reply {
            Reply::Whole(sender) => {
                let _ = sender.send(answer);
            }
            Reply::Pieces(sender) => {
                let end = answer.and_then(|mut answers| answers.pop().ok_or(Refusal::Broken));
                let _ = sender.try_send(Piece::End(end));
            }
        }
    }
}

/// What connections and the computing thread share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something arrived, or the queue closed.
    changed: Condvar,
    queue_max: usize,
    broken: CancellationToken,
    broken_reason: OnceLock<String>,
}

#[derive(Default)]
struct State {
    /// Not yet looked at.
    arrived: VecDeque<Job>,
    /// Checked, some already computed in part; first come, first picked.
    ready: VecDeque<Job>,
    closed: bool,
}

impl State {
    fn depth(&self) -> usize {
        self.arrived.len() + self.ready.len()
    }

    fn forget_abandoned(&mut self) {
        self.arrived.retain(|job| !job.is_abandoned());
        self.ready.retain(|job| !job.is_abandoned());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, job: Job) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.depth() >= self.queue_max {
            state.forget_abandoned();
        }
        if state.depth() >= self.queue_max {
            return Err(Refused::Full);
        }
        state.arrived.push_back(job);
        self.changed.notify_one();
        Ok(())
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Waits for a job; false when the queue is closed.
    pub(crate) fn wait(&self) -> bool {
        let idle = |state: &mut State| state.depth() == 0 && !state.closed;
        let state = self.changed.wait_while(self.lock(), idle);
        !state.unwrap_or_else(PoisonError::into_inner).closed
    }

    /// Waits for an arrival until the deadline; whether there is one.
    pub(crate) fn wait_for_arrival(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let idle = |state: &mut State| state.arrived.is_empty() && !state.closed;
        let waited = self.changed.wait_timeout_while(self.lock(), left, idle);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !state.arrived.is_empty() && !state.closed
    }

    /// The next job that nobody has looked at.
    pub(crate) fn next_arrived(&self) -> Option<Job> {
        self.lock().arrived.pop_front()
    }

    /// Queues a job for computing. It was admitted once, so there is room: at most the jobs of one
    /// piece come on top of the bound.
    pub(crate) fn ready(&self, job: Job) {
        self.lock().ready.push_back(job);
    }

    /// Looks at the jobs that are ready, or takes some; those whose caller has left are gone.
    pub(crate) fn with_ready<T>(&self, work: impl FnOnce(&mut VecDeque<Job>) -> T) -> T {
        let mut state = self.lock();
        state.ready.retain(|job| !job.is_abandoned());
        work(&mut state.ready)
    }

    /// The model failed: nothing is computed any more. Whoever waits must be told after this.
    pub(crate) fn set_broken(&self, reason: String) {
        tracing::error!(reason, "the model failed");
        let _ = self.broken_reason.set(reason);
        self.close();
        self.broken.cancel();
    }

    /// Refuses everybody who still waits.
    pub(crate) fn refuse_all(&self) {
        self.close();
        let jobs: Vec<Job> = {
            let mut state = self.lock();
            let State { arrived, ready, .. } = &mut *state;
            arrived.drain(..).chain(ready.drain(..)).collect()
        };
        jobs.into_iter().for_each(|job| job.refuse(Refusal::Closed));
    }
}

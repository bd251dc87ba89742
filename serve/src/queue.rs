//! The bounded queue between connections and the one thread that computes, and its micro-batching:
//! the thread takes what is there, waits a moment for more, and computes them together.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use algorithms::{GenerateInput, Predictor, Request, RequestError, Response};
use tokio::sync::{mpsc, oneshot};

use crate::metrics::Metrics;

/// Pieces of text a slow reader may lag behind before generation waits for it.
const STREAM_PIECES_MAX: usize = 64;

/// Answers in the order of the requests.
pub type Answers = Vec<Result<Response, RequestError>>;

/// A piece of a streamed answer.
#[derive(Debug)]
pub enum Piece {
    /// Some more text.
    Text(String),
    /// The end: the whole answer, or why there is none.
    End(Result<Response, RequestError>),
}

enum Item {
    Batch { requests: Vec<Request>, reply: oneshot::Sender<Answers> },
    Stream { input: GenerateInput, pieces: mpsc::Sender<Piece> },
}

/// No room in the queue, or the computing thread is gone.
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
    /// Items that may wait.
    pub queue_max: usize,
}

/// Hands requests to the computing thread; cheap to clone.
#[derive(Clone)]
pub struct Queue {
    sender: mpsc::Sender<Item>,
}

impl Queue {
    /// Starts the computing thread around a model. It ends when every clone of the queue is gone.
    pub fn start(
        predictor: Box<dyn Predictor>,
        options: QueueOptions,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(options.queue_max.max(1));
        std::thread::Builder::new()
            .name("predict".into())
            .spawn(move || compute(predictor, receiver, options, &metrics))?;
        Ok(Self { sender })
    }

    /// Queues requests to be computed, together with others.
    pub fn ask(&self, requests: Vec<Request>) -> Result<oneshot::Receiver<Answers>, Refused> {
        let (reply, answers) = oneshot::channel();
        self.sender.try_send(Item::Batch { requests, reply }).map_err(refused)?;
        Ok(answers)
    }

    /// Queues a text to be generated piece by piece. Dropping the receiver ends the generation.
    pub fn stream(&self, input: GenerateInput) -> Result<mpsc::Receiver<Piece>, Refused> {
        let (pieces, receiver) = mpsc::channel(STREAM_PIECES_MAX);
        self.sender.try_send(Item::Stream { input, pieces }).map_err(refused)?;
        Ok(receiver)
    }

    /// Items waiting now.
    pub fn depth(&self) -> usize {
        self.sender.max_capacity() - self.sender.capacity()
    }
}

fn refused<T>(error: mpsc::error::TrySendError<T>) -> Refused {
    match error {
        mpsc::error::TrySendError::Full(_) => Refused::Full,
        mpsc::error::TrySendError::Closed(_) => Refused::Closed,
    }
}

fn compute(
    mut predictor: Box<dyn Predictor>,
    mut receiver: mpsc::Receiver<Item>,
    options: QueueOptions,
    metrics: &Metrics,
) {
    // An item taken while a batch was being gathered that does not fit into it.
    let mut held = None;
    while let Some(item) = held.take().or_else(|| receiver.blocking_recv()) {
        match item {
            Item::Stream { input, pieces } => generate(predictor.as_mut(), &input, &pieces),
            Item::Batch { requests, reply } => {
                let mut batch = vec![(requests, reply)];
                held = gather(&mut receiver, &mut batch, options);
                answer(predictor.as_mut(), batch, metrics);
            }
        }
    }
}

/// Adds waiting items to a batch until it is full, the wait is over, or a stream comes first.
fn gather(
    receiver: &mut mpsc::Receiver<Item>,
    batch: &mut Vec<(Vec<Request>, oneshot::Sender<Answers>)>,
    options: QueueOptions,
) -> Option<Item> {
    let deadline = Instant::now() + options.batch_wait;
    let mut count: usize = batch.iter().map(|(requests, _)| requests.len()).sum();
    while count < options.batch_max {
        match receiver.try_recv() {
            Ok(Item::Batch { requests, reply }) => {
                count += requests.len();
                batch.push((requests, reply));
            }
            Ok(stream) => return Some(stream),
            Err(mpsc::error::TryRecvError::Disconnected) => return None,
            Err(mpsc::error::TryRecvError::Empty) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return None;
                }
                // Short naps: the channel has no blocking receive with a deadline.
                std::thread::sleep(left.min(Duration::from_micros(100)));
            }
        }
    }
    None
}

fn answer(
    predictor: &mut dyn Predictor,
    batch: Vec<(Vec<Request>, oneshot::Sender<Answers>)>,
    metrics: &Metrics,
) {
    // Whoever has given up meanwhile is not computed.
    let batch: Vec<_> = batch.into_iter().filter(|(_, reply)| !reply.is_closed()).collect();
    let counts: Vec<usize> = batch.iter().map(|(requests, _)| requests.len()).collect();
    let (requests, replies): (Vec<Vec<Request>>, Vec<_>) = batch.into_iter().unzip();
    let requests: Vec<Request> = requests.into_iter().flatten().collect();
    if requests.is_empty() {
        return;
    }
    metrics.batch(requests.len());
    let mut answers = predictor.predict(requests).into_iter();
    for (reply, count) in replies.into_iter().zip(counts) {
        // The receiver may have gone; its answer is dropped.
        let _ = reply.send(answers.by_ref().take(count).collect());
    }
}

fn generate(predictor: &mut dyn Predictor, input: &GenerateInput, pieces: &mpsc::Sender<Piece>) {
    let ended = predictor.generate(input, &mut |text| match pieces
        .blocking_send(Piece::Text(text.to_owned()))
    {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    });
    let _ = pieces.blocking_send(Piece::End(ended));
}

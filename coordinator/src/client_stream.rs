//! Streams that outlive the coordinator that serves them: they reconnect and repeat nothing.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{Hash as _, Hasher as _};

use api::events::JobEvent;
use api::pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::ClusterClient;
use crate::client_error::{ClientError, is_retryable};

/// A job's log lines.
pub type LineStream = ReceiverStream<Result<pb::LogLine, ClientError>>;
/// A job's events.
pub type EventStream = ReceiverStream<Result<JobEvent, ClientError>>;

/// Items read ahead of the caller.
const AHEAD_MAX: usize = 64;
/// Events remembered to recognise repeated ones: more than a coordinator's window holds.
const REMEMBERED_MAX: usize = 2048;
/// Reconnections without a single item in between, after which a stream gives up. Each of them has
/// already tried every coordinator for the time of several elections.
const BARREN_MAX: u32 = 5;

/// Drops what was seen before.
trait Unseen<T> {
    fn is_new(&mut self, item: &T) -> bool;
}

/// The first sequence not seen yet, per (generation, rank).
#[derive(Default)]
struct LinesSeen {
    next: HashMap<(u64, u32), u64>,
}

impl Unseen<pb::LogLine> for LinesSeen {
    fn is_new(&mut self, line: &pb::LogLine) -> bool {
        let next = self.next.entry((line.generation, line.rank)).or_insert(0);
        if line.sequence < *next {
            return false;
        }
        *next = line.sequence.saturating_add(1);
        true
    }
}

/// Digests of the newest events. Two events are the same when their documents are: steps carry
/// timings, so different ones do not collide in practice, and the price of an error is one line.
#[derive(Default)]
struct EventsSeen {
    digests: HashSet<u64>,
    order: VecDeque<u64>,
    /// Only after a reconnection can events be repeated.
    reconnected: bool,
}

impl Unseen<pb::JobEvent> for EventsSeen {
    fn is_new(&mut self, event: &pb::JobEvent) -> bool {
        let mut hasher = DefaultHasher::new();
        event.json.hash(&mut hasher);
        let digest = hasher.finish();
        let is_new = self.digests.insert(digest);
        if is_new {
            self.order.push_back(digest);
            if self.order.len() > REMEMBERED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.digests.remove(&oldest);
            }
        }
        is_new || !self.reconnected
    }
}

pub(crate) async fn follow_lines(
    client: ClusterClient,
    request: pb::LogsRequest,
) -> Result<LineStream, ClientError> {
    let (sink, lines) = mpsc::channel(AHEAD_MAX);
    let mut stream = open_lines(&client, &request).await?;
    tokio::spawn(async move {
        let mut seen = LinesSeen::default();
        let mut barren = 0;
        loop {
            match pass_on(&mut stream, &mut seen, &sink, Ok, &mut barren).await {
                Passed::Ended => return,
                Passed::Lost => {}
            }
            match reopened(&sink, open_lines(&client, &request)).await {
                Some(next) => stream = next,
                None => return,
            }
        }
    });
    Ok(ReceiverStream::new(lines))
}

pub(crate) async fn follow_events(
    client: ClusterClient,
    request: pb::WatchRequest,
) -> Result<EventStream, ClientError> {
    let (sink, events) = mpsc::channel(AHEAD_MAX);
    let mut stream = open_events(&client, &request).await?;
    tokio::spawn(async move {
        let mut seen = EventsSeen::default();
        let mut barren = 0;
        loop {
            match pass_on(&mut stream, &mut seen, &sink, parse_event, &mut barren).await {
                Passed::Ended => return,
                Passed::Lost => seen.reconnected = true,
            }
            match reopened(&sink, open_events(&client, &request)).await {
                Some(next) => stream = next,
                None => return,
            }
        }
    });
    Ok(ReceiverStream::new(events))
}

async fn open_lines(
    client: &ClusterClient,
    request: &pb::LogsRequest,
) -> Result<Streaming<pb::LogLine>, ClientError> {
    client.call(request.clone(), async |mut rpc, r| rpc.logs(r).await).await
}

async fn open_events(
    client: &ClusterClient,
    request: &pb::WatchRequest,
) -> Result<Streaming<pb::JobEvent>, ClientError> {
    client.call(request.clone(), async |mut rpc, r| rpc.watch(r).await).await
}

fn parse_event(event: pb::JobEvent) -> Result<JobEvent, ClientError> {
    let parsed = serde_json::from_slice(&event.json);
    parsed.map_err(|error| ClientError::Protocol(format!("an event: {error}")))
}

/// How a connection ended.
enum Passed {
    /// The stream is complete, cannot go on, or its reader left.
    Ended,
    /// The coordinator was lost.
    Lost,
}

/// Passes on what is new until the connection ends.
async fn pass_on<W, T>(
    stream: &mut Streaming<W>,
    seen: &mut impl Unseen<W>,
    sink: &mpsc::Sender<Result<T, ClientError>>,
    convert: impl Fn(W) -> Result<T, ClientError>,
    barren: &mut u32,
) -> Passed {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            () = sink.closed() => return Passed::Ended,
        };
        match message {
            Ok(Some(item)) => {
                if !seen.is_new(&item) {
                    continue;
                }
                *barren = 0;
                if sink.send(convert(item)).await.is_err() {
                    return Passed::Ended;
                }
            }
            Ok(None) => return Passed::Ended,
            Err(status) if is_lost(&status) && *barren < BARREN_MAX => {
                *barren += 1;
                return Passed::Lost;
            }
            Err(status) if is_lost(&status) => {
                let text = format!("the stream broke off again and again: {}", status.message());
                let _ = sink.send(Err(ClientError::Unavailable(text))).await;
                return Passed::Ended;
            }
            Err(status) => {
                // The reader may have left.
                let _ = sink.send(Err(ClientError::refused(&status))).await;
                return Passed::Ended;
            }
        }
    }
}

/// A broken connection shows as one of the retryable codes, or as an internal error of the
/// transport.
fn is_lost(status: &Status) -> bool {
    is_retryable(status) || status.code() == tonic::Code::Internal
}

/// The next stream; `None` when there is none (the reader was told) or the reader left.
async fn reopened<W, T>(
    sink: &mpsc::Sender<Result<T, ClientError>>,
    open: impl Future<Output = Result<Streaming<W>, ClientError>>,
) -> Option<Streaming<W>> {
    let opened = tokio::select! {
        opened = open => opened,
        () = sink.closed() => return None,
    };
    match opened {
        Ok(stream) => Some(stream),
        Err(error) => {
            // The reader may have left.
            let _ = sink.send(Err(error)).await;
            None
        }
    }
}

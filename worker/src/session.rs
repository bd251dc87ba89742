//! The stream to the leading coordinator: hello, heartbeats, the ledger's messages one way, orders
//! the other. It finds the leader, and finds it again, for as long as the worker lives.
//!
//! Losing the stream changes nothing for running ranks. Nothing is removed from the ledger before
//! the leader has acknowledged it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::config::TlsSection;
use api::connect::{LEADER_KEY, TOKEN_KEY, endpoint, token_metadata};
use api::pb::worker_session_client::WorkerSessionClient;
use api::pb::{CoordinatorFrame, WorkerFrame};
use api::session::{CoordinatorMessage, MESSAGE_BYTES_MAX, WorkerHello, WorkerMessage};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming};
use tracing::{debug, error, info, warn};

use crate::error::WorkerError;
use crate::ledger::{Ledger, frame};

/// A coordinator that accepts the connection but does not answer the hello is given up.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause after every coordinator was tried in vain.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause: well below the grace period in which a new leader waits for its workers.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// An absence of the control plane this long is worth a warning.
const AWAY_WARNING: Duration = Duration::from_secs(5);
/// A leader that takes facts and acknowledges none lost its majority or hangs: look for another.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Probes notice a frozen or vanished leader before its successor's grace period ends.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3));
/// Followers may name each other while they hold an election; then it is time for a pause.
const HINTS_MAX: u32 = 3;
/// Frames between this and the connection; the ledger holds what does not fit.
const FRAME_QUEUE: usize = 64;
/// Shortest heartbeat interval taken from a welcome.
const HEARTBEAT_MIN: Duration = Duration::from_millis(10);
/// What the envelope around a message may add to it.
const ENVELOPE_BYTES: usize = 64 << 10;

/// What the session needs to know.
pub(crate) struct SessionOptions {
    /// Sent at each attach, with the inventory of that instant.
    pub(crate) hello: WorkerHello,
    /// Coordinators to try in turn.
    pub(crate) coordinators: Vec<SocketAddr>,
    pub(crate) tls: TlsSection,
}

/// How one attachment ended.
enum Ended {
    /// This worker stops.
    Stopped,
    /// Another coordinator leads.
    Elsewhere(SocketAddr),
    /// The cluster does not want this worker.
    Denied(String),
    /// Whatever else; worth another attempt.
    Lost(String),
}

pub(crate) struct Session {
    options: SessionOptions,
    ledger: Arc<Ledger>,
    orders: mpsc::Sender<CoordinatorMessage>,
    /// Whether any coordinator has ever welcomed this incarnation.
    was_welcome: bool,
    /// Since when no coordinator has answered, and whether that was said.
    away: Option<(Instant, bool)>,
}

impl Session {
    pub(crate) fn new(
        options: SessionOptions,
        ledger: Arc<Ledger>,
        orders: mpsc::Sender<CoordinatorMessage>,
    ) -> Self {
        Self { options, ledger, orders, was_welcome: false, away: None }
    }

    /// Attaches again and again until `stop`; fails only if the cluster refuses this worker.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Result<(), WorkerError> {
        let coordinators = self.options.coordinators.clone();
        let mut backoff = BACKOFF_MIN;
        let (mut next, mut hint, mut hints, mut tried) = (0, None, 0, 0);
        loop {
            let address = hint.take().unwrap_or_else(|| {
                next += 1;
                tried += 1;
                coordinators[(next - 1) % coordinators.len()]
            });
            let mut welcomed = false;
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = self.attach(address, &mut welcomed, &stop) => ended,
            };
            if welcomed {
                // A short pause all the same: this one may welcome and hang up again and again.
                (backoff, hints, tried) = (BACKOFF_MIN, 0, coordinators.len());
            }
            match ended {
                Ended::Stopped => return Ok(()),
                Ended::Denied(reason) if !self.was_welcome => {
                    return Err(WorkerError::Denied { reason });
                }
                Ended::Denied(reason) => {
                    // One coordinator with a wrong file must not end ranks that run well.
                    error!(%address, reason, "a coordinator refuses this worker; it goes on");
                }
                Ended::Elsewhere(leader) if hints < HINTS_MAX => {
                    debug!(%address, %leader, "sent on to the leader");
                    (hint, hints) = (Some(leader), hints + 1);
                    continue;
                }
                Ended::Elsewhere(_) => hints = 0,
                Ended::Lost(reason) => {
                    // A change of leader is over in a moment and worth no warning.
                    let (since, said) = self.away.get_or_insert((Instant::now(), false));
                    if !*said && since.elapsed() >= AWAY_WARNING {
                        warn!(%address, reason, "no session with a coordinator; ranks run on");
                        *said = true;
                    } else {
                        debug!(%address, reason, "no session with a coordinator");
                    }
                }
            }
            if tried >= coordinators.len() {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = sleep(backoff) => {}
                }
                backoff = (backoff * 2).min(BACKOFF_MAX);
                (tried, hints) = (0, 0);
            }
        }
    }

    async fn attach(
        &mut self,
        address: SocketAddr,
        welcomed: &mut bool,
        stop: &CancellationToken,
    ) -> Ended {
        let (frames, outbound) = mpsc::channel(FRAME_QUEUE);
        let opened = timeout(WELCOME_TIMEOUT, self.open(address, &frames, outbound)).await;
        let late = || Ended::Lost(format!("no welcome within {} s", WELCOME_TIMEOUT.as_secs()));
        let (inbound, heartbeat) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(ended)) => return ended,
            Err(_) => return late(),
        };
        (*welcomed, self.was_welcome, self.away) = (true, true, None);
        self.ledger.attached(true);
        let ended = self.converse(inbound, frames, heartbeat, stop).await;
        self.ledger.attached(false);
        ended
    }

    /// Says hello and waits for the welcome.
    async fn open(
        &self,
        address: SocketAddr,
        frames: &mpsc::Sender<WorkerFrame>,
        outbound: mpsc::Receiver<WorkerFrame>,
    ) -> Result<(Streaming<CoordinatorFrame>, Duration), Ended> {
        let lost = |error: &dyn std::error::Error| Ended::Lost(chain(error));
        let channel = endpoint(address, &self.options.tls)
            .map_err(|error| lost(&error))?
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1)
            .connect()
            .await
            .map_err(|error| lost(&error))?;
        let (sequence, tasks) = self.ledger.begin_session();
        let unhealthy = self.ledger.unhealthy();
        let hello = WorkerHello { tasks, unhealthy, ..self.options.hello.clone() };
        let first = frame(sequence, &WorkerMessage::Hello(Box::new(hello)));
        frames.send(first).await.map_err(|error| lost(&error))?;
        let mut request = Request::new(ReceiverStream::new(outbound));
        if let Some(token) = token_metadata(&self.options.hello.token) {
            request.metadata_mut().insert(TOKEN_KEY, token);
        }
        let mut inbound = WorkerSessionClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX + ENVELOPE_BYTES)
            .attach(request)
            .await
            .map_err(refused)?
            .into_inner();
        loop {
            let frame = inbound.message().await.map_err(refused)?;
            let Some(frame) = frame else {
                return Err(Ended::Lost("the coordinator closed the stream".into()));
            };
            if frame.json.is_empty() {
                continue;
            }
            return match decode(&frame)? {
                CoordinatorMessage::Welcome { node, heartbeat } => {
                    info!(%node, %address, "attached to the leader");
                    Ok((inbound, heartbeat.0.max(HEARTBEAT_MIN)))
                }
                _ => Err(Ended::Lost("the first message is not a welcome".into())),
            };
        }
    }

    async fn converse(
        &self,
        mut inbound: Streaming<CoordinatorFrame>,
        frames: mpsc::Sender<WorkerFrame>,
        heartbeat: Duration,
        stop: &CancellationToken,
    ) -> Ended {
        let mut changes = self.ledger.subscribe();
        let mut beats = interval(heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut acknowledged = Instant::now();
        loop {
            let has_unsent = self.ledger.has_unsent();
            tokio::select! {
                () = stop.cancelled() => return Ended::Stopped,
                received = inbound.message() => {
                    let frame = match received {
                        Ok(Some(frame)) => frame,
                        Ok(None) => return Ended::Lost("the coordinator closed the stream".into()),
                        Err(status) => return refused(status),
                    };
                    acknowledged = Instant::now();
                    self.ledger.acknowledge(frame.acknowledged);
                    if frame.json.is_empty() {
                        continue;
                    }
                    let message = match decode(&frame) {
                        Ok(message) => message,
                        Err(ended) => return ended,
                    };
                    if self.orders.send(message).await.is_err() {
                        return Ended::Stopped;
                    }
                }
                permit = frames.reserve(), if has_unsent => match permit {
                    Ok(permit) => {
                        if !self.ledger.awaits_acknowledgement() {
                            acknowledged = Instant::now();
                        }
                        if let Some(frame) = self.ledger.next_frame() {
                            permit.send(frame);
                        }
                    }
                    Err(_) => return Ended::Lost("the connection is gone".into()),
                },
                changed = changes.changed(), if !has_unsent => {
                    if changed.is_err() {
                        return Ended::Stopped;
                    }
                }
                _ = beats.tick() => {
                    let waits = self.ledger.awaits_acknowledgement();
                    if waits && acknowledged.elapsed() > ACKNOWLEDGE_TIMEOUT {
                        let seconds = ACKNOWLEDGE_TIMEOUT.as_secs();
                        return Ended::Lost(format!("nothing acknowledged for {seconds} s"));
                    }
                    // A full queue is about to say something anyway.
                    if let Ok(permit) = frames.try_reserve() {
                        permit.send(self.ledger.heartbeat());
                    }
                }
            }
        }
    }
}

fn decode(frame: &CoordinatorFrame) -> Result<CoordinatorMessage, Ended> {
    serde_json::from_slice(&frame.json).map_err(|error| {
        // A coordinator of another version; the next one may be ours.
        Ended::Lost(format!("a message from the coordinator cannot be read: {error}"))
    })
}

fn refused(status: Status) -> Ended {
    let leader = || status.metadata().get(LEADER_KEY)?.to_str().ok()?.parse().ok();
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => {
            Ended::Denied(status.message().to_owned())
        }
        Code::FailedPrecondition => match leader() {
            Some(address) => Ended::Elsewhere(address),
            None => Ended::Lost(format!("no leader is known: {}", status.message())),
        },
        code => Ended::Lost(format!("{code}: {}", status.message())),
    }
}

/// An error with its causes, because a transport error alone only says `transport error`.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        source = cause.source();
    }
    text
}

//! The HTTP face of one model: `GET /ping`, `POST /invocations`, `GET /metrics`.
//!
//! What a caller did wrong is answered 4xx with a JSON body that says what was found and expected;
//! a full queue is 503 with Retry-After; while stopping, running requests finish. A model that
//! fails on a request answers it 500, and then the server ends: `/ping` is 500 until it has.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use algorithms::{GenerateInput, Request, Response as Answer};
use api::config::ServeSection;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::body::{HeldBody, Intake, Unread};
use crate::connection::{self, ConnectionLimits, Ending};
use crate::error::ServeError;
use crate::metrics::{Metrics, Waiting};
use crate::model::LoadedModel;
use crate::queue::{Piece, Queue, QueueOptions, Refusal, Refused};
use crate::request::{accepts, check_tokens, parse_body, write_answers};

/// Connections besides those whose requests wait or are computed: uploads, health checks, scrapes,
/// and idle ones. With the default queue it makes about a thousand.
const CONNECTIONS_SPARE: usize = 768;

/// How a server runs.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen; port 0: any free one.
    pub listen: SocketAddr,
    /// Batching, bounds and time-outs.
    pub section: ServeSection,
}

/// A bound server, ready to run.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    limits: ConnectionLimits,
    state: Arc<ServerState>,
}

struct ServerState {
    queue: Queue,
    intake: Intake,
    metrics: Arc<Metrics>,
    types: Vec<String>,
    description: serde_json::Value,
    stopping: CancellationToken,
}

impl Server {
    /// Binds and starts the computing thread.
    pub async fn bind(options: ServerOptions, model: LoadedModel) -> Result<Self, ServeError> {
        let listen = options.listen;
        let unusable = |source| ServeError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(unusable)?;
        let address = listener.local_addr().map_err(unusable)?;
        let section = options.section;
        if section.threads > 0 {
            // Already started elsewhere in this process: then its size stands.
            let threads = section.threads as usize;
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
        let metrics = Arc::new(Metrics::default());
        let types = model.predictor.request_types();
        let description = serde_json::json!({
            "status": "ok", "algorithm": model.descriptor.algorithm, "sha256": model.sha256,
        });
        let queue_options = QueueOptions {
            batch_max: section.batch_max.max(1) as usize,
            batch_wait: section.batch_wait.0,
            queue_max: section.queue_max as usize,
        };
        let queue = Queue::start(model.predictor, queue_options, Arc::clone(&metrics))
            .map_err(|e| ServeError::Server(format!("cannot start the computing thread: {e}")))?;
        let intake = Intake::new(section.body_max.0, section.queue_bytes.0);
        let stopping = CancellationToken::new();
        let state = ServerState { queue, intake, metrics, types, description, stopping };
        let connections_max = queue_options.queue_max + queue_options.batch_max + CONNECTIONS_SPARE;
        let limits = ConnectionLimits::new(connections_max, section.drain_timeout.0);
        Ok(Self { listener, address, limits, state: Arc::new(state) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown`, or until the model fails, which is an error; then running requests
    /// get the drain time to finish.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let router = Router::new()
            .route("/ping", get(ping))
            .route("/invocations", post(invoke))
            .route("/metrics", get(render_metrics))
            .with_state(Arc::clone(&self.state));
        let broken = self.state.queue.broken().clone();
        let end = Ending { shutdown: self.state.stopping.clone(), broken };
        let serving = connection::serve(self.listener, router, self.limits, end);
        let mut serving = std::pin::pin!(serving);
        tokio::select! {
            () = &mut serving => {}
            () = shutdown.cancelled() => {
                self.state.stopping.cancel();
                serving.await;
            }
        }
        match self.state.queue.broken_reason() {
            Some(reason) => Err(ServeError::Model(reason.to_owned())),
            None => Ok(()),
        }
    }
}

async fn ping(State(state): State<Arc<ServerState>>) -> Response {
    if let Some(reason) = state.queue.broken_reason() {
        let text = format!("the model failed on a request and the server ends: it {reason}");
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, &text);
    }
    if state.stopping.is_cancelled() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping");
    }
    axum::Json(&state.description).into_response()
}

async fn render_metrics(State(state): State<Arc<ServerState>>) -> Response {
    let waiting = Waiting { depth: state.queue.depth(), bytes: state.intake.held_bytes() };
    let text = state.metrics.render(waiting);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// Counts a caller who leaves: its handler is dropped where it waits.
struct Attended<'a> {
    metrics: &'a Metrics,
    answered: bool,
}

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.metrics.abandoned();
        }
    }
}

async fn invoke(
    State(state): State<Arc<ServerState>>,
    request: axum::extract::Request,
) -> Response {
    let mut attended = Attended { metrics: &state.metrics, answered: false };
    let (head, body) = request.into_parts();
    let read = state.intake.read(&head.headers, body).await;
    let begin = Instant::now();
    let response = match read {
        Ok(body) => answer(&state, &head.headers, body).await,
        Err(unread) => refuse_unread(&unread),
    };
    attended.answered = true;
    state.metrics.answered(response.status().as_u16(), begin.elapsed());
    response
}

async fn answer(state: &ServerState, headers: &HeaderMap, body: HeldBody) -> Response {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json");
    let HeldBody { bytes, share } = body;
    let parsed = match parse_body(content_type, &bytes, &state.types) {
        Ok(parsed) => parsed,
        Err(error) if !accepts(content_type, &state.types) => {
            return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, &error.0);
        }
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.0),
    };
    // From here on the requests are what the share pays for.
    drop(bytes);
    if let Err(error) = check_tokens(&parsed.requests) {
        return refuse(StatusCode::BAD_REQUEST, &error.0);
    }
    if parsed.stream
        && let [Request::Generate(input)] = parsed.requests.as_slice()
    {
        return stream_text(state, input.clone(), share).await;
    }
    let (form, several) = (parsed.form, parsed.requests.len() > 1);
    let answers = match state.queue.ask(parsed.requests, share) {
        Ok(answers) => answers,
        Err(refused) => return refuse_queue(refused),
    };
    match answers.await.unwrap_or(Err(Refusal::Broken)) {
        Ok(answers) => {
            let (content_type, body) = write_answers(form, &answers);
            ([(header::CONTENT_TYPE, content_type)], body).into_response()
        }
        Err(refusal) => refuse_job(&refusal, several),
    }
}

/// Server-sent events: `{"text": …}` a piece, then the finish, then `[DONE]`.
async fn stream_text(
    state: &ServerState,
    input: GenerateInput,
    share: OwnedSemaphorePermit,
) -> Response {
    let mut pieces = match state.queue.stream(input, share) {
        Ok(pieces) => pieces,
        Err(refused) => return refuse_queue(refused),
    };
    // The first piece decides between an answer and an error.
    let first = match pieces.recv().await {
        Some(Piece::End(Err(refusal))) => return refuse_job(&refusal, false),
        Some(first) => first,
        None => return refuse_job(&Refusal::Broken, false),
    };
    let pieces = stream::iter([first]).chain(ReceiverStream::new(pieces));
    let events = pieces.flat_map(|piece| {
        let data = |value: serde_json::Value| Event::default().data(value.to_string());
        let events = match piece {
            Piece::Text(text) => vec![data(serde_json::json!({ "text": text }))],
            Piece::End(Ok(Answer::Text { tokens, finish_reason, .. })) => {
                let end = serde_json::json!({ "tokens": tokens, "finish_reason": finish_reason });
                vec![data(end), Event::default().data("[DONE]")]
            }
            Piece::End(Ok(Answer::Class { .. })) => vec![Event::default().data("[DONE]")],
            Piece::End(Err(refusal)) => {
                vec![data(serde_json::json!({ "error": describe(&refusal, false) }))]
            }
        };
        stream::iter(events.into_iter().map(Ok::<_, Infallible>))
    });
    Sse::new(events).into_response()
}

fn refuse(status: StatusCode, message: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": message }))).into_response()
}

fn retry_later(mut response: Response) -> Response {
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn refuse_unread(unread: &Unread) -> Response {
    let response = refuse(unread.status(), &unread.to_string());
    if matches!(unread, Unread::NoRoom) { retry_later(response) } else { response }
}

fn refuse_queue(refused: Refused) -> Response {
    let message = match refused {
        Refused::Full => "the queue is full: try again in a moment",
        Refused::Closed => "the server is stopping",
    };
    retry_later(refuse(StatusCode::SERVICE_UNAVAILABLE, message))
}

fn refuse_job(refusal: &Refusal, several: bool) -> Response {
    let message = describe(refusal, several);
    match refusal {
        Refusal::Mistake { .. } => refuse(StatusCode::BAD_REQUEST, &message),
        Refusal::Broken => refuse(StatusCode::INTERNAL_SERVER_ERROR, &message),
        Refusal::Closed => retry_later(refuse(StatusCode::SERVICE_UNAVAILABLE, &message)),
    }
}

fn describe(refusal: &Refusal, several: bool) -> String {
    match refusal {
        Refusal::Mistake { at, error } if several => format!("request {}: {error}", at + 1),
        Refusal::Mistake { error, .. } => error.to_string(),
        Refusal::Broken => {
            "the model failed while it computed this request: the server ends".into()
        }
        Refusal::Closed => "the server is stopping".into(),
    }
}

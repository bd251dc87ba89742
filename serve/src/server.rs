//! The HTTP face of one model: `GET /ping`, `POST /invocations`, `GET /metrics`.
//!
//! What a caller did wrong is answered 4xx with a JSON body that says what was found and expected;
//! a full queue is 503 with Retry-After; while stopping, running requests finish.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use algorithms::{GenerateInput, Request, Response as Answer};
use api::config::ServeSection;
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::model::LoadedModel;
use crate::queue::{Piece, Queue, QueueOptions, Refused};
use crate::request::{accepts, parse_body, write_answers};

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
    drain_timeout: Duration,
    body_max: usize,
    state: Arc<ServerState>,
}

struct ServerState {
    queue: Queue,
    metrics: Arc<Metrics>,
    types: Vec<String>,
    description: serde_json::Value,
    draining: AtomicBool,
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
        let draining = AtomicBool::new(false);
        let state = Arc::new(ServerState { queue, metrics, types, description, draining });
        Ok(Self {
            listener,
            address,
            drain_timeout: section.drain_timeout.0,
            body_max: section.body_max.0 as usize,
            state,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown`; then running requests get the drain time to finish.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let state = Arc::clone(&self.state);
        let router = Router::new()
            .route("/ping", get(ping))
            .route("/invocations", post(invoke))
            .route("/metrics", get(render_metrics))
            .layer(DefaultBodyLimit::max(self.body_max))
            .with_state(self.state);
        let stop = shutdown.clone();
        let begun = async move {
            stop.cancelled().await;
            state.draining.store(true, Ordering::Relaxed);
        };
        let serving = axum::serve(self.listener, router).with_graceful_shutdown(begun);
        let limit = async {
            shutdown.cancelled().await;
            tokio::time::sleep(self.drain_timeout).await;
        };
        tokio::select! {
            ended = serving.into_future() => {
                ended.map_err(|e| ServeError::Server(e.to_string()))
            }
            () = limit => {
                tracing::warn!("requests were still running after the drain time");
                Ok(())
            }
        }
    }
}

async fn ping(State(state): State<Arc<ServerState>>) -> Response {
    if state.draining.load(Ordering::Relaxed) {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping");
    }
    axum::Json(&state.description).into_response()
}

async fn render_metrics(State(state): State<Arc<ServerState>>) -> Response {
    let text = state.metrics.render(state.queue.depth());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn invoke(
    State(state): State<Arc<ServerState>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let begin = Instant::now();
    let response = answer(&state, &headers, body).await;
    state.metrics.answered(response.status().as_u16(), begin.elapsed());
    response
}

async fn answer(
    state: &ServerState,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(rejection) => return refuse(rejection.status(), &rejection.body_text()),
    };
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json");
    let parsed = match parse_body(content_type, &body, &state.types) {
        Ok(parsed) => parsed,
        Err(error) if !accepts(content_type, &state.types) => {
            return refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, &error.0);
        }
        Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.0),
    };
    if parsed.stream
        && let [Request::Generate(input)] = parsed.requests.as_slice()
    {
        return stream(state, input.clone());
    }
    let form = parsed.form;
    let answers = match state.queue.ask(parsed.requests) {
        Ok(answers) => answers,
        Err(refused) => return refuse_queue(refused),
    };
    let Ok(answers) = answers.await else {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, "the model failed on this request");
    };
    let several = answers.len() > 1;
    let mut good: Vec<Answer> = Vec::with_capacity(answers.len());
    for (at, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(answer) => good.push(answer),
            Err(error) if several => {
                let text = format!("request {}: {}", at + 1, error.0);
                return refuse(StatusCode::BAD_REQUEST, &text);
            }
            Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.0),
        }
    }
    let (content_type, body) = write_answers(form, &good);
    ([(header::CONTENT_TYPE, content_type)], body).into_response()
}

/// Server-sent events: `{"text": …}` a piece, then the finish, then `[DONE]`.
fn stream(state: &ServerState, input: GenerateInput) -> Response {
    let pieces = match state.queue.stream(input) {
        Ok(pieces) => pieces,
        Err(refused) => return refuse_queue(refused),
    };
    let events = ReceiverStream::new(pieces).flat_map(|piece| {
        let data = |value: serde_json::Value| Event::default().data(value.to_string());
        let events = match piece {
            Piece::Text(text) => vec![data(serde_json::json!({ "text": text }))],
            Piece::End(Ok(Answer::Text { tokens, finish_reason, .. })) => {
                let end = serde_json::json!({ "tokens": tokens, "finish_reason": finish_reason });
                vec![data(end), Event::default().data("[DONE]")]
            }
            Piece::End(Ok(Answer::Class { .. })) => vec![Event::default().data("[DONE]")],
            Piece::End(Err(error)) => vec![data(serde_json::json!({ "error": error.0 }))],
        };
        futures::stream::iter(events.into_iter().map(Ok::<_, Infallible>))
    });
    Sse::new(events).into_response()
}

fn refuse(status: StatusCode, message: &str) -> Response {
    (status, axum::Json(serde_json::json!({ "error": message }))).into_response()
}

fn refuse_queue(refused: Refused) -> Response {
    let mut response = match refused {
        Refused::Full => {
            refuse(StatusCode::SERVICE_UNAVAILABLE, "the queue is full: try again in a moment")
        }
        Refused::Closed => refuse(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"),
    };
    response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    response
}

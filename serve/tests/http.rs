//! The HTTP face against a small model of its own: forms, mistakes, batching, a full queue,
//! streaming and graceful shutdown, all over real sockets.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use algorithms::{
    GenerateInput, ImageInput, ModelDescriptor, Predictor, Request, RequestError, Response,
};
use api::config::ServeSection;
use api::units::{ByteSize, Span};
use serve::{LoadedModel, Server, ServerOptions};
use tokio_util::sync::CancellationToken;

/// Nothing here takes long; a hang fails instead of blocking the run.
const GUARD: Duration = Duration::from_secs(30);

/// A gate that the model waits at, so that tests decide when it computes.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, Vec<usize>)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self, batch: usize) {
        let mut state = self.state.lock().expect("not poisoned");
        state.1.push(batch);
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, GUARD, |s| s.0).expect("not poisoned");
        assert!(!waited.1.timed_out(), "the gate stayed shut");
    }

    fn set_shut(&self, shut: bool) {
        self.state.lock().expect("not poisoned").0 = shut;
        self.changed.notify_all();
    }

    fn wait_for_batch(&self) {
        let state = self.state.lock().expect("not poisoned");
        let waited = self
            .changed
            .wait_timeout_while(state, GUARD, |s| s.1.is_empty())
            .expect("not poisoned");
        assert!(!waited.1.timed_out(), "no batch arrived");
    }

    fn batches(&self) -> Vec<usize> {
        self.state.lock().expect("not poisoned").1.clone()
    }
}

/// Sums pixels; spells prompts letter by letter.
struct Summer(Arc<Gate>);

impl Predictor for Summer {
    fn predict(&mut self, requests: Vec<Request>) -> Vec<Result<Response, RequestError>> {
        self.0.pass(requests.len());
        requests
            .iter()
            .map(|request| {
                self.check(request)?;
                match request {
                    Request::Image(ImageInput::Pixels(pixels)) => Ok(Response::Class {
                        label: pixels.iter().sum::<f32>().to_string(),
                        probability: 1.0,
                        probabilities: Vec::new(),
                    }),
                    _ => Err(RequestError("expected pixels".into())),
                }
            })
            .collect()
    }

    fn generate(
        &mut self,
        input: &GenerateInput,
        emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Response, RequestError> {
        let mut text = String::new();
        for letter in input.prompt.chars() {
            text.push(letter);
            if emit(&letter.to_string()).is_break() {
                break;
            }
        }
        let tokens = text.len() as u32;
        Ok(Response::Text { text, tokens, finish_reason: "length".into() })
    }

    fn request_types(&self) -> Vec<String> {
        ["application/json", "application/jsonlines", "text/csv"].map(String::from).to_vec()
    }

    fn check(&self, request: &Request) -> Result<(), RequestError> {
        match request {
            Request::Image(ImageInput::Pixels(pixels)) if pixels.len() != 2 => {
                Err(RequestError(format!("found {} pixels, expected 2", pixels.len())))
            }
            _ => Ok(()),
        }
    }
}

struct Running {
    url: String,
    gate: Arc<Gate>,
    shutdown: CancellationToken,
    server: tokio::task::JoinHandle<Result<(), serve::ServeError>>,
    client: reqwest::Client,
}

async fn start(section: ServeSection) -> Running {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let gate = Arc::new(Gate::default());
    let descriptor = ModelDescriptor {
        algorithm: "summer".into(),
        version: 1,
        parameters: serde_json::Value::Null,
    };
    let predictor = Box::new(Summer(Arc::clone(&gate)));
    let model = LoadedModel { descriptor, predictor, sha256: "00".into() };
    let listen = "127.0.0.1:0".parse().expect("an address");
    let server = Server::bind(ServerOptions { listen, section }, model).await.expect("bound");
    let url = format!("http://{}", server.address());
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(server.run(shutdown.clone()));
    Running { url, gate, shutdown, server, client: reqwest::Client::new() }
}

impl Running {
    async fn post(&self, content_type: &str, body: &str) -> (u16, String) {
        let sent = self
            .client
            .post(format!("{}/invocations", self.url))
            .header("content-type", content_type)
            .body(body.to_owned())
            .send();
        let answer = tokio::time::timeout(GUARD, sent).await.expect("in time").expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let sent = self.client.get(format!("{}{path}", self.url)).send();
        let answer = tokio::time::timeout(GUARD, sent).await.expect("in time").expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("a body"))
    }

    async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(GUARD, self.server).await.expect("in time");
        ended.expect("no panic").expect("a clean end");
    }
}

#[tokio::test]
async fn forms_and_mistakes() {
    let section = ServeSection { body_max: ByteSize(4096), ..ServeSection::default() };
    let running = start(section).await;
    let (status, body) = running.get("/ping").await;
    assert!(status == 200 && body.contains("summer"), "{status} {body}");

    let (status, body) = running.post("application/json", r#"{"pixels":[1,2]}"#).await;
    assert!(status == 200 && body.contains(r#""label":"3""#), "{status} {body}");
    let (status, body) = running.post("text/csv", "1,2\n3,4\n").await;
    assert_eq!((status, body.as_str()), (200, "3,1\n7,1\n"));
    let lines = "{\"pixels\":[1,1]}\n{\"pixels\":[2,2]}\n";
    let (status, body) = running.post("application/jsonlines", lines).await;
    assert!(status == 200 && body.lines().count() == 2, "{status} {body}");

    for (content_type, body, expected_status, expected) in [
        ("application/json", "{", 400, "not JSON"),
        ("application/json", r#"{"pixels":[1]}"#, 400, "found 1 pixels, expected 2"),
        ("application/xml", "<a/>", 415, "not one this model reads"),
        ("text/csv", "1,x\n", 400, "row 1, column 2"),
    ] {
        let (status, answer) = running.post(content_type, body).await;
        assert_eq!(status, expected_status, "{answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("a JSON error");
        assert!(answer["error"].as_str().expect("a text").contains(expected), "{answer}");
    }
    let (status, answer) = running.post("text/csv", &"1,".repeat(4096)).await;
    assert!(status == 413 && answer.contains("error"), "{status} {answer}");
    assert_eq!(running.get("/nowhere").await.0, 404);

    let (_, metrics) = running.get("/metrics").await;
    assert!(metrics.contains("cohort_serve_responses_total{status=\"415\"} 1"), "{metrics}");
    running.stop().await;
}

#[tokio::test]
async fn waiting_requests_are_computed_together_and_a_full_queue_is_refused() {
    let section =
        ServeSection { queue_max: 3, batch_wait: Span::millis(0), ..ServeSection::default() };
    let running = Arc::new(start(section).await);
    running.gate.set_shut(true);
    let ask = |n: u32| {
        let running = Arc::clone(&running);
        tokio::spawn(async move {
            running.post("application/json", &format!(r#"{{"pixels":[{n},0]}}"#)).await
        })
    };
    let first = ask(0);
    let gate = Arc::clone(&running.gate);
    tokio::task::spawn_blocking(move || gate.wait_for_batch()).await.expect("no panic");
    // The model holds the first; three more fill the queue, in any order of arrival.
    let mut waiting: Vec<_> = (1..4).map(&ask).collect();
    let full = tokio::time::timeout(GUARD, async {
        loop {
            let (_, metrics) = running.get("/metrics").await;
            if metrics.contains("cohort_serve_queue_depth 3") {
                return running.post("application/json", r#"{"pixels":[9,0]}"#).await;
            }
        }
    });
    let (status, body) = full.await.expect("the queue fills");
    assert!(status == 503 && body.contains("queue is full"), "{status} {body}");
    running.gate.set_shut(false);
    waiting.push(first);
    for answer in waiting {
        assert_eq!(answer.await.expect("no panic").0, 200);
    }
    assert_eq!(running.gate.batches(), [1, 3], "the three that waited were one batch");
    Arc::into_inner(running).expect("the last owner").stop().await;
}

#[tokio::test]
async fn text_is_streamed_and_running_requests_finish_at_shutdown() {
    let running = start(ServeSection::default()).await;
    let (status, body) = running.post("application/json", r#"{"prompt":"hi","stream":true}"#).await;
    assert_eq!(status, 200);
    let data: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data[..2], [r#"{"text":"h"}"#, r#"{"text":"i"}"#], "{body}");
    assert_eq!(data.last(), Some(&"[DONE]"), "{body}");

    running.gate.set_shut(true);
    let client = running.client.clone();
    let url = format!("{}/invocations", running.url);
    let slow = tokio::spawn(async move {
        client.post(url).body(r#"{"pixels":[5,5]}"#).send().await.expect("an answer").status()
    });
    let gate = Arc::clone(&running.gate);
    tokio::task::spawn_blocking(move || gate.wait_for_batch()).await.expect("no panic");
    running.shutdown.cancel();
    running.gate.set_shut(false);
    assert_eq!(slow.await.expect("no panic"), 200);
    running.stop().await;
}

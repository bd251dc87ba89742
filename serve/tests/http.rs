//! The HTTP face against a small model of its own: forms, mistakes, batching, a full queue,
//! streaming and graceful shutdown, all over real sockets.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use algorithms::{
    GenerateInput, ImageInput, ModelDescriptor, Predictor, Request, RequestError, Response,
};
use api::config::ServeSection;
use api::units::{ByteSize, Span};
use serve::{LoadedModel, Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// Nothing here takes long; a hang fails instead of blocking the run.
const GUARD: Duration = Duration::from_secs(30);

/// A gate that the model waits at, so that tests decide when it computes.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shut: bool,
    /// The sums, or the prompt, of everything that came to the gate.
    batches: Vec<Vec<String>>,
}

impl Gate {
    fn pass(&self, batch: Vec<String>) {
        let mut state = self.state.lock().expect("not poisoned");
        state.batches.push(batch);
        self.changed.notify_all();
        let waited =
            self.changed.wait_timeout_while(state, GUARD, |s| s.shut).expect("not poisoned");
        assert!(!waited.1.timed_out(), "the gate stayed shut");
    }

    fn set_shut(&self, shut: bool) {
        self.state.lock().expect("not poisoned").shut = shut;
        self.changed.notify_all();
    }

    fn batches(&self) -> Vec<Vec<String>> {
        self.state.lock().expect("not poisoned").batches.clone()
    }
}

/// Sums pixels; spells prompts letter by letter. It fails on a sum of 666.
struct Summer(Arc<Gate>);

fn sum(request: &Request) -> String {
    match request {
        Request::Image(ImageInput::Pixels(pixels)) => pixels.iter().sum::<f32>().to_string(),
        other => panic!("not pixels: {other:?}"),
    }
}

impl Predictor for Summer {
    fn predict(&mut self, requests: Vec<Request>) -> Vec<Result<Response, RequestError>> {
        let sums: Vec<String> = requests.iter().map(sum).collect();
        self.0.pass(sums.clone());
        assert!(!sums.contains(&"666".into()), "the number of the beast");
        let class = |label| Response::Class { label, probability: 1.0, probabilities: Vec::new() };
        sums.into_iter().map(|label| Ok(class(label))).collect()
    }

    /// `endless` goes on until nobody listens, `flood` gives a megabyte per token.
    fn generate(
        &mut self,
        input: &GenerateInput,
        emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Response, RequestError> {
        self.0.pass(vec![input.prompt.clone()]);
        let mut text = String::new();
        match input.prompt.as_str() {
            "endless" => {
                let begin = Instant::now();
                while emit("x").is_continue() {
                    assert!(begin.elapsed() < GUARD, "nobody ended it");
                    std::thread::yield_now();
                }
            }
            "flood" => {
                let piece = "x".repeat(1 << 20);
                for _ in 0..input.max_tokens {
                    assert!(emit(&piece).is_continue(), "there is room for what was asked");
                }
            }
            prompt => {
                for letter in prompt.chars() {
                    text.push(letter);
                    if emit(&letter.to_string()).is_break() {
                        break;
                    }
                }
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
            Request::Generate(input) if input.prompt.is_empty() => {
                Err(RequestError("the prompt is empty".into()))
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

    /// Posts from a task of its own, which can be aborted: then the connection closes.
    fn ask(&self, body: String) -> tokio::task::JoinHandle<(u16, String)> {
        let (client, url) = (self.client.clone(), format!("{}/invocations", self.url));
        tokio::spawn(async move {
            let sent = client.post(url).body(body).send();
            let answer = tokio::time::timeout(GUARD, sent).await.expect("in time").expect("sent");
            (answer.status().as_u16(), answer.text().await.expect("a body"))
        })
    }

    /// Waits until so many batches have come to the gate.
    async fn wait_for_batches(&self, count: usize) {
        let gate = Arc::clone(&self.gate);
        let waited = tokio::task::spawn_blocking(move || {
            let state = gate.state.lock().expect("not poisoned");
            let few = |s: &mut GateState| s.batches.len() < count;
            gate.changed.wait_timeout_while(state, GUARD, few).expect("not poisoned").1.timed_out()
        });
        assert!(!waited.await.expect("no panic"), "no batch arrived");
    }

    /// Waits until a counter or gauge has a value.
    async fn wait_for_metric(&self, line: &str) {
        let seen = async {
            while !self.get("/metrics").await.1.lines().any(|found| found == line) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(GUARD, seen).await.unwrap_or_else(|_| panic!("never `{line}`"));
    }

    /// A connection of its own, with something already sent on it.
    async fn connect(&self, sent: &str) -> TcpStream {
        let address = self.url.strip_prefix("http://").expect("a URL");
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(sent.as_bytes()).await.expect("sent");
        stream
    }

    async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(GUARD, self.server).await.expect("in time");
        ended.expect("no panic").expect("a clean end");
    }
}

/// Reads until the end of a text has arrived.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&text).contains(end) {
            let byte = stream.read_u8().await.expect("more to come");
            text.push(byte);
        }
    };
    tokio::time::timeout(GUARD, read).await.expect("in time");
    String::from_utf8_lossy(&text).into_owned()
}

/// A body of several images with the sums given.
fn instances(sums: impl Iterator<Item = usize>) -> String {
    let pixels: Vec<String> = sums.map(|sum| format!(r#"{{"pixels":[{sum},0]}}"#)).collect();
    format!(r#"{{"instances":[{}]}}"#, pixels.join(","))
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
        ("text/csv", "1,2\n1\n", 400, "request 2: found 1 pixels"),
        ("application/json", r#"{"prompt":"","stream":true}"#, 400, "the prompt is empty"),
        ("application/json", r#"{"prompt":"a","max_tokens":70000}"#, 400, "at most 65536"),
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
    let running = start(section).await;
    running.gate.set_shut(true);
    let ask = |n: usize| running.ask(format!(r#"{{"pixels":[{n},0]}}"#));
    let first = ask(0);
    running.wait_for_batches(1).await;
    // The model holds the first; three more fill the queue, in any order of arrival.
    let mut waiting: Vec<_> = (1..4).map(&ask).collect();
    running.wait_for_metric("cohort_serve_queue_depth 3").await;
    let (status, body) = running.post("application/json", r#"{"pixels":[9,0]}"#).await;
    assert!(status == 503 && body.contains("queue is full"), "{status} {body}");
    // One of them gives up: its place is free although the model is still busy.
    waiting.remove(0).abort();
    running.wait_for_metric("cohort_serve_abandoned_total 1").await;
    assert!(running.get("/metrics").await.1.contains("cohort_serve_queue_bytes 4096"));
    let two_units = format!(r#"{{"pixels":[4,0]{}}}"#, " ".repeat(1500));
    waiting.push(running.ask(two_units));
    running.wait_for_metric("cohort_serve_queue_bytes 5120").await;
    running.gate.set_shut(false);
    waiting.push(first);
    for answer in waiting {
        assert_eq!(answer.await.expect("no panic").0, 200);
    }
    let sizes: Vec<usize> = running.gate.batches().iter().map(Vec::len).collect();
    assert_eq!(sizes, [1, 3], "the three that waited were one batch");
    running.stop().await;
}

#[tokio::test]
async fn an_abandoned_body_is_computed_no_further() {
    let section =
        ServeSection { batch_max: 4, batch_wait: Span::millis(0), ..ServeSection::default() };
    let running = start(section).await;
    running.gate.set_shut(true);
    let large = running.ask(instances(0..1024));
    running.wait_for_batches(1).await;
    large.abort();
    running.wait_for_metric("cohort_serve_abandoned_total 1").await;
    let small = running.ask(r#"{"pixels":[7,0]}"#.into());
    running.wait_for_metric("cohort_serve_queue_depth 1").await;
    running.gate.set_shut(false);
    assert_eq!(small.await.expect("no panic").0, 200);
    assert_eq!(running.gate.batches(), [vec!["0", "1", "2", "3"], vec!["7"]]);
    running.wait_for_metric("cohort_serve_queue_bytes 0").await;

    // A text ends at the next token, and those after it are not begun.
    let texts = r#"{"instances":[{"prompt":"endless"},{"prompt":"never"}]}"#;
    let large = running.ask(texts.into());
    running.wait_for_batches(3).await;
    large.abort();
    let (status, body) = running.post("application/json", r#"{"prompt":"next"}"#).await;
    assert!(status == 200 && body.contains(r#""text":"next""#), "{status} {body}");
    assert_eq!(running.gate.batches()[2..], [vec!["endless"], vec!["next"]]);
    running.stop().await;
}

#[tokio::test]
async fn a_large_body_shares_the_model_with_small_ones() {
    let section =
        ServeSection { batch_max: 4, batch_wait: Span::millis(0), ..ServeSection::default() };
    let running = start(section).await;
    running.gate.set_shut(true);
    let large = running.ask(instances(0..9));
    running.wait_for_batches(1).await;
    let small = running.ask(instances(70..72));
    let bad = running.ask(r#"{"pixels":[1,2,3]}"#.into());
    running.wait_for_metric("cohort_serve_queue_depth 2").await;
    running.gate.set_shut(false);
    let (status, body) = large.await.expect("no panic");
    let labels: Vec<usize> =
        (0..9).filter(|n| body.contains(&format!(r#""label":"{n}""#))).collect();
    assert_eq!((status, labels.len()), (200, 9), "{body}");
    assert_eq!(small.await.expect("no panic").0, 200);
    assert_eq!(bad.await.expect("no panic").0, 400);
    let expected = [vec!["0", "1", "2", "3"], vec!["70", "71", "4", "5"], vec!["6", "7", "8"]];
    assert_eq!(running.gate.batches(), expected, "the small body went first, with a share each");

    // Texts: one each in turn.
    running.gate.set_shut(true);
    let texts = r#"{"instances":[{"prompt":"a"},{"prompt":"b"},{"prompt":"c"}]}"#;
    let large = running.ask(texts.into());
    running.wait_for_batches(4).await;
    let small = running.ask(r#"{"prompt":"small"}"#.into());
    running.wait_for_metric("cohort_serve_queue_depth 1").await;
    running.gate.set_shut(false);
    assert_eq!(large.await.expect("no panic").0, 200);
    assert_eq!(small.await.expect("no panic").0, 200);
    assert_eq!(running.gate.batches()[3..], [["a"], ["small"], ["b"], ["c"]]);
    running.stop().await;
}

#[tokio::test]
async fn bodies_beyond_the_byte_budget_are_refused_before_they_are_read() {
    let section = ServeSection {
        body_max: ByteSize(4 << 10),
        queue_bytes: ByteSize(8 << 10),
        ..ServeSection::default()
    };
    let running = start(section).await;
    running.gate.set_shut(true);
    let body = instances(100..300);
    assert!((3073..=4096).contains(&body.len()), "{} bytes, four units", body.len());
    let first = running.ask(body.clone());
    running.wait_for_batches(1).await;
    let second = running.ask(body.clone());
    running.wait_for_metric("cohort_serve_queue_bytes 8192").await;

    let (status, answer) = running.post("application/json", r#"{"pixels":[9,0]}"#).await;
    assert!(status == 503 && answer.contains("serve.queue_bytes"), "{status} {answer}");
    // Whoever asks first is answered before it sends; a body of unknown length is no way around.
    for length in ["content-length: 4000", "transfer-encoding: chunked"] {
        let head = format!(
            "POST /invocations HTTP/1.1\r\nhost: x\r\n{length}\r\nexpect: 100-continue\r\n\r\n"
        );
        let answer = read_until(&mut running.connect(&head).await, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("retry-after: 1"), "{answer}");
    }
    running.gate.set_shut(false);
    assert_eq!(first.await.expect("no panic").0, 200);
    assert_eq!(second.await.expect("no panic").0, 200);
    running.wait_for_metric("cohort_serve_queue_bytes 0").await;
    assert_eq!(running.post("application/json", &body).await.0, 200, "there is room again");
    running.stop().await;
}

#[tokio::test]
async fn a_model_that_panics_ends_the_server() {
    let running = start(ServeSection::default()).await;
    running.gate.set_shut(true);
    let fatal = running.ask(r#"{"pixels":[666,0]}"#.into());
    running.wait_for_batches(1).await;
    let waiting = running.ask(r#"{"pixels":[1,0]}"#.into());
    running.wait_for_metric("cohort_serve_queue_depth 1").await;
    // An upload that has begun keeps the server from ending before the test has asked it.
    let head = "POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: 16\r\n\
                expect: 100-continue\r\n\r\n";
    let mut upload = running.connect(head).await;
    read_until(&mut upload, "100 Continue\r\n\r\n").await;
    running.gate.set_shut(false);

    let (status, body) = fatal.await.expect("no panic");
    assert!(status == 500 && body.contains("the model failed"), "{status} {body}");
    let (status, body) = waiting.await.expect("no panic");
    assert!(status == 503 && body.contains("stopping"), "{status} {body}");
    let (status, body) = running.get("/ping").await;
    assert!(status == 500 && body.contains("the number of the beast"), "{status} {body}");
    assert!(!running.server.is_finished(), "the upload still runs");
    upload.write_all(br#"{"pixels":[1,0]}"#).await.expect("sent");
    let answer = read_until(&mut upload, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");

    let ended = tokio::time::timeout(GUARD, running.server).await.expect("in time");
    let error = ended.expect("no panic").expect_err("the process must fail");
    assert!(error.to_string().contains("panicked: the number of the beast"), "{error}");
    assert_eq!(error.exit_class(), api::ExitClass::Internal);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_holds_nobody_up() {
    let running = start(ServeSection::default()).await;
    // Far more than the buffers of two sockets hold.
    let body = r#"{"prompt":"flood","max_tokens":64,"stream":true}"#;
    let length = body.len();
    let head = format!("POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    let mut stalled = running.connect(&format!("{head}{body}")).await;
    running.wait_for_batches(1).await;
    let (status, body) = running.post("application/json", r#"{"prompt":"next"}"#).await;
    assert!(status == 200 && body.contains(r#""text":"next""#), "{status} {body}");
    // Nothing is lost for a reader who was only slow.
    let text = read_until(&mut stalled, "\r\n\r\n").await;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let mut rest = Vec::new();
    let mut chunk = vec![0; 1 << 20];
    let read = async {
        while !rest.ends_with(b"[DONE]\n\n\r\n0\r\n\r\n") {
            let count = stalled.read(&mut chunk).await.expect("more to come");
            assert!(count > 0, "the stream was cut off");
            rest.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(GUARD, read).await.expect("in time");
    assert!(rest.len() > 64 << 20, "{} bytes", rest.len());
    running.stop().await;
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
    running.wait_for_batches(1).await;
    running.shutdown.cancel();
    running.gate.set_shut(false);
    assert_eq!(slow.await.expect("no panic"), 200);
    running.stop().await;
}

//! Metadata servers of three providers in one, for tests: they speak the real protocols and refuse what
//! the real ones refuse. Also used by the tests of the whole worker.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How the server behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Normal,
    /// Answers with what no metadata server says.
    Garbage,
    /// Takes the question and never answers.
    Hangs,
    /// Status 500.
    Broken,
}

/// What the server tells.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub mood: Mood,
    /// AWS: the token in force, by its number.
    pub token: u32,
    /// AWS: spot/instance-action.
    pub action: Option<String>,
    /// AWS: the recommendation to rebalance.
    pub rebalance: Option<String>,
    /// GCP: instance/preempted.
    pub preempted: bool,
    /// GCP: instance/maintenance-event.
    pub maintenance: Option<String>,
    /// Azure: the events, without the brackets.
    pub events: String,
}

/// A running server.
pub struct Fake {
    pub endpoint: String,
    told: watch::Sender<Told>,
    /// Every question, as "GET /path" with its body.
    questions: mpsc::UnboundedReceiver<String>,
    server: JoinHandle<()>,
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let (told, receiver) = watch::channel(Told::default());
        let (sender, questions) = mpsc::unbounded_channel();
        let server = tokio::spawn(async move {
            let connections = Arc::new(Mutex::new(Vec::new()));
            loop {
                let (stream, _) = listener.accept().await.expect("accepts");
                let served = tokio::spawn(serve(stream, receiver.clone(), sender.clone()));
                let guard = tokio_util::task::AbortOnDropHandle::new(served);
                connections.lock().expect("no panic").push(guard);
            }
        });
        Self { endpoint, told, questions, server }
    }

    pub fn tell(&self, change: impl FnOnce(&mut Told)) {
        self.told.send_modify(change);
    }

    /// Waits for the next question that begins like this; the question.
    pub async fn asked(&mut self, begin: &str) -> String {
        let wait = async {
            loop {
                let question = self.questions.recv().await.expect("the server runs");
                if question.starts_with(begin) {
                    return question;
                }
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
        waited.unwrap_or_else(|_| panic!("nobody asks `{begin}`"))
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(
    stream: TcpStream,
    told: watch::Receiver<Told>,
    questions: mpsc::UnboundedSender<String>,
) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let (told, questions) = (told.clone(), questions.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = read(body).await;
            let header = |name: &str| {
                head.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
            };
            let path = head.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
            let _ = questions.send(format!("{} {path} {body}", head.method));
            let mood = told.borrow().mood;
            let (status, etag, text) = match mood {
                Mood::Hangs => std::future::pending().await,
                Mood::Broken => (500, None, "oh".to_owned()),
                Mood::Garbage => (200, None, "<html>not what you look for</html>".to_owned()),
                Mood::Normal if path.starts_with("/latest/") => {
                    let (status, text) = aws(&head.method, &path, header, &told.borrow());
                    (status, None, text)
                }
                Mood::Normal if path.starts_with("/computeMetadata/") => {
                    gcp(&path, &header("metadata-flavor"), told).await
                }
                Mood::Normal => {
                    let told = told.borrow();
                    let (status, text) = azure(&head.method, &path, &header("metadata"), &told);
                    (status, None, text)
                }
            };
            let mut response = Response::builder().status(status);
            if let Some(etag) = etag {
                response = response.header("etag", etag);
            }
            Ok::<_, Infallible>(response.body(text).expect("a response"))
        }
    });
    // A client that goes away is no matter of the server's.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), answer)
        .await;
}

async fn read(mut body: Incoming) -> String {
    let mut bytes = Vec::new();
    while let Some(Ok(frame)) =
        std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
    {
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn aws(method: &Method, path: &str, header: impl Fn(&str) -> String, told: &Told) -> (u16, String) {
    if path == "/latest/api/token" {
        let seconds = header("x-aws-ec2-metadata-token-ttl-seconds").parse::<u32>();
        return match (method, seconds) {
            (&Method::PUT, Ok(1..=21_600)) => (200, format!("token-{}==", told.token)),
            _ => (400, String::new()),
        };
    }
    if header("x-aws-ec2-metadata-token") != format!("token-{}==", told.token) {
        return (401, "Unauthorized".into());
    }
    let item = match path {
        "/latest/meta-data/spot/instance-action" => &told.action,
        "/latest/meta-data/events/recommendations/rebalance" => &told.rebalance,
        _ => &None,
    };
    item.clone().map_or_else(|| (404, "Not Found".into()), |text| (200, text))
}

async fn gcp(
    path: &str,
    flavor: &str,
    mut told: watch::Receiver<Told>,
) -> (u16, Option<String>, String) {
    if flavor != "Google" {
        return (403, None, "Missing Metadata-Flavor:Google header.".into());
    }
    let (item, query) = path.split_once('?').unwrap_or((path, ""));
    let value = |told: &Told| match item {
        "/computeMetadata/v1/instance/preempted" => {
            Some(if told.preempted { "TRUE" } else { "FALSE" }.to_owned())
        }
        "/computeMetadata/v1/instance/maintenance-event" => {
            Some(told.maintenance.clone().unwrap_or_else(|| "NONE".into()))
        }
        _ => None,
    };
    // The tag is the value in hex digits, so that it changes with it.
    let tag = |value: &str| value.bytes().map(|b| format!("{b:02x}")).collect::<String>();
    let known = query.split('&').find_map(|pair| pair.strip_prefix("last_etag="));
    if query.contains("wait_for_change=true") {
        let has_changed = |told: &Told| {
            told.mood != Mood::Normal || value(told).is_none_or(|v| Some(&*tag(&v)) != known)
        };
        let _ = told.wait_for(has_changed).await;
    }
    let found = value(&told.borrow());
    match found {
        Some(found) => (200, Some(tag(&found)), found),
        None => (404, None, String::new()),
    }
}

fn azure(method: &Method, path: &str, metadata: &str, told: &Told) -> (u16, String) {
    if metadata != "true" {
        return (400, "Bad request. Required metadata header not specified".into());
    }
    match (method, path) {
        (&Method::GET, "/metadata/instance/compute/name?api-version=2021-02-01&format=text") => {
            (200, "vm_1".into())
        }
        (&Method::GET, "/metadata/scheduledevents?api-version=2020-07-01") => {
            (200, format!(r#"{{"DocumentIncarnation": 1, "Events": [{}]}}"#, told.events))
        }
        (&Method::POST, "/metadata/scheduledevents?api-version=2020-07-01") => (200, String::new()),
        _ => (404, String::new()),
    }
}

/// An event of Azure's.
pub fn azure_event(id: &str, kind: &str, resources: &str, not_before: &str) -> String {
    format!(
        r#"{{"EventId": "{id}", "EventType": "{kind}", "ResourceType": "VirtualMachine",
        "Resources": {resources}, "EventStatus": "Scheduled", "NotBefore": "{not_before}",
        "Description": "", "EventSource": "Platform", "DurationInSeconds": -1}}"#
    )
}

//! Checkpoints on S3: a real server process (moto) where one is given, and a server of our own
//! that refuses, throttles and breaks off on purpose.
//!
//! `COHORT_MOTO_ADDRESS=host:port` names a running `moto_server`.

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::config::{S3Section, StoreSection};
use api::ids::Secret;
use api::job::Compression;
use bytes::Bytes;
use checkpoint::{Saver, Store, StoreError, TensorSlice, keys};
use futures::future::join_all;
use support::{State, job, options, restore, runtime, save};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

fn section(endpoint: &str) -> StoreSection {
    StoreSection {
        uri: String::new(),
        s3: S3Section {
            endpoint: endpoint.to_owned(),
            region: "us-east-1".into(),
            access_key_id: "key-of-the-test".into(),
            secret_access_key: Some(Secret::new("secret-of-the-test")),
            session_token: None,
            allow_http: true,
        },
        ..StoreSection::default()
    }
}

/// A fresh bucket on moto; nothing, loudly, where no server is given.
fn moto(runtime: &Runtime, bucket: &str) -> Option<StoreSection> {
    let Ok(address) = std::env::var("COHORT_MOTO_ADDRESS") else {
        eprintln!("SKIPPED: COHORT_MOTO_ADDRESS is not set, nothing was tested against S3");
        return None;
    };
    let endpoint = format!("http://{address}");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let created = runtime.block_on(async {
        let client = reqwest::Client::new();
        client.put(format!("{endpoint}/{bucket}")).send().await.map(|answer| answer.status())
    });
    assert!(created.expect("moto answers").is_success(), "the bucket was not created");
    Some(section(&endpoint))
}

/// Buckets outlive a test run: each run has its own.
fn unique(name: &str) -> String {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970");
    format!("{name}-{}-{}", std::process::id(), since.as_millis())
}

#[test]
fn checkpoints_round_trip_through_a_real_server() {
    let runtime = runtime();
    let bucket = unique("round-trip");
    let Some(section) = moto(&runtime, &bucket) else { return };
    let store = Store::open(&section, &format!("s3://{bucket}/some/prefix")).expect("opens");
    runtime.block_on(store.probe()).expect("moto keeps the promise");
    assert_eq!(runtime.block_on(store.list("")), Ok(vec![]), "the probe left something");

    let state = State::new(11, 200_000);
    let mut facts = Vec::new();
    for (step, world_size, compression) in
        [(1, 1, Compression::None), (2, 3, Compression::Zstd), (3, 2, Compression::None)]
    {
        let fact = save(&store, &state, step, world_size, compression).expect("saves");
        assert_eq!(restore(&store, &fact, &state).as_ref(), Ok(&state));
        facts.push(fact);
    }
    let folder = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        assert_eq!(checkpoint::find_complete(&store, &job(), None).await, Ok(facts.clone()));
        let mut exports = Vec::new();
        for fact in &facts {
            let digest = Some(fact.manifest_digest.as_str());
            let report = checkpoint::verify(&store, &fact.manifest_key, digest).await;
            assert!(report.expect("verifies").ok);
            let to = folder.path().join("weights.safetensors");
            exports.push(checkpoint::export(&store, fact, &to).await.expect("exports").sha256);
        }
        exports.dedup();
        assert_eq!(exports.len(), 1, "exports differ");

        checkpoint::delete_checkpoint(
            &store,
            &facts[0].manifest_key,
            &checkpoint::References::default(),
        )
        .await
        .expect("deletes");
        assert_eq!(checkpoint::find_complete(&store, &job(), None).await, Ok(facts[1..].to_vec()));
        let gone = checkpoint::verify(&store, &facts[0].manifest_key, None).await;
        assert!(gone.expect_err("gone").is_not_found());
        let rest = store.list(&keys::checkpoint(&job(), facts[0].step, facts[0].generation)).await;
        assert_eq!(rest, Ok(vec![]), "shards are left");
    });
    // The prefix is part of the place, not of the keys.
    let whole = Store::open(&section, &format!("s3://{bucket}")).expect("opens");
    let all = runtime.block_on(whole.list("some/prefix/jobs")).expect("lists");
    assert!(all.iter().any(|o| o.key == format!("some/prefix/{}", facts[1].manifest_key)));

    // One damaged object: moto lets us replace it.
    let shard = runtime.block_on(store.list(&keys::checkpoints(&job()))).expect("lists");
    let shard = shard.into_iter().find(|o| o.key.ends_with(".zst")).expect("a shard");
    let mut bytes = runtime.block_on(store.get(&shard.key)).expect("reads").to_vec();
    bytes[shard.bytes as usize / 2] ^= 1;
    runtime.block_on(store.put(&shard.key, bytes.into())).expect("writes");
    let text = restore(&store, &facts[1], &state).expect_err("damaged").to_string();
    assert!(text.contains(&shard.key) && text.contains("not those that were written"), "{text}");
}

#[test]
fn a_large_model_goes_in_parts_and_channels_come_back() {
    let runtime = runtime();
    let bucket = unique("parts");
    let Some(section) = moto(&runtime, &bucket) else { return };
    let store = Store::open(&section, &format!("s3://{bucket}/p")).expect("opens");
    let data: Vec<f32> = (0..12_000_000).map(|i| i as f32).collect();
    let tensors = [TensorSlice { name: "w", shape: &[12_000_000], data: &data }];
    let mut saver = Saver::with_store(store.clone(), options(0, 1, Compression::None)).expect("up");
    let (key, _, bytes) = saver.put_model(&tensors, b"{\"a\":1}").expect("writes");
    assert!(bytes > 32 << 20, "{bytes} bytes go in one request");
    let folder = tempfile::tempdir().expect("a folder");
    let copy = runtime.block_on(store.download(&key, folder.path())).expect("copies");
    let weights = std::fs::read(copy.join("model.safetensors")).expect("there");
    assert!(weights == checkpoint::safetensors_bytes(&tensors).expect("bytes"));
    // A channel's URI may name the folder or the object itself.
    for (uri, file) in [(key.clone(), "model.json"), (format!("{key}/model.json"), "")] {
        let channel = Store::open(&section, &format!("s3://{bucket}/p/{uri}")).expect("opens");
        let folder = tempfile::tempdir().expect("a folder");
        let copy = runtime.block_on(channel.download("", folder.path())).expect("copies");
        let path = if file.is_empty() { copy } else { copy.join(file) };
        assert_eq!(std::fs::read_to_string(path).expect("there"), "{\"a\":1}");
    }
}

#[test]
fn of_sixteen_writers_one_wins_on_a_real_server() {
    let runtime = runtime();
    let bucket = unique("race");
    let Some(section) = moto(&runtime, &bucket) else { return };
    let store = Store::open(&section, &format!("s3://{bucket}")).expect("opens");
    for round in 0..5 {
        let key = format!("race/{round}");
        let bodies: Vec<Bytes> = (0..16).map(|i| Bytes::from(format!("writer {i}"))).collect();
        let writes = bodies.iter().map(|body| store.put_if_absent(&key, body.clone()));
        let outcomes = runtime.block_on(join_all(writes));
        let won: Vec<usize> = (0..16).filter(|i| outcomes[*i] == Ok(true)).collect();
        assert_eq!(won.len(), 1, "{outcomes:?}");
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert_eq!(runtime.block_on(store.get(&key)).expect("reads"), bodies[won[0]]);
    }
}

#[test]
fn a_missing_bucket_is_named() {
    let runtime = runtime();
    let Some(section) = moto(&runtime, &unique("present")) else { return };
    let store = Store::open(&section, "s3://no-such-bucket-here/prefix").expect("opens");
    let error = runtime.block_on(store.probe()).expect_err("no bucket");
    assert!(matches!(error, StoreError::NoBucket(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("bucket `no-such-bucket-here` at `http://"), "{text}");
    assert!(text.contains("create the bucket") && !error.is_retryable(), "{text}");
    assert!(runtime.block_on(store.list("x")).is_err());
}

/// What our own server does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Behaviour {
    /// Stores and serves objects.
    Work,
    /// Answers with an error document.
    Answer(u16, &'static str),
    /// Does it, then closes the connection without an answer.
    BreakOff,
}

/// A small S3 server: one bucket; PUT (also only if absent), GET with ranges, HEAD, DELETE.
struct Server {
    endpoint: String,
    shared: Arc<Shared>,
}

struct Shared {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    /// For the next requests, one each.
    script: Mutex<VecDeque<Behaviour>>,
    /// When the script is over.
    then: Behaviour,
    requests: Mutex<Vec<String>>,
}

impl Server {
    fn start(runtime: &Runtime, script: &[Behaviour], then: Behaviour) -> Self {
        let shared = Arc::new(Shared {
            objects: Mutex::default(),
            script: Mutex::new(script.iter().copied().collect()),
            then,
            requests: Mutex::default(),
        });
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("binds");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let serving = shared.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, serving.clone()));
            }
        });
        Self { endpoint, shared }
    }

    fn store(&self) -> Store {
        Store::open(&section(&self.endpoint), "s3://bucket/prefix").expect("opens")
    }

    fn requests(&self) -> usize {
        self.shared.requests.lock().expect("not poisoned").len()
    }
}

/// One request per connection.
async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let header = |name: &str| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let length = header("content-length:").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let mut words = head.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    shared.requests.lock().expect("not poisoned").push(format!("{method} {path}"));
    let next = shared.script.lock().expect("not poisoned").pop_front();
    let behaviour = next.unwrap_or(shared.then);
    let (status, extra, content) = match behaviour {
        Behaviour::Answer(status, code) => {
            let document = format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message>\
                 <AWSAccessKeyId>key-of-the-test</AWSAccessKeyId></Error>"
            );
            (status, String::new(), document.into_bytes())
        }
        _ => {
            let objects = &mut *shared.objects.lock().expect("not poisoned");
            let create = header("if-none-match:").is_some();
            act(objects, &method, path, body, create, header("range:"))
        }
    };
    if behaviour == Behaviour::BreakOff {
        return None;
    }
    let mut answer = format!(
        "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\nETag: \"e\"\r\n\
         Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n{extra}\r\n",
        content.len()
    )
    .into_bytes();
    if method != "HEAD" {
        answer.extend(content);
    }
    stream.write_all(&answer).await.ok()?;
    stream.shutdown().await.ok()
}

fn act(
    objects: &mut BTreeMap<String, Vec<u8>>,
    method: &str,
    path: String,
    body: Vec<u8>,
    create: bool,
    range: Option<String>,
) -> (u16, String, Vec<u8>) {
    let nothing = |status| (status, String::new(), Vec::new());
    match method {
        "PUT" if create && objects.contains_key(&path) => nothing(412),
        "PUT" => {
            objects.insert(path, body);
            nothing(200)
        }
        "DELETE" => {
            objects.remove(&path);
            nothing(204)
        }
        _ => {
            let Some(object) = objects.get(&path) else { return nothing(404) };
            let range = range.and_then(|range| {
                let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
                Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()?))
            });
            match range {
                Some((start, end)) => {
                    let end = end.min(object.len() - 1);
                    let extra = format!("Content-Range: bytes {start}-{end}/{}\r\n", object.len());
                    (206, extra, object[start..=end].to_vec())
                }
                None => (200, String::new(), object.clone()),
            }
        }
    }
}

#[test]
fn refused_credentials_are_one_clear_error_without_retries() {
    let runtime = runtime();
    for (status, code) in [
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "AccessDenied"),
        (401, "Unauthorized"),
        (400, "ExpiredToken"),
    ] {
        let server = Server::start(&runtime, &[], Behaviour::Answer(status, code));
        let store = server.store();
        let error = runtime.block_on(store.probe()).expect_err("refused");
        assert!(matches!(error, StoreError::Denied { .. }), "{error:?}");
        assert!(!error.is_retryable() && error.has_no_side_effects());
        let text = error.to_string();
        let place = format!("bucket `bucket` at `{}` ({code})", server.endpoint);
        assert!(text.starts_with(&format!("credentials refused for {place}")), "{text}");
        assert!(text.contains("AWS_ACCESS_KEY_ID") && text.contains("[store.s3]"), "{text}");
        for secret in ["key-of-the-test", "secret-of-the-test"] {
            assert!(!text.contains(secret) && !format!("{error:?}{store:?}").contains(secret));
        }
        // One race of the probe, each contender once: nothing was tried again.
        assert!(server.requests() <= 12, "{} requests", server.requests());
        let error = save(&store, &State::new(1, 4000), 1, 1, Compression::None).expect_err("no");
        assert!(!error.is_retryable() && error.to_string() == text, "{error}");
    }
}

#[test]
fn throttling_is_waited_out() {
    let runtime = runtime();
    let slow = Behaviour::Answer(503, "SlowDown");
    let server = Server::start(&runtime, &[slow; 4], Behaviour::Work);
    let store = server.store();
    runtime.block_on(async {
        store.put("a", "content".into()).await.expect("written in the end");
        assert_eq!(server.requests(), 5);
        assert_eq!(store.get("a").await.expect("reads"), "content");
        assert_eq!(store.get_range("a", 2..5).await.expect("reads"), "nte");
        assert_eq!(store.size("a").await, Ok(7));
    });
    let state = State::new(12, 20_000);
    server.shared.script.lock().expect("not poisoned").extend([slow, Behaviour::Work, slow]);
    let fact = save(&store, &state, 1, 1, Compression::Zstd).expect("saves");
    server.shared.script.lock().expect("not poisoned").extend([slow, slow, Behaviour::Work, slow]);
    assert_eq!(restore(&store, &fact, &state), Ok(state));
}

#[test]
fn a_store_that_stays_busy_is_reported_in_bounded_time() {
    let runtime = runtime();
    let server = Server::start(&runtime, &[], Behaviour::Answer(503, "SlowDown"));
    let begun = Instant::now();
    let error = runtime.block_on(server.store().get("a")).expect_err("busy");
    assert!(error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("status 503 (SlowDown)"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert_eq!(server.requests(), 9, "one request and eight retries");
}

#[test]
fn a_write_whose_answer_is_lost_is_recognised_as_ones_own() {
    let runtime = runtime();
    let server = Server::start(&runtime, &[Behaviour::BreakOff; 2], Behaviour::Work);
    let store = server.store();
    runtime.block_on(async {
        assert_eq!(store.put_if_absent("m", "mine, nonce 1".into()).await, Ok(true));
        assert_eq!(store.put_if_absent("m", "yours, nonce 2".into()).await, Ok(false));
        assert_eq!(store.get("m").await.expect("reads"), "mine, nonce 1");
    });
    assert!(server.requests() >= 4);
}

#[test]
fn other_refusals_say_what_the_server_said() {
    let runtime = runtime();
    let ask = |status, code| {
        let server = Server::start(&runtime, &[], Behaviour::Answer(status, code));
        runtime.block_on(server.store().probe()).expect_err("refused")
    };
    let error = ask(501, "NotImplemented");
    assert!(matches!(error, StoreError::Unsafe { .. }), "{error:?}");
    let error = ask(400, "AuthorizationHeaderMalformed");
    assert!(error.to_string().contains("`region`"), "{error}");
    let error = ask(301, "PermanentRedirect");
    assert!(error.to_string().contains("`region`"), "{error}");
    let error = ask(404, "NoSuchBucket");
    assert!(matches!(error, StoreError::NoBucket(_)), "{error:?}");
}

#[test]
fn nobody_listening_is_one_clear_error() {
    let runtime = runtime();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    let store = Store::open(&section(&endpoint), "s3://bucket").expect("opens");
    let begun = Instant::now();
    let error = runtime.block_on(store.get("a")).expect_err("nobody there");
    assert!(error.is_retryable() && error.has_no_side_effects(), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&endpoint) && text.contains("refused"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
}

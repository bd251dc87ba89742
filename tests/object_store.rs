//! A whole run on S3: a real server process where `COHORT_MOTO_ADDRESS` names one, and a server of
//! our own that refuses the credentials.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use common::moto::config;
use common::{Running, cluster, run, small_job, submit_local, weights_digest};
use nix::sys::signal::{Signal, kill};

fn moto() -> Option<String> {
    let address = std::env::var("COHORT_MOTO_ADDRESS").ok();
    if address.is_none() {
        eprintln!("SKIPPED: COHORT_MOTO_ADDRESS is not set: `bash tests/run` starts an S3 server");
    }
    address
}

/// One request; the server takes any credentials, so the signature need not be right.
fn http(address: &str, method: &str, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
    let mut socket = TcpStream::connect(address).expect("connects");
    socket.set_read_timeout(Some(common::GUARD)).expect("set");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\nauthorization: \
         AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, \
         Signature=00\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).and_then(|()| socket.write_all(body)).expect("sent");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("an answer");
    let split = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    let status = String::from_utf8_lossy(&answer[..split]);
    let status = status.split_whitespace().nth(1).and_then(|s| s.parse().ok()).expect("a status");
    (status, answer[split..].to_vec())
}

#[test]
fn a_run_on_s3_survives_a_kill_and_gives_the_same_weights() {
    let Some(address) = moto() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let bucket = format!("run-{}", std::process::id());
    assert_eq!(http(&address, "PUT", &format!("/{bucket}"), b"").0, 200);
    let job = small_job(folder.path(), "[resources]\nranks = 2\n");
    // Long enough that its rank is killed before its end.
    let steps = "stop.max_steps=100";
    let plain = run(&mut submit_local(&job, &folder.path().join("plain"), &[steps]));
    let plain = plain.expect_code(0);
    let expected = weights_digest(&plain);

    // The data come from S3 as well.
    let text = std::fs::read(folder.path().join("text.txt")).expect("written");
    assert_eq!(http(&address, "PUT", &format!("/{bucket}/data/text.txt"), &text).0, 200);
    let config = config(folder.path(), &address, &bucket);
    let channel = format!("channels.train.uri=\"s3://{bucket}/data/text.txt\"");
    let dir = folder.path().join("s3");
    let mut submit = submit_local(&job, &dir, &[&channel, steps]);
    let mut running = Running::start(submit.arg("--config").arg(&config));
    running.wait_for("a committed checkpoint", |event| event["event"] == "checkpoint");
    let ranks = running.ranks();
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    kill(ranks[0].1, Signal::SIGKILL).expect("killed");
    let finished = running.finish().expect_code(0);
    let last = finished.last_json();
    assert_eq!(last["sha256"], expected.as_str(), "{last}");
    assert_eq!(last["restarts"], 1, "{last}");
    assert!(last["model"].as_str().expect("a URI").starts_with(&format!("s3://{bucket}/")));

    // A cluster on the same folder and bucket reads back what was written.
    let mut up = cluster();
    up.args(["up", "--port", "0", "--json", "--config"]).arg(&config).arg("--dir").arg(&dir);
    let mut up = Running::start(&mut up);
    up.wait_for("up", |event| event["event"] == "up");
    let ask = |args: &[&str]| {
        let mut command = cluster();
        command.args(args).args(["--json", "--dir"]).arg(&dir);
        run(&mut command).expect_code(0)
    };
    let exported = folder.path().join("weights.safetensors");
    let exported = exported.to_str().expect("UTF-8");
    let report = ask(&["checkpoint", "export", "small", "-o", exported]).last_json();
    assert_eq!(report["sha256"], expected.as_str(), "the checkpoint holds the same weights");
    assert_eq!(ask(&["checkpoint", "verify", "small"]).last_json()["report"]["ok"], true);
    assert!(ask(&["predict", "small", "--text", "fn "]).last_json()["text"].is_string());
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);

    // Other data under the same key are seen: nothing of the former run is used for them.
    let changed = [text.as_slice(), b"fn the_end() {}\n".repeat(50).as_slice()].concat();
    std::fs::write(folder.path().join("text.txt"), &changed).expect("written");
    let other = run(&mut submit_local(&job, &folder.path().join("other"), &[steps]));
    let other = other.expect_code(0);
    assert_ne!(weights_digest(&other), expected, "other data, other weights");
    assert_eq!(http(&address, "PUT", &format!("/{bucket}/data/text.txt"), &changed).0, 200);
    let again = submit_local(&job, &dir, &[&channel, steps, "name=\"again\""]);
    let again = run({ again }.arg("--config").arg(&config)).expect_code(0);
    assert_eq!(again.last_json()["sha256"], weights_digest(&other).as_str());

    // The secret is in none of the cluster's files.
    let mut found = Vec::new();
    grep(&dir, b"test-secret", &mut found);
    assert!(found.is_empty(), "the secret lies in {found:?}");
}

fn grep(folder: &Path, needle: &[u8], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            grep(&path, needle, found);
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes.windows(needle.len()).any(|window| window == needle)
        {
            found.push(path);
        }
    }
}

#[test]
fn refused_credentials_are_one_clear_message() {
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("bound").to_string();
    std::thread::spawn(move || {
        for socket in server.incoming() {
            let Ok(mut socket) = socket else { return };
            let mut request = [0; 16384];
            let _ = socket.read(&mut request);
            let body = "<?xml version=\"1.0\"?><Error><Code>InvalidAccessKeyId</Code>\
                        <Message>unknown key</Message></Error>";
            let _ = write!(
                socket,
                "HTTP/1.1 403 Forbidden\r\ncontent-type: application/xml\r\ncontent-length: \
                 {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
        }
    });
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(folder.path(), &address, "locked");
    let job = small_job(folder.path(), "");
    let mut submit = submit_local(&job, &folder.path().join("run"), &[]);
    let finished = run(submit.arg("--config").arg(&config)).expect_code(6);
    assert!(finished.stderr.contains("locked"), "the bucket is named: {finished:?}");
    assert!(finished.stderr.contains("AWS_ACCESS_KEY_ID"), "what to do: {finished:?}");
    assert!(!finished.stderr.contains("test-secret"), "{finished:?}");

    let mut up = cluster();
    up.args(["up", "--port", "0", "--config"])
        .arg(&config)
        .arg("--dir")
        .arg(folder.path().join("c"));
    run(&mut up).expect_code(6);
}

#[test]
fn a_rank_that_dies_while_the_store_fails_costs_the_others_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("run");
    let job = small_job(folder.path(), "[resources]\nranks = 2\n[recovery]\nmax_failures = 1\n");
    let sets = ["stop.max_steps=300", "checkpoint.every_steps=1000"];
    let mut running = Running::start(&mut submit_local(&job, &dir, &sets));
    running.wait_for_step(3);
    // A link that leads to itself: whoever asks for the store's mark gets an error of the disk.
    let mark = dir.join("store/encryption.json");
    std::os::unix::fs::symlink("encryption.json", &mark).expect("made");
    let ranks = running.ranks();
    kill(ranks[1].1, Signal::SIGKILL).expect("killed");
    running.wait_for("they go on", |event| {
        event["event"] == "status" && event["phase"] == "running" && event["generation"] == 2
    });
    running.wait_for("a step", |event| event["event"] == "step");
    assert!(running.ranks().contains(&ranks[0]), "the survivor keeps its process");
    std::fs::remove_file(&mark).expect("it is there");
    let last = running.finish().expect_code(0).last_json();
    assert_eq!((&last["state"], &last["restarts"]), (&"succeeded".into(), &1.into()), "{last}");
}

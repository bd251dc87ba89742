//! From training to an answer over HTTP: `serve` by hand and `deploy` on a cluster, with real
//! models.

mod common;

use common::{Running, cluster, repository, run, small_job, submit_local, up};
use nix::sys::signal::Signal;

/// Sends one request with nothing but a socket; gives the status and the body.
fn http(address: &str, request: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let mut socket = std::net::TcpStream::connect(address).expect("connects");
    socket.set_read_timeout(Some(common::GUARD)).expect("set");
    socket.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    let status = answer.split_whitespace().nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    (status, body.unwrap_or_default())
}

fn post(address: &str, content_type: &str, body: &str) -> (u16, String) {
    http(
        address,
        &format!(
            "POST /invocations HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
             {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ),
    )
}

fn get(address: &str, path: &str) -> (u16, String) {
    http(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
}

#[test]
fn digits_are_trained_served_and_told_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = repository("examples/digits/job.toml");
    let dir = folder.path().join("run");
    let finished = run(&mut submit_local(&job, &dir, &[])).expect_code(0);
    let last = finished.last_json();
    let accuracy = last["metrics"]["validation:accuracy"].as_f64().expect("an accuracy");
    assert!(accuracy >= 0.97, "the held-out split: {accuracy}");
    let model = last["model"].as_str().expect("a path").replace("/model.safetensors", "");

    let mut serve = cluster();
    serve.args(["serve", &model, "--listen", "127.0.0.1:0", "--json"]);
    let mut serving = Running::start(&mut serve);
    let event = serving.wait_for("serving", |event| event["event"] == "serving");
    let address = event["address"].as_str().expect("an address");
    assert_eq!(get(address, "/ping").0, 200);
    let sample = std::fs::read_to_string(repository("examples/digits/sample.json")).expect("there");
    let (status, body) = post(address, "application/json", &sample);
    assert_eq!(status, 200, "{body}");
    let answer: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    let mut predict = cluster();
    predict
        .args(["predict", &model, "--json", "--input"])
        .arg(repository("examples/digits/sample.json"));
    let here = run(&mut predict).expect_code(0).last_json();
    assert_eq!(here["label"], answer["label"], "the same answer without a server");
    let huge = format!("{{\"pixels\":[{}]}}", ["1e38"; 64].join(","));
    let (status, body) = post(address, "application/json", &huge);
    assert!(status == 400 && body.contains("overflows"), "no number is no answer: {status} {body}");
    let (status, body) = post(address, "text/csv", "1,2,3\n");
    assert!(status == 400 && body.contains("64"), "{status} {body}");
    serving.signal(Signal::SIGTERM);
    serving.finish().expect_code(0);
}

#[test]
fn a_language_model_is_deployed_on_a_cluster() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("c");
    let up = up(&dir, &[]);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--dir").arg(&dir))
    };
    let missing = ask(&["deploy", "small"]).expect_code(3);
    assert!(missing.stderr.contains("small"), "{missing:?}");
    let job = small_job(folder.path(), "");
    let job = job.to_str().expect("UTF-8");
    ask(&["submit", job, "--follow"]).expect_code(0);
    ask(&["submit", job]).expect_code(4);
    let models = ask(&["models"]).expect_code(0);
    assert_eq!(models.last_json()["name"], "small");
    let endpoint = ask(&["deploy", "small", "--name", "talk"]).expect_code(0).last_json();
    let address = endpoint["status"]["address"].as_str().expect("an address");
    let request = r#"{"prompt":"fn step_","max_tokens":12,"temperature":0.7,"seed":3}"#;
    let (status, first) = post(address, "application/json", request);
    assert_eq!(status, 200, "{first}");
    assert_eq!(post(address, "application/json", request).1, first, "the same seed, the same text");
    let stream = r#"{"prompt":"fn","max_tokens":4,"stream":true}"#;
    let (status, body) = post(address, "application/json", stream);
    assert!(status == 200 && body.contains("[DONE]"), "{body}");
    let asked = ask(&["predict", "talk", "--text", "fn "]).expect_code(0);
    assert!(asked.last_json()["text"].is_string(), "{asked:?}");
    ask(&["stop", "talk", "--endpoint"]).expect_code(0);
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

#[test]
fn a_job_is_stopped_with_its_state_and_resumed() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("c");
    let up = up(&dir, &[]);
    let job = small_job(folder.path(), "[resources]\nranks = 2\n");
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--set", "stop.max_steps=2000"]);
    let mut following = Running::start(submit.arg("--dir").arg(&dir));
    following.wait_for_step(12);
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--dir").arg(&dir))
    };
    ask(&["stop", "small"]).expect_code(0);
    let stopped = following.finish().expect_code(8);
    assert_eq!(stopped.last_json()["state"], "stopped", "{stopped:?}");
    let job = ask(&["job", "small"]).expect_code(0).last_json();
    let saved = job["status"]["checkpoint"]["step"].as_u64().expect("a checkpoint");
    assert!(saved >= 12, "the state at the stop was saved: {job}");
    let verified = ask(&["checkpoint", "verify", "small"]).expect_code(0);
    assert!(verified.last_json()["report"]["ok"] == true, "{verified:?}");
    let diff = ask(&["checkpoint", "diff", "small"]).expect_code(0).last_json();
    assert_eq!(diff["to"].as_u64(), Some(saved), "{diff}");
    assert!(diff["from"].as_u64() < Some(saved), "{diff}");
    let changed = diff["report"]["differing"].as_array().expect("tensors");
    assert!(changed.iter().all(|tensor| tensor["difference"] == "values"), "{diff}");
    assert!(changed.iter().any(|tensor| tensor["largest"].as_f64() > Some(0.0)), "{diff}");
    let mut resume = cluster();
    resume.args(["resume", "small", "--json", "--follow", "--dir"]).arg(&dir);
    let mut resumed = Running::start(&mut resume);
    let first = resumed.wait_for("a step", |event| {
        event["event"] == "step" && event["step"].as_u64() > Some(saved)
    });
    assert_eq!(first["step"].as_u64(), Some(saved + 1), "it goes on where it stopped: {first}");
    ask(&["stop", "small"]).expect_code(0);
    resumed.finish().expect_code(8);
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

#[test]
fn a_frozen_job_can_be_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("c");
    let config = folder.path().join("cluster.toml");
    std::fs::write(&config, "[worker]\nstop_timeout = \"500ms\"\nstopped_rank_timeout = \"0s\"\n")
        .expect("written");
    let up = up(&dir, &["--config", config.to_str().expect("UTF-8")]);
    let job = small_job(folder.path(), "[resources]\nranks = 2\n");
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--set", "stop.max_steps=100000"]);
    let mut following = Running::start(submit.arg("--dir").arg(&dir));
    following.wait_for("a checkpoint", |event| event["event"] == "checkpoint");
    let ranks = up.ranks();
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    for (_, rank) in &ranks {
        nix::sys::signal::kill(*rank, Signal::SIGSTOP).expect("frozen");
    }
    let mut stop = cluster();
    run(stop.args(["stop", "small", "--dir"]).arg(&dir)).expect_code(0);
    let stopped = following.finish().expect_code(8);
    assert_eq!(stopped.last_json()["state"], "stopped", "{stopped:?}");
    assert!(up.ranks().is_empty(), "nothing of it is left");
    up.signal(Signal::SIGTERM);
    up.finish().expect_code(0);
}

//! How ranks reach each other, as cluster.toml says: certificates, streams and a table of algorithms
//! change no bit of a model, and what cannot be used is one clear error.

mod common;

use std::path::{Path, PathBuf};

use common::{Finished, Running, cluster, eventually, free_ports, run, small_job};
use nix::sys::signal::Signal;
use serde_json::Value;

/// What cluster.toml says besides the place of things.
#[derive(Clone, Copy, Default)]
struct Settings<'a> {
    /// `[tls]` with the certificates of [`folder`].
    tls: bool,
    /// Lines of `[worker]`.
    worker: &'a str,
}

/// A table that differs from the built-in one for what a small job sums.
const TABLE: &str =
    r#"{"rules": [{"operation": "reduce_lanes", "algorithm": "halving_doubling"}]}"#;

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let mut certs = cluster();
    run(certs.args(["certs", "--output"]).arg(folder.path().join("tls"))).expect_code(0);
    std::fs::write(folder.path().join("table.json"), TABLE).expect("written");
    folder
}

fn write_config(folder: &Path, name: &str, port: u16, settings: Settings<'_>) -> PathBuf {
    let at = folder.display();
    let mut text = format!(
        "[cluster]\ndir = \"{at}/{name}\"\ntoken_file = \"{at}/tls/token\"\n\
         [coordinator]\nmembers = [{{ node = 1, address = \"127.0.0.1:{port}\" }}]\n\
         [store]\nuri = \"file://{at}/store-{port}\"\n[worker]\n{}\n",
        settings.worker
    );
    if settings.tls {
        text += &format!(
            "[tls]\nca = \"{at}/tls/ca.pem\"\ncertificate = \"{at}/tls/host.pem\"\n\
             key = \"{at}/tls/host.key\"\n"
        );
    }
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).expect("written");
    path
}

/// A coordinator and its workers, each a process, ready for a job of two ranks.
struct Hosts {
    config: PathBuf,
    parts: Vec<Running>,
}

impl Hosts {
    fn start(folder: &Path, workers: &[Settings<'_>]) -> Self {
        let port = free_ports(1)[0];
        let slots = (2 / workers.len()).to_string();
        let config = write_config(folder, &format!("c{port}"), port, workers[0]);
        let mut parts =
            vec![Running::start(cluster().arg("coordinator").arg("--config").arg(&config))];
        for (index, settings) in workers.iter().enumerate() {
            let name = format!("w{index}");
            let config = write_config(folder, &format!("{name}-{port}"), port, *settings);
            let mut command = cluster();
            command.args(["worker", "--slots", &slots, "--name", &name]).arg("--config");
            parts.push(Running::start(command.arg(config)));
        }
        let hosts = Self { config, parts };
        eventually("the workers", || {
            let listed = hosts.ask(&["workers"]);
            (listed.code == 0 && listed.stdout.lines().count() == workers.len()).then_some(())
        });
        hosts
    }

    fn ask(&self, arguments: &[&str]) -> Finished {
        run(cluster().args(arguments).arg("--json").arg("--config").arg(&self.config))
    }

    /// Runs the small job on two ranks, the first failure of which ends it.
    fn train(&self, folder: &Path) -> Finished {
        let job = small_job(folder, "[resources]\nranks = 2\n[recovery]\nmax_failures = 0\n");
        self.ask(&["submit", &job.to_string_lossy(), "--follow"])
    }

    fn status(&self) -> Value {
        self.ask(&["job", "small"]).expect_code(0).last_json()["status"].clone()
    }

    /// Waits until the ranks have written something.
    fn wait_for_log(&self, text: &str) {
        eventually(text, || self.ask(&["logs", "small"]).stdout.contains(text).then_some(()));
    }

    fn stop(self) {
        for part in self.parts.into_iter().rev() {
            part.signal(Signal::SIGTERM);
            part.finish().expect_code(0);
        }
    }
}

#[test]
fn certificates_streams_and_a_table_change_no_bit_of_a_model() {
    let folder = folder();
    let folder = folder.path();
    let table = format!("algorithms = \"{}\"\n", folder.join("table.json").display());
    let wired = format!("shared_memory = false\ndata_streams = 2\n{table}");
    let mut digests = Vec::new();
    for (tls, worker, connections) in [
        (false, "shared_memory = false", "ranks reduce over tcp, with plaintext connections"),
        (true, wired.as_str(), "ranks reduce over tcp, with encrypted connections"),
        (true, "", "ranks reduce over shm, with encrypted connections"),
    ] {
        let hosts = Hosts::start(folder, &[Settings { tls, worker }]);
        hosts.train(folder).expect_code(0);
        hosts.wait_for_log(connections);
        let sha256 = hosts.status()["model"]["sha256"].as_str().expect("a digest").to_owned();
        digests.push(sha256);
        hosts.stop();
    }
    assert_eq!(digests[1], digests[0], "encrypted");
    assert_eq!(digests[2], digests[0], "over shared memory");
}

#[test]
fn workers_that_disagree_about_the_connections_are_named() {
    let folder = folder();
    let folder = folder.path();
    let plain = Settings { tls: true, worker: "plaintext_data = true" };
    let tls = Settings { tls: true, worker: "" };
    let more = Settings { tls: true, worker: "data_streams = 2" };
    for (workers, expected) in [([tls, plain], "encrypt"), ([tls, more], "streams per peer")] {
        let hosts = Hosts::start(folder, &workers);
        hosts.train(folder).expect_code(7);
        let status = hosts.status();
        let cause = status["first_cause"].to_string();
        assert!(cause.contains(expected), "`{expected}` is missing: {status}");
        hosts.stop();
    }
}

#[test]
fn files_that_cannot_be_used_are_one_error() {
    let folder = folder();
    let folder = folder.path();
    let at = |name: &str| folder.join(name).display().to_string();
    std::fs::write(folder.join("bad.json"), "{\"rules\": 3}").expect("written");
    let algorithms = |name: &str| format!("algorithms = \"{}\"", at(name));
    let certificate = |certificate: &str, key: &str| {
        let (ca, certificate, key) = (at("tls/ca.pem"), at(certificate), at(key));
        format!("[tls]\nca = \"{ca}\"\ncertificate = \"{certificate}\"\nkey = \"{key}\"")
    };
    let cases: [(String, &[&str]); 7] = [
        (algorithms("none.json"), &["worker.algorithms", "none.json`: No such file"]),
        (algorithms("bad.json"), &["worker.algorithms", "bad.json`: not a table of algorithms"]),
        ("data_streams = 0".into(), &["worker.data_streams = 0: expected 1 to 8"]),
        ("data_address = \"10.0.0.1\"".into(), &["10.0.0.1 is not loopback", "[tls]"]),
        (certificate("none.pem", "tls/host.key"), &["tls.certificate", "none.pem`: No such file"]),
        (certificate("tls/host.pem", "tls/ca.key"), &["[tls]", "do not form an identity"]),
        ("[tls]\nca = \"ca.pem\"".into(), &["tls.ca is set and tls.certificate is not"]),
    ];
    for (worker, expected) in cases {
        let config = write_config(folder, "w", 1, Settings { tls: false, worker: &worker });
        let mut command = cluster();
        command.args(["worker", "--name", "w"]).arg("--config").arg(config);
        let finished = run(&mut command).expect_code(2);
        let errors = finished.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(errors, 1, "one message: {finished:?}");
        for text in expected {
            assert!(finished.stderr.contains(text), "`{text}` is missing: {finished:?}");
        }
    }
}

#[test]
fn a_table_that_is_gone_when_a_rank_starts_fails_the_job_once() {
    let folder = folder();
    let folder = folder.path();
    let worker = format!("algorithms = \"{}\"", folder.join("table.json").display());
    let hosts = Hosts::start(folder, &[Settings { tls: false, worker: &worker }]);
    std::fs::remove_file(folder.join("table.json")).expect("removed");
    hosts.train(folder).expect_code(7);
    let status = hosts.status();
    assert_eq!(status["restarts"], 0, "{status}");
    assert!(status["reason"].as_str().is_some_and(|r| r.contains("table.json")), "{status}");
    hosts.stop();
}

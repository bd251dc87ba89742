//! Three coordinators and two workers as processes of their own: the leader is killed during
//! training, another one answers, and not one step fails or repeats.

mod common;

use std::net::TcpListener;
use std::path::Path;

use common::{Running, cluster, eventually, run, small_job};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Ports that were free a moment ago.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    held.iter().map(|l| l.local_addr().expect("bound").port()).collect()
}

fn write_config(folder: &Path, name: &str, node: usize, ports: &[u16]) -> std::path::PathBuf {
    let tls = folder.join("tls");
    let members: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(i, port)| format!("{{ node = {}, address = \"127.0.0.1:{port}\" }}", i + 1))
        .collect();
    let text = format!(
        "[cluster]\nid = \"three\"\ndir = \"{0}/{name}\"\ntoken_file = \"{1}/token\"\n\
         [coordinator]\nnode = {node}\nmembers = [{2}]\n\
         [store]\nuri = \"file://{0}/store\"\n\
         [tls]\nca = \"{1}/ca.pem\"\ncertificate = \"{1}/host.pem\"\nkey = \"{1}/host.key\"\n",
        folder.display(),
        tls.display(),
        members.join(", ")
    );
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).expect("written");
    path
}

#[test]
fn the_leader_dies_and_training_does_not_notice() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let mut certs = cluster();
    certs.args(["certs", "--output"]).arg(folder.join("tls"));
    run(&mut certs).expect_code(0);
    let ports = free_ports(3);
    let mut coordinators: Vec<Running> = (1..=3)
        .map(|node| {
            let config = write_config(folder, &format!("c{node}"), node, &ports);
            let mut command = cluster();
            Running::start(command.arg("coordinator").arg("--config").arg(config))
        })
        .collect();
    let client = folder.join("c1.toml");
    let workers: Vec<Running> = ["w1", "w2"]
        .iter()
        .map(|name| {
            let config = write_config(folder, name, 1, &ports);
            let mut command = cluster();
            command.args(["worker", "--slots", "1", "--name", name]).arg("--config").arg(config);
            Running::start(&mut command)
        })
        .collect();
    let ask = |args: &[&str]| {
        let mut command = cluster();
        run(command.args(args).arg("--json").arg("--config").arg(&client))
    };
    let leader = eventually("a leader", || {
        let finished = ask(&["status"]);
        (finished.code == 0)
            .then(|| finished.last_json()["leader"].as_u64())
            .flatten()
            .filter(|node| *node > 0)
    });
    eventually("two workers", || (ask(&["workers"]).stdout.lines().count() == 2).then_some(()));

    // Long enough that the leader's death falls well inside.
    let job = small_job(folder, "[resources]\nranks = 2\n");
    let mut submit = cluster();
    submit.arg("submit").arg(&job).args(["--json", "--follow", "--set", "stop.max_steps=600"]);
    submit.args(["--set", "checkpoint.every_steps=20"]).arg("--config").arg(&client);
    let mut following = Running::start(&mut submit);
    following.wait_for_step(30);
    coordinators[leader as usize - 1].kill();

    let after = eventually("another leader", || {
        let finished = ask(&["status"]);
        (finished.code == 0)
            .then(|| finished.last_json()["leader"].as_u64())
            .flatten()
            .filter(|node| *node > 0 && *node != leader)
    });
    assert_ne!(after, leader);
    let listed = ask(&["jobs"]).expect_code(0);
    let job: Value = serde_json::from_str(&listed.stdout).expect("one job");
    assert_eq!(job["spec"]["name"], "small", "the new leader knows the job: {job}");

    let finished = following.finish().expect_code(0);
    let last = finished.last_json();
    assert_eq!(last["state"], "succeeded", "{last}");
    assert_eq!(last["generation"], 1, "no restart: {last}");
    assert_eq!(last["restarts"], 0, "{last}");

    // The ranks' own account: every step once, in order, in one generation.
    let logs = ask(&["logs", "small", "--rank", "0"]).expect_code(0);
    let mut steps: Vec<u64> = Vec::new();
    for line in logs.stdout.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(line["generation"], 1, "{line}");
        assert_ne!(line["stream"], "gap", "no line is lost: {line}");
        let text = line["text"].as_str().unwrap_or_default();
        if let Some(step) = text.strip_prefix("step ").filter(|t| t.contains(" loss ")) {
            steps.extend(step.split('/').next().and_then(|n| n.parse::<u64>().ok()));
        }
    }
    assert_eq!(steps, (1..=20).map(|n| n * 30).collect::<Vec<_>>(), "{logs:?}");

    for mut part in workers.into_iter().chain(coordinators) {
        // The killed leader has been waited for already.
        if part.pid().as_raw() > 0 && part.is_running() {
            part.signal(Signal::SIGTERM);
            part.finish().expect_code(0);
        }
    }
}

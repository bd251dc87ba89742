//! A provider's notice, from its metadata server to the job's history: work moves while there is time,
//! and where nobody can take it its state is saved. Through the shipped binary; the server speaks the
//! protocol of AWS (instance metadata version 2).

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use common::roles::{make_certificates, start_coordinator, start_worker, write_config};
use common::{
    Running, cluster, eventually, free_ports, run, small_job, submit_local, weights_digest,
};
use serde_json::Value;

/// A metadata server, and the instance action that it tells of once there is one.
struct Metadata {
    endpoint: String,
    action: Arc<Mutex<Option<String>>>,
}

impl Metadata {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let action = Arc::new(Mutex::new(None));
        let told = action.clone();
        thread::spawn(move || {
            // A client that goes away is its own affair.
            listener.incoming().flatten().for_each(|stream| drop(answer(stream, &told)));
        });
        Self { endpoint, action }
    }

    /// The instance is reclaimed in so many seconds.
    fn reclaim(&self, seconds: u64) {
        let at = SystemTime::now() + Duration::from_secs(seconds);
        let at = chrono::DateTime::<chrono::Utc>::from(at).format("%FT%TZ");
        let action = format!("{{\"action\": \"terminate\", \"time\": \"{at}\"}}");
        *self.action.lock().expect("no panic") = Some(action);
    }
}

fn answer(stream: TcpStream, action: &Mutex<Option<String>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut has_token = false;
    for line in lines {
        let line = line?.to_lowercase();
        has_token |= line == "x-aws-ec2-metadata-token: t0k3n";
        if line.is_empty() {
            break;
        }
    }
    let action = action.lock().expect("no panic").clone();
    let (status, body) = match request.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["PUT", "/latest/api/token"] => ("200 OK", "t0k3n".to_owned()),
        _ if !has_token => ("401 Unauthorized", String::new()),
        ["GET", "/latest/meta-data/spot/instance-action"] => match action {
            Some(action) => ("200 OK", action),
            None => ("404 Not Found", String::new()),
        },
        _ => ("404 Not Found", String::new()),
    };
    let length = body.len();
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// A coordinator and jobs over it.
struct Cluster {
    folder: PathBuf,
    config: PathBuf,
    ports: Vec<u16>,
    _coordinator: Running,
}

impl Cluster {
    fn start(folder: &Path) -> Self {
        make_certificates(folder);
        let ports = free_ports(1);
        let config = write_config(folder, "n1", 1, ("127.0.0.1", &ports), "");
        let _coordinator = start_coordinator(&config);
        let cluster = Self { folder: folder.to_owned(), config, ports, _coordinator };
        eventually("a leader", || {
            let mut status = self::cluster();
            let status = run(status.args(["status", "--config"]).arg(&cluster.config));
            (status.code == 0).then_some(())
        });
        cluster
    }

    /// A worker of one slot that asks the metadata server.
    fn spot_worker(&self, name: &str, metadata: &Metadata) -> Running {
        let notices = format!(
            "[worker.notices]\nsources = [\"aws\"]\nendpoint = \"{}\"\ninterval = \"50ms\"\n",
            metadata.endpoint
        );
        let config = write_config(&self.folder, name, 1, ("127.0.0.1", &self.ports), &notices);
        let mut worker = cluster();
        worker.args(["worker", "--slots", "1", "--name", name, "--config"]).arg(config);
        Running::start(&mut worker)
    }

    fn submit(&self, job: &Path, sets: &[&str]) -> Running {
        let mut submit = cluster();
        submit.arg("submit").arg(job).args(["--json", "--follow", "--config"]).arg(&self.config);
        for set in sets {
            submit.args(["--set", set]);
        }
        Running::start(&mut submit)
    }

    /// The status of the job `small`.
    fn status(&self) -> Value {
        let mut job = cluster();
        let job = run(job.args(["job", "small", "--json", "--config"]).arg(&self.config));
        job.expect_code(0).last_json()["status"].clone()
    }
}

/// No checkpoint is due before the end.
const SETS: [&str; 3] =
    ["stop.max_steps=300", "checkpoint.every_steps=0", "recovery.max_failures=0"];

fn undisturbed(job: &Path, folder: &Path) -> String {
    let finished = run(&mut submit_local(job, &folder.join("undisturbed"), &SETS));
    weights_digest(&finished.expect_code(0))
}

/// The moments of a job's history that tell of the notice.
fn told(status: &Value) -> usize {
    let history = status["history"].as_array().expect("a list");
    let tells = |moment: &&Value| {
        moment["text"].as_str().is_some_and(|text| text.contains("AWS reclaims it at "))
    };
    history.iter().filter(tells).count()
}

#[test]
fn a_reclaimed_host_hands_its_rank_over_and_ends() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let job = small_job(folder, "[resources]\nranks = { min = 1, max = 2 }\n");
    let expected = undisturbed(&job, folder);
    let cluster = Cluster::start(folder);
    let metadata = Metadata::start();
    let _stays = start_worker(folder, "w1", 1, &cluster.ports);
    let leaves = cluster.spot_worker("w2", &metadata);
    let mut following = cluster.submit(&job, &SETS);
    let runs_on = |ranks| {
        move |event: &Value| {
            let gang = event["gang"].as_array().map_or(0, Vec::len);
            event["event"] == "status" && event["phase"] == "running" && gang == ranks
        }
    };
    following.wait_for("two ranks run", runs_on(2));
    metadata.reclaim(120);
    following.wait_for("one rank runs", runs_on(1));
    leaves.finish().expect_code(0);
    following.finish().expect_code(0);
    let status = cluster.status();
    assert_eq!(status["model"]["sha256"], expected.as_str(), "{status}");
    assert_eq!((&status["failures"], &status["first_cause"]), (&0.into(), &Value::Null));
    assert_eq!(status["regroups"], status["restarts"], "in place: {status}");
    assert_eq!(status["goodput"]["lost_ms"], 0, "{status}");
    assert_eq!(told(&status), 1, "{status}");
}

#[test]
fn the_only_host_saves_the_state_in_the_time_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let job = small_job(folder, "");
    let expected = undisturbed(&job, folder);
    let cluster = Cluster::start(folder);
    let metadata = Metadata::start();
    let leaves = cluster.spot_worker("w1", &metadata);
    let mut following = cluster.submit(&job, &SETS);
    following.wait_for_step(30);
    metadata.reclaim(30);
    leaves.finish().expect_code(0);
    let status = eventually("the job waits", || {
        Some(cluster.status()).filter(|status| status["phase"] == "queued")
    });
    assert!(status["checkpoint"]["step"].as_u64() >= Some(30), "{status}");
    assert_eq!((told(&status), &status["failures"]), (1, &0.into()), "{status}");

    let _other = start_worker(folder, "w2", 1, &cluster.ports);
    following.finish().expect_code(0);
    assert_eq!(cluster.status()["model"]["sha256"], expected.as_str());
}

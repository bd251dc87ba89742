//! A worker that is killed, and the next one on its folder.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use nix::sys::{prctl, wait::waitpid};
use nix::unistd::Pid;
use tokio_util::sync::CancellationToken;
use worker::{Worker, WorkerError};

use crate::harness::{Coordinator, Host, Running, gone, is_alive, kill_9, options, task};

const FOLDER: &str = "COHORT_TEST_FOLDER";
const COORDINATOR: &str = "COHORT_TEST_COORDINATOR";

/// Not a test: the worker as a process of its own, for the tests below.
#[tokio::test]
#[ignore = "started by other tests as a process"]
async fn worker_process() {
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("started by a test"));
    let address: SocketAddr =
        std::env::var(COORDINATOR).expect("started by a test").parse().expect("an address");
    let result = Worker::run(options(&folder, &[address]), CancellationToken::new()).await;
    panic!("the worker ended by itself: {result:?}");
}

/// Killed when the test ends, however it ends.
struct Process(Child);

impl Process {
    fn worker(host: &Host, coordinator: SocketAddr) -> Self {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--ignored", "--exact", "restarts::worker_process"])
            .env(FOLDER, host.folder.path())
            .env(COORDINATOR, coordinator.to_string())
            .spawn();
        Self(child.expect("starts"))
    }

    fn kill(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_killed_worker_leaves_nothing_that_the_next_one_does_not_clear() {
    // Rank 0 ignores the end of its socket; rank 1 leaves on it, but its child stays.
    let host = Host::new(
        r#"
sleep 100000 &
echo $!
if [ $RANK = 0 ]; then exec sleep 100000; fi
while read -r order; do :; done
"#,
    );
    // Orphans become this process's children: it decides when a dead one's id is free again.
    prctl::set_child_subreaper(true).expect("sets");
    let mut coordinator = Coordinator::leader().await;
    let mut former = Process::worker(&host, coordinator.address);
    let mut session = coordinator.welcomed().await;
    let mut processes = Vec::new();
    for rank in [task(1, 0), task(1, 1)] {
        session.start(&rank).await;
        let pid = session.started(&rank).await;
        let lines = session.lines_until(|line| line.text.parse::<i32>().is_ok()).await;
        processes.push((pid, lines[0].text.parse::<i32>().expect("a process id")));
    }
    let incarnation = session.hello.incarnation;
    let records = host.dir().join("ranks");
    assert_eq!(fs::read_dir(&records).expect("a folder").count(), 2);

    // A folder has one worker.
    let second = Running::start(host.options(&[coordinator.address])).result().await;
    assert!(matches!(second, Err(WorkerError::Locked { .. })), "{second:?}");

    former.kill();
    gone(processes[1].0).await;
    waitpid(Pid::from_raw(processes[1].0), None).expect("an orphan of ours");
    assert!(is_alive(processes[0].0), "rank 0 is to be a stray for this test");
    assert!(is_alive(processes[1].1), "rank 1's child is to be a stray for this test");

    // A record whose process id now belongs to someone else, and one that was never finished.
    let bystander = Command::new("sleep").arg("100000").process_group(0).spawn();
    let mut bystander = Process(bystander.expect("starts"));
    let record = fs::read_to_string(records.join("digits.g1.r0.json")).expect("a record");
    let (ours, theirs) = (processes[0].0, bystander.0.id());
    let reused = record.replace(&format!("\"pid\":{ours}"), &format!("\"pid\":{theirs}"));
    assert_ne!(reused, record);
    fs::write(records.join("digits.g0.r0.json"), reused).expect("writes");
    fs::write(records.join("digits.g0.r1.tmp"), "{\"task\":").expect("writes");

    let _next = host.worker(&[coordinator.address]);
    let session = coordinator.welcomed().await;
    assert_ne!(session.hello.incarnation, incarnation);
    assert!(session.hello.tasks.is_empty());
    // It said hello only after they were gone.
    for pid in [processes[0].0, processes[0].1, processes[1].1] {
        assert!(!is_alive(pid), "process {pid} outlived the restart");
    }
    assert_eq!(bystander.0.try_wait().expect("waits"), None, "a stranger's process was killed");
    assert_eq!(fs::read_dir(&records).expect("a folder").count(), 0);
}

#[tokio::test]
async fn output_that_a_killed_worker_did_not_upload_is_uploaded_by_the_next() {
    let host = Host::new("echo before\nread -r order\n");
    let mut coordinator = Coordinator::leader().await;
    let mut former = Process::worker(&host, coordinator.address);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    let pid = session.started(&rank).await;
    session.lines_until(|line| line.text == "before").await;
    // The leader may have the line before the disk; an exit event comes after both.
    kill_9(pid);
    session.exited(&rank).await;
    former.kill();
    let key = host.store().join("jobs/digits/logs/g1/r0/000000000000.jsonl.zst");
    // Whether the former one got to upload it is chance; the next one must not depend on it.
    fs::remove_dir_all(host.store()).expect("removes");
    let _ = fs::remove_file(host.dir().join("logs/digits/g1/r0/cursor.json"));

    let next = host.worker(&[coordinator.address]);
    let _session = coordinator.welcomed().await;
    next.shut_down();
    next.result().await.expect("a clean end");
    let stored = zstd::decode_all(fs::File::open(key).expect("an object")).expect("zstd");
    assert!(String::from_utf8_lossy(&stored).contains("before"));
}

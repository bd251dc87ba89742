//! A lone node is killed (SIGKILL) at random moments; whatever it had acknowledged is there after
//! each restart. The child is this test binary, started again.

mod raft_support;

use std::io::{BufRead, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use coordinator::RaftNode;
use coordinator_core::Outcome;
use raft_support::{counter, counters, guard, lone_options, status_is};

/// Makes the child's test do its work; holds its folder.
const CHILD_DIR: &str = "COHORT_RAFT_CHILD_DIR";
const KILLS: usize = 30;

/// SplitMix64: one seed gives one schedule of kills.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// The child: says what it has, then proposes one counter after the other and says which were
/// acknowledged, until it is killed. Does nothing when it is run as an ordinary test.
#[tokio::test]
async fn child_process() {
    let Ok(dir) = std::env::var(CHILD_DIR) else { return };
    let say = |word: &str, number: u64| {
        let mut out = std::io::stdout().lock();
        // The parent may have stopped reading.
        let _ = writeln!(out, "{word} {number}").and_then(|()| out.flush());
    };
    let (handle, _service) = RaftNode::start(lone_options(dir.as_ref())).expect("starts");
    status_is(&handle, "leading", |status| status.is_leader).await;
    let have = counters(&handle);
    let next = have.len() as u64;
    assert_eq!(have, (0..next).collect::<Vec<_>>(), "a gap");
    say("have", next);
    // The last one again, as a client does that was not answered before the kill.
    for number in next.saturating_sub(1).. {
        let outcome =
            guard("a commit", handle.propose(counter(number), Duration::from_secs(30))).await;
        assert_eq!(outcome, Ok(Outcome::Committed), "counter {number}");
        say("acknowledged", number);
    }
}

struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(dir: &std::path::Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["child_process", "--exact", "--nocapture"])
            .env(CHILD_DIR, dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let out = child.stdout.take().expect("piped");
        Self { child, lines: BufReader::new(out).lines() }
    }

    /// The next number said under `word`; `None` when the child is gone.
    fn next(&mut self, word: &str) -> Option<u64> {
        loop {
            let line = self.lines.next()?.ok()?;
            // The harness writes to the same stream, without a line end before our first one.
            if let Some((_, number)) = line.rsplit_once(&format!("{word} ")) {
                return Some(number.parse().expect("a number"));
            }
        }
    }

    /// Kills it and returns the last acknowledged counter that it got out.
    fn kill(mut self) -> Option<u64> {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
        std::iter::from_fn(|| self.next("acknowledged")).last()
    }
}

/// Spins: a sleep is too coarse for a point inside a disk write.
fn spin(duration: Duration) {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

#[test]
fn nothing_acknowledged_is_lost_by_kills() {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos() as u64;
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(seed);
    println!("SEED={seed}");
    let mut random = Random(seed);
    let dir = tempfile::tempdir().expect("a folder");
    // How many counters have been acknowledged, over all lives.
    let mut acknowledged = 0;
    for kill in 0..KILLS {
        let mut running = Running::start(dir.path());
        // One in five dies while it starts: while the log is made, repaired or replayed.
        if random.below(5) == 0 {
            spin(Duration::from_micros(random.below(40_000)));
        } else {
            let have = running.next("have").expect("it comes up");
            assert!(have >= acknowledged, "kill {kill}: {acknowledged} acknowledged, {have} left");
            for _ in 0..random.below(25) {
                let number = running.next("acknowledged").expect("it commits");
                acknowledged = acknowledged.max(number + 1);
            }
            spin(Duration::from_micros(random.below(3_000)));
        }
        if let Some(number) = running.kill() {
            acknowledged = acknowledged.max(number + 1);
        }
    }
    let mut running = Running::start(dir.path());
    let have = running.next("have").expect("it comes up");
    assert!(have >= acknowledged, "at the end: {acknowledged} acknowledged, {have} left");
    assert!(acknowledged > KILLS as u64, "only {acknowledged} were ever acknowledged");
    running.kill();
}

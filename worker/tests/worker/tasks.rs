//! From start to exit event: reports, output, causes of death, and who may start.

use std::fs;

use api::ids::{Generation, Rank, Secret, TaskId};
use api::session::{
    Assignment, CoordinatorMessage, ExitCause, LOG_LINE_BYTES_MAX, LeaveScope, LogLine, LogStream,
    RankOrder, RankReport, Regroup,
};
use api::session::{TaskEvent, TaskView, WorkerMessage};
use api::units::{ByteSize, Span};

use crate::harness::{
    Coordinator, GANG_SECRET, Host, Running, TOKEN, gone, is_alive, kill_9, task, train,
};

/// Waits for orders until the socket ends.
pub const OBEY: &str = r#"
listen 7001
while read -r order; do
  case "$order" in
    *'"order":"stop"'*) say '{"report":"stopped","step":3}'; exit 0 ;;
  esac
done
"#;

#[tokio::test]
async fn a_rank_reports_prints_and_is_killed_from_outside() {
    let host = Host::new(
        r#"
echo "rank $RANK of $WORLD_SIZE in $COHORT_JOB g$COHORT_GENERATION as $*"
read -r order
printf 'half a line, ' >&2; echo 'and the rest' >&2
listen 7001
read -r order
head -c 20000 /dev/zero | tr '\0' x; echo
printf '10%%\r20%%\r100%%\n'
read -r order
"#,
    );
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    assert_eq!((session.hello.slots, session.hello.tasks.len()), (2, 0));
    let rank = task(4, 1);
    session.start(&rank).await;
    let pid = session.started(&rank).await;

    let mut lines = session.lines_until(|_| true).await;
    // What a person on the host can see of the process shows no secret.
    for file in ["cmdline", "environ"] {
        let seen = fs::read(format!("/proc/{pid}/{file}")).expect("the rank runs");
        let seen = String::from_utf8_lossy(&seen);
        assert!(!seen.contains(GANG_SECRET) && !seen.contains(TOKEN), "{file}: {seen}");
    }
    session.nudge(&rank).await;
    // The line on standard error was finished before the report; it may arrive after it.
    let (mut listened, mut complained) = (false, false);
    while !(listened && complained) {
        match session.message().await {
            WorkerMessage::Logs { lines: more, .. } => {
                complained |= more.iter().any(|line| line.stream == LogStream::Stderr);
                lines.extend(more);
            }
            WorkerMessage::Task { event, .. } => {
                let report = TaskEvent::Report {
                    generation: rank.generation,
                    report: RankReport::Listening {
                        address: "127.0.0.1:7001".parse().expect("an address"),
                        fingerprint: "f".into(),
                    },
                };
                assert_eq!(event, report);
                listened = true;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    session.nudge(&rank).await;
    lines.extend(session.lines_until(|line| line.text == "100%").await);

    let sequences: Vec<u64> = lines.iter().map(|line| line.sequence).collect();
    assert_eq!(sequences, [0, 1, 2, 3]);
    assert_eq!(lines[0].text, "rank 1 of 2 in digits g4 as rank");
    assert_eq!(
        (lines[1].stream, lines[1].text.as_str()),
        (LogStream::Stderr, "half a line, and the rest")
    );
    assert!(lines[2].text.len() <= LOG_LINE_BYTES_MAX && lines[2].text.ends_with("bytes cut]"));

    kill_9(pid);
    let message = "half a line, and the rest".to_owned();
    assert_eq!(session.exited(&rank).await, ExitCause::Signal { signal: 9, message });
    session.acknowledge(session.last).await;
    worker.shut_down();
    worker.result().await.expect("a clean end");

    // The same lines lie in the object store, and no record of a live rank is left.
    let key = host.store().join("jobs/digits/logs/g4/r1/000000000000.jsonl.zst");
    let stored = zstd::decode_all(fs::File::open(key).expect("an object")).expect("zstd");
    let stored: Vec<LogLine> = String::from_utf8(stored)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line"))
        .collect();
    assert_eq!(stored, lines);
    assert_eq!(fs::read_dir(host.dir().join("ranks")).expect("a folder").count(), 0);
}

/// Every line from 0 on is there or counted by a note that stands in its place; returns the notes.
fn check_continuity(lines: &[LogLine]) -> usize {
    let (mut next, mut notes) = (0, 0);
    for line in lines {
        let missing = line.sequence - next;
        if line.stream == LogStream::Gap {
            let text = format!("{} lines are missing", missing + 1);
            assert!(line.text.starts_with(&text), "expected {text}, found {}", line.text);
            notes += 1;
        } else {
            assert_eq!((missing, &line.text), (0, &(line.sequence + 1).to_string()));
        }
        next = line.sequence + 1;
    }
    notes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_output_is_bounded_and_stalls_nothing() {
    const LINES: u64 = 300_000;
    let host = Host::new(&format!("seq 1 {LINES}\n"));
    let mut coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    options.config.worker.log_bytes = ByteSize(256 << 10);
    let worker = Running::start(options);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    let pid = session.started(&rank).await;
    // Nobody reads the session meanwhile; the rank gets to its end all the same.
    gone(pid).await;
    let mut lines = Vec::new();
    loop {
        match session.message().await {
            WorkerMessage::Logs { lines: more, .. } => lines.extend(more),
            WorkerMessage::Task { event, .. } => {
                assert_eq!(event, TaskEvent::Exited { cause: ExitCause::Completed });
                break;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(check_continuity(&lines) > 0, "the flood was to exceed the queue");
    assert_eq!(lines.last().map(|line| line.sequence), Some(LINES - 1));
    session.acknowledge(session.last).await;
    worker.shut_down();
    worker.result().await.expect("a clean end");

    let on_disk: u64 = fs::read_dir(host.dir().join("logs/digits/g1/r0"))
        .expect("a folder")
        .map(|file| file.and_then(|f| f.metadata()).expect("a file").len())
        .sum();
    assert!(on_disk <= (256 << 10) + 1_024, "{on_disk} bytes are kept");
    let mut objects: Vec<_> = fs::read_dir(host.store().join("jobs/digits/logs/g1/r0"))
        .expect("a folder")
        .map(|file| file.expect("a file").path())
        .collect();
    objects.sort();
    let stored: Vec<LogLine> = objects
        .iter()
        .flat_map(|path| {
            let bytes = zstd::decode_all(fs::File::open(path).expect("an object")).expect("zstd");
            let text = String::from_utf8(bytes).expect("text");
            text.lines().map(|l| serde_json::from_str(l).expect("a line")).collect::<Vec<_>>()
        })
        .collect();
    check_continuity(&stored);
    assert_eq!(stored.last().map(|line| line.sequence), Some(LINES - 1));
}

#[tokio::test]
async fn a_rank_that_fails_says_why_and_whether_to_try_again() {
    let host = Host::new(
        r#"
case "$RANK" in
  0) say '{"report":"failed","message":"channel `train` is empty","retryable":false,"blames":null}'
     exit 2 ;;
  1) echo 'first' >&2
     echo 'thread main panicked: out of memory' >&2
     echo 'note: run with a backtrace' >&2
     exit 101 ;;
esac
"#,
    );
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (first, second) = (task(1, 0), task(1, 1));
    session.start(&first).await;
    session.started(&first).await;
    let (_, event) = session.fact().await;
    assert!(
        matches!(event, TaskEvent::Report { report: RankReport::Failed { .. }, .. }),
        "{event:?}"
    );
    let message = "channel `train` is empty".to_owned();
    assert_eq!(
        session.exited(&first).await,
        ExitCause::Code { code: 2, message, retryable: false, damaged: None }
    );

    session.start(&second).await;
    session.started(&second).await;
    let message = "thread main panicked: out of memory".to_owned();
    let cause = ExitCause::Code { code: 101, message, retryable: true, damaged: None };
    assert_eq!(session.exited(&second).await, cause);
}

#[tokio::test]
async fn what_a_rank_started_dies_with_it() {
    let host = Host::new("sleep 100000 & echo $!\n[ $RANK = 1 ] || wait\n");
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let child = |line: &LogLine| line.text.parse::<i32>().ok();

    // A rank that is killed, and one that leaves by itself without its child.
    let (killed, leaving) = (task(1, 0), task(1, 1));
    session.start(&killed).await;
    let pid = session.started(&killed).await;
    let lines = session.lines_until(|line| child(line).is_some()).await;
    let orphan = child(&lines[0]).expect("a process id");
    assert!(is_alive(orphan));
    kill_9(pid);
    session.exited(&killed).await;
    gone(orphan).await;

    session.start(&leaving).await;
    session.started(&leaving).await;
    let lines = session.lines_until(|line| child(line).is_some()).await;
    assert_eq!(session.exited(&leaving).await, ExitCause::Completed);
    gone(child(&lines[0]).expect("a process id")).await;
}

#[tokio::test]
async fn a_process_that_left_the_group_does_not_hold_up_the_exit() {
    let host = Host::new("setsid sh -c 'echo $$; exec sleep 100000' &\nread -r order\n");
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    // It prints only after it has left the group; then the rank may go.
    let mut lines = session.lines_until(|_| true).await;
    session.nudge(&rank).await;
    lines.extend(session.lines_until(|line| line.stream == LogStream::Gap).await);
    assert!(lines[1].text.contains("a process that it detached"), "{}", lines[1].text);
    assert_eq!(session.exited(&rank).await, ExitCause::Completed);
    kill_9(lines[0].text.parse().expect("a process id"));
}

#[tokio::test]
async fn a_rank_that_breaks_the_protocol_is_killed() {
    let host = Host::new(
        r#"
if [ $RANK = 0 ]; then say 'good morning'; else head -c 5000000 /dev/zero >&0; fi
sleep 100000
"#,
    );
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    for (rank, said) in [(task(1, 0), "not a report"), (task(1, 1), "a report of more than")] {
        session.start(&rank).await;
        session.started(&rank).await;
        let cause = session.exited(&rank).await;
        assert!(matches!(&cause, ExitCause::Killed { reason } if reason.contains(said)), "{cause}");
    }
}

#[tokio::test]
async fn starts_are_bounded_idempotent_and_superseded_by_a_newer_generation() {
    let host = Host::new(OBEY);
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let old = [task(1, 0), task(1, 1)];
    for rank in &old {
        session.start(rank).await;
        session.started(rank).await;
        session.listening(rank).await;
    }
    // Twice is once; a third has no room; an older one is refused.
    session.start(&old[0]).await;
    let third = task(1, 2);
    session.start(&third).await;
    assert_eq!(
        session.exited(&third).await,
        ExitCause::NotStarted { reason: "no free slot: 2 of 2 are taken".into() }
    );
    let stale = task(0, 0);
    session.start(&stale).await;
    let cause = session.exited(&stale).await;
    assert!(cause.to_string().contains("superseded: g1"), "{cause}");

    // Both old ranks die before the first new one starts.
    let new = task(2, 0);
    session.start(&new).await;
    let mut ended = vec![session.fact().await, session.fact().await];
    ended.sort_by_key(|(task, _)| task.rank);
    for ((who, event), rank) in ended.into_iter().zip(&old) {
        let cause = ExitCause::Killed { reason: "superseded by g2".into() };
        assert_eq!((&who, event), (rank, TaskEvent::Exited { cause }));
    }
    session.started(&new).await;
    session.listening(&new).await;

    // Orders for what is not here are answered, so that the leader learns of it.
    let unknown = task(9, 0);
    session.kill(&unknown, "not wanted").await;
    let cause = ExitCause::Killed { reason: "not wanted".into() };
    assert_eq!(session.exited(&unknown).await, cause);
    session.deliver(&unknown, RankOrder::Committed { step: api::Step(1) }).await;
    assert!(matches!(session.exited(&unknown).await, ExitCause::Killed { .. }));

    session.kill(&new, "enough").await;
    assert_eq!(session.exited(&new).await, ExitCause::Killed { reason: "enough".into() });
}

#[tokio::test]
async fn a_program_that_cannot_be_started_is_a_fact_too() {
    let host = Host::new("");
    fs::remove_file(host.folder.path().join("program")).expect("removes");
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    let cause = session.exited(&rank).await;
    let expected = "program: No such file or directory";
    assert!(
        matches!(&cause, ExitCause::NotStarted { reason } if reason.contains(expected)),
        "{cause}"
    );
}

#[tokio::test]
async fn shutting_down_asks_first_and_kills_later() {
    // Rank 1 neither reads its orders nor ends with its socket.
    let host = Host::new(&format!("[ $RANK = 0 ] || exec sleep 100000\n{OBEY}"));
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (polite, deaf) = (task(1, 0), task(1, 1));
    session.start(&polite).await;
    session.started(&polite).await;
    session.listening(&polite).await;
    session.start(&deaf).await;
    let pid = session.started(&deaf).await;

    worker.shut_down();
    let (deadline_ms, cause) = (None, "its process was told to end".to_owned());
    let leaving = WorkerMessage::Leaving { deadline_ms, cause, scope: LeaveScope::Ends };
    assert_eq!(session.message().await, leaving, "before all that follows from it");
    let (who, event) = session.fact().await;
    assert_eq!(who, polite);
    assert!(
        matches!(event, TaskEvent::Report { report: RankReport::Stopped { .. }, .. }),
        "{event:?}"
    );
    // What comes now is refused.
    let late = task(2, 0);
    session.start(&late).await;
    let mut exits = Vec::new();
    for _ in 0..3 {
        match session.fact().await {
            (who, TaskEvent::Exited { cause }) => exits.push((who, cause.to_string())),
            other => panic!("expected exits, found {other:?}"),
        }
    }
    exits.sort();
    let late_text = "could not be started: the worker is shutting down";
    let deaf_text = "stopped by its worker: it did not leave in time when asked to";
    assert_eq!(
        exits,
        [
            (polite, "completed".to_owned()),
            (deaf, deaf_text.to_owned()),
            (late, late_text.to_owned()),
        ]
    );
    assert!(!is_alive(pid));
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
}

/// Hears everything and does nothing about it but say what it heard, as another port.
const HEAR: &str = r#"
listen 7001
while read -r order; do
  case "$order" in
    *'"order":"stop"'*) listen 7002 ;;
    *'"order":"regroup"'*) listen 7003 ;;
  esac
done
"#;

fn regroup(generation: u64) -> RankOrder {
    RankOrder::Regroup(Box::new(Regroup {
        generation: Generation(generation),
        rank: Rank(0),
        world_size: 1,
        restore: None,
        secret: Secret::new(GANG_SECRET),
        elapsed: Span::seconds(0),
        reason: "the others are lost".into(),
    }))
}

#[tokio::test]
async fn an_order_to_leave_ends_with_its_generation() {
    let host = Host::new(HEAR);
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (survivor, other) = (task(1, 0), task(1, 1));
    for rank in [&survivor, &other] {
        session.start(rank).await;
        session.started(rank).await;
        session.listening(rank).await;
    }
    let leave = || RankOrder::Stop { reason: "too few are left".into() };
    for (order, heard) in [(leave(), 7002), (regroup(2), 7003)] {
        session.deliver(&survivor, order).await;
        assert_eq!(session.listening(&survivor).await.port(), heard);
    }
    // By the time that this one has had its time, the survivor would have had it, too.
    session.deliver(&other, leave()).await;
    assert_eq!(session.listening(&other).await.port(), 7002);
    let reason = "it did not leave in time when asked to".to_owned();
    assert_eq!(session.exited(&other).await, ExitCause::Killed { reason: reason.clone() });
    session.deliver(&survivor, regroup(3)).await;
    assert_eq!(session.listening(&survivor).await.port(), 7003);
    // It is bounded again in the generation in which it is given again.
    session.deliver(&survivor, leave()).await;
    assert_eq!(session.listening(&survivor).await.port(), 7002);
    assert_eq!(session.exited(&survivor).await, ExitCause::Killed { reason });
    session.acknowledge(session.last).await;
    worker.shut_down();
    worker.result().await.expect("a clean end");
}

#[tokio::test]
async fn what_a_worker_that_ends_has_told_its_ranks_holds_in_every_generation() {
    let host = Host::new(HEAR);
    let mut coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    options.config.worker.stop_timeout = Span::millis(2_000);
    let worker = Running::start(options);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    session.listening(&rank).await;
    worker.shut_down();
    assert!(matches!(session.message().await, WorkerMessage::Leaving { .. }));
    assert_eq!(session.listening(&rank).await.port(), 7002);
    // The leader has not heard of the worker's end yet.
    session.deliver(&rank, regroup(2)).await;
    assert_eq!(session.listening(&rank).await.port(), 7003);
    assert_eq!(session.listening(&rank).await.port(), 7002, "it is told again");
    let reason = "it did not leave in time when asked to".to_owned();
    assert_eq!(session.exited(&rank).await, ExitCause::Killed { reason });
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
}

/// The same process for another generation, and whether it waits beside it for a place.
fn train_in(task: &TaskId, generation: u64, spare: bool) -> Box<Assignment> {
    let mut assignment = train(task);
    if let Assignment::Train(train) = assignment.as_mut() {
        (train.generation, train.spare) = (Generation(generation), spare);
    }
    assignment
}

#[tokio::test]
async fn a_start_counts_in_the_generation_that_it_is_for() {
    let host = Host::new(HEAR);
    let mut coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    options.slots = 3;
    let _worker = Running::start(options);
    let mut session = coordinator.welcomed().await;
    let (survivor, dying) = (task(1, 0), [task(1, 1), task(1, 2)]);
    for rank in std::iter::once(&survivor).chain(&dying) {
        session.start(rank).await;
        session.started(rank).await;
        session.listening(rank).await;
    }
    // A spare waits for the room of those that are dying, and hears meanwhile what it is to be.
    for rank in &dying {
        session.kill(rank, "the gang broke").await;
    }
    let spare = task(1, 3);
    let assignment = train_in(&spare, 1, true);
    session.order(CoordinatorMessage::Start { task: spare.clone(), assignment }).await;
    for rank in [&survivor, &spare] {
        session.deliver(rank, regroup(2)).await;
    }
    let new = task(2, 2);
    session.start(&new).await;
    let (mut killed, mut begun) = (0, Vec::new());
    while killed < 2 || begun.len() < 2 {
        match session.fact().await {
            (who, TaskEvent::Exited { .. }) if dying.contains(&who) => killed += 1,
            (who, TaskEvent::Started { .. }) => begun.push(who),
            (_, TaskEvent::Report { report: RankReport::Listening { .. }, .. }) => {}
            other => panic!("expected two ends and two starts, found {other:?}"),
        }
    }
    begun.sort();
    assert_eq!(begun, [spare.clone(), new.clone()]);
    session.kill(&new, "enough").await;
    while !matches!(session.fact().await, (who, TaskEvent::Exited { .. }) if who == new) {}

    // Its first start was lost, and it is a rank of the next generation by now.
    let late = task(1, 4);
    let assignment = train_in(&late, 2, false);
    session.order(CoordinatorMessage::Start { task: late.clone(), assignment }).await;
    session.started(&late).await;
    session.listening(&late).await;
    session.acknowledge(session.last).await;
    drop(session);
    let session = coordinator.welcomed().await;
    let of = |task: &TaskId| {
        let view = session.hello.tasks.iter().find(|view| view.task == *task);
        view.map(TaskView::generation)
    };
    assert_eq!(
        (of(&survivor), of(&spare), of(&late)),
        (Some(Generation(2)), Some(Generation(2)), Some(Generation(2)))
    );
}

//! What is kept, what is sent again, and what is not.

use super::*;
use api::{Generation, Rank};

fn task(rank: u32) -> TaskId {
    TaskId { workload: "job".parse().expect("a name"), generation: Generation(1), rank: Rank(rank) }
}

fn line(sequence: u64, bytes: usize) -> LogLine {
    LogLine { sequence, time_ms: 0, stream: LogStream::Stdout, text: "x".repeat(bytes) }
}

fn drain(ledger: &Ledger) -> Vec<(u64, WorkerMessage)> {
    std::iter::from_fn(|| ledger.next_frame())
        .map(|frame| (frame.sequence, serde_json::from_slice(&frame.json).expect("parses")))
        .collect()
}

fn summary(messages: &[(u64, WorkerMessage)]) -> Vec<String> {
    messages
        .iter()
        .map(|(sequence, message)| match message {
            WorkerMessage::Task { task, event: TaskEvent::Started { .. } } => {
                format!("{sequence} {} started", task.rank)
            }
            WorkerMessage::Task { task, event: TaskEvent::Exited { .. } } => {
                format!("{sequence} {} exited", task.rank)
            }
            WorkerMessage::Logs { task, lines } => {
                format!("{sequence} {} {} lines", task.rank, lines.len())
            }
            WorkerMessage::Leaving { scope, cause, .. } => format!("{sequence} {scope:?}: {cause}"),
            other => format!("{sequence} {other:?}"),
        })
        .collect()
}

#[test]
fn what_is_not_acknowledged_is_sent_again_in_order_under_new_sequences() {
    let ledger = Ledger::new();
    assert!(ledger.accept(&task(0)) && ledger.accept(&task(1)));
    assert!(!ledger.accept(&task(0)), "a task is accepted once");
    ledger.begin_session();
    ledger.started(&task(0), 7);
    ledger.lines(&task(0), vec![line(0, 1), line(1, 1)]);
    ledger.started(&task(1), 8);
    ledger.exited(&task(0), ExitCause::Completed);
    let first = ["2 r0 started", "3 r0 2 lines", "4 r1 started", "5 r0 exited"];
    assert_eq!(summary(&drain(&ledger)), first);
    ledger.acknowledge(3);

    let (hello, inventory) = ledger.begin_session();
    assert_eq!((hello, inventory.len()), (1, 2), "an unacknowledged exit keeps its task");
    assert_eq!(summary(&drain(&ledger)), ["2 r1 started", "3 r0 exited"]);
    ledger.acknowledge(3);
    assert_eq!(ledger.facts_left(), 0);
    assert_eq!(ledger.begin_session().1.len(), 1);
    assert!(ledger.accept(&task(0)), "its exit is acknowledged");
}

fn leaving() -> Option<Leave> {
    Some(Leave { scope: api::session::LeaveScope::Ends, cause: "x".into(), deadline: None })
}

#[test]
fn a_leave_is_said_first_in_each_session_and_waited_for_while_a_leader_is_there() {
    let ledger = Ledger::new();
    ledger.begin_session();
    ledger.started(&task(0), 7);
    ledger.leave(leaving());
    assert!(ledger.has_unsent() && !ledger.leave_is_unknown(), "nobody is there to know");
    ledger.attached(true);
    assert!(ledger.leave_is_unknown());
    assert_eq!(summary(&drain(&ledger)), ["2 Ends: x", "3 r0 started"]);
    ledger.acknowledge(1);
    assert!(ledger.leave_is_unknown());
    ledger.acknowledge(2);
    assert!(!ledger.leave_is_unknown() && !ledger.has_unsent());
    ledger.leave(leaving());
    assert!(!ledger.has_unsent(), "the same once more is nothing new");
    ledger.begin_session();
    assert_eq!(summary(&drain(&ledger)), ["2 Ends: x", "3 r0 started"]);
    // Taken back: that, too, is said in each session, to a leader that remembers the other.
    ledger.leave(None);
    assert_eq!(summary(&drain(&ledger)), ["4 Staying"]);
    ledger.begin_session();
    assert_eq!(summary(&drain(&ledger)), ["2 Staying", "3 r0 started"]);
}

#[test]
fn an_answer_is_sent_once_in_the_session_that_it_came_about_in() {
    let ledger = Ledger::new();
    let answer =
        |request| WorkerMessage::Flight { request, task: task(0), log: None, why: String::new() };
    ledger.begin_session();
    ledger.started(&task(0), 7);
    ledger.answer(&answer(5));
    assert!(ledger.has_unsent());
    let sent = drain(&ledger);
    assert_eq!(sent[0], (2, answer(5)), "it does not wait for what is kept");
    assert_eq!(summary(&sent[1..]), ["3 r0 started"]);
    assert_eq!(ledger.facts_left(), 1, "it is no fact");
    ledger.answer(&answer(6));
    ledger.begin_session();
    assert_eq!(summary(&drain(&ledger)), ["2 r0 started"]);
    ledger.acknowledge(2);
    assert!(!ledger.has_unsent());
}

#[test]
fn pressure_drops_the_oldest_lines_with_a_note_and_never_a_fact() {
    let ledger = Ledger::new();
    ledger.started(&task(0), 7);
    let count = (2 * SAMPLE_BYTES_MAX / LOG_LINE_BYTES_MAX) as u64;
    for sequence in 0..count {
        ledger.lines(&task(0), vec![line(sequence, LOG_LINE_BYTES_MAX)]);
    }
    assert!(ledger.lock().sample_bytes <= SAMPLE_BYTES_MAX);
    ledger.begin_session();
    let messages = drain(&ledger);
    assert!(matches!(messages[0].1, WorkerMessage::Task { .. }), "the fact is still there");
    let lines: Vec<LogLine> = messages
        .into_iter()
        .filter_map(|(_, message)| match message {
            WorkerMessage::Logs { lines, .. } => Some(lines),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!((lines[0].stream, lines[0].sequence), (LogStream::Gap, lines[1].sequence - 1));
    let missing = format!("{} lines are missing", lines[1].sequence);
    assert!(lines[0].text.starts_with(&missing), "{}", lines[0].text);
    let kept: Vec<u64> = lines[1..].iter().map(|line| line.sequence).collect();
    assert_eq!(kept, (lines[1].sequence..count).collect::<Vec<_>>());
    ledger.acknowledge(u64::MAX);
    assert_eq!(ledger.lock().sample_bytes, 0, "the count of bytes is exact");
}

#[test]
fn lines_dropped_on_their_way_are_missing_only_if_the_session_is_cut() {
    let note = |ledger: &Ledger| -> Option<(u64, String)> {
        drain(ledger).into_iter().find_map(|(_, message)| match message {
            WorkerMessage::Logs { lines, .. } if lines[0].stream == LogStream::Gap => {
                Some((lines[0].sequence, lines[0].text.clone()))
            }
            _ => None,
        })
    };
    let count = (2 * SAMPLE_BYTES_MAX / LOG_LINE_BYTES_MAX) as u64;
    for cut in [false, true] {
        let ledger = Ledger::new();
        ledger.begin_session();
        for sequence in 0..count {
            ledger.lines(&task(0), vec![line(sequence, LOG_LINE_BYTES_MAX)]);
            assert_eq!(note(&ledger), None, "all was sent");
        }
        let dropped = count - ledger.lock().samples.len() as u64;
        assert!(dropped > 0);
        if cut {
            ledger.begin_session();
            let (sequence, text) = note(&ledger).expect("a note");
            assert_eq!(sequence, dropped - 1);
            assert!(text.starts_with(&format!("{dropped} lines are missing")), "{text}");
        } else {
            ledger.acknowledge(u64::MAX);
            ledger.begin_session();
            ledger.lines(&task(0), vec![line(count, 1)]);
            assert_eq!(note(&ledger), None);
        }
    }
}

#[test]
fn a_full_queue_forgets_superseded_checkpoints_first() {
    let ledger = Ledger::new();
    ledger.started(&task(0), 7);
    for step in 0..=FACTS_MAX as u64 {
        let fact = api::events::CheckpointFact {
            step: api::Step(step),
            generation: Generation(1),
            manifest_key: String::new(),
            manifest_digest: String::new(),
            bytes: 0,
            ..Default::default()
        };
        let report = RankReport::Checkpoint(fact);
        ledger.report(&task(0), RankLine { generation: Generation(1), report });
    }
    assert_eq!(ledger.facts_left(), FACTS_MAX);
    let inner = ledger.lock();
    assert!(matches!(inner.facts[0].event, TaskEvent::Started { .. }));
    let TaskEvent::Report { report: RankReport::Checkpoint(fact), .. } = &inner.facts[1].event
    else {
        panic!("expected a checkpoint")
    };
    assert_eq!(fact.step.0, 2, "steps 0 and 1 went, the newest stayed");
}

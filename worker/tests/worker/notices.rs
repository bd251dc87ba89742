//! Notices, drains and stopped ranks: what the worker says, what its ranks hear, and when it ends.

use std::fs;
use std::time::{Duration, SystemTime};

use api::config::NoticeSource;
use api::session::{
    CoordinatorMessage, ExitCause, LeaveScope, RankReport, TaskEvent, WorkerMessage,
};
use api::units::Span;
use chrono::{DateTime, Utc};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use worker::WorkerOptions;

use crate::fake::{Fake, azure_event};
use crate::harness::{Attachment, Coordinator, Host, Running, is_alive, task};
use crate::tasks::OBEY;

fn with_source(mut options: WorkerOptions, fake: &Fake, source: NoticeSource) -> WorkerOptions {
    let notices = &mut options.config.worker.notices;
    notices.sources = vec![source];
    notices.endpoint.clone_from(&fake.endpoint);
    notices.interval = Span::millis(10);
    options
}

/// In so many seconds, as the providers write it.
fn soon(seconds: u64) -> DateTime<Utc> {
    (SystemTime::now() + Duration::from_secs(seconds)).into()
}

/// The next message must be of leaving: scope, cause, milliseconds left.
async fn leaving(session: &mut Attachment) -> (LeaveScope, String, Option<u64>) {
    match session.message().await {
        WorkerMessage::Leaving { scope, cause, deadline_ms } => (scope, cause, deadline_ms),
        other => panic!("expected a leave, found {other:?}"),
    }
}

async fn has_stopped(session: &mut Attachment) {
    let (_, event) = session.fact().await;
    assert!(
        matches!(event, TaskEvent::Report { report: RankReport::Stopped { .. }, .. }),
        "{event:?}"
    );
}

#[tokio::test]
async fn an_interruption_is_said_with_its_cause_and_ends_the_worker() {
    let host = Host::new(OBEY);
    let fake = Fake::start().await;
    let mut coordinator = Coordinator::leader().await;
    let options = host.options(&[coordinator.address]);
    let worker = Running::start(with_source(options, &fake, NoticeSource::Aws));
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    session.listening(&rank).await;

    let at = soon(120);
    let action = format!(r#"{{"action": "terminate", "time": "{}"}}"#, at.format("%FT%TZ"));
    fake.tell(|told| told.action = Some(action));
    let (scope, cause, left) = leaving(&mut session).await;
    assert_eq!(scope, LeaveScope::Ends);
    assert_eq!(cause, format!("AWS reclaims it at {}", at.format("%TZ")));
    assert!(left.is_some_and(|left| (1..=120_000).contains(&left)), "{left:?}");
    has_stopped(&mut session).await;
    assert_eq!(session.exited(&rank).await, ExitCause::Completed);
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end, as after SIGTERM");
}

#[tokio::test]
async fn a_rank_that_overstays_is_killed_before_the_deadline() {
    // It neither reads its orders nor ends with its socket.
    let host = Host::new("exec sleep 100000\n");
    let notice = host.folder.path().join("notice");
    let mut coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    // Only the deadline is sooner than this test's patience.
    options.config.worker.stop_timeout = Span::seconds(3_600);
    options.config.worker.notices.sources = vec![NoticeSource::File];
    options.config.worker.notices.file.clone_from(&notice);
    options.config.worker.notices.interval = Span::millis(10);
    let worker = Running::start(options);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    let pid = session.started(&rank).await;

    let begin = SystemTime::now();
    fs::write(&notice, r#"{"deadline_seconds": 2, "reason": "the rack moves"}"#).expect("writes");
    let (scope, cause, left) = leaving(&mut session).await;
    assert_eq!((scope, cause.as_str()), (LeaveScope::Ends, "the rack moves"));
    assert!(left.is_some_and(|left| left <= 2_000), "{left:?}");
    let reason = "it did not leave in time when asked to".to_owned();
    assert_eq!(session.exited(&rank).await, ExitCause::Killed { reason });
    assert!(begin.elapsed().expect("time goes on") >= Duration::from_secs(1), "it got its time");
    assert!(!is_alive(pid));
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
}

#[tokio::test]
async fn an_event_is_acknowledged_once_the_worker_has_left() {
    let host = Host::new(OBEY);
    let mut fake = Fake::start().await;
    let mut coordinator = Coordinator::leader().await;
    let options = host.options(&[coordinator.address]);
    let worker = Running::start(with_source(options, &fake, NoticeSource::Azure));
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    session.listening(&rank).await;
    let at = soon(600).format("%a, %d %b %Y %T GMT").to_string();
    fake.tell(|told| told.events = azure_event("e7", "Redeploy", r#"["vm_1"]"#, &at));
    let (scope, cause, _) = leaving(&mut session).await;
    assert_eq!(scope, LeaveScope::Ends);
    assert!(cause.starts_with("Azure moves it to another host at "), "{cause}");
    has_stopped(&mut session).await;
    session.exited(&rank).await;
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
    let posted = fake.asked("POST /metadata/scheduledevents").await;
    assert!(posted.contains("e7"), "{posted}");
}

#[tokio::test]
async fn a_host_at_risk_is_avoided_for_as_long_as_it_is() {
    let host = Host::new(OBEY);
    let fake = Fake::start().await;
    let mut coordinator = Coordinator::leader().await;
    let options = host.options(&[coordinator.address]);
    let worker = Running::start(with_source(options, &fake, NoticeSource::Aws));
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    session.listening(&rank).await;
    let notice = r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#;
    fake.tell(|told| told.rebalance = Some(notice.into()));
    let (scope, cause, left) = leaving(&mut session).await;
    assert_eq!((scope, left), (LeaveScope::Avoided, None));
    assert_eq!(cause, "AWS recommends since 08:22:00Z to rebalance");
    // What runs goes on, and what the leader starts all the same is started.
    session.nudge(&rank).await;
    let other = task(1, 1);
    session.start(&other).await;
    session.started(&other).await;
    session.listening(&other).await;
    fake.tell(|told| told.rebalance = None);
    assert_eq!(session.news().await, WorkerMessage::Staying);
    worker.shut_down();
    assert_eq!(leaving(&mut session).await.0, LeaveScope::Ends);
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
}

#[tokio::test]
async fn a_drained_worker_stays_and_takes_nothing_until_it_is_undrained() {
    let host = Host::new(OBEY);
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let rank = task(1, 0);
    session.start(&rank).await;
    session.started(&rank).await;
    session.listening(&rank).await;
    let reason = "drained by a user".to_owned();
    let deadline = Some(Span::seconds(60));
    session.order(CoordinatorMessage::Drain { deadline, reason: reason.clone() }).await;
    let (scope, cause, left) = leaving(&mut session).await;
    assert_eq!((scope, cause), (LeaveScope::Drains, reason.clone()));
    assert!(left.is_some_and(|left| left <= 60_000), "{left:?}");
    has_stopped(&mut session).await;
    assert_eq!(session.exited(&rank).await, ExitCause::Completed);
    let refused = task(2, 0);
    session.start(&refused).await;
    assert_eq!(session.exited(&refused).await, ExitCause::NotStarted { reason });
    session.acknowledge(session.last).await;

    // The next leader hears of it before anything else.
    drop(session);
    let mut session = coordinator.welcomed().await;
    assert_eq!(leaving(&mut session).await.0, LeaveScope::Drains);
    session.order(CoordinatorMessage::Undrain).await;
    assert_eq!(session.news().await, WorkerMessage::Staying);
    let next = task(3, 0);
    session.start(&next).await;
    session.started(&next).await;
    session.listening(&next).await;
    // Undrained already: said again, so that whoever asks knows.
    session.order(CoordinatorMessage::Undrain).await;
    assert_eq!(session.news().await, WorkerMessage::Staying);
    worker.shut_down();
    assert_eq!(leaving(&mut session).await.0, LeaveScope::Ends);
    has_stopped(&mut session).await;
    session.exited(&next).await;
    session.acknowledge(session.last).await;
    worker.result().await.expect("a clean end");
}

#[tokio::test]
async fn a_rank_that_is_stopped_by_a_signal_is_killed_and_says_so() {
    let host = Host::new(OBEY);
    let mut coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    options.config.worker.stopped_rank_timeout = Span::millis(200);
    let _worker = Running::start(options);
    let mut session = coordinator.welcomed().await;
    let (stopped, other) = (task(1, 0), task(1, 1));
    for rank in [&stopped, &other] {
        session.start(rank).await;
    }
    let mut pid = None;
    while pid.is_none() {
        if let (who, TaskEvent::Started { pid: found }) = session.fact().await
            && who == stopped
        {
            pid = Some(found as i32);
        }
    }
    let pid = pid.expect("it runs");
    kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it runs");
    let cause = loop {
        if let (who, TaskEvent::Exited { cause }) = session.fact().await {
            assert_eq!(who, stopped, "the other one runs");
            break cause;
        }
    };
    let reason = format!("its process {pid} was stopped by a signal for 200 ms");
    assert_eq!(cause, ExitCause::Killed { reason });
    assert!(!is_alive(pid));
}

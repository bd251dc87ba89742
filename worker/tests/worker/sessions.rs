//! Finding the leader, losing it, finding it again; being refused.

use api::session::{ExitCause, WorkerMessage};
use api::units::Span;
use worker::WorkerError;

use crate::harness::{Coordinator, Host, Running, TOKEN, is_alive, kill_9, task};

#[tokio::test]
async fn a_cut_session_is_resumed_with_exactly_what_was_not_acknowledged() {
    // Nobody reads what the rank would lose: it runs until it is killed.
    let host = Host::new("listen 700$RANK\nwhile read -r order; do listen 800$RANK; done\n");
    let mut coordinator = Coordinator::leader().await;
    let _worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    let (first, second) = (task(1, 0), task(1, 1));
    session.start(&first).await;
    let first_pid = session.started(&first).await;
    session.listening(&first).await;
    session.start(&second).await;
    let second_pid = session.started(&second).await;
    // Acknowledged: the first rank's facts and the second's start. Its address is not.
    let acknowledged = session.last;
    session.listening(&second).await;
    session.acknowledge(acknowledged).await;
    // An order behind the acknowledgement, answered: both have been taken.
    session.nudge(&first).await;
    assert_eq!(session.listening(&first).await.port(), 8000);
    let incarnation = session.hello.incarnation;
    drop(session);

    let mut session = coordinator.attached().await;
    assert_eq!(session.hello.incarnation, incarnation);
    let inventory: Vec<_> = session
        .hello
        .tasks
        .iter()
        .map(|view| (view.task.clone(), view.address.map(|a| a.port()), view.has_peers))
        .collect();
    assert_eq!(inventory, [(first.clone(), Some(8000), true), (second.clone(), Some(7001), false)]);
    // Something happens while nobody has welcomed the worker yet.
    kill_9(second_pid);
    session.welcome(Span::seconds(3600)).await;
    assert_eq!(session.listening(&second).await.port(), 7001);
    assert_eq!(session.listening(&first).await.port(), 8000);
    let cause = ExitCause::Signal { signal: 9, message: String::new() };
    assert_eq!(session.exited(&second).await, cause);
    assert!(is_alive(first_pid), "a rank does not notice that the control plane was away");

    // Cut again without an acknowledgement: the same once more, and the dead rank is still listed
    // so that the leader learns its cause of death instead of missing it.
    drop(session);
    let mut session = coordinator.welcomed().await;
    assert_eq!(session.hello.tasks.len(), 2);
    assert_eq!(session.listening(&second).await.port(), 7001);
    assert_eq!(session.listening(&first).await.port(), 8000);
    session.exited(&second).await;
    session.acknowledge(session.last).await;
    session.nudge(&first).await;
    session.listening(&first).await;
    drop(session);
    let mut session = coordinator.welcomed().await;
    assert_eq!(session.hello.tasks.len(), 1);
    session.listening(&first).await;
    assert!(is_alive(first_pid));
}

#[tokio::test]
async fn a_follower_sends_the_worker_to_the_leader() {
    let host = Host::new("");
    let mut leader = Coordinator::leader().await;
    let follower = Coordinator::follower(leader.address).await;
    let _worker = host.worker(&[follower.address]);
    let mut session = leader.attached().await;
    session.welcome(Span::millis(20)).await;
    for _ in 0..3 {
        assert_eq!(session.message().await, WorkerMessage::Heartbeat);
    }
}

#[tokio::test]
async fn the_next_coordinator_is_tried_when_one_is_gone() {
    let host = Host::new("");
    let gone = Coordinator::leader().await.address;
    let mut leader = Coordinator::leader().await;
    let _worker = host.worker(&[gone, leader.address]);
    leader.welcomed().await;
}

#[tokio::test]
async fn a_wrong_token_ends_the_worker_with_one_clear_message() {
    let host = Host::new("");
    let coordinator = Coordinator::leader().await;
    let mut options = host.options(&[coordinator.address]);
    options.token = api::Secret::new("another-token");
    let error = Running::start(options).result().await.expect_err("refused");
    let text = error.to_string();
    assert!(matches!(error, WorkerError::Denied { .. }), "{text}");
    assert!(text.contains("the cluster token is not ours") && text.contains("cluster.token_file"));
    assert!(!text.contains("another-token") && !text.contains(TOKEN), "{text}");
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused() {
    let host = Host::new("");
    let text = Running::start(host.options(&[])).result().await.expect_err("refused").to_string();
    assert!(text.contains("no coordinator's address"), "{text}");
    let mut options = host.options(&["127.0.0.1:1".parse().expect("an address")]);
    options.slots = 0;
    let text = Running::start(options).result().await.expect_err("refused").to_string();
    assert!(text.contains("at least 1 slot"), "{text}");
}

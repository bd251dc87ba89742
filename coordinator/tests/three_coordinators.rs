//! Three coordinators: any of them answers, and losing the leader costs a running job nothing.

mod support;

use api::events::JobEvent;
use api::pb;
use api::records::{KIND_JOB, Phase};
use api::session::{CoordinatorMessage, RankReport, WorkerMessage};
use support::{
    FakeWorker, GENERATION, Group, checkpoint, guard, hello, inventory, metrics, name, rpc, spec,
    with_token,
};
use tokio_stream::StreamExt as _;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_passes_every_call_on_to_the_leader() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let follower = *group.coordinators.keys().find(|node| **node != leader).expect("a follower");
    let client = group.client_of(&[group.address(follower)]).await;
    let status = client.status().await.expect("answers itself");
    assert_eq!((status.node, status.leader, status.members.len()), (follower, leader, 3));

    // A worker is sent to the leader.
    let sent_on = FakeWorker::attach(group.address(follower), hello("w1", 1, Vec::new())).await;
    let sent_on = sent_on.err().expect("a follower takes no worker");
    assert_eq!(sent_on.code(), Code::FailedPrecondition);
    let hint = sent_on.metadata().get(api::connect::LEADER_KEY).expect("a hint");
    assert_eq!(hint.to_str().expect("text"), group.address(leader).to_string());
    let addresses = group.addresses();
    let mut worker = FakeWorker::attach_anywhere(&addresses, hello("w1", 1, Vec::new())).await;

    let job = name("a");
    client.submit(&spec("a", 1)).await.expect("accepted");
    let mut events = client.watch(&job).await.expect("watches");
    let mut lines = client.logs(&job, None, true).await.expect("follows");
    let (tasks, _) = worker.run_gang(1).await;
    assert_eq!(client.workers().await.expect("lists").len(), 1);
    assert_eq!(client.jobs().await.expect("lists").len(), 1);
    let sequence = worker.log(&tasks[0], 0, &["hello"]).await;
    worker.acknowledged(sequence).await;
    let line = guard("a line", lines.next()).await.expect("one").expect("a line");
    assert_eq!(line.text, "hello");
    worker.finish(&tasks).await;
    let mut phases = Vec::new();
    while let Some(event) = guard("an event", events.next()).await {
        if let JobEvent::Status(status) = event.expect("an event") {
            phases.push(status.phase);
        }
    }
    assert_eq!(phases.last(), Some(&Phase::Succeeded), "{phases:?}");
    assert!(guard("the end", lines.next()).await.is_none());
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_the_leader_starts_no_rank_again_and_no_stream_repeats() {
    let mut group = Group::start(3).await;
    let addresses = group.addresses();
    let client = group.client().await;
    let mut worker = FakeWorker::attach_anywhere(&addresses, hello("w1", 2, Vec::new())).await;
    let job = name("a");
    client.submit(&spec("a", 2)).await.expect("accepted");
    let (tasks, _) = worker.run_gang(2).await;
    let mut events = client.watch(&job).await.expect("watches");
    let mut lines = client.logs(&job, None, true).await.expect("follows");
    let sequence = worker.log(&tasks[0], 0, &["before"]).await;
    worker.report(&tasks[0], RankReport::Step(metrics(1))).await;
    let fact = checkpoint(&tasks[0], 50);
    let committed = worker.report(&tasks[0], RankReport::Checkpoint(fact)).await;
    worker.acknowledged(sequence.max(committed)).await;
    let line = guard("a line", lines.next()).await.expect("one").expect("a line");
    assert_eq!(line.text, "before");

    let leader = group.leader().await;
    group.stop(leader).await;
    let lost = loop {
        match worker.order().await {
            Ok(CoordinatorMessage::Deliver { .. }) => {}
            Ok(other) => panic!("unexpected {other:?}"),
            Err(status) => break status,
        }
    };
    assert_ne!(lost.code(), Code::Unauthenticated, "{lost}");

    // As a worker does: the same incarnation comes back and says what it still runs. What was not
    // acknowledged is said again.
    let mut worker =
        FakeWorker::attach_anywhere(&addresses, hello("w1", 2, inventory(&tasks))).await;
    assert_ne!(group.leader().await, leader);
    worker.log(&tasks[0], 0, &["before", "after"]).await;
    worker.report(&tasks[0], RankReport::Step(metrics(2))).await;
    let sequence = worker.say(WorkerMessage::Heartbeat).await;
    worker.acknowledged(sequence).await;
    let line = guard("a line", lines.next()).await.expect("one").expect("a line");
    assert_eq!((line.sequence, line.text.as_str()), (1, "after"), "a line was repeated");
    worker.finish(&tasks).await;
    for order in worker.early() {
        let is_start = matches!(order, CoordinatorMessage::Start { .. });
        assert!(!is_start, "the new leader started a rank again: {order:?}");
    }

    let (mut steps, mut last) = (Vec::new(), None);
    while let Some(event) = guard("an event", events.next()).await {
        match event.expect("an event") {
            JobEvent::Step(metrics) => steps.push(metrics.step.0),
            JobEvent::Status(status) => last = Some(status),
            _ => {}
        }
    }
    let last = last.expect("a status");
    assert_eq!((last.phase, last.generation), (Phase::Succeeded, GENERATION));
    assert_eq!(steps, [1, 2], "steps were lost or repeated");
    assert_eq!(client.checkpoints(&job).await.expect("lists").len(), 1);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_the_message_says_who_is_missing() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let others: Vec<u64> =
        group.coordinators.keys().copied().filter(|node| *node != leader).collect();
    let survivor = group.address(others[0]);
    group.stop(leader).await;
    group.stop(others[1]).await;
    // Asked once: the client would go on asking for a while.
    let mut rpc = rpc(survivor).await;
    let request = pb::ListRequest { kind: KIND_JOB.into(), id_prefix: String::new() };
    let status = guard("an answer", rpc.list(with_token(request))).await.expect_err("no majority");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let text = status.message();
    assert!(text.contains("no leader: 1 of 3 coordinators answer"), "{text}");
    group.stop_all().await;
}

//! Three coordinators: elections, replication, catching up, and who is not let in.

mod raft_support;

use std::time::Duration;

use api::pb::raft_client::RaftClient;
use api::pb::raft_server::{Raft, RaftServer};
use api::pb::{RaftAck, RaftFrame};
use coordinator::{ProposeError, RaftNode, RaftOptions, StartError, StopReason};
use coordinator_core::{Outcome, Transaction};
use protobuf::Message as _;
use raft::eraftpb::{Entry, Message, MessageType};
use raft_support::{Group, applied, counter, counters, guard, lone_options, status_is};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, Streaming};

/// Large enough that no test makes a snapshot by accident.
const NO_SNAPSHOTS: u64 = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_leader_commits_is_on_every_node_and_only_the_leader_commits() {
    let group = Group::start(3, NO_SNAPSHOTS).await;
    for number in 1..=20 {
        assert_eq!(group.commit(counter(number)).await, Outcome::Committed);
    }
    assert_eq!(group.converged().await, (1..=20).collect::<Vec<_>>());

    // Again under the same request id: the first outcome, and nothing is written.
    let before = group.handle(group.leader().await).records();
    assert_eq!(group.commit(counter(7)).await, Outcome::Committed);
    // Under another id the precondition speaks.
    let second = Transaction { request_id: "other".into(), ..counter(7) };
    assert!(matches!(group.commit(second).await, Outcome::Conflict { .. }));
    let after = group.handle(group.leader().await).records();
    assert_eq!(before.get("counter", "00000007"), after.get("counter", "00000007"));

    let leader = group.leader().await;
    let follower = (leader + 1) % 3;
    let known =
        status_is(group.handle(follower), "a leader is known", |s| s.leader.is_some()).await;
    let refused = group.handle(follower).propose(counter(99), Duration::from_secs(5)).await;
    match refused {
        Err(ProposeError::NotLeader { leader }) => assert_eq!(leader, known.leader),
        other => panic!("a follower answered {other:?}"),
    }
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_takes_over_and_the_old_one_catches_up() {
    let mut group = Group::start(3, NO_SNAPSHOTS).await;
    for number in 1..=5 {
        group.commit(counter(number)).await;
    }
    let old = group.leader().await;
    let term = group.handle(old).status().term;
    group.stop(old).await;
    for number in 6..=10 {
        group.commit(counter(number)).await;
    }
    let new = group.leader().await;
    assert!(group.handle(new).status().term > term);
    group.restart(old).await;
    group.commit(counter(11)).await;
    assert_eq!(group.converged().await, (1..=11).collect::<Vec<_>>());
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_behind_the_compacted_log_catches_up_by_snapshot() {
    let mut group = Group::start(3, 8).await;
    group.commit(counter(1)).await;
    group.converged().await;
    let behind = (group.leader().await + 1) % 3;
    let had = group.handle(behind).status().applied_index;
    group.stop(behind).await;
    for number in 2..=60 {
        group.commit(counter(number)).await;
    }
    let leader = group.leader().await;
    let first = group.handle(leader).status().first_index;
    assert!(first > had + 1, "the leader still has entry {}: from {first} on", had + 1);
    group.restart(behind).await;
    group.commit(counter(61)).await;
    assert_eq!(group.converged().await, (1..=61).collect::<Vec<_>>());
    // It took the snapshot over: entries before it never were in its log.
    let status = group.handle(behind).status();
    assert!(status.first_index > had + 1, "{status:?}");
    // And it is a full member: it can be the majority together with one other.
    group.stop((0..3).find(|index| *index != behind).expect("three nodes")).await;
    group.commit(counter(62)).await;
    assert_eq!(group.converged().await.len(), 62);
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_majority_answers_by_the_deadline_and_steps_down() {
    let mut group = Group::start(3, NO_SNAPSHOTS).await;
    group.commit(counter(1)).await;
    let leader = group.leader().await;
    for other in (0..3).filter(|index| *index != leader) {
        group.stop(other).await;
    }
    let handle = group.handle(leader).clone();
    let asked = handle.propose(counter(2), Duration::from_millis(100));
    let answer = guard("a proposal without a majority", asked).await;
    assert!(
        matches!(answer, Err(ProposeError::Timeout | ProposeError::NotLeader { .. })),
        "{answer:?}"
    );
    status_is(&handle, "stepping down", |status| !status.is_leader && status.leader.is_none())
        .await;
    assert_eq!(
        handle.propose(counter(3), Duration::from_secs(5)).await,
        Err(ProposeError::NotLeader { leader: None })
    );
    assert_eq!(counters(&handle), [1]);

    // With the majority back the unknown outcome becomes known by asking again.
    group.restart((leader + 1) % 3).await;
    assert_eq!(group.commit(counter(2)).await, Outcome::Committed);
    assert_eq!(group.converged().await, [1, 2]);
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_folder_stops_itself_and_the_others_go_on() {
    let mut group = Group::start(3, NO_SNAPSHOTS).await;
    group.commit(counter(1)).await;
    group.converged().await;
    // A follower that has acknowledged: the leader has heard from it.
    let wiped = (group.leader().await + 1) % 3;
    group.stop(wiped).await;
    std::fs::remove_dir_all(group.dir(wiped)).expect("removable");
    group.restart(wiped).await;
    let reason = guard("the wiped node stops", group.handle(wiped).stopped()).await;
    let StopReason::Failed(text) = reason else { panic!("stopped as if asked to") };
    assert!(text.contains("was lost") && text.contains("old id"), "{text}");
    let late = group.handle(wiped).propose(counter(9), Duration::from_secs(5)).await;
    assert_eq!(late, Err(ProposeError::Stopped));
    group.stop(wiped).await;
    group.commit(counter(2)).await;
    assert_eq!(group.converged().await, [1, 2]);
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_before_their_messages_are_read() {
    let group = Group::start(3, NO_SNAPSHOTS).await;
    group.commit(counter(1)).await;
    let address = format!("http://{}", group.members[0].address);
    let garbage = vec![0xff; 64];
    let frame = |from, cluster: &str, message: &[u8]| RaftFrame {
        from,
        to: 1,
        message: message.to_vec(),
        cluster_id: cluster.into(),
    };
    let cases = [
        (None, frame(2, "test", &garbage), Code::Unauthenticated, "no cluster token"),
        (
            Some("wrong-token"),
            frame(2, "test", &garbage),
            Code::Unauthenticated,
            "not this cluster",
        ),
        (Some("right-token"), frame(2, "else", &garbage), Code::FailedPrecondition, "`else`"),
        (Some("right-token"), frame(9, "test", &garbage), Code::FailedPrecondition, "n9"),
        (Some("right-token"), frame(1, "test", &garbage), Code::FailedPrecondition, "n1 to n1"),
        (Some("right-token"), frame(2, "test", &garbage), Code::DataLoss, "folder"),
    ];
    // The last case needs node 1 to have heard from node 2.
    group.converged().await;
    for (token, frame, code, text) in cases {
        let mut client = RaftClient::connect(address.clone()).await.expect("connects");
        let mut request = Request::new(tokio_stream::once(frame));
        if let Some(token) = token {
            let token = token.parse().expect("ascii");
            request.metadata_mut().insert(api::connect::TOKEN_KEY, token);
        }
        request.metadata_mut().insert("cohort-raft-folder", 5.into());
        let refused = guard("a refusal", client.step(request)).await.expect_err("let in");
        assert_eq!(refused.code(), code, "{refused}");
        assert!(refused.message().contains(text), "{refused}");
        assert!(!refused.message().contains("right-token"), "{refused}");
    }
    group.commit(counter(2)).await;
    group.finish().await;
}

/// Sends messages as n2, which must not run, to another node.
async fn as_second_node(group: &Group, index: usize, messages: Vec<Message>) {
    let to = group.members[index].node.0;
    let frames = messages.into_iter().map(|mut message| {
        (message.from, message.to) = (2, to);
        let message = message.write_to_bytes().expect("encodes");
        RaftFrame { from: 2, to, message, cluster_id: "test".into() }
    });
    let mut request = Request::new(tokio_stream::iter(frames.collect::<Vec<_>>()));
    let token = "right-token".parse().expect("ascii");
    request.metadata_mut().insert(api::connect::TOKEN_KEY, token);
    request.metadata_mut().insert("cohort-raft-folder", 5.into());
    let address = format!("http://{}", group.members[index].address);
    let mut client = RaftClient::connect(address).await.expect("connects");
    // Refused or not: what counts is what becomes of the node.
    let _ = guard("sending", client.step(request)).await;
}

fn message(kind: MessageType, term: u64) -> Message {
    let mut message = Message { term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_knows_more_of_the_log_than_the_disk_holds_stops_the_node() {
    let group = Group::start_some(3, &[0], NO_SNAPSHOTS).await;
    let heartbeat = Message { commit: 5, ..message(MessageType::MsgHeartbeat, 9) };
    as_second_node(&group, 0, vec![heartbeat]).await;
    let reason = guard("the node stops", group.handle(0).stopped()).await;
    let StopReason::Failed(text) = reason else { panic!("stopped as if asked to") };
    assert!(text.contains("n1 had log entry 5") && text.contains("ends with 0"), "{text}");
    group.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_raft_ends_the_node_with_a_message_and_frees_its_folder() {
    let mut group = Group::start_some(3, &[0], NO_SNAPSHOTS).await;
    let append = |term, entry: Entry| {
        let mut append = Message { commit: 1, ..message(MessageType::MsgAppend, term) };
        append.set_entries(vec![entry].into());
        append
    };
    let first = append(8, Entry { term: 8, index: 1, ..Entry::default() });
    as_second_node(&group, 0, vec![first]).await;
    applied(group.handle(0), 1).await;
    // Claims to follow entry 1, and contradicts it.
    let mut second = append(9, Entry { term: 9, index: 1, ..Entry::default() });
    (second.index, second.log_term) = (1, 8);
    as_second_node(&group, 0, vec![second]).await;
    let reason = guard("the node stops", group.handle(0).stopped()).await;
    let StopReason::Failed(text) = reason else { panic!("stopped as if asked to") };
    assert!(text.contains("conflict with committed entry") && text.contains("n1"), "{text}");
    group.stop(0).await;
    // What it had is still there.
    group.restart(0).await;
    status_is(group.handle(0), "the committed entry", |status| status.term == 8).await;
    group.finish().await;
}

/// A peer that hands on the messages it gets.
struct Recorder(mpsc::UnboundedSender<Message>);

#[tonic::async_trait]
impl Raft for Recorder {
    async fn step(
        &self,
        request: Request<Streaming<RaftFrame>>,
    ) -> Result<Response<RaftAck>, Status> {
        let mut frames = request.into_inner();
        while let Some(frame) = frames.message().await? {
            let message = Message::parse_from_bytes(&frame.message).expect("raft's own");
            if self.0.send(message).is_err() {
                break;
            }
        }
        Ok(Response::new(RaftAck {}))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_lost_on_the_way_is_sent_again() {
    // n2 is played by this test.
    let group = Group::start_some(3, &[0, 2], 8).await;
    for number in 1..=30 {
        group.commit(counter(number)).await;
    }
    let status = group.handle(group.leader().await).status();
    assert!(status.first_index > 2, "{status:?}");
    // n2 is alive, so raft sends it a snapshot; it never arrives, as often as it is tried. On a busy
    // machine the lead may change meanwhile: n2 answers whoever leads.
    let listener = TcpListener::bind(group.members[1].address).await.expect("a free port");
    let be_alive = async || {
        let leader = group.leader().await;
        let term = group.handle(leader).status().term;
        let alive = vec![message(MessageType::MsgHeartbeatResponse, term)];
        as_second_node(&group, leader, alive).await;
    };
    for _ in 0..6 {
        be_alive().await;
        drop(guard("a connection", listener.accept()).await.expect("accepts"));
    }
    // Now it would.
    let (sender, mut received) = mpsc::unbounded_channel();
    let server = tonic::transport::Server::builder()
        .add_service(RaftServer::new(Recorder(sender)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    guard("the snapshot", async {
        loop {
            be_alive().await;
            let next = received.recv().await.expect("the server runs");
            match next.get_msg_type() {
                MessageType::MsgSnapshot => {
                    let metadata = next.get_snapshot().get_metadata();
                    assert!(metadata.index > 1, "{metadata:?}");
                    break;
                }
                // One of the lost ones had left the leader's hands: it goes on behind it, and a node
                // without a log says that it lacks what comes before.
                MessageType::MsgAppend => {
                    let mut refusal = message(MessageType::MsgAppendResponse, next.term);
                    (refusal.index, refusal.reject) = (next.index, true);
                    as_second_node(&group, group.leader().await, vec![refusal]).await;
                }
                _ => {}
            }
        }
    })
    .await;
    server.abort();
    group.finish().await;
}

#[tokio::test]
async fn a_lone_node_leads_at_once_and_keeps_everything() {
    let dir = tempfile::tempdir().expect("a folder");
    // An election timeout that no test would wait for: a lone node must not need it.
    let options = RaftOptions {
        election_timeout: Duration::from_secs(3600),
        heartbeat_interval: Duration::from_secs(600),
        ..lone_options(dir.path())
    };
    let mut expected = Vec::new();
    for round in 0..4_u64 {
        let (handle, _service) = RaftNode::start(options.clone()).expect("starts");
        let status = status_is(&handle, "leading", |status| status.is_leader).await;
        assert_eq!(counters(&handle), expected, "after {round} restarts: {status:?}");
        // Two processes in one folder would be two nodes with one vote.
        let second = RaftNode::start(options.clone()).expect_err("the folder is in use");
        assert!(matches!(second, StartError::Folder(_)), "{second}");
        assert!(second.to_string().contains("in use by another process"), "{second}");

        // Many at once share appends and disk writes; each is answered.
        let numbers: Vec<_> = (round * 25..(round + 1) * 25).collect();
        let proposals =
            numbers.iter().map(|n| handle.propose(counter(*n), Duration::from_secs(30)));
        let outcomes = guard("commits", futures::future::join_all(proposals)).await;
        assert!(outcomes.iter().all(|o| *o == Ok(Outcome::Committed)), "{outcomes:?}");
        expected.extend(numbers);
        assert_eq!(counters(&handle), expected);
        applied(&handle, handle.status().commit_index).await;
        guard("stop", handle.stop()).await;
        assert_eq!(handle.stopped().await, StopReason::Requested);
        let late = handle.propose(counter(1000), Duration::from_secs(5)).await;
        assert_eq!(late, Err(ProposeError::Stopped));
    }
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = lone_options(dir.path());
    let refusal = |options| match RaftNode::start(options) {
        Ok(_) => panic!("started"),
        Err(error) => error.to_string(),
    };
    let base = options.clone();
    let fast = RaftOptions { election_timeout: Duration::from_millis(50), ..base.clone() };
    let text = refusal(fast);
    assert!(text.contains("election_timeout = 50ms") && text.contains("2 times"), "{text}");
    let stranger = RaftOptions { node: api::NodeId(4), ..base.clone() };
    assert!(refusal(stranger).contains("n4 is not among"));
    let tokenless = RaftOptions { token: api::Secret::new(""), ..base.clone() };
    assert!(refusal(tokenless).contains("token"));
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("writable");
    let blocked = RaftOptions { dir: file.join("below"), ..base };
    assert!(refusal(blocked).contains("cannot make"));
}

#[tokio::test]
async fn a_transaction_that_is_too_large_is_refused_before_the_log() {
    let dir = tempfile::tempdir().expect("a folder");
    let (handle, _service) = RaftNode::start(lone_options(dir.path())).expect("starts");
    status_is(&handle, "leading", |status| status.is_leader).await;
    let before = handle.status();
    let mut huge = counter(1);
    if let coordinator_core::Write::Put { json, .. } = &mut huge.writes[0] {
        json.resize(5 << 20, b' ');
    }
    let error = handle.propose(huge, Duration::from_secs(30)).await.expect_err("too large");
    assert!(error.has_no_side_effects() && !error.is_retryable(), "{error}");
    assert_eq!(handle.status(), before);
    handle.stop().await;
}

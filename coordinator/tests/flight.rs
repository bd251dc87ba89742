//! Questions for flight logs reach the ranks' workers through any coordinator; answers touch no
//! record and wait for no commit.

mod support;

use api::finding::{FlightReport, FlightSource};
use api::flight::FlightLog;
use api::records::EndpointSpec;
use api::session::{RankOrder, RankReport, WorkerMessage};
use api::{ExitClass, Rank, TaskId};
use coordinator::{ClientError, ClusterClient};
use support::{FakeWorker, Group, guard, hello, name, rank_address, spec};
use tokio::task::JoinHandle;

type Asked = JoinHandle<Result<FlightReport, ClientError>>;

fn ask(client: &ClusterClient, job: &str) -> Asked {
    let (client, job) = (client.clone(), name(job));
    tokio::spawn(async move { client.flight(&job, None, false).await })
}

async fn answered(asked: Asked) -> Result<FlightReport, ClientError> {
    guard("an answer", asked).await.expect("no panic")
}

/// Takes a question for each of so many ranks; gives its number.
async fn take(worker: &mut FakeWorker, ranks: usize) -> u64 {
    let mut number = None;
    for _ in 0..ranks {
        let (task, order) = worker.deliver().await;
        let RankOrder::Flight { request, entries } = order else { panic!("{task}: {order:?}") };
        assert!(entries > 0);
        assert_eq!(*number.get_or_insert(request), request, "one question to all");
    }
    number.expect("asked")
}

fn log(task: &TaskId, tag: &str) -> Option<Box<FlightLog>> {
    let (generation, rank, tag) = (task.generation, task.rank, tag.to_owned());
    Some(Box::new(FlightLog { generation, rank, world_size: 2, tag, ..FlightLog::default() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_are_asked_through_a_follower_and_nothing_is_committed() {
    let mut group = Group::start(3).await;
    let leader = group.leader().await;
    let follower = (1..=3).find(|node| *node != leader).expect("a follower");
    let client = group.client_of(&[group.address(follower)]).await;
    let w1 = hello("w1", 2, Vec::new());
    let mut worker = FakeWorker::attach(group.address(leader), w1).await.expect("attaches");
    client.submit(&spec("a", 2)).await.expect("accepted");
    let (tasks, _) = worker.run_gang(2).await;
    let committed = worker
        .report(&tasks[0], RankReport::Running { step: api::Step(0), holds_state: true })
        .await;
    worker.acknowledged(committed).await;
    // A follower hears of commits a little later.
    let at_leader = group.client_of(&[group.address(leader)]).await;
    let before = at_leader.status().await.expect("answers").commit_index;

    let asked = ask(&client, "a");
    let request = take(&mut worker, 2).await;
    for (task, tag) in tasks.iter().zip(["one", "two"]) {
        let (task, log) = (task.clone(), log(task, tag));
        worker.say(WorkerMessage::Flight { request, task, log, why: String::new() }).await;
    }
    let report = answered(asked).await.expect("a report");
    let tags: Vec<&str> =
        report.ranks.iter().filter_map(|rank| rank.log.as_ref()).map(|log| &*log.tag).collect();
    assert_eq!(tags, ["one", "two"]);
    assert!(report.ranks.iter().all(|rank| rank.source == FlightSource::Live), "{report:?}");
    assert_eq!(report.ranks[0].host, "test-host");

    // One answers that it has none, one not at all: the report comes all the same, and in time.
    let asked = ask(&client, "a");
    let request = take(&mut worker, 2).await;
    let task = tasks[0].clone();
    let why = "it is stopped".to_owned();
    worker.say(WorkerMessage::Flight { request, task, log: None, why }).await;
    let report = answered(asked).await.expect("a report");
    assert!(report.verdict[0].starts_with("rank 0 has no flight log: it is stopped"), "{report:?}");
    assert!(report.verdict[1].starts_with("rank 1 has no flight log: it did not"), "{report:?}");
    assert_eq!(at_leader.status().await.expect("answers").commit_index, before);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_flight_log_is_told_clearly() {
    let mut group = Group::start(1).await;
    let client = group.client().await;
    let missing = answered(ask(&client, "a")).await.expect_err("no such job");
    assert_eq!(missing.exit_class(), ExitClass::NotFound, "{missing}");
    client.submit(&spec("a", 1)).await.expect("accepted");
    let early = answered(ask(&client, "a")).await.expect_err("it has not run");
    assert!(early.to_string().contains("has not run yet"), "{early}");
    let w1 = hello("w1", 1, Vec::new());
    let mut worker = FakeWorker::attach(group.address(1), w1).await.expect("attaches");
    let (tasks, _) = worker.run_gang(1).await;
    worker.finish(&tasks).await;
    let over = answered(ask(&client, "a")).await.expect_err("nothing was kept");
    assert_eq!(over.exit_class(), ExitClass::Conflict, "{over}");
    assert!(over.to_string().contains("no flight log"), "{over}");
    let newer = client.flight(&name("a"), Some(9), false).await.expect_err("no such generation");
    assert_eq!(newer.exit_class(), ExitClass::Usage, "{newer}");

    let listen = rank_address(Rank(0));
    let endpoint = EndpointSpec { name: name("talk"), model: name("a"), listen };
    client.deploy(&endpoint).await.expect("accepted");
    let endpoint = answered(ask(&client, "talk")).await.expect_err("an endpoint");
    assert!(endpoint.to_string().contains("`talk` is an endpoint"), "{endpoint}");
    group.stop_all().await;
}

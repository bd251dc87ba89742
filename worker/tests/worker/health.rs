//! Checks of the host: what the worker answers, and what it says of one that has not passed.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use api::session::{CoordinatorMessage, WorkerMessage};

use crate::harness::{Attachment, Coordinator, Host};

/// The program is another one from now on, whoever runs the former.
fn replace_program(host: &Host, script: &str) {
    let next = host.folder.path().join("next");
    fs::write(&next, format!("#!/bin/sh\n{script}\n")).expect("writes");
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).expect("executable");
    fs::rename(next, host.folder.path().join("program")).expect("renames");
}

async fn check(session: &mut Attachment, number: u64) -> Vec<String> {
    let reason = "it was lost".to_owned();
    session.order(CoordinatorMessage::Check { request: number, reason }).await;
    match session.news().await {
        WorkerMessage::Checked { request, failed } => {
            assert_eq!(request, number);
            failed
        }
        other => panic!("expected the answer to a check, found {other:?}"),
    }
}

#[tokio::test]
async fn a_check_that_failed_is_said_to_every_leader_until_one_passes() {
    let host = Host::new("");
    replace_program(&host, "[ \"$1\" = self-test ] || exit 92\necho 'memory: word 3'\nexit 1");
    let mut coordinator = Coordinator::leader().await;
    let worker = host.worker(&[coordinator.address]);
    let mut session = coordinator.welcomed().await;
    assert_eq!(session.hello.unhealthy, None);
    assert_eq!(check(&mut session, 7).await, ["the self-test: memory: word 3"]);

    drop(session);
    let mut session = coordinator.welcomed().await;
    let said = session.hello.unhealthy.as_deref();
    assert_eq!(said, Some("it failed its last check: the self-test: memory: word 3"));
    replace_program(&host, "exit 0");
    assert!(check(&mut session, 8).await.is_empty());

    drop(session);
    let session = coordinator.welcomed().await;
    assert_eq!(session.hello.unhealthy, None);
    drop(session);
    worker.shut_down();
    worker.result().await.expect("ends well");
}

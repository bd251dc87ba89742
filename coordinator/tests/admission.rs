//! Who is let in: the cluster token, the cluster id, certificates; and an address that is taken.

mod support;

use std::net::TcpListener;

use api::config::{ClusterConfig, TlsSection};
use api::{ExitClass, Secret};
use coordinator::{ClientError, ClusterClient, Coordinator, CoordinatorError};
use support::{FakeWorker, Group, TOKEN, guard, hello, spec};
use tonic::Code;

const WRONG: &str = "token-of-another-cluster-x";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_token_or_cluster_id_is_refused_and_not_repeated() {
    let mut group = Group::start(1).await;
    let address = group.address(1);
    let (addresses, no_tls) = ([address], TlsSection::default());
    let refused = ClusterClient::connect(&addresses, &no_tls, Secret::new(WRONG));
    let refused = guard("connect", refused).await.expect_err("a wrong token");
    assert_eq!(refused.exit_class(), ExitClass::Denied);
    let text = refused.to_string();
    assert!(text.contains("cluster.token_file"), "{text}");
    assert!(!text.contains(TOKEN) && !text.contains(WRONG), "a token was printed: {text}");

    let config = ClusterConfig::default();
    let attach =
        |token: &'static str, hello| FakeWorker::attach_with(address, token, hello, &config);
    let status = attach(WRONG, hello("w1", 1, Vec::new())).await.err().expect("a wrong token");
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    let mut other_token = hello("w1", 1, Vec::new());
    other_token.token = Secret::new(WRONG);
    let status = attach(TOKEN, other_token).await.err().expect("a wrong token in the hello");
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    let mut other_cluster = hello("w1", 1, Vec::new());
    other_cluster.cluster_id = "elsewhere".into();
    let status = attach(TOKEN, other_cluster).await.err().expect("another cluster's worker");
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert!(status.message().contains("`elsewhere`") && status.message().contains("`cohort`"));

    let client = group.client().await;
    assert!(client.workers().await.expect("lists").is_empty(), "a refused worker was registered");
    group.stop_all().await;
}

#[tokio::test]
async fn nobody_listening_and_a_taken_port_are_each_one_clear_message() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let dir = tempfile::tempdir().expect("a folder");
    let mut config = ClusterConfig::default();
    config.cluster.dir = dir.path().to_owned();
    config.coordinator.members[0].address = address;
    let options = coordinator::CoordinatorOptions {
        config,
        token: Secret::new(TOKEN),
        validate: std::sync::Arc::new(|_| Ok(())),
        listener: None,
    };
    let error = Coordinator::start(options).expect_err("the port is taken");
    assert!(matches!(error, CoordinatorError::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert!(!dir.path().join("raft").exists(), "something was left behind");

    drop(listener);
    let connected =
        ClusterClient::connect(&[address], &TlsSection::default(), Secret::new(TOKEN)).await;
    let error = connected.expect_err("nobody listens");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    assert_eq!(error.exit_class(), ExitClass::Unavailable);
    let text = error.to_string();
    assert!(text.contains(&address.to_string()) && text.contains("`cluster up`"), "{text}");
}

/// A certificate authority and one host's certificate, as PEM files.
fn issue(folder: &std::path::Path) -> TlsSection {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };

    let authority_key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.clone().self_signed(&authority_key).expect("a certificate");
    let issuer = Issuer::new(params, authority_key);
    let key = KeyPair::generate().expect("a key");
    let names = vec![api::connect::CERTIFICATE_NAME.to_owned()];
    let mut params = CertificateParams::new(names).expect("parameters");
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        path
    };
    TlsSection {
        ca: write("ca.pem", authority.pem()),
        certificate: write("host.pem", certificate.pem()),
        key: write("host.key", key.serialize_pem()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_certificates_all_traffic_is_mutual_tls() {
    let folder = tempfile::tempdir().expect("a folder");
    let tls = issue(folder.path());
    let mut group = Group::start_with(3, |config| config.tls = tls.clone()).await;
    // Raft elected a leader over TLS, a follower forwards over it, a worker attaches over it.
    let leader = group.leader().await;
    let follower = *group.coordinators.keys().find(|node| **node != leader).expect("a follower");
    let client = group.client_of(&[group.address(follower)]).await;
    client.submit(&spec("a", 1)).await.expect("accepted");
    let address = group.address(leader);
    let hello = hello("w1", 1, Vec::new());
    let worker = FakeWorker::attach_with(address, TOKEN, hello, &group.config).await;
    worker.expect("attaches").start().await;

    let other_folder = tempfile::tempdir().expect("a folder");
    let addresses = [address];
    for stranger in [TlsSection::default(), issue(other_folder.path())] {
        let connected = ClusterClient::connect(&addresses, &stranger, Secret::new(TOKEN));
        let error = guard("connect", connected).await.expect_err("a stranger");
        assert_eq!(error.exit_class(), ExitClass::Unavailable, "{error}");
    }
    group.stop_all().await;
}

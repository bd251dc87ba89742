//! Several streams per peer, and certificates between ranks.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::{TCP, error, group, in_parallel, moves, options, results, scripts};
use crate::{
    Algorithm, CollectiveError, Communicator, ReduceOp, Selection, TcpOptions, TlsMaterial,
};

fn set(streams: usize, tls: Option<Arc<TlsMaterial>>) {
    TCP.set(TcpOptions { streams, tls, ..TcpOptions::default() });
}

/// A certificate of a fresh authority, as a cluster's hosts have.
fn material() -> Arc<TlsMaterial> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_key = KeyPair::generate().unwrap();
    let ca = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let mut host = CertificateParams::new(vec!["cohort".to_owned()]).unwrap();
    host.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = host.signed_by(&key, &issuer).unwrap().pem();
    let key = key.serialize_pem();
    let material = TlsMaterial::from_pem(ca.as_bytes(), certificate.as_bytes(), key.as_bytes());
    Arc::new(material.unwrap())
}

fn everything() {
    results::every_operation_on_every_world_has_the_bits_of_the_reference();
    results::two_ranks_may_send_much_to_each_other_at_the_same_time();
    results::a_long_random_script_stays_in_step();
    results::bytes_of_different_lengths_reach_every_rank_and_too_many_are_refused();
    moves::subgroups_of_subgroups_work_beside_their_parents();
    large();
    scripts::random_scripts_have_the_results_of_the_reference();
}

/// Payloads that are shared by the streams, of every kind of exchange.
fn large() {
    for (world, algorithm) in [
        (2, Algorithm::Scatter),
        (3, Algorithm::Scatter),
        (2, Algorithm::Direct),
        (4, Algorithm::HalvingDoubling),
    ] {
        let selection = Selection::only(algorithm);
        let before = TCP.with_borrow(Clone::clone);
        TCP.set(TcpOptions { selection, ..before.clone() });
        group(world, move |rank, communicator| {
            const LEN: usize = (3 << 20) + 5;
            for step in 0..3u32 {
                let mut buffer: Vec<i32> =
                    (0..LEN as i32).map(|i| i * (rank + 1) as i32 + step as i32).collect();
                communicator.all_reduce((&mut buffer).into(), ReduceOp::Sum).unwrap();
                let factor = (world * (world + 1) / 2) as i32;
                for (i, value) in buffer.iter().enumerate() {
                    assert_eq!(*value, i as i32 * factor + (world * step) as i32);
                }
                let root = api::Rank(step % world);
                let mut buffer = vec![(rank + step) as u8; LEN];
                communicator.broadcast((&mut buffer).into(), root).unwrap();
                assert!(buffer.iter().all(|value| *value == (root.0 + step) as u8));
            }
        });
        TCP.set(before);
    }
}

#[test]
fn everything_works_over_three_streams() {
    set(3, None);
    everything();
}

#[test]
fn everything_works_with_certificates() {
    set(1, Some(material()));
    everything();
}

#[test]
fn failures_are_as_precise_over_three_encrypted_streams() {
    set(3, Some(material()));
    large();
    super::failures::calls_that_differ_are_an_error_on_both_ranks_that_names_both();
    super::failures::a_peer_that_dies_is_named_at_once_in_whatever_call();
    super::failures::a_peer_that_leaves_while_it_is_needed_is_named();
    super::failures::an_abort_ends_a_call_and_every_later_one_and_is_told_to_the_peers();
    super::failures::a_wrong_call_of_one_rank_is_told_to_all();
    super::failures::strangers_do_not_keep_a_group_from_forming();
}

#[test]
fn ranks_that_differ_in_their_streams_or_tables_do_not_form_a_group() {
    for (change, expected) in [
        (TcpOptions { streams: 2, ..TcpOptions::default() }, "2 streams per peer, expected 1"),
        (
            TcpOptions { selection: Selection::only(Algorithm::Direct), ..TcpOptions::default() },
            "another table of algorithms",
        ),
    ] {
        let errors = forming(move |rank| (rank == 1).then(|| change.clone()));
        assert!(errors[1].contains("cannot join r0 at"), "{}", errors[1]);
        for error in errors {
            assert!(error.contains(expected), "`{error}` does not say `{expected}`");
        }
    }
    for (streams, world, expected) in [
        (0, 2, "0 streams per peer, expected 1 to 8"),
        (9, 2, "9 streams per peer, expected 1 to 8"),
        (8, 200, "8 streams to each of 200 ranks take more than 960 descriptors"),
    ] {
        let (mut listeners, peers) = super::listeners(world);
        let tcp = TcpOptions { streams, ..TcpOptions::default() };
        let listener = listeners.remove(0).with_tcp(tcp);
        let found = error(listener.connect(options(0, world), &peers).map(|_| ()));
        assert!(found.to_string().contains(expected), "`{found}`");
    }
}

/// The errors of two ranks that form a group, one of which may have other connections.
fn forming(tcp: impl Fn(u32) -> Option<TcpOptions> + Clone + Send + 'static) -> Vec<String> {
    in_parallel(2, move |rank, listener, peers| {
        let mut options = options(rank, 2);
        options.connect_timeout = Duration::from_secs(2);
        let listener = match tcp(rank) {
            Some(tcp) => listener.with_tcp(tcp),
            None => listener,
        };
        error(listener.connect(options, &peers).map(|_| ())).to_string()
    })
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    set(1, Some(material()));
    let stranger = TcpOptions { tls: Some(material()), ..TcpOptions::default() };
    for odd in [0, 1] {
        let stranger = stranger.clone();
        let errors = forming(move |rank| (rank == odd).then(|| stranger.clone()));
        assert!(errors[1].contains("cannot join r0 at"), "{}", errors[1]);
        assert!(errors[1].contains("is not of this cluster's authority"), "{}", errors[1]);
        assert!(errors[0].contains("missing r1 at"), "{}", errors[0]);
        assert!(errors[0].contains("does not accept this host's certificate"), "{}", errors[0]);
    }
}

#[test]
fn a_rank_that_encrypts_and_one_that_does_not_say_so() {
    let encrypting = TcpOptions { tls: Some(material()), ..TcpOptions::default() };
    for odd in [0, 1] {
        let encrypting = encrypting.clone();
        let errors = forming(move |rank| (rank == odd).then(|| encrypting.clone()));
        assert!(errors[1].contains("cannot join r0 at"), "{}", errors[1]);
        for (rank, error) in errors.iter().enumerate() {
            let expected = if rank == odd as usize {
                "it does not encrypt, but this rank has certificates"
            } else {
                "it encrypts, but this rank has no certificates"
            };
            assert!(error.contains(expected), "rank {rank}: `{error}` does not say `{expected}`");
        }
    }
}

#[test]
fn certificates_that_cannot_be_used_are_refused() {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["cohort".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let other = KeyPair::generate().unwrap().serialize_pem();
    let certificate = certificate.as_bytes();
    for (ca, chain, key, expected) in [
        (&b""[..], certificate, other.as_bytes(), "the authority's certificate holds none"),
        (certificate, &b"-----BEGIN"[..], other.as_bytes(), "the certificate"),
        (certificate, certificate, &b""[..], "the key is not PEM"),
        (certificate, certificate, other.as_bytes(), "do not form an identity"),
    ] {
        let error = TlsMaterial::from_pem(ca, chain, key).unwrap_err().to_string();
        assert!(error.contains(expected), "`{error}` does not say `{expected}`");
    }
    let missing = std::path::Path::new("no-such.pem");
    let error = TlsMaterial::load(missing, missing, missing).unwrap_err().to_string();
    assert!(error.contains("tls.ca `no-such.pem`: No such file"), "{error}");
    let shown = format!("{:?}", material());
    assert_eq!(shown, "TlsMaterial { .. }");
}

#[test]
fn a_wrong_secret_is_noticed_inside_an_encrypted_connection() {
    set(2, Some(material()));
    let found = in_parallel(2, |rank, listener, peers| {
        let mut options = options(rank, 2);
        options.connect_timeout = Duration::from_secs(2);
        if rank == 1 {
            options.secret = api::Secret::new("guess");
        }
        error(listener.connect(options, &peers).map(|_| ()))
    });
    assert!(matches!(found[1], CollectiveError::WrongSecret { .. }), "{}", found[1]);
}

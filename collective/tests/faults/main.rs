//! Faults in the middle of every operation, between ranks that are processes.
//!
//! A test starts this binary again, once per rank, and talks to the ranks over their standard input
//! and output. While all of them repeat one operation, one is killed, stopped or cut off at a
//! random moment. A killed one breaks its connections. A stopped one or a cut link breaks nothing:
//! there the harness does as the coordinator would and pushes an abort. Every survivor must have
//! the error and say whose fault it was, leave nothing behind, and form the next group; the rank
//! that comes back finds out by itself, joins nothing and disturbs nobody.
//!
//! A few random cases by default, with no limit on time but that nothing hangs. With
//! `COHORT_FAULTS=100` so many of each kind and transport, a table of the times, and limits on them:
//! run it alone and in release, as `benches/faults.sh` does. Seeds are printed;
//! `COHORT_FAULTS_SEED` gives the first.

#![allow(clippy::unwrap_used, reason = "a test panics where it fails")]

mod case;
mod census;
mod gang;
mod message;
mod mismatch;
mod network;
mod plan;
mod process;
mod random;
mod rank;
mod step;

use case::{Case, Fault};
use collective::Transport;
use mismatch::Mismatch;
use network::Network;
use plan::Plan;

/// The last: as if two ranks each were on a host.
const TRANSPORTS: [Transport; 3] = [Transport::Shared, Transport::Tcp, Transport::Auto];

#[test]
fn a_killed_rank_is_an_error_on_all_and_the_rest_go_on() {
    for transport in TRANSPORTS {
        Plan::from_environment()
            .run("kill -9", transport, |seed| Case::draw(seed).run(&Fault::Kill, transport));
    }
}

#[test]
fn an_abort_frees_the_rest_from_a_stopped_rank() {
    for transport in TRANSPORTS {
        Plan::from_environment()
            .run("SIGSTOP", transport, |seed| Case::draw(seed).run(&Fault::Stop, transport));
    }
}

#[test]
fn an_abort_frees_the_rest_from_a_rank_behind_a_cut_link() {
    let network = match Network::new(step::WORLD_MOST) {
        Ok(network) => network,
        Err(reason) => {
            eprintln!("SKIPPED: cut links: needs root and iproute2: {reason}");
            return;
        }
    };
    let fault = Fault::Cut(network);
    Plan::from_environment()
        .run("cut link", Transport::Tcp, |seed| Case::draw(seed).run(&fault, Transport::Tcp));
}

#[test]
fn calls_that_differ_are_an_error_on_all_that_names_both() {
    for transport in TRANSPORTS {
        Plan::from_environment()
            .run_mismatches(transport, |seed| Mismatch::draw(seed).run(transport));
    }
}

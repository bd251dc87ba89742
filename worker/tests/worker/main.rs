//! The worker against a scripted coordinator (a real gRPC server) and scripted ranks (shell
//! scripts that speak the control protocol on their standard input).
//!
//! Nothing here sleeps to synchronise: every wait is for an event, under a generous guard.

#[path = "../../src/notice/fake.rs"]
#[allow(dead_code, reason = "the tests of the sources use all of it")]
mod fake;
mod flights;
mod harness;
mod notices;
mod restarts;
mod sessions;
mod stacks;
mod tasks;

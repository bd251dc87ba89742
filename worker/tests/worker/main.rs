//! The worker against a scripted coordinator (a real gRPC server) and scripted ranks (shell
//! scripts that speak the control protocol on their standard input).
//!
//! Nothing here sleeps to synchronise: every wait is for an event, under a generous guard.

mod flights;
mod harness;
mod restarts;
mod sessions;
mod tasks;

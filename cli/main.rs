//! The one binary of Cohort, `cluster`: every role and every command.

#![forbid(unsafe_code)]

mod args;
mod certificates;
mod commands;
mod context;
mod embedded;
mod error;
mod follow;
mod output;
mod processes;
mod signals;

use std::io::IsTerminal;
use std::process::ExitCode;

use api::ExitClass;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command, Global};

// Tensors are allocated and freed in every operation; the system's allocator gives large ones back
// to the kernel each time, which then zeroes them again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // One provider, chosen before anything speaks TLS; a second call would only repeat it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    start_logging(&cli.global);
    match cli.command {
        Command::Rank => return trainer::run_rank(),
        Command::Replica => return serve::run_replica(),
        Command::SelfTest => return trainer::run_self_test(),
        Command::BenchRank => return commands::bench::run_rank(),
        _ => {}
    }
    let json = cli.global.json;
    let ended = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(cli)),
        Err(error) => Err(error::CliError::internal(format!("cannot start the runtime: {error}"))),
    };
    match ended {
        Ok(()) => ExitCode::from(ExitClass::Success.code()),
        Err(error) => {
            if json && !error.is_told_by_result() {
                output::json(&error.to_json());
            }
            eprintln!("error: {error}");
            ExitCode::from(error.class().code())
        }
    }
}

/// Logs go to standard error; results alone go to standard output.
fn start_logging(global: &Global) {
    let level = match global.verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("COHORT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // A terminal that is gone takes no line, nor that there was none: to stop goes on all the same.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

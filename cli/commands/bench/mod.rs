//! `cluster bench`: figures anyone can make again on their own machine.

mod buffers;
mod checkpoint;
mod checkpoint_store;
mod checkpoint_training;
mod collective;
mod cost;
mod exchange;
mod floor;
mod gang;
mod on_cluster;
mod plan;
mod progress;
mod protocol;
mod rank;
mod recovery;
mod samples;
mod train;
mod tune;
mod view;

pub use rank::run_rank;

use crate::args::{BenchCommand, Global};
use crate::error::Result;

/// Runs a benchmark.
pub async fn run(global: &Global, command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Train(args) => train::run(global, args).await,
        BenchCommand::Recovery(args) => recovery::run(global, args).await,
        BenchCommand::Checkpoint(args) => checkpoint::run(global, args).await,
        // Blocks the main thread, which nothing else needs; the ranks die when this thread ends.
        BenchCommand::Collective(args) => collective::run(global, &args),
    }
}

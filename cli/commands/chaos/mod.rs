//! `cluster chaos`: faults on purpose, and the availability of spot nodes.

mod disk;
mod job;
mod link;
mod replay;
mod run;
mod sample;
mod spot;
mod strike;

use crate::args::{ChaosCommand, Global};
use crate::error::Result;

/// Runs one of its commands.
pub async fn run(global: &Global, command: ChaosCommand) -> Result<()> {
    match command {
        ChaosCommand::Run(args) => run::run(global, &args).await,
        ChaosCommand::Replay(args) => replay::replay(global, &args).await,
        ChaosCommand::Sample(args) => sample::write(global, &args),
    }
}

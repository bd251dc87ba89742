//! What each command does, one file per noun.

mod algorithms;
pub mod bench;
mod certs;
mod chaos;
mod checkpoints;
mod cost;
mod data;
mod flight;
mod jobs;
mod models;
mod roles;
mod submit;
mod up;
mod workers;

use crate::args::{Cli, Command, DataCommand};
use crate::error::Result;

/// Runs a command to its end.
pub async fn run(cli: Cli) -> Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Up(args) => up::up(global, &args).await,
        Command::Submit(args) => submit::submit(global, &args).await,
        Command::Resume(args) => submit::resume(global, &args).await,
        Command::Jobs => jobs::list(global).await,
        Command::Job(args) => jobs::show(global, &args.name).await,
        Command::Logs(args) => jobs::logs(global, &args).await,
        Command::Follow(args) => jobs::watch(global, &args.name).await,
        Command::Flight(args) => flight::show(global, &args).await,
        Command::Stop(args) => jobs::stop(global, &args).await,
        Command::Workers => workers::list(global).await,
        Command::Drain(args) => workers::drain(global, &args).await,
        Command::Undrain(args) => workers::undrain(global, &args).await,
        Command::Status => jobs::status(global).await,
        Command::Checkpoints(args) => checkpoints::list(global, &args.job).await,
        Command::Checkpoint(command) => checkpoints::run(global, command).await,
        Command::Models => models::list(global).await,
        Command::Endpoints => models::endpoints(global).await,
        Command::Deploy(args) => models::deploy(global, &args).await,
        Command::Serve(args) => models::serve(global, &args).await,
        Command::Predict(args) => models::predict(global, &args).await,
        Command::Data(DataCommand::Pack(args)) => data::pack(global, &args),
        Command::Algorithms(args) => algorithms::show(global, &args),
        Command::Certs(args) => certs::make(global, &args),
        Command::Coordinator => roles::coordinator(global).await,
        Command::Worker(args) => roles::worker(global, &args).await,
        Command::Bench(command) => bench::run(global, command).await,
        Command::Chaos(command) => chaos::run(global, command).await,
        // Started before the runtime, see `main`.
        Command::Rank | Command::Replica | Command::SelfTest | Command::BenchRank => Ok(()),
    }
}

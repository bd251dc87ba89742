//! `cluster up`: a whole cluster on this machine, until Ctrl-C.

use crate::args::{Global, Up};
use crate::context::DIR_DEFAULT;
use crate::embedded::{Embedded, EmbeddedOptions};
use crate::error::{CliError, Result};
use crate::output;
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// Runs until a signal, or until a part fails.
pub async fn up(global: &Global, args: &Up) -> Result<()> {
    let config = super::roles::load_config(global)?;
    let dir = global.dir.clone().unwrap_or_else(|| DIR_DEFAULT.into());
    let slots = if args.slots > 0 { args.slots } else { share_of_cores(args.workers) };
    let mut signals = Signals::new()?;
    let starting = Embedded::start(EmbeddedOptions {
        dir: dir.clone(),
        config,
        config_file: global.config.clone(),
        coordinators: args.coordinators,
        workers: args.workers,
        slots,
        port: args.port,
    });
    let mut embedded = signals.or_exit(starting).await?;
    let access = embedded.access.clone();
    // A leader answers: only now is the cluster of use to anyone.
    tokio::select! {
        workers = async { access.connect().await?.workers().await.map_err(CliError::from) } => {
            workers?;
        }
        error = embedded.failed() => return Err(error),
    }
    let addresses: Vec<String> =
        embedded.access.coordinators.iter().map(ToString::to_string).collect();
    if global.json {
        output::json(&serde_json::json!({
            "event": "up", "dir": dir, "coordinators": addresses, "workers": args.workers,
            "slots": slots, "store": embedded.access.store_uri,
        }));
    } else {
        output::line(&format!(
            "cluster is up in `{}`: coordinators {}, {} worker(s) with {slots} slot(s) each",
            dir.display(),
            addresses.join(", "),
            args.workers
        ));
        output::line("submit with `cluster submit JOB.toml --follow`; stop with Ctrl-C");
    }
    tokio::select! {
        () = signals.wait() => {}
        error = embedded.failed() => {
            // What is still running is stopped as well; the first error is the one to tell.
            let _ = embedded.stop().await;
            return Err(error);
        }
    }
    if !global.json {
        output::line("stopping: jobs save their state; Ctrl-C again to stop at once");
    }
    tokio::select! {
        ended = embedded.stop() => ended,
        () = signals.wait() => std::process::exit(EXIT_INTERRUPTED),
    }
}

fn share_of_cores(workers: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    cores.div_ceil(workers).max(1)
}

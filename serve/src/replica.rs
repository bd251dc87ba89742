//! The replica process: `cluster replica`, started by a worker for an endpoint.

use std::process::ExitCode;
use std::time::Duration;

use api::ExitClass;
use api::control::{Control, die_with_parent};
use api::session::{Assignment, RankOrder, RankReport};
use checkpoint::Store;
use tokio_util::sync::CancellationToken;

use crate::error::ServeError;
use crate::model::load_from_store;
use crate::server::{Server, ServerOptions};

/// The assignment is written before the replica is started; a slow host gets this long.
const ASSIGNMENT_DEADLINE: Duration = Duration::from_secs(60);
/// How often a replica looks whether it was asked to stop.
const STOP_POLL: Duration = Duration::from_millis(100);

/// Runs one replica until it is asked to stop.
pub fn run_replica() -> ExitCode {
    if let Err(error) = die_with_parent() {
        eprintln!("replica: {error}");
    }
    let (control, orders) = match Control::from_stdin() {
        Ok(parts) => parts,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(ExitClass::Usage.code());
        }
    };
    let assignment = match orders.next(ASSIGNMENT_DEADLINE) {
        Ok(assignment) => assignment,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(ExitClass::Internal.code());
        }
    };
    let ended = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(&control, assignment)),
        Err(error) => Err(ServeError::Server(format!("cannot start the runtime: {error}"))),
    };
    let Err(error) = ended else { return ExitCode::SUCCESS };
    eprintln!("error: {error}");
    let retryable = match &error {
        ServeError::Malformed { .. } | ServeError::Algorithm(_) => false,
        ServeError::Store(error) => !error.is_key_mistake(),
        _ => true,
    };
    let message = error.to_string();
    let report = RankReport::Failed { message, retryable, blames: None, damaged: None };
    // The worker may be gone; the exit code still tells.
    let _ = control.report(&report);
    ExitCode::from(error.exit_class().code())
}

async fn serve(control: &Control, order: RankOrder) -> Result<(), ServeError> {
    let RankOrder::Assignment { assignment, store, serve: section, .. } = order else {
        return Err(ServeError::Server("the first order is not an assignment".into()));
    };
    let Assignment::Serve(assignment) = *assignment else {
        return Err(ServeError::Server("this assignment is not for a replica".into()));
    };
    let opened = Store::open(&store, &store.uri)?;
    let model = load_from_store(&opened, &assignment.model.key).await?;
    if model.sha256 != assignment.model.sha256 {
        return Err(ServeError::Malformed {
            file: format!("{}/model.safetensors", assignment.model.key),
            message: format!(
                "sha256 is {}, expected {}: the file changed after it was registered",
                model.sha256, assignment.model.sha256
            ),
        });
    }
    let options = ServerOptions { listen: assignment.listen, section };
    let server = Server::bind(options, model).await?;
    let address = server.address();
    println!("serving `{}` at http://{address}", assignment.endpoint);
    control
        .report(&RankReport::Listening { address, fingerprint: String::new() })
        .map_err(|e| ServeError::Server(e.to_string()))?;
    let shutdown = CancellationToken::new();
    let stopped = async {
        while !control.stop_requested() {
            tokio::time::sleep(STOP_POLL).await;
        }
        shutdown.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = server.run(shutdown.clone()) => ended,
        () = stopped => Ok(()),
    }
}

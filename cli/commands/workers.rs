//! Workers: `workers`, `drain`, `undrain`.

use api::Name;
use api::records::{WorkerState, WorkerView};

use crate::args::{Drain, Global, WorkerName};
use crate::context::Access;
use crate::error::Result;
use crate::output;

/// `cluster workers`.
pub async fn list(global: &Global) -> Result<()> {
    let workers = Access::find(global)?.0.connect().await?.workers().await?;
    if global.json {
        workers.iter().for_each(output::json);
        return Ok(());
    }
    let row = |worker: &WorkerView| {
        vec![
            worker.name.to_string(),
            worker.host.clone(),
            worker.state.to_string(),
            format!("{}/{}", worker.used, worker.slots),
            worker.tasks.join(" "),
            worker.reason.clone(),
        ]
    };
    let rows = workers.iter().map(row).collect();
    output::table(&["name", "host", "state", "slots", "tasks", "reason"], rows, "no workers");
    Ok(())
}

/// `cluster drain WORKER`.
pub async fn drain(global: &Global, args: &Drain) -> Result<()> {
    let name: Name = args.worker.parse()?;
    let client = Access::find(global)?.0.connect().await?;
    show(global, &client.drain(&name, args.deadline).await?);
    Ok(())
}

/// `cluster undrain WORKER`.
pub async fn undrain(global: &Global, args: &WorkerName) -> Result<()> {
    let name: Name = args.worker.parse()?;
    let client = Access::find(global)?.0.connect().await?;
    let worker = client.undrain(&name).await?;
    if global.json {
        output::json(&worker);
    } else {
        output::line(&format!("`{name}` takes tasks again"));
    }
    Ok(())
}

fn show(global: &Global, worker: &WorkerView) {
    if global.json {
        return output::json(worker);
    }
    let name = &worker.name;
    output::line(&match (worker.state, worker.tasks.len()) {
        (WorkerState::Drained, _) => format!("`{name}` is drained"),
        (state, 1) => format!("`{name}` is {state}: 1 task is asked to leave"),
        (state, tasks) => format!("`{name}` is {state}: {tasks} tasks are asked to leave"),
    });
}

//! The disturbed job, seen from outside: when its gang changes, when it ends, what became of its
//! time.

use std::time::Duration;

use api::events::JobEvent;
use api::records::{JobRecord, JobStatus, Phase};
use api::{ExitClass, Generation, Name};
use coordinator::{ClusterClient, EventStream};
use tokio_stream::StreamExt;

use crate::commands::cost;
use crate::commands::jobs::show_goodput;
use crate::error::{CliError, Result};
use crate::output;

/// Between two attempts to watch a job again, while its cluster has no leader.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

/// The job to disturb: the named one, or the only one that has not ended.
pub async fn choose(client: &ClusterClient, name: Option<&str>) -> Result<JobRecord> {
    if let Some(name) = name {
        let (_, job) = client.job(&name.parse()?).await?;
        if job.status.phase.is_terminal() {
            let text = format!("job `{name}` is {}: there is nothing to strike", job.status.phase);
            return Err(CliError::new(ExitClass::Conflict, text));
        }
        return Ok(job);
    }
    let all = client.jobs().await?.into_iter().map(|(_, job)| job);
    let mut going: Vec<JobRecord> = all.filter(|job| !job.status.phase.is_terminal()).collect();
    match (going.pop(), going.as_slice()) {
        (Some(job), []) => Ok(job),
        (None, _) => Err(CliError::new(ExitClass::NotFound, "no job runs: nothing to strike")
            .with_hint("submit one with `cluster submit JOB.toml`; an elastic one recovers best")),
        (Some(last), others) => {
            let names: Vec<&str> =
                others.iter().chain([&last]).map(|job| job.spec.name.as_str()).collect();
            let text = format!("{} jobs run: {}", names.len(), names.join(", "));
            Err(CliError::usage(text).with_hint("choose one with --job NAME"))
        }
    }
}

/// A job's states as they come.
pub struct Watch {
    client: ClusterClient,
    name: Name,
    events: Option<EventStream>,
    /// What was last told: checkpoints change a record too, and are of no interest here.
    told: Option<(Phase, Generation, usize)>,
}

impl Watch {
    /// Of a job.
    pub fn new(client: &ClusterClient, name: &Name) -> Self {
        Self { client: client.clone(), name: name.clone(), events: None, told: None }
    }

    /// The next state with another phase, generation or number of ranks; waits out a cluster without a leader. Can be given up at any time.
    pub async fn status(&mut self) -> JobStatus {
        loop {
            if self.events.is_none() {
                self.events = self.client.watch(&self.name).await.ok();
            }
            let Some(events) = &mut self.events else {
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            };
            match events.next().await {
                Some(Ok(JobEvent::Status(status))) => {
                    let shown = (status.phase, status.generation, status.gang.len());
                    if self.told.replace(shown) != Some(shown) {
                        return *status;
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => {
                    self.events = None;
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// The record once the job has ended.
    pub async fn end(&mut self) -> Result<JobRecord> {
        while !self.told.is_some_and(|(phase, ..)| phase.is_terminal()) {
            self.status().await;
        }
        Ok(self.client.job(&self.name).await?.1)
    }
}

/// One line about a job's state, for people.
pub fn line(status: &JobStatus) -> String {
    let ranks = match status.gang.len() {
        1 => "1 rank".to_owned(),
        count => format!("{count} ranks"),
    };
    let reason = if status.phase == Phase::Running { "" } else { status.reason.as_str() };
    let colon = if reason.is_empty() { "" } else { ": " };
    format!("job is {}, generation {}, {ranks}{colon}{reason}", status.phase, status.generation.0)
}

/// What became of a job, as one document.
pub fn document(job: &JobRecord) -> serde_json::Value {
    let status = &job.status;
    serde_json::json!({
        "job": job.spec.name,
        "phase": status.phase,
        "generation": status.generation,
        "restarts": status.restarts,
        "regroups": status.regroups,
        "failures": status.failures,
        "goodput": status.goodput.fraction(),
        "rank_time": status.goodput,
        "cost": cost::document(status),
    })
}

/// The same for people.
pub fn show(job: &JobRecord) {
    let status = &job.status;
    output::line(&format!(
        "job `{}` is {}: generation {}, {} restarts, {} of them in place",
        job.spec.name, status.phase, status.generation.0, status.restarts, status.regroups
    ));
    show_goodput(&status.goodput);
    cost::show(status);
}

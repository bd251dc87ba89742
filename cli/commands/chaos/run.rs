//! `cluster chaos run`: disturbs a running cluster on this host by a seed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use api::config::StoreSection;
use api::records::{JobRecord, Phase};
use chaos::{FaultKind, Plan, PlanOptions, Role, Strike, Targets};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::job::{self, Watch};
use super::link;
use super::strike::{Claims, Held, Scene, Struck};
use crate::args::{ChaosRun, Global};
use crate::context::Access;
use crate::error::{CliError, Result};
use crate::follow::outcome;
use crate::output;
use crate::processes::{Process, Roles, listeners};
use crate::signals::{EXIT_INTERRUPTED, Signals};

/// Shortest mean time between two faults: each looks through all processes of the host.
const EVERY_MIN: Duration = Duration::from_millis(10);
/// How long the last look at the job may wait for a leader.
const LAST_LOOK: Duration = Duration::from_secs(30);

/// Makes the plan, and does it.
pub async fn run(global: &Global, args: &ChaosRun) -> Result<()> {
    if args.every.0 < EVERY_MIN {
        return Err(CliError::usage(format!("--every {}: expected at least 10ms", args.every)));
    }
    // From here on Ctrl-C does not end the process by itself: what was done is undone first.
    let mut signals = Signals::new()?;
    let (access, store) = Access::find(global)?;
    let client = access.connect().await?;
    let job = job::choose(&client, args.job.as_deref()).await?;
    let roles = Roles::find(&access.coordinators, access.pid);
    let scene = Scene {
        job: job.spec.name.clone(),
        coordinators: access.coordinators.clone(),
        whole: access.pid,
        store: store_server(&store),
        fill: args.fill.clone(),
        fill_bytes: args.fill_bytes.0,
        claims: Claims::default(),
        killed: Mutex::default(),
    };
    for kind in &args.faults {
        check(*kind, args, &scene, &roles)?;
    }
    let plan = plan(args, &job, &roles);
    announce(global, args, &plan);
    if args.dry_run {
        return Ok(());
    }
    let mut run = Run {
        global,
        scene,
        watch: Watch::new(&client, &job.spec.name),
        started: Instant::now(),
        begun: JoinSet::new(),
        kept: Vec::new(),
        struck: 0,
        missed: 0,
    };
    let ended = tokio::select! {
        ended = run.all(&plan, args.duration.0) => Some(ended),
        () = signals.wait() => None,
    };
    run.undo().await;
    let (struck, missed) = (run.struck, run.missed);
    match ended {
        None => {
            let document = serde_json::json!({
                "event": "end", "broken_off": true, "struck": struck, "missed": missed,
            });
            // After a hang-up nobody reads it.
            let _ = match global.json {
                true => output::try_line(&document.to_string()),
                false => output::try_line("broken off; everything is undone"),
            };
            std::process::exit(EXIT_INTERRUPTED);
        }
        Some(ended) => ended?,
    }
    let look = tokio::time::timeout(LAST_LOOK, client.job(&job.spec.name));
    let late = |_| CliError::internal("no coordinator says what became of the job");
    let (_, job) = signals.or_exit(look).await.map_err(late)??;
    if global.json {
        let mut document = job::document(&job);
        document["event"] = "end".into();
        document["struck"] = struck.into();
        document["missed"] = missed.into();
        output::json(&document);
    } else {
        output::line(&format!("{struck} faults, {missed} missed; everything is undone"));
        job::show(&job);
    }
    match job.status.phase {
        Phase::Failed => outcome(&job.spec.name, &job.status).map_err(CliError::told_by_result),
        _ => Ok(()),
    }
}

fn plan(args: &ChaosRun, job: &JobRecord, roles: &Roles) -> Plan {
    let struck = |role, count: usize| if args.roles.contains(&role) { count as u32 } else { 0 };
    Plan::new(&PlanOptions {
        seed: args.seed,
        duration: args.duration.0,
        every: args.every.0,
        faults: args.faults.clone(),
        targets: Targets {
            ranks: struck(Role::Rank, job.spec.resources.ranks.max() as usize),
            workers: struck(Role::Worker, roles.workers.len()),
            links: roles.workers.iter().filter(|worker| link::is_apart(worker)).count() as u32,
            coordinators: roles.coordinators.len() as u32,
        },
    })
}

fn announce(global: &Global, args: &ChaosRun, plan: &Plan) {
    if global.json {
        output::json(&serde_json::json!({
            "event": "plan", "seed": args.seed, "strikes": plan.strikes,
        }));
        return;
    }
    let count = plan.strikes.len();
    output::line(&format!("seed {}: {count} faults in {}", args.seed, args.duration));
    if args.dry_run {
        plan.strikes.iter().for_each(|strike| output::line(&strike.to_string()));
    }
}

/// Refuses a kind of fault that cannot be done here, before any is.
fn check(kind: FaultKind, args: &ChaosRun, scene: &Scene, roles: &Roles) -> Result<()> {
    let refuse = |why: &str, hint: &str| {
        Err(CliError::usage(format!("--faults {kind}: {why}")).with_hint(hint))
    };
    let is_whole = roles.whole.is_some();
    match kind {
        FaultKind::Kill | FaultKind::Stop | FaultKind::Freeze | FaultKind::Slow => {
            if args.roles.contains(&Role::Worker) && roles.workers.is_empty() {
                return refuse(
                    "--roles worker: no worker of this cluster is a process of its own here",
                    "`cluster worker --config cluster.toml` runs one; `cluster up` holds all roles",
                );
            }
            if roles.parents().is_empty() {
                return refuse(
                    "no worker of this cluster runs on this host",
                    "run this where the ranks are, as the same user",
                );
            }
            Ok(())
        }
        FaultKind::Cut if !roles.workers.iter().any(link::is_apart) => refuse(
            "no worker here has a network namespace of its own, so there is no link to cut",
            "start workers with `ip netns exec NAME cluster worker …`",
        ),
        FaultKind::Cut => match link::lacking() {
            Some(why) => refuse(why, "run this as root, with iproute2 and util-linux installed"),
            None => Ok(()),
        },
        FaultKind::FillDisk => match &scene.fill {
            None => refuse("--fill names no folder", "name one, best on a small file system"),
            Some(folder) if !folder.is_dir() => {
                refuse(&format!("`{}` is no folder", folder.display()), "make it, or mount it")
            }
            Some(_) => Ok(()),
        },
        FaultKind::ThrottleStore => {
            let servers = listeners(&scene.store);
            let programs: BTreeSet<_> = servers.iter().map(Process::program).collect();
            match programs.len() {
                0 => refuse(
                    "the object store is not a server on this host",
                    "it is where store.uri is `s3://…` and store.s3.endpoint is on loopback",
                ),
                1 => Ok(()),
                _ => refuse(
                    "several programs hold the socket of the object store's server",
                    "only one that is the server's own can be stopped without harm to others",
                ),
            }
        }
        FaultKind::KillCoordinator if is_whole => refuse(
            "all roles of this cluster are one process",
            "run `cluster coordinator` three times for one that can lose a coordinator",
        ),
        FaultKind::KillCoordinator if roles.coordinators.is_empty() => {
            refuse("no coordinator of this cluster runs on this host", "run this where one does")
        }
        FaultKind::KillCoordinator if scene.coordinators.len() < 3 => refuse(
            "the cluster has one coordinator, and nothing would decide without it",
            "run three or five",
        ),
        FaultKind::KillCoordinator => Ok(()),
    }
}

/// Where the server of an S3 store listens whose endpoint is on loopback.
fn store_server(store: &StoreSection) -> Vec<SocketAddr> {
    let endpoint = store.s3.endpoint.split_once("://").map_or("", |(_, rest)| rest);
    let place = endpoint.split('/').next().unwrap_or_default();
    let places = match place.strip_prefix("localhost") {
        Some(port) => vec![format!("127.0.0.1{port}"), format!("[::1]{port}")],
        None => vec![place.to_owned()],
    };
    let addresses = places.iter().filter_map(|place| place.parse::<SocketAddr>().ok());
    let is_used = store.uri.starts_with("s3://");
    addresses.filter(|address| is_used && address.ip().is_loopback()).collect()
}

/// A plan under way.
struct Run<'a> {
    global: &'a Global,
    scene: Scene,
    watch: Watch,
    started: Instant,
    /// Faults that end by themselves.
    begun: JoinSet<()>,
    /// Faults that last as long as the run.
    kept: Vec<Held>,
    struck: usize,
    missed: usize,
}

impl Run<'_> {
    /// Strikes as planned, until the end of the duration or of the job.
    async fn all(&mut self, plan: &Plan, duration: Duration) -> Result<()> {
        for strike in &plan.strikes {
            if !self.wait(Duration::from_millis(strike.at_ms)).await? {
                return Ok(());
            }
            self.strike(strike)?;
        }
        self.wait(duration).await?;
        Ok(())
    }

    /// Prints a line of what happens: a document or a text. Ends the run where nobody can read it.
    fn say(&self, document: serde_json::Value, text: &str) -> Result<()> {
        match self.global.json {
            true => output::try_line(&document.to_string()),
            false => output::try_line(text),
        }
    }

    /// Waits until so long after the start, telling what the job does; false when it has ended.
    async fn wait(&mut self, offset: Duration) -> Result<bool> {
        let until = self.started + offset;
        loop {
            let status = tokio::select! {
                // First, or strikes that are late would hide that the job has ended.
                biased;
                status = self.watch.status() => status,
                () = tokio::time::sleep_until(until) => return Ok(true),
            };
            let seconds = self.started.elapsed().as_secs_f64();
            let document = serde_json::json!({
                "event": "job", "at_ms": (seconds * 1e3) as u64, "phase": status.phase,
                "generation": status.generation, "ranks": status.gang.len(),
            });
            self.say(document, &format!("{seconds:8.3} s  {}", job::line(&status)))?;
            if status.phase.is_terminal() {
                return Ok(false);
            }
        }
    }

    fn strike(&mut self, strike: &Strike) -> Result<()> {
        let (pid, missed) = match self.scene.strike(strike) {
            Struck::Done(pid, held) => {
                self.struck += 1;
                match (held, strike.fault.lasts) {
                    (Some(held), Some(lasts)) => {
                        self.begun.spawn(held.last(lasts));
                    }
                    (Some(held), None) => self.kept.push(held),
                    (None, _) => {}
                }
                (pid, None)
            }
            Struck::Missed(why) => {
                self.missed += 1;
                (None, Some(why))
            }
        };
        let document = serde_json::json!({
            "event": "fault", "strike": strike, "pid": pid.map(nix::unistd::Pid::as_raw),
            "missed": missed,
        });
        let behind = match (pid, missed) {
            (_, Some(why)) => format!(": missed, {why}"),
            (Some(pid), None) => format!(" (process {pid})"),
            (None, None) => String::new(),
        };
        self.say(document, &format!("{strike}{behind}"))
    }

    /// Ends what has not ended yet.
    async fn undo(&mut self) {
        self.begun.shutdown().await;
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_s_server_is_where_its_endpoint_is() {
        let at = |endpoint: &str, uri: &str| {
            let mut store = StoreSection { uri: uri.into(), ..StoreSection::default() };
            store.s3.endpoint = endpoint.into();
            let found = store_server(&store);
            found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(at("http://127.0.0.1:9000", "s3://b"), "127.0.0.1:9000");
        assert_eq!(at("http://127.0.0.1:9000/x", "s3://b/c"), "127.0.0.1:9000");
        assert_eq!(at("http://localhost:9000", "s3://b"), "127.0.0.1:9000 [::1]:9000");
        assert_eq!(at("http://[::1]:9000", "s3://b"), "[::1]:9000");
        assert_eq!(at("http://10.0.0.5:9000", "s3://b"), "");
        assert_eq!(at("http://127.0.0.1:9000", "file:///b"), "");
        assert_eq!(at("", "s3://b"), "");
    }
}

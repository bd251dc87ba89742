//! The rank process: `cluster rank`, started by a worker.
//!
//! Assignment → data and model → a [`Member`] of its gang, through one generation or many. An error
//! that ends the process is reported with whether trying again can help and whose fault it was,
//! before it exits.

use std::process::ExitCode;
use std::time::Duration;

use api::control::{Control, ControlError, Orders, die_with_parent};
use api::session::{Assignment, FLIGHT_LAST, RankOrder, RankReport, TrainAssignment};
use api::{ExitClass, JobSpec};
use checkpoint::{ManifestInfo, SaveError, Store};
use collective::FlightRecorder;

use crate::data_plane::tcp_options;
use crate::error::TrainError;
use crate::held::{Held, Progress, last_step};
use crate::member::Member;
use crate::optimizer::Optimizer;
use crate::parameters::Table;
use crate::place::Place;
use crate::{channels, device};

/// The assignment is written before the rank is started; a slow host gets this long.
const ASSIGNMENT_DEADLINE: Duration = Duration::from_secs(60);

/// Runs one rank to its end; the exit code is that of [`ExitClass`].
pub fn run_rank() -> ExitCode {
    if let Err(error) = die_with_parent() {
        eprintln!("rank: {error}");
    }
    let (control, orders) = match Control::from_stdin() {
        Ok(parts) => parts,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(ExitClass::Usage.code());
        }
    };
    match stacks::install() {
        Ok(()) => control.on_stacks(stacks::dump),
        // Nothing but a dump is lost by it.
        Err(error) => eprintln!("rank: its stacks cannot be told: {error}"),
    }
    let mut recorder = None;
    match run(&control, orders, &mut recorder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(recorder) = &recorder {
                say_last(&control, recorder, &error);
            }
            let report = RankReport::Failed {
                message: error.to_string(),
                retryable: error.is_retryable(),
                blames: error.blames(),
                damaged: error.damaged(),
            };
            // The worker may be gone; the exit code still tells.
            let _ = control.report(&report);
            ExitCode::from(if error.is_retryable() {
                ExitClass::Internal.code()
            } else {
                ExitClass::Usage.code()
            })
        }
    }
}

/// Leaves the flight log with the worker, which keeps it. Before the error itself, because whoever
/// hears of that may end this process.
fn say_last(control: &Control, recorder: &FlightRecorder, error: &TrainError) {
    let mut log = recorder.snapshot();
    log.ending = Some(error.to_string());
    // Best effort: the error is what counts.
    let _ = control.report(&RankReport::Flight { request: FLIGHT_LAST, log: Some(Box::new(log)) });
}

fn run(
    control: &Control,
    orders: Orders,
    recorder: &mut Option<FlightRecorder>,
) -> Result<(), TrainError> {
    let RankOrder::Assignment { assignment, store, data, .. } = orders.next(ASSIGNMENT_DEADLINE)?
    else {
        return Err(unexpected("the first order is not an assignment"));
    };
    let Assignment::Train(assignment) = *assignment else {
        return Err(unexpected("this assignment is not for a rank"));
    };
    let spec = &assignment.spec;
    let now = recorder.insert(recorder_of(&assignment)).clone();
    let told = now.clone();
    control.on_flight(move |entries| told.last(entries));
    now.set_tag("reading data");
    spec.validate().map_err(|e| TrainError::Job(e.to_string()))?;
    limit_threads(spec)?;
    let tcp = tcp_options(&data)?;
    let device = device::open(spec.resources.device, assignment.local_rank)?;
    let fingerprint = device::fingerprint(&spec.resources);

    let local = channels::localize(spec, &store)?;
    let store = Store::open(&store, &store.uri).map_err(SaveError::from)?;
    let problem = algorithms::algorithm(&spec.algorithm)?.open(spec, &local)?;
    let table = Table::of(&problem.model);
    let total = last_step(spec, problem.train.len());
    let optimizer = Optimizer::from_hyperparameters(&spec.hyperparameters, total);
    let info = ManifestInfo {
        fingerprint: fingerprint.clone(),
        data_digest: problem.train.digest().to_owned(),
        spec_digest: spec_digest(spec)?,
        lanes: spec.batch.lanes.get(),
        metrics: Default::default(),
        samples: None,
    };
    let held = Held {
        spec: spec.clone(),
        problem,
        table,
        optimizer,
        device,
        last_step: total,
        state: None,
        progress: Progress::default(),
    };
    let place = (!assignment.spare).then(|| Place::first(&assignment));
    let mut member = Member {
        control: control.clone(),
        orders,
        store,
        data,
        tcp,
        info,
        fingerprint,
        recorder: now,
    };
    // From inside the pool, so that matrix products need no hand-over to another thread.
    let mut ended = None;
    rayon::scope(|_| ended = Some(member.run(held, place)));
    *recorder = Some(member.recorder);
    ended.map_or_else(|| Err(unexpected("the step loop did not run")), |end| end.map(|_| ()))
}

fn recorder_of(assignment: &TrainAssignment) -> FlightRecorder {
    FlightRecorder::new(assignment.generation, assignment.rank, assignment.world_size)
}

fn unexpected(what: &str) -> TrainError {
    ControlError(what.into()).into()
}

/// One pool of the job's size: the number of threads is part of the fingerprint.
fn limit_threads(spec: &JobSpec) -> Result<(), TrainError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(spec.resources.threads_per_rank.get() as usize)
        .build_global()
        .map_err(|e| TrainError::Job(format!("cannot start the compute threads: {e}")))
}

/// BLAKE3 over the settings that the result depends on: not the name, ranks or policies.
fn spec_digest(spec: &JobSpec) -> Result<String, TrainError> {
    let parts = (&spec.algorithm, spec.seed, &spec.hyperparameters, &spec.batch, &spec.stop);
    let bytes = serde_json::to_vec(&parts).map_err(|e| TrainError::Job(e.to_string()))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

//! The rank process: `cluster rank`, started by a worker.
//!
//! Assignment → data and model → listen → peers → group → restore → step loop. Any error is
//! reported with whether trying again can help and whose fault it was, before the process exits.

use std::cell::OnceCell;
use std::process::ExitCode;
use std::time::Duration;

use api::control::{Control, ControlError, Orders, die_with_parent};
use api::session::{Assignment, FLIGHT_LAST, RankOrder, RankReport, TrainAssignment};
use api::{ExitClass, JobSpec, Rank, Step};
use checkpoint::{Manifest, ManifestInfo, Restore};
use collective::{FlightRecorder, GroupOptions, Listener};

use crate::agreement::agree;
use crate::checkpoints::Checkpoints;
use crate::data_plane::{tcp_options, transport};
use crate::error::TrainError;
use crate::optimizer::Optimizer;
use crate::parameters::Table;
use crate::state::TrainState;
use crate::train::{Trainer, TrainerParts, last_step};
use crate::{channels, device};

/// The assignment is written before the rank is started; a slow host gets this long.
const ASSIGNMENT_DEADLINE: Duration = Duration::from_secs(60);
/// The others may still be reading large data sets when this rank listens already.
const PEERS_DEADLINE: Duration = Duration::from_secs(600);
/// Every peer listens when the addresses are known, so connecting is quick.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

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
    let recorder = OnceCell::new();
    match run(&control, &orders, &recorder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(recorder) = recorder.get() {
                say_last(&control, recorder, &error);
            }
            let report = RankReport::Failed {
                message: error.to_string(),
                retryable: error.is_retryable(),
                blames: error.blames(),
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
    orders: &Orders,
    recorder: &OnceCell<FlightRecorder>,
) -> Result<(), TrainError> {
    let RankOrder::Assignment { assignment, store, data, .. } = orders.next(ASSIGNMENT_DEADLINE)?
    else {
        return Err(unexpected("the first order is not an assignment"));
    };
    let Assignment::Train(assignment) = *assignment else {
        return Err(unexpected("this assignment is not for a rank"));
    };
    let spec = &assignment.spec;
    let recorder = recorder.get_or_init(|| recorder_of(&assignment));
    let told = recorder.clone();
    control.on_flight(move |entries| told.last(entries));
    recorder.set_tag("reading data");
    spec.validate().map_err(|e| TrainError::Job(e.to_string()))?;
    limit_threads(spec)?;
    let tcp = tcp_options(&data)?;
    let device = device::open(spec.resources.device, assignment.local_rank)?;
    let fingerprint = device::fingerprint(&spec.resources);

    let local = channels::localize(spec, &store)?;
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
    };

    recorder.set_tag("waiting for the other ranks");
    let encrypts = tcp.tls.is_some();
    let listener = Listener::bind(data.address)?.with_tcp(tcp);
    let abort = listener.abort_handle();
    control.on_abort(move |reason| abort.abort(reason));
    control.report(&RankReport::Listening { address: listener.address(), fingerprint })?;
    let RankOrder::Peers { addresses } = orders.next(PEERS_DEADLINE)? else {
        return Err(unexpected("expected the peers' addresses"));
    };
    let group = GroupOptions {
        job: spec.name.clone(),
        group: "data".into(),
        generation: assignment.generation,
        rank: assignment.rank,
        world_size: assignment.world_size,
        secret: assignment.secret.clone(),
        connect_timeout: CONNECT_TIMEOUT,
        reduction: match spec.parallel.reduction {
            api::job::Reduction::Deterministic => collective::Reduction::Deterministic,
            api::job::Reduction::Fast => collective::Reduction::Fast,
        },
        transport: transport(&data),
        host: None,
    };
    recorder.set_tag("forming the group");
    let mut communicator = listener.connect(group, &addresses)?;
    communicator.set_recorder(recorder.clone());
    if assignment.rank == Rank(0) && assignment.world_size > 1 {
        let connections = if encrypts { "encrypted connections" } else { "plaintext connections" };
        println!("ranks reduce over {}, with {connections}", communicator.transport());
    }
    recorder.set_tag("comparing data and settings");
    let validation = problem.validation.as_ref().map_or("none", |data| data.digest());
    agree(
        &mut communicator,
        &[
            ("training data", &info.data_digest),
            ("validation data", validation),
            ("settings", &info.spec_digest),
            ("number of steps", &total.to_string()),
        ],
    )?;

    recorder.set_tag("restoring");
    let (state, base) = initial_state(&assignment, &table, &optimizer, &info, &store)?;
    let checkpoints = Checkpoints::start(&assignment, store, info, base.as_ref())?;
    control.report(&RankReport::Running { step: state.step })?;
    let trainer = Trainer::new(TrainerParts {
        assignment,
        problem,
        table,
        state,
        optimizer,
        device,
        communicator: Box::new(communicator),
        checkpoints,
        control: control.clone(),
        recorder: recorder.clone(),
    })?;
    // From inside the pool, so that matrix products need no hand-over to another thread.
    let mut ended = None;
    rayon::scope(|_| ended = Some(trainer.run()));
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

/// Fresh, or from the checkpoint that the leader named, whose manifest comes with it; a checkpoint of
/// other data or settings is refused.
fn initial_state(
    assignment: &TrainAssignment,
    table: &Table,
    optimizer: &Optimizer,
    info: &ManifestInfo,
    store: &api::config::StoreSection,
) -> Result<(TrainState, Option<Manifest>), TrainError> {
    let spec = &assignment.spec;
    let mut state = TrainState {
        step: Step(0),
        values: Vec::new(),
        optimizer: optimizer.initial_state(table.len),
    };
    let Some(fact) = &assignment.restore else {
        state.values = table.initial(spec.seed);
        return Ok((state, None));
    };
    let mut restore = Restore::open(store, &store.uri, fact)?;
    let found = restore.manifest();
    for (what, found, expected) in [
        ("training data", &found.data_digest, &info.data_digest),
        ("settings", &found.spec_digest, &info.spec_digest),
    ] {
        if found != expected {
            return Err(TrainError::Job(format!(
                "the checkpoint at step {} was made with other {what} (digest {found}, now \
                 {expected}): restore them, or submit a new job",
                fact.step.0
            )));
        }
    }
    let strict = spec.parallel.determinism == api::job::Determinism::Strict;
    if found.fingerprint != info.fingerprint {
        let message = format!(
            "the checkpoint at step {} was made under the numeric fingerprint `{}`, this rank has \
             `{}`: the result would differ in its last bits",
            fact.step.0, found.fingerprint, info.fingerprint
        );
        if strict {
            return Err(TrainError::Job(format!(
                "{message}; run on the same kind of host, or set parallel.determinism = \"relaxed\""
            )));
        }
        eprintln!("warning: {message}");
    }
    state.values = vec![0.0; table.len];
    state.restore(table, &mut restore)?;
    Ok((state, Some(restore.manifest().clone())))
}

/// BLAKE3 over the settings that the result depends on: not the name, ranks or policies.
fn spec_digest(spec: &JobSpec) -> Result<String, TrainError> {
    let parts = (&spec.algorithm, spec.seed, &spec.hyperparameters, &spec.batch, &spec.stop);
    let bytes = serde_json::to_vec(&parts).map_err(|e| TrainError::Job(e.to_string()))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

//! A process as a member of its gang, from generation to generation: listen, meet the others, agree
//! on the newest state, step; and when the group breaks or pauses, keep the state and wait for the
//! next.
//!
//! What a break leaves in memory is whole: a step changes the state only after all of its reductions
//! have succeeded. So every member holds the state of one step, and of two neighbouring ones at
//! most: some may have finished the step under way.

use std::time::{Duration, Instant};

use api::control::{Control, ControlError, Orders};
use api::data_plane::DataPlane;
use api::session::{FLIGHT_LAST, RankOrder, RankReport};
use api::{JobSpec, Rank, Step};
use checkpoint::{Manifest, ManifestInfo, Restore, Store};
use collective::{
    CollectiveError, Communicator, FlightRecorder, GroupOptions, Listener, ProcessGroup, TcpOptions,
};

use crate::agreement::{Disagreement, agree};
use crate::checkpoints::Checkpoints;
use crate::data_plane::transport;
use crate::error::TrainError;
use crate::held::{Held, Progress};
use crate::newcomers::{Joining, send_parts};
use crate::place::Place;
use crate::recovery::{Offer, Origin, origin};
use crate::samples;
use crate::state::TrainState;
use crate::train::{Bound, End, Trainer};

/// Every peer listens when the addresses are known, so connecting is quick.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Others may still read large data sets, and without a control plane nobody orders anything for a
/// while; this process may hold the job's only state. The leader and the worker end whom they must.
const ORDERS_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// One process of a job.
pub struct Member {
    /// To the worker.
    pub control: Control,
    /// From the worker.
    pub orders: Orders,
    /// The store, opened once: what a regroup needs of it is at hand.
    pub store: Store,
    /// How to reach the other ranks.
    pub data: DataPlane,
    /// Options of connections to them.
    pub tcp: TcpOptions,
    /// What a manifest says of the job.
    pub info: ManifestInfo,
    /// The numeric fingerprint of this process.
    pub fingerprint: String,
    /// What the process was doing.
    pub recorder: FlightRecorder,
}

/// What a generation begins with.
struct Settled {
    origin: Origin,
    /// The manifest of the checkpoint that the state came from, if it did.
    base: Option<Manifest>,
    /// Who gets it behind the first step.
    joining: Option<Joining>,
}

/// Why a member did not come to its end in this generation.
enum Interrupted {
    /// A newer generation begins.
    By(Box<Place>),
    /// The group broke; what the state is worth is not touched by it.
    Broken(CollectiveError),
    /// This process cannot go on.
    Failed(Box<TrainError>),
}

impl From<TrainError> for Interrupted {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Collective(error) => Self::Broken(error),
            error => Self::Failed(Box::new(error)),
        }
    }
}

impl From<CollectiveError> for Interrupted {
    fn from(error: CollectiveError) -> Self {
        Self::Broken(error)
    }
}

impl From<ControlError> for Interrupted {
    fn from(error: ControlError) -> Self {
        Self::Failed(Box::new(error.into()))
    }
}

impl Member {
    /// Is a rank in one generation after another until the job ends for this process. `place`: none
    /// for a spare, which waits for its first.
    pub fn run(&mut self, mut held: Held, place: Option<Place>) -> Result<End, TrainError> {
        let mut next = match place {
            Some(place) => place,
            None => {
                let fingerprint = self.fingerprint.clone();
                self.recorder.set_tag("spare, waiting for a place");
                self.control.report(&RankReport::Ready { fingerprint })?;
                self.next_place(None)?
            }
        };
        loop {
            let mut trainer = None;
            let outcome = self.generation(&mut held, &mut trainer, &next);
            let is_paused = matches!(outcome, Ok(End::Paused));
            // The group goes before anything is reported: the next one may begin at once.
            drop(trainer);
            next = match outcome {
                Ok(End::Paused) => {
                    self.control.report(&RankReport::Paused { step: held.step() })?;
                    self.next_place(Some(&next))?
                }
                Ok(end) => return Ok(end),
                Err(Interrupted::By(place)) => *place,
                Err(Interrupted::Failed(error)) => return Err(*error),
                Err(Interrupted::Broken(error)) => self.broken(&held, &next, &error)?,
            };
            let how = if is_paused { "paused" } else { "broken off" };
            // Not on standard error: its last line is taken for the cause of an end.
            println!(
                "generation {} is {how}; this process goes on as {} of {} in generation {}{}",
                self.recorder.snapshot().generation,
                next.rank,
                next.world_size,
                next.generation,
                held.state.as_ref().map_or(String::new(), |s| format!(", from step {}", s.step.0)),
            );
        }
    }

    /// Leaves the flight log, says that the group broke, and waits for the next place.
    fn broken(
        &mut self,
        held: &Held,
        place: &Place,
        error: &CollectiveError,
    ) -> Result<Place, TrainError> {
        // What this rank was doing is kept, whoever broke the group off.
        let mut log = self.recorder.snapshot();
        log.ending = Some(error.to_string());
        let flight = RankReport::Flight { request: FLIGHT_LAST, log: Some(Box::new(log)) };
        self.control.report(&flight)?;
        // An order to regroup is what broke it: nobody needs to be told.
        if let Some(next) = self.newer_place(place) {
            return Ok(next);
        }
        println!("the group broke: {error}");
        self.control.report(&RankReport::Broken {
            step: held.state.as_ref().map(|state| state.step),
            message: error.to_string(),
            blames: error.peer(),
        })?;
        self.recorder.set_tag("waiting for the next generation");
        self.next_place(Some(place))
    }

    /// One generation from the first socket to its end.
    fn generation(
        &mut self,
        held: &mut Held,
        trainer: &mut Option<Trainer>,
        place: &Place,
    ) -> Result<End, Interrupted> {
        let began = Instant::now();
        self.enter(place);
        let mut communicator = self.join(held, place)?;
        let formed = began.elapsed();
        let Settled { origin, base, joining } =
            self.settle_state(held, &mut communicator, place)?;
        let step = joining.as_ref().map_or(held.step(), |joining| joining.step);
        if matches!(origin, Origin::Members { .. }) && place.rank == Rank(0) {
            println!(
                "regrouped at step {} with {} ranks: met in {:.0} ms, state agreed in {:.0} ms{}",
                step.0,
                place.world_size,
                formed.as_secs_f64() * 1e3,
                (began.elapsed() - formed).as_secs_f64() * 1e3,
                joining.as_ref().map_or(String::new(), |joining| format!(
                    ", to be sent behind the next step to {}",
                    listed(&joining.newcomers)
                )),
            );
        }
        let mut info = self.info.clone();
        info.metrics.clear();
        let store = self.store.clone();
        let mut checkpoints =
            Checkpoints::start(&held.spec, place, store, info, base.as_ref(), &self.control)?;
        if held.spec.checkpoint.every_steps > 0
            && let Some(state) = &held.state
        {
            checkpoints.reserve(&held.table, state)?;
        }
        let holds_state = held.state.is_some();
        self.control.report(&RankReport::Running { step, holds_state })?;
        let bound = Bound::new(held, place, Box::new(communicator), checkpoints, joining)?;
        let trainer = trainer.insert(Trainer::new(bound, self.control.clone(), &self.recorder));
        Ok(trainer.run(held)?)
    }

    /// From here on everything that leaves this process carries the generation.
    fn enter(&mut self, place: &Place) {
        self.control.enter(place.generation);
        self.recorder = FlightRecorder::new(place.generation, place.rank, place.world_size);
        let told = self.recorder.clone();
        self.control.on_flight(move |entries| told.last(entries));
    }

    /// Listens, hears where the others do, and connects to them.
    fn join(&mut self, held: &Held, place: &Place) -> Result<ProcessGroup, Interrupted> {
        self.recorder.set_tag("waiting for the other ranks");
        let listener = Listener::bind(self.data.address)?.with_tcp(self.tcp.clone());
        let abort = listener.abort_handle();
        self.control.on_abort(move |reason| abort.abort(reason));
        // An order that came before there was anything to abort.
        if let Some(next) = self.newer_place(place) {
            return Err(Interrupted::By(Box::new(next)));
        }
        let (listened, fingerprint) = (listener.address(), self.fingerprint.clone());
        self.control.report(&RankReport::Listening { address: listened, fingerprint })?;
        let addresses = loop {
            match self.orders.next(ORDERS_DEADLINE)? {
                RankOrder::Peers { generation, addresses } if generation == place.generation => {
                    break addresses;
                }
                RankOrder::Regroup(order) if order.generation > place.generation => {
                    let next: Place = (*order).into();
                    return Err(Interrupted::By(Box::new(next)));
                }
                // Of a generation that is over.
                _ => {}
            }
        };
        let options = GroupOptions {
            job: held.spec.name.clone(),
            group: "data".into(),
            generation: place.generation,
            rank: place.rank,
            world_size: place.world_size,
            secret: place.secret.clone(),
            connect_timeout: CONNECT_TIMEOUT,
            reduction: match held.spec.parallel.reduction {
                api::job::Reduction::Deterministic => collective::Reduction::Deterministic,
                api::job::Reduction::Fast => collective::Reduction::Fast,
            },
            transport: transport(&self.data),
            host: None,
        };
        self.recorder.set_tag("forming the group");
        let encrypts = self.tcp.tls.is_some();
        let mut communicator = listener.connect(options, &addresses)?;
        communicator.set_recorder(self.recorder.clone());
        if place.rank == Rank(0) && place.world_size > 1 {
            let kind = if encrypts { "encrypted connections" } else { "plaintext connections" };
            println!("ranks reduce over {}, with {kind}", communicator.transport());
        }
        self.recorder.set_tag("comparing data and settings");
        let validation = held.problem.validation.as_ref().map_or("none", |data| data.digest());
        let inputs = [
            ("training data", self.info.data_digest.as_str()),
            ("validation data", validation),
            ("settings", self.info.spec_digest.as_str()),
            ("number of steps", &held.last_step.to_string()),
        ];
        match agree(&mut communicator, &inputs, held.state.is_some())? {
            Ok(()) => Ok(communicator),
            // The others keep what they hold and go on without it.
            Err(Disagreement { rank, is_newcomer: true, message }) if rank != place.rank => {
                let address = addresses.get(rank.0 as usize).copied().unwrap_or(listened);
                let culprit = None;
                Err(CollectiveError::PeerFailed { rank, address, culprit, message }.into())
            }
            Err(found) => Err(TrainError::Job(found.message).into()),
        }
    }

    /// Brings every member to the newest state that one of them, or else the store, holds; but for
    /// newcomers that get it behind the first step.
    fn settle_state(
        &mut self,
        held: &mut Held,
        communicator: &mut ProcessGroup,
        place: &Place,
    ) -> Result<Settled, Interrupted> {
        self.recorder.set_tag("agreeing on the state");
        let offer: Offer = held.state.as_ref().map(|state| state.step);
        let mine = serde_json::to_vec(&(offer, &held.progress)).map_err(unreadable)?;
        let mut offers: Vec<Offer> = Vec::new();
        let mut newest = Progress::default();
        for bytes in communicator.gather_bytes(&mine)? {
            let (offer, progress): (Offer, Progress) =
                serde_json::from_slice(&bytes).map_err(unreadable)?;
            if offer.is_some() && offers.iter().flatten().all(|other| Some(*other) < offer) {
                newest = progress;
            }
            offers.push(offer);
        }
        let recorded = place.restore.as_ref().map(|fact| fact.step);
        let origin = origin(&offers, recorded);
        let (mut base, mut joining) = (None, None);
        match &origin {
            Origin::Members { step, holders, receivers } => {
                joining = Joining::of(&origin, &offers, held, &newest);
                if !receivers.is_empty() && joining.is_none() {
                    self.recorder.set_tag(format_args!("receiving the state of step {}", step.0));
                    let blank = receivers.contains(&place.rank).then(|| held.blank_state());
                    share(&mut held.state, blank, communicator, *step, holders)?;
                }
                held.progress = newest;
            }
            Origin::Checkpoint(step) => {
                self.recorder.set_tag(format_args!("restoring step {}", step.0));
                let (state, manifest) = self.restored(held, place)?;
                let drawn = step.0 * u64::from(held.spec.batch.global.get());
                let kept = manifest.as_ref().and_then(|manifest| manifest.samples);
                held.progress = Progress {
                    samples: kept
                        .unwrap_or_else(|| samples::beginning_at(drawn, held.problem.train.len())),
                    ..Default::default()
                };
                held.state = Some(state);
                base = manifest;
            }
            Origin::Beginning => {
                held.progress = Progress::default();
                let mut state = held.blank_state();
                state.values = held.table.initial(held.spec.seed);
                held.state = Some(state);
            }
        }
        Ok(Settled { origin, base, joining })
    }

    /// The state of the checkpoint that the leader named; one of other data or settings is refused.
    /// What seems damaged is looked at twice: it costs the job all steps since the one before.
    fn restored(
        &self,
        held: &Held,
        place: &Place,
    ) -> Result<(TrainState, Option<Manifest>), TrainError> {
        let read = self.read_state(held, place);
        match &read {
            Err(error) if error.damaged().is_some() => {
                tracing::warn!(%error, "reading the checkpoint once more");
                self.read_state(held, place)
            }
            _ => read,
        }
    }

    fn read_state(
        &self,
        held: &Held,
        place: &Place,
    ) -> Result<(TrainState, Option<Manifest>), TrainError> {
        let mut state = held.blank_state();
        let Some(fact) = &place.restore else { return Ok((state, None)) };
        let failed = |error| TrainError::restore(fact.step, error);
        let mut restore = Restore::with_store(self.store.clone(), fact).map_err(failed)?;
        check(&held.spec, restore.manifest(), &self.info, fact.step)?;
        state.restore(&held.table, &mut restore)?;
        Ok((state, Some(restore.manifest().clone())))
    }

    /// The newest order for a generation after that of `place`, if one waits.
    fn newer_place(&self, place: &Place) -> Option<Place> {
        let mut newest: Option<Place> = None;
        while let Some(order) = self.orders.try_next() {
            if let RankOrder::Regroup(order) = order
                && order.generation > newest.as_ref().map_or(place.generation, |p| p.generation)
            {
                newest = Some((*order).into());
            }
        }
        newest
    }

    /// Waits for an order to be part of a generation after that of `place`.
    fn next_place(&self, place: Option<&Place>) -> Result<Place, TrainError> {
        loop {
            if let RankOrder::Regroup(order) = self.orders.next(ORDERS_DEADLINE)?
                && place.is_none_or(|place| order.generation > place.generation)
            {
                let next: Place = (*order).into();
                return Ok(self.newer_place(&next).unwrap_or(next));
            }
        }
    }
}

/// Every holder sends its part of every buffer to all. A receiver brings a `blank` state to receive
/// into; what it held, if anything, it holds until all has come, so that a transfer that breaks off
/// leaves no state that is none.
fn share(
    held: &mut Option<TrainState>,
    blank: Option<TrainState>,
    communicator: &mut dyn Communicator,
    step: Step,
    holders: &[Rank],
) -> Result<(), CollectiveError> {
    let mut incoming = blank;
    let Some(state) = incoming.as_mut().or(held.as_mut()) else { return Ok(()) };
    send_parts(state, communicator, holders)?;
    state.step = step;
    if incoming.is_some() {
        *held = incoming;
    }
    Ok(())
}

/// Ranks as people read them.
pub fn listed(ranks: &[Rank]) -> String {
    ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether a checkpoint is one of this job as it is now.
fn check(
    spec: &JobSpec,
    found: &Manifest,
    info: &ManifestInfo,
    step: Step,
) -> Result<(), TrainError> {
    for (what, found, expected) in [
        ("training data", &found.data_digest, &info.data_digest),
        ("settings", &found.spec_digest, &info.spec_digest),
    ] {
        if found != expected {
            return Err(TrainError::Job(format!(
                "the checkpoint at step {} was made with other {what} (digest {found}, now \
                 {expected}): restore them, or submit a new job",
                step.0
            )));
        }
    }
    let strict = spec.parallel.determinism == api::job::Determinism::Strict;
    if found.fingerprint != info.fingerprint {
        let message = format!(
            "the checkpoint at step {} was made under the numeric fingerprint `{}`, this rank has \
             `{}`: the result would differ in its last bits",
            step.0, found.fingerprint, info.fingerprint
        );
        if strict {
            return Err(TrainError::Job(format!(
                "{message}; run on the same kind of host, or set parallel.determinism = \"relaxed\""
            )));
        }
        eprintln!("warning: {message}");
    }
    Ok(())
}

fn unreadable(error: serde_json::Error) -> TrainError {
    ControlError(format!("a member's offer: {error}")).into()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::thread;

    use api::{Generation, Secret};

    use super::*;
    use crate::optimizer::OptimizerState;

    const LEN: usize = 1000;

    fn state(step: u64, value: f32) -> TrainState {
        let buffer = vec![value; LEN];
        let optimizer = OptimizerState { m: buffer.clone(), v: buffer.clone() };
        TrainState { step: Step(step), values: buffer, optimizer }
    }

    /// Rank 0 holds step 5 and leaves after `sent` of its buffers; what rank 1, which held `own`, holds
    /// then.
    fn received(own: Option<TrainState>, sent: usize) -> Option<TrainState> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let listeners = [(); 2].map(|()| Listener::bind(local).expect("a port"));
        let peers: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
        let [first, second] = listeners;
        let connect = move |listener: Listener, rank: u32| {
            let options = GroupOptions {
                job: "a".parse().expect("a name"),
                group: "data".into(),
                generation: Generation(2),
                rank: Rank(rank),
                world_size: 2,
                secret: Secret::new("of the test"),
                connect_timeout: CONNECT_TIMEOUT,
                reduction: Default::default(),
                transport: Default::default(),
                host: None,
            };
            listener.connect(options, &peers).expect("connects")
        };
        let other = connect.clone();
        let sender = thread::spawn(move || {
            let mut group = other(first, 0);
            let mut state = state(5, 1.5);
            for _ in 0..sent {
                group.broadcast(state.values.as_mut_slice().into(), Rank(0)).expect("sent");
            }
        });
        let mut group = connect(second, 1);
        let mut held = own;
        let outcome = share(&mut held, Some(state(0, 0.0)), &mut group, Step(5), &[Rank(0)]);
        sender.join().expect("no panic");
        assert_eq!(outcome.is_ok(), sent == 3, "{outcome:?}");
        held
    }

    #[test]
    fn a_transfer_that_breaks_off_leaves_what_was_held_before() {
        for sent in 0..3 {
            assert!(received(None, sent).is_none(), "half a state was kept");
            let kept = received(Some(state(4, 0.5)), sent).expect("its own");
            assert_eq!((kept.step, kept.values[0]), (Step(4), 0.5));
        }
        let whole = received(Some(state(4, 0.5)), 3).expect("the sender's");
        assert_eq!((whole.step, whole.values[LEN - 1]), (Step(5), 1.5));
        assert_eq!(whole.optimizer.v[0], 1.5);
    }
}

//! Answers `Flight`: asks the ranks that run, waits a moment, reads what was kept of the others, and
//! has the core say what the logs mean.
//!
//! Nothing of it enters raft or is acknowledged. An answer that does not come in time is a rank
//! without a log, which is an answer too.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::finding::{FlightReport, FlightSource, RankFlight};
use api::flight::{FLIGHT_ENTRIES_MAX, FLIGHT_LOG_BYTES_MAX, FlightLog};
use api::job::LANES_MAX;
use api::records::JobRecord;
use api::session::FLIGHT_LAST;
use api::stacks::{STACKS_BYTES_MAX, StackDump};
use api::{Generation, Name, Rank, TaskId};
use checkpoint::{Store, StoreError, keys};
use coordinator_core::flight::findings;
use futures::stream::{self, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Status;
use tracing::debug;

use crate::leadership::{LeaderQuestion, Leadership};
use crate::status::leadership_lost;

/// A running rank answers within a few milliseconds, or is starved or out of reach.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// A worker knows what a rank's threads are in within two seconds, if not from the rank then from the
/// kernel.
const STACKS_WAIT: Duration = Duration::from_secs(3);
/// A store that takes longer for one request counts as one that has nothing: the caller is told so
/// before it gives up.
const STORE_WAIT: Duration = Duration::from_secs(3);
/// Logs read at once.
const READS_AT_ONCE: usize = 16;
/// Operations of all ranks together: at some 350 bytes each the answer stays well below the largest.
const ENTRIES_IN_ALL: usize = 64 << 10;
/// Operations per rank in any case: those it is in and what led there.
const ENTRIES_MIN: usize = 16;

/// Generations of a job whose logs are kept, the newest.
const GENERATIONS_KEPT: usize = 8;

/// What a rank was asked for, or why there is none.
type Told = Result<Answer, String>;

/// The answer to one kind of question.
#[derive(Debug)]
pub(crate) enum Answer {
    /// What it remembers of its collective operations.
    Flight(Box<FlightLog>),
    /// What its threads are in.
    Stacks(Box<StackDump>),
}

/// Which stacks belong to a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WantedStacks {
    /// None.
    None,
    /// Those that were kept of ranks that were replaced.
    Kept,
    /// Those of the ranks that run, now.
    Live,
}

/// Questions that wait for answers.
pub(crate) struct Questions {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, Open>>,
}

struct Open {
    job: Name,
    answers: mpsc::Sender<(TaskId, Told)>,
}

impl Default for Questions {
    fn default() -> Self {
        Self { next: AtomicU64::new(FLIGHT_LAST + 1), open: Mutex::default() }
    }
}

impl Questions {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a question to at most `ranks` ranks.
    fn ask(self: &Arc<Self>, job: &Name, ranks: usize) -> Question {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answers, inbox) = mpsc::channel(ranks.max(1));
        self.lock().insert(number, Open { job: job.clone(), answers });
        Question { number, questions: Arc::clone(self), inbox }
    }

    /// A worker answers; an answer to no open question is dropped.
    pub(crate) fn answer(&self, number: u64, task: &TaskId, told: Told) {
        let open = self.lock();
        let Some(question) = open.get(&number) else { return };
        if question.job == task.workload {
            // Full only when somebody answers more often than it was asked.
            let _ = question.answers.try_send((task.clone(), told));
        }
    }
}

/// One open question; closed when dropped.
struct Question {
    number: u64,
    questions: Arc<Questions>,
    inbox: mpsc::Receiver<(TaskId, Told)>,
}

impl Question {
    /// The answers of so many ranks, or those that came within `wait`.
    async fn answers(&mut self, count: usize, wait: Duration) -> BTreeMap<TaskId, Told> {
        let deadline = Instant::now() + wait;
        let mut answers = BTreeMap::new();
        while answers.len() < count
            && let Ok(Some((task, told))) = timeout_at(deadline, self.inbox.recv()).await
        {
            answers.insert(task, told);
        }
        answers
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.questions.lock().remove(&self.number);
    }
}

/// What flight reports are made of.
pub(crate) struct FlightDesk {
    pub(crate) store: Store,
    pub(crate) questions: Arc<Questions>,
}

impl FlightDesk {
    /// The flight logs of a job, of one generation if it is given.
    pub(crate) async fn report(
        &self,
        leadership: &Leadership,
        job: &JobRecord,
        wanted: Option<Generation>,
        stacks: WantedStacks,
    ) -> Result<FlightReport, Status> {
        let (name, status) = (&job.spec.name, &job.status);
        if status.generation == Generation(0) {
            return Err(Status::failed_precondition(format!(
                "job `{name}` has not run yet: {}",
                status.reason
            )));
        }
        if let Some(wanted) = wanted.filter(|wanted| *wanted > status.generation) {
            return Err(Status::invalid_argument(format!(
                "job `{name}` has no generation {}: the newest is {}",
                wanted.0, status.generation.0
            )));
        }
        let mut generation = wanted.unwrap_or(status.generation);
        let count = ranks_in(job, generation);
        let mut ranks: Vec<RankFlight> = (0..count).map(|rank| unknown(job, Rank(rank))).collect();
        let mut notes = Vec::new();
        let entries = (ENTRIES_IN_ALL / ranks.len()).clamp(ENTRIES_MIN, FLIGHT_ENTRIES_MAX);
        let asked = match generation == status.generation {
            true => self.ask(leadership, name, generation, entries, &mut ranks).await?,
            false => 0,
        };
        let kept = self.list(name).await.unwrap_or_else(|why| {
            notes.push(format!("the logs that were kept cannot be listed: {why}"));
            BTreeMap::new()
        });
        let stacks = match stacks {
            WantedStacks::None => Vec::new(),
            WantedStacks::Live => {
                self.ask_stacks(leadership, name, generation, None, false).await?
            }
            WantedStacks::Kept => self.read_stacks(name, wanted).await.unwrap_or_else(|why| {
                notes.push(format!("the stacks that were kept cannot be read: {why}"));
                Vec::new()
            }),
        };
        if asked == 0 && wanted.is_none() && !kept.contains_key(&generation) {
            let newest = kept.keys().rev().find(|kept| **kept < generation).copied();
            // One that hung may have left its stacks only.
            let newest = newest.or_else(|| stacks.first().map(|dump| dump.generation));
            generation = newest.ok_or_else(|| {
                let why = notes.first().map(|note| format!("; {note}")).unwrap_or_default();
                Status::failed_precondition(format!(
                    "job `{name}` has no flight log: none of its ranks runs, and none that failed \
                     or was killed has left one (the job is {}: {}){why}",
                    status.phase, status.reason
                ))
            })?;
            notes.push(format!(
                "generation {} left no flight log; these are of generation {}",
                status.generation.0, generation.0
            ));
            ranks.extend((count..ranks_in(job, generation)).map(|rank| unknown(job, Rank(rank))));
        }
        let own = kept.get(&generation).cloned().unwrap_or_default();
        self.read_kept(job, generation, &own, entries, &mut ranks, asked > 0).await;
        let findings = findings(generation, &ranks);
        let verdict = findings.iter().map(ToString::to_string).collect();
        let (job, phase) = (name.clone(), status.phase);
        Ok(FlightReport { job, phase, generation, ranks, notes, findings, verdict, stacks })
    }

    /// Asks the ranks that run; returns how many they are.
    async fn ask(
        &self,
        leadership: &Leadership,
        job: &Name,
        generation: Generation,
        entries: usize,
        ranks: &mut [RankFlight],
    ) -> Result<usize, Status> {
        let mut question = self.questions.ask(job, ranks.len());
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        let number = question.number;
        let asked = LeaderQuestion::Flight { entries };
        let places = leadership.ask_ranks(job.clone(), generation, number, asked).await?;
        let reached = places.iter().filter(|place| place.session.is_some()).count();
        let mut answers = tokio::select! {
            answers = question.answers(reached, ANSWER_WAIT) => answers,
            // The sessions ended with it: silence would say nothing of the ranks.
            () = leadership.over.cancelled() => return Err(leadership_lost()),
        };
        for place in &places {
            let Some(flight) = ranks.iter_mut().find(|flight| flight.rank == place.rank) else {
                continue;
            };
            flight.worker = Some(place.worker.clone());
            flight.host = place.host.clone();
            match answers.remove(&place.task) {
                Some(Ok(Answer::Flight(log))) => {
                    flight.absent.clear();
                    flight.source = FlightSource::Live;
                    flight.log = Some(*log);
                }
                Some(Ok(Answer::Stacks(_))) => flight.absent = "it told something else".into(),
                Some(Err(why)) => flight.absent = why,
                None if place.session.is_none() => {
                    flight.absent = format!("its worker `{}` is not connected", place.worker);
                }
                None => {
                    let (wait, worker) = (ANSWER_WAIT.as_secs(), &place.worker);
                    flight.absent = format!(
                        "it did not answer within {wait} s: its process on `{worker}` is starved \
                         or out of reach"
                    );
                }
            }
        }
        Ok(places.len())
    }

    /// Asks ranks that run, or only one, what their threads are in; what comes in time, by rank. `keep`
    /// has their workers keep it, too.
    pub(crate) async fn ask_stacks(
        &self,
        leadership: &Leadership,
        job: &Name,
        generation: Generation,
        only: Option<Rank>,
        keep: bool,
    ) -> Result<Vec<StackDump>, Status> {
        let mut question = self.questions.ask(job, LANES_MAX as usize);
        let asked = LeaderQuestion::Stacks { only, keep };
        let number = question.number;
        let places = leadership.ask_ranks(job.clone(), generation, number, asked).await?;
        let reached = places.iter().filter(|place| place.session.is_some()).count();
        let answers = tokio::select! {
            answers = question.answers(reached, STACKS_WAIT) => answers,
            () = leadership.over.cancelled() => return Err(leadership_lost()),
        };
        let mut dumps: Vec<StackDump> = Vec::new();
        for (task, told) in answers {
            match told {
                Ok(Answer::Stacks(dump)) => dumps.push(*dump),
                Ok(Answer::Flight(_)) => {}
                Err(why) => debug!(%task, why, "no stacks"),
            }
        }
        dumps.sort_by_key(|dump| dump.rank);
        Ok(dumps)
    }

    /// The stacks that were kept of one generation: the given one, else the newest that left some.
    async fn read_stacks(
        &self,
        job: &Name,
        wanted: Option<Generation>,
    ) -> Result<Vec<StackDump>, String> {
        let kept = in_time(list(&self.store, job, keys::parse_stacks)).await?;
        let newest = wanted.or_else(|| kept.keys().next_back().copied());
        let Some((generation, ranks)) = newest.and_then(|wanted| kept.get_key_value(&wanted))
        else {
            return Ok(Vec::new());
        };
        let mut dumps = Vec::new();
        for rank in ranks {
            let key = keys::stacks(job, *generation, *rank);
            let bytes = in_time(self.store.get_bounded(&key, STACKS_BYTES_MAX)).await?;
            dumps.push(serde_json::from_slice(&bytes).map_err(|error| error.to_string())?);
        }
        dumps.sort_by_key(|dump: &StackDump| dump.rank);
        Ok(dumps)
    }

    /// Which logs were kept, by generation.
    async fn list(&self, job: &Name) -> Result<BTreeMap<Generation, Vec<Rank>>, String> {
        in_time(list(&self.store, job, keys::parse_flight)).await
    }

    /// Reads what was kept of ranks that have not told their log.
    async fn read_kept(
        &self,
        job: &JobRecord,
        generation: Generation,
        kept: &[Rank],
        entries: usize,
        ranks: &mut [RankFlight],
        is_live: bool,
    ) {
        let name = &job.spec.name;
        let mut wanted = Vec::new();
        for flight in ranks.iter_mut().filter(|flight| flight.log.is_none()) {
            if let Some(end) = known_end(job, generation, flight.rank) {
                flight.absent = end;
            }
            if kept.contains(&flight.rank) {
                wanted.push(flight.rank);
            } else if !is_live {
                flight.absent = format!("{}, and left none", flight.absent);
            }
        }
        let read = |rank| async move {
            let mut log = self.read(name, generation, rank).await;
            // At once: whole logs of a large gang would fill the memory.
            log.iter_mut().for_each(|log| log.keep_last(entries));
            (rank, log)
        };
        let reads = stream::iter(wanted).map(read).buffer_unordered(READS_AT_ONCE);
        let read: Vec<(Rank, Result<FlightLog, String>)> = reads.collect().await;
        for (rank, log) in read {
            let Some(flight) = ranks.iter_mut().find(|flight| flight.rank == rank) else {
                continue;
            };
            match log {
                Ok(log) => {
                    flight.absent.clear();
                    flight.source = FlightSource::Kept;
                    flight.host = log.host.clone();
                    flight.log = Some(log);
                }
                Err(why) => flight.absent = format!("the one that was kept cannot be read: {why}"),
            }
        }
    }

    async fn read(
        &self,
        job: &Name,
        generation: Generation,
        rank: Rank,
    ) -> Result<FlightLog, String> {
        let key = keys::flight(job, generation, rank);
        let bytes = in_time(self.store.get_bounded(&key, FLIGHT_LOG_BYTES_MAX)).await?;
        serde_json::from_slice(&bytes).map_err(|error| error.to_string())
    }
}

/// Reads a key, if it is of the kind that is looked for.
type ParseKey = fn(&Name, &str) -> Option<(Generation, Rank)>;

/// Makes a key of one kind.
type MakeKey = fn(&Name, Generation, Rank) -> String;

/// What was kept of a job, by generation.
async fn list(
    store: &Store,
    job: &Name,
    parse: ParseKey,
) -> Result<BTreeMap<Generation, Vec<Rank>>, StoreError> {
    let listed = store.list(&keys::flights(job)).await?;
    let mut kept: BTreeMap<Generation, Vec<Rank>> = BTreeMap::new();
    for object in listed {
        if let Some((generation, rank)) = parse(job, &object.key) {
            kept.entry(generation).or_default().push(rank);
        }
    }
    Ok(kept)
}

/// Deletes the logs of all but the newest generations that left some, and their stacks likewise. What may
/// go once may go for ever: newer ones only push it further out.
pub(crate) async fn drop_old_flights(store: &Store, job: &Name) -> Result<(), StoreError> {
    let kinds: [(ParseKey, MakeKey); 2] =
        [(keys::parse_flight, keys::flight), (keys::parse_stacks, keys::stacks)];
    for (parse, key) in kinds {
        let kept = list(store, job, parse).await?;
        for (generation, ranks) in kept.into_iter().rev().skip(GENERATIONS_KEPT) {
            for rank in ranks {
                store.delete(&key(job, generation, rank)).await?;
            }
        }
    }
    Ok(())
}

async fn in_time<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, String> {
    match timeout(STORE_WAIT, work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("the store did not answer within {} s", STORE_WAIT.as_secs())),
    }
}

/// How many ranks a generation has. Of one that is over it is not recorded: as many as the job needs, or
/// as the present one has.
fn ranks_in(job: &JobRecord, generation: Generation) -> u32 {
    let present = u32::try_from(job.status.gang.len()).unwrap_or(u32::MAX);
    match present > 0 && generation == job.status.generation {
        // Those that are left of a gang may be fewer than it began with.
        true => present,
        false => present.max(job.spec.resources.ranks.min()),
    }
}

/// A rank of which nothing is known but where it was placed.
fn unknown(job: &JobRecord, rank: Rank) -> RankFlight {
    let place = job.status.gang.iter().find(|place| place.rank == rank);
    RankFlight {
        rank,
        worker: place.map(|place| place.worker.clone()),
        host: String::new(),
        source: FlightSource::None,
        absent: "it does not run".into(),
        log: None,
    }
}

/// How a rank ended, where the job's record says so.
fn known_end(job: &JobRecord, generation: Generation, rank: Rank) -> Option<String> {
    let cause = job.status.first_cause.as_ref()?;
    let is_it = cause.generation == generation && cause.rank == Some(rank);
    is_it.then(|| format!("it failed first: {}", cause.cause))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use api::JobSpec;
    use api::records::{JobStatus, Placement};

    use super::*;

    #[test]
    fn a_gang_that_is_smaller_than_the_job_needs_has_no_silent_ranks() {
        let text = "name = \"a\"\nalgorithm = \"transformer\"\n[stop]\nmax_steps = 1\n\
                    [resources]\nranks = 3\n";
        let spec = JobSpec::parse(text, "job.toml", Path::new("/"), &[]).expect("a job");
        let left = Placement {
            rank: Rank(0),
            worker: "w1".parse().expect("a name"),
            started_as: None,
            local_rank: 0,
        };
        let status =
            JobStatus { generation: Generation(4), gang: vec![left], ..JobStatus::default() };
        let mut job = JobRecord { spec, status };
        assert_eq!((ranks_in(&job, Generation(4)), ranks_in(&job, Generation(3))), (1, 3));
        job.status.gang.clear();
        assert_eq!(ranks_in(&job, Generation(4)), 3);
    }

    #[tokio::test]
    async fn the_logs_of_the_newest_generations_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let uri = format!("file://{}", folder.path().display());
        let store = Store::open(&api::config::StoreSection::default(), &uri).expect("opens");
        let job: Name = "a".parse().expect("a name");
        let last = GENERATIONS_KEPT as u64 + 3;
        for generation in 1..=last {
            for rank in [0, 11] {
                for key in [keys::flight, keys::stacks] {
                    let key = key(&job, Generation(generation), Rank(rank));
                    store.put(&key, "{}".into()).await.expect("stored");
                }
            }
        }
        drop_old_flights(&store, &job).await.expect("deletes");
        for parse in [keys::parse_flight as ParseKey, keys::parse_stacks] {
            let kept = list(&store, &job, parse).await.expect("lists");
            let generations: Vec<u64> = kept.keys().map(|generation| generation.0).collect();
            assert_eq!(generations, (4..=last).collect::<Vec<_>>());
            assert!(kept.values().all(|ranks| *ranks == [Rank(0), Rank(11)]));
        }
    }

    fn task(generation: u64, rank: u32) -> TaskId {
        let workload = "a".parse().expect("a name");
        TaskId { workload, generation: Generation(generation), rank: Rank(rank) }
    }

    #[tokio::test]
    async fn answers_of_the_right_job_count_and_late_ones_do_not() {
        let questions = Arc::new(Questions::default());
        let job: Name = "a".parse().expect("a name");
        let mut question = questions.ask(&job, 3);
        let number = question.number;
        assert_ne!(number, FLIGHT_LAST);
        let log = |rank| {
            let log = FlightLog { rank: Rank(rank), ..FlightLog::default() };
            Ok(Answer::Flight(Box::new(log)))
        };
        questions.answer(number, &task(2, 0), log(0));
        let other = TaskId { workload: "b".parse().expect("a name"), ..task(2, 1) };
        questions.answer(number, &other, log(1));
        questions.answer(number + 1, &task(2, 1), log(1));
        questions.answer(number, &task(2, 2), Err("it has just been started".into()));
        let answers = question.answers(2, ANSWER_WAIT).await;
        let told: Vec<_> = answers.iter().map(|(task, log)| (task.rank.0, log.is_ok())).collect();
        assert_eq!(told, [(0, true), (2, false)]);
        drop(question);
        assert!(questions.lock().is_empty());
        questions.answer(number, &task(2, 1), log(1));
        let mut question = questions.ask(&job, 1);
        questions.answer(question.number, &task(2, 0), log(0));
        assert_eq!(question.answers(1, ANSWER_WAIT).await.len(), 1, "nothing more is waited for");
    }
}

//! Notices that this host is to be reclaimed: one file per source. Each looks again and again, for as
//! long as the worker lives; one that has trouble says so once and goes on looking. None of them can
//! end the worker.

mod aws;
mod azure;
#[cfg(test)]
mod fake;
mod file;
mod gcp;
mod metadata;
#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime};

use api::config::{NoticeSource, NoticesSection};
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{info, warn};

use self::aws::Aws;
use self::azure::Azure;
use self::file::NoticeFile;
use self::gcp::{Gcp, Item};
use self::metadata::Trouble;

/// A metadata server answers from this host's own memory; one that takes longer has trouble.
const ANSWER: Duration = Duration::from_secs(5);
/// How long an answer may be waited for where the server tells of a change by itself.
const WAIT: Duration = Duration::from_secs(60);
/// Changes that wait for the worker; a source that has more to tell waits.
const CHANGE_QUEUE: usize = 16;

/// Something that is about to happen to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Stands behind "`w2` is leaving: ".
    pub(crate) cause: String,
    /// When it happens, where that is known.
    pub(crate) deadline: Option<SystemTime>,
    pub(crate) urgency: Urgency,
    /// The Azure event that may begin once this worker has left.
    pub(crate) acknowledge: Option<String>,
}

/// What is to be done about a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// Everything here is lost then: leave.
    Leave,
    /// It may happen: nothing more should come here.
    Avoid,
}

impl Notice {
    /// Time until it happens; none once it is over.
    pub(crate) fn left(&self) -> Option<Duration> {
        let left = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default();
        self.deadline.map(left)
    }
}

/// The one to act on: who has to leave before who is only avoided, the earliest first.
fn most_urgent(notices: impl IntoIterator<Item = Notice>) -> Option<Notice> {
    let rank = |notice: &Notice| (notice.urgency, notice.deadline.is_none(), notice.deadline);
    notices.into_iter().min_by_key(rank)
}

/// "12:00:31Z".
fn clock(at: SystemTime) -> String {
    DateTime::<Utc>::from(at).format("%H:%M:%SZ").to_string()
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Between two looks.
    interval: Duration,
    /// For an answer that is there already.
    answer: Duration,
    /// For an answer that comes with a change.
    wait: Duration,
}

/// Where notices come from.
trait Source {
    fn name(&self) -> &'static str;

    /// What is announced now. May wait for a change.
    fn look(&mut self) -> impl Future<Output = Result<Option<Notice>, Trouble>> + Send;
}

/// What a source found, by its number.
type Change = (usize, Option<Notice>);

/// All sources of a worker. Their tasks end with it.
pub(crate) struct Notices {
    changes: mpsc::Receiver<Change>,
    found: Vec<Option<Notice>>,
    endpoint: String,
    pace: Pace,
    _tasks: JoinSet<()>,
}

impl Notices {
    pub(crate) fn start(section: &NoticesSection) -> Self {
        let pace = Pace { interval: section.interval.0, answer: ANSWER, wait: WAIT };
        Self::at_pace(section, pace)
    }

    fn at_pace(section: &NoticesSection, pace: Pace) -> Self {
        let (sink, changes) = mpsc::channel(CHANGE_QUEUE);
        let mut tasks = JoinSet::new();
        let mut found = Vec::new();
        let endpoint = section.endpoint.clone();
        for source in &section.sources {
            let mut next = || {
                found.push(None);
                (found.len() - 1, sink.clone())
            };
            match source {
                NoticeSource::Aws => {
                    let aws = Aws::new(&endpoint, pace, section.act_on_rebalance);
                    tasks.spawn(watch(aws, pace.interval, next()));
                }
                NoticeSource::Gcp => {
                    for item in [Item::Preempted, Item::MaintenanceEvent] {
                        let gcp = Gcp::new(&endpoint, pace, item);
                        tasks.spawn(watch(gcp, pace.interval, next()));
                    }
                }
                NoticeSource::Azure => {
                    let azure = Azure::new(&endpoint, pace);
                    tasks.spawn(watch(azure, pace.interval, next()));
                }
                NoticeSource::File => {
                    let file = NoticeFile::new(section.file.clone());
                    tasks.spawn(watch(file, pace.interval, next()));
                }
            }
        }
        Self { changes, found, endpoint, pace, _tasks: tasks }
    }

    /// The notice to act on, when it has changed; waits for ever where no source is asked.
    pub(crate) async fn changed(&mut self) -> Option<Notice> {
        let Some((source, notice)) = self.changes.recv().await else {
            return std::future::pending().await;
        };
        self.found[source] = notice;
        self.current()
    }

    fn current(&self) -> Option<Notice> {
        most_urgent(self.found.iter().flatten().cloned())
    }

    /// Tells who wants to know that this worker has left. What it was told of may begin.
    pub(crate) async fn has_left(&self) {
        let Some(event) = self.current().and_then(|notice| notice.acknowledge) else { return };
        match azure::acknowledge(&self.endpoint, self.pace, &event).await {
            Ok(()) => info!(event, "told Azure that its event may begin"),
            Err(error) => {
                warn!(event, error = %error, "Azure was not told; its event begins in time");
            }
        }
    }
}

/// Looks for as long as the worker lives.
async fn watch<S: Source>(
    mut source: S,
    interval: Duration,
    (number, sink): (usize, mpsc::Sender<Change>),
) {
    let name = source.name();
    let mut told = None;
    let mut has_trouble = false;
    loop {
        match source.look().await {
            Ok(notice) => {
                if std::mem::take(&mut has_trouble) {
                    info!(source = name, "notices can be read again");
                }
                if notice != told {
                    told.clone_from(&notice);
                    if sink.send((number, notice)).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut has_trouble, true) {
                    warn!(source = name, error = %error, "no notices can be read; it is tried again");
                }
            }
        }
        sleep(interval).await;
    }
}

//! Google Compute Engine: preemption, about 30 seconds ahead, and maintenance that ends the machine.
//!
//! Each item is asked for with `wait_for_change`, so the answer comes in the moment it changes; its
//! ETag in the next question makes sure that no change falls between two. ("About VM metadata" and
//! "Query the metadata server for maintenance event notices" in the Compute Engine documentation.)

use std::time::{Duration, SystemTime};

use super::metadata::{MetadataServer, Question, Trouble};
use super::{Notice, Pace, Source, Urgency};

const OWN: &str = "metadata.google.internal";
/// Time between the signal and the end of a spot machine.
const PREEMPTION: Duration = Duration::from_secs(30);
/// An ETag that no value has: the first answer comes at once.
const NO_ETAG: &str = "0";

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Preempted,
    MaintenanceEvent,
}

impl Item {
    fn key(self) -> &'static str {
        match self {
            Self::Preempted => "preempted",
            Self::MaintenanceEvent => "maintenance-event",
        }
    }

    /// What a value means.
    fn notice(self, value: &str, now: SystemTime) -> Result<Option<Notice>, Trouble> {
        let (cause, deadline) = match (self, value) {
            (Self::Preempted, "TRUE") => ("GCP preempts it", Some(now + PREEMPTION)),
            (Self::Preempted, "FALSE") | (Self::MaintenanceEvent, "NONE") => return Ok(None),
            // It moves with all that runs on it, and hardly stops.
            (Self::MaintenanceEvent, "MIGRATE_ON_HOST_MAINTENANCE") => return Ok(None),
            (Self::MaintenanceEvent, "TERMINATE_ON_HOST_MAINTENANCE") => {
                ("GCP ends it for maintenance of its host", None)
            }
            (Self::Preempted, _) => {
                return Err(Trouble::garbage(self.key(), value, "TRUE or FALSE"));
            }
            (Self::MaintenanceEvent, _) => {
                let expected = "NONE, MIGRATE_ON_HOST_MAINTENANCE or TERMINATE_ON_HOST_MAINTENANCE";
                return Err(Trouble::garbage(self.key(), value, expected));
            }
        };
        let cause = cause.to_owned();
        Ok(Some(Notice { cause, deadline, urgency: Urgency::Leave, acknowledge: None }))
    }
}

/// One item of the source "gcp".
pub(crate) struct Gcp {
    server: MetadataServer,
    pace: Pace,
    item: Item,
    etag: String,
    /// What the item said last.
    value: String,
    notice: Option<Notice>,
}

impl Gcp {
    pub(crate) fn new(endpoint: &str, pace: Pace, item: Item) -> Self {
        let server = MetadataServer::new(endpoint, OWN);
        let (etag, value) = (NO_ETAG.to_owned(), String::new());
        Self { server, pace, item, etag, value, notice: None }
    }
}

impl Source for Gcp {
    fn name(&self) -> &'static str {
        "gcp"
    }

    async fn look(&mut self) -> Result<Option<Notice>, Trouble> {
        let path = format!(
            "/computeMetadata/v1/instance/{}?wait_for_change=true&timeout_sec={}&last_etag={}",
            self.item.key(),
            self.pace.wait.as_secs().max(1),
            self.etag
        );
        let limit = self.pace.wait + self.pace.answer;
        let headers = [("Metadata-Flavor", "Google")];
        let answer = self.server.ask(Question::get(&path, &headers, limit)).await?;
        if answer.status != 200 {
            self.etag = NO_ETAG.to_owned();
            return Err(Trouble::status(self.item.key(), &answer, "200"));
        }
        // Without one the next question would wait for a change that this answer may have missed.
        let is_tag = |tag: &String| tag.bytes().all(|b| b.is_ascii_alphanumeric());
        self.etag = answer.etag.filter(is_tag).unwrap_or_else(|| NO_ETAG.to_owned());
        if answer.body != self.value {
            // The time of a preemption counts from the first word of it.
            let notice = self.item.notice(&answer.body, SystemTime::now());
            self.notice = notice.inspect_err(|_| self.etag = NO_ETAG.to_owned())?;
            self.value = answer.body;
        }
        Ok(self.notice.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_values_mean() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let preempted = Item::Preempted.notice("TRUE", now).expect("known").expect("a notice");
        assert_eq!(preempted.deadline, Some(now + Duration::from_secs(30)));
        let ends = Item::MaintenanceEvent.notice("TERMINATE_ON_HOST_MAINTENANCE", now);
        let ends = ends.expect("known").expect("a notice");
        assert_eq!((ends.deadline, ends.urgency), (None, Urgency::Leave));
        for (item, value) in [
            (Item::Preempted, "FALSE"),
            (Item::MaintenanceEvent, "NONE"),
            (Item::MaintenanceEvent, "MIGRATE_ON_HOST_MAINTENANCE"),
        ] {
            assert_eq!(item.notice(value, now).expect("known"), None, "{value}");
        }
        for item in [Item::Preempted, Item::MaintenanceEvent] {
            let trouble = item.notice("<html>", now).expect_err("garbage").to_string();
            assert!(trouble.contains("answers `<html>`, expected"), "{trouble}");
        }
    }
}

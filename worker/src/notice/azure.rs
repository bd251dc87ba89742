//! Azure: scheduled events, 30 seconds ahead for a spot eviction, 5 to 15 minutes for others.
//!
//! The events of a whole availability or scale set are told to each of its machines, so this one first
//! asks for its own name. An event that concerns no other machine is acknowledged once the worker has
//! left, and then comes at once; acknowledging would start it for all machines that it names. ("Scheduled
//! Events for Linux VMs" in the Azure documentation.)

use std::time::{Duration, SystemTime};

use chrono::DateTime;
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::metadata::{MetadataServer, Question, Trouble};
use super::{Notice, Pace, Source, Urgency, clock};

const OWN: &str = "169.254.169.254";
const EVENTS_PATH: &str = "/metadata/scheduledevents?api-version=2020-07-01";
const NAME_PATH: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
const HEADERS: [(&str, &str); 1] = [("Metadata", "true")];
/// The first question turns scheduled events on, which "may take up to two minutes".
const FIRST_ANSWER: Duration = Duration::from_secs(130);

/// The source "azure".
pub(crate) struct Azure {
    server: MetadataServer,
    pace: Pace,
    /// This machine, as events name it.
    name: Option<String>,
    /// Whether scheduled events are on.
    is_on: bool,
}

impl Azure {
    pub(crate) fn new(endpoint: &str, pace: Pace) -> Self {
        Self { server: MetadataServer::new(endpoint, OWN), pace, name: None, is_on: false }
    }

    async fn get(&self, path: &str, limit: Duration) -> Result<String, Trouble> {
        let answer = self.server.ask(Question::get(path, &HEADERS, limit)).await?;
        match answer.status {
            200 => Ok(answer.body),
            _ => Err(Trouble::status(path, &answer, "200")),
        }
    }
}

impl Source for Azure {
    fn name(&self) -> &'static str {
        "azure"
    }

    async fn look(&mut self) -> Result<Option<Notice>, Trouble> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => machine_name(self.get(NAME_PATH, self.pace.answer).await?)?,
        };
        self.name = Some(name.clone());
        let limit = if self.is_on { self.pace.answer } else { FIRST_ANSWER };
        let events = self.get(EVENTS_PATH, limit).await?;
        self.is_on = true;
        notice(&events, &name)
    }
}

/// A name that is none would never be found in an event.
fn machine_name(text: String) -> Result<String, Trouble> {
    let is_legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    match !text.is_empty() && text.bytes().all(is_legal) {
        true => Ok(text),
        false => Err(Trouble::garbage(NAME_PATH, &text, "the name of this machine")),
    }
}

/// Says that an event may begin: this worker has left.
pub(crate) async fn acknowledge(endpoint: &str, pace: Pace, event: &str) -> Result<(), Trouble> {
    let question = Question {
        method: Method::POST,
        path: EVENTS_PATH,
        headers: &HEADERS,
        body: json!({ "StartRequests": [{ "EventId": event }] }).to_string(),
        limit: pace.answer,
    };
    let answer = MetadataServer::new(endpoint, OWN).ask(question).await?;
    match answer.status {
        200..300 => Ok(()),
        _ => Err(Trouble::status(EVENTS_PATH, &answer, "200")),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    events: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Event {
    event_id: String,
    event_type: String,
    event_status: String,
    #[serde(default)]
    resources: Vec<String>,
    /// Empty once it has started.
    #[serde(default)]
    not_before: String,
}

/// The most urgent of the events that concern this machine.
fn notice(body: &str, name: &str) -> Result<Option<Notice>, Trouble> {
    let expected = r#"{"Events": [{"EventId", "EventType", "EventStatus", "NotBefore", …}]}"#;
    let garbage = || Trouble::garbage(EVENTS_PATH, body, expected);
    let document: Document = serde_json::from_str(body).map_err(|_| garbage())?;
    // What is wrong with another machine's event must not hide ours.
    let is_mine = |event: &Value| {
        let resources = event["Resources"].as_array();
        resources.is_some_and(|all| all.iter().any(|resource| resource == name))
    };
    let mine = document.events.into_iter().filter(is_mine);
    let mine: Vec<Event> = mine
        .map(|event| serde_json::from_value(event).map_err(|_| garbage()))
        .collect::<Result<_, _>>()?;
    let is_ahead = |event: &&Event| matches!(&*event.event_status, "Scheduled" | "Started");
    let notices: Option<Vec<Notice>> = mine.iter().filter(is_ahead).map(Event::notice).collect();
    Ok(super::most_urgent(notices.ok_or_else(garbage)?))
}

impl Event {
    /// `None` when its time is not one.
    fn notice(&self) -> Option<Notice> {
        let at: Option<SystemTime> = match self.not_before.as_str() {
            "" => None,
            text => Some(DateTime::parse_from_rfc2822(text).ok()?.into()),
        };
        let (does, urgency) = match self.event_type.as_str() {
            "Preempt" => ("evicts it".to_owned(), Urgency::Leave),
            "Terminate" => ("deletes it".to_owned(), Urgency::Leave),
            "Reboot" => ("reboots it".to_owned(), Urgency::Leave),
            "Redeploy" => ("moves it to another host".to_owned(), Urgency::Leave),
            // Seconds: ranks outlast it, or it costs a restart like any other failure.
            "Freeze" => ("pauses it for some seconds".to_owned(), Urgency::Avoid),
            other => (format!("has announced `{other}`"), Urgency::Avoid),
        };
        let when = at.map_or_else(|| " now".to_owned(), |at| format!(" at {}", clock(at)));
        let is_alone = self.resources.len() == 1 && urgency == Urgency::Leave;
        Some(Notice {
            cause: format!("Azure {does}{when}"),
            deadline: at,
            urgency,
            acknowledge: is_alone.then(|| self.event_id.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, kind: &str, resources: &str, not_before: &str) -> String {
        format!(
            r#"{{"EventId": "{id}", "EventType": "{kind}", "ResourceType": "VirtualMachine",
            "Resources": {resources}, "EventStatus": "Scheduled", "NotBefore": "{not_before}",
            "Description": "", "EventSource": "Platform", "DurationInSeconds": -1}}"#
        )
    }

    fn read(events: &[String]) -> Result<Option<Notice>, Trouble> {
        let events = events.join(",");
        notice(&format!(r#"{{"DocumentIncarnation": 1, "Events": [{events}]}}"#), "vm_1")
    }

    const AT: &str = "Mon, 19 Sep 2016 18:29:47 GMT";

    #[test]
    fn only_events_of_this_machine_count_and_the_most_urgent_first() {
        assert_eq!(read(&[]).expect("read"), None);
        assert_eq!(read(&[event("a", "Preempt", r#"["vm_2"]"#, AT)]).expect("read"), None);
        // Another machine's, whatever it looks like.
        let odd = r#"{"EventId": 7, "Resources": ["vm_2"]}"#.to_owned();
        let found = read(&[odd, event("e", "Reboot", r#"["vm_1"]"#, AT)]).expect("read");
        assert_eq!(found.and_then(|notice| notice.acknowledge).as_deref(), Some("e"));
        let freeze = event("b", "Freeze", r#"["vm_1"]"#, AT);
        let found = read(std::slice::from_ref(&freeze)).expect("read").expect("a notice");
        assert_eq!(found.cause, "Azure pauses it for some seconds at 18:29:47Z");
        assert_eq!((found.urgency, found.acknowledge), (Urgency::Avoid, None));
        let later = event("c", "Reboot", r#"["vm_1"]"#, "Mon, 19 Sep 2016 19:00:00 GMT");
        let preempt = event("d", "Preempt", r#"["vm_1"]"#, AT);
        let found = read(&[freeze, later, preempt]).expect("read").expect("a notice");
        assert_eq!(found.cause, "Azure evicts it at 18:29:47Z");
        assert_eq!(found.acknowledge.as_deref(), Some("d"));
    }

    #[test]
    fn what_concerns_others_too_is_not_acknowledged() {
        let both = event("a", "Redeploy", r#"["vm_1", "vm_2"]"#, "");
        let found = read(&[both]).expect("read").expect("a notice");
        assert_eq!(found.cause, "Azure moves it to another host now");
        assert_eq!((found.deadline, found.acknowledge), (None, None));
    }

    #[test]
    fn garbage_is_no_event() {
        for body in ["", "<html>", "{}", r#"{"Events": 1}"#] {
            let trouble = notice(body, "vm_1").expect_err("garbage").to_string();
            assert!(trouble.contains("expected {\"Events\""), "{trouble}");
        }
        read(&[event("a", "Reboot", r#"["vm_1"]"#, "soon")]).expect_err("no time");
        read(&[r#"{"EventId": 7, "Resources": ["vm_1"]}"#.to_owned()]).expect_err("no event");
    }
}

//! The sources against servers that speak the real protocols, in every mood.

use std::path::PathBuf;

use api::units::Span;

use super::fake::{Fake, Mood, azure_event};
use super::*;

/// Quick, because some of these tests wait for time-outs to pass.
const PACE: Pace = Pace {
    interval: Duration::from_millis(10),
    answer: Duration::from_millis(200),
    wait: Duration::from_secs(60),
};
const ACTION: &str = r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#;
const REBALANCE: &str = r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#;
const TOKEN: &str = "PUT /latest/api/token";
const ASKED: &str = "GET /latest/meta-data/spot/instance-action";
const PREEMPTED: &str = "GET /computeMetadata/v1/instance/preempted";
const EVENTS: &str = "GET /metadata/scheduledevents";

fn section(fake: &Fake, source: NoticeSource) -> NoticesSection {
    NoticesSection {
        sources: vec![source],
        file: PathBuf::new(),
        endpoint: fake.endpoint.clone(),
        interval: Span::millis(10),
        act_on_rebalance: false,
    }
}

async fn next(notices: &mut Notices) -> Option<Notice> {
    let changed = tokio::time::timeout(Duration::from_secs(60), notices.changed()).await;
    changed.expect("a notice")
}

async fn cause(notices: &mut Notices) -> String {
    next(notices).await.expect("a notice").cause
}

#[tokio::test]
async fn aws_asks_with_a_token_and_for_another_when_it_expires() {
    let mut fake = Fake::start().await;
    let mut notices = Notices::at_pace(&section(&fake, NoticeSource::Aws), PACE);
    fake.asked(TOKEN).await;
    for _ in 0..3 {
        fake.asked(ASKED).await;
    }
    // The token is refused: a new one, and the same question again.
    fake.tell(|told| told.token = 1);
    fake.asked(TOKEN).await;
    fake.asked(ASKED).await;
    fake.tell(|told| (told.token, told.action) = (2, Some(ACTION.into())));
    assert_eq!(cause(&mut notices).await, "AWS reclaims it at 08:22:00Z");
}

#[tokio::test]
async fn a_recommendation_to_rebalance_is_followed_as_configured() {
    for (act_on_rebalance, urgency) in [(false, Urgency::Avoid), (true, Urgency::Leave)] {
        let fake = Fake::start().await;
        fake.tell(|told| told.rebalance = Some(REBALANCE.into()));
        let section = NoticesSection { act_on_rebalance, ..section(&fake, NoticeSource::Aws) };
        let mut notices = Notices::at_pace(&section, PACE);
        let notice = next(&mut notices).await.expect("a notice");
        assert_eq!((notice.urgency, notice.deadline), (urgency, None));
        // The interruption itself matters more.
        fake.tell(|told| told.action = Some(ACTION.into()));
        let notice = next(&mut notices).await.expect("a notice");
        assert_eq!((notice.urgency, notice.deadline.is_some()), (Urgency::Leave, true));
    }
}

#[tokio::test]
async fn gcp_tells_of_a_preemption_the_moment_it_comes() {
    let mut fake = Fake::start().await;
    let mut notices = Notices::at_pace(&section(&fake, NoticeSource::Gcp), PACE);
    let first = fake.asked(PREEMPTED).await;
    assert!(first.contains("wait_for_change=true&timeout_sec=60&last_etag=0"), "{first}");
    // It knows the value and waits for another: without the change it would be asked for an hour.
    let second = fake.asked(PREEMPTED).await;
    assert!(!second.contains("last_etag=0"), "{second}");
    fake.tell(|told| told.preempted = true);
    let notice = next(&mut notices).await.expect("a notice");
    assert_eq!((notice.cause.as_str(), notice.urgency), ("GCP preempts it", Urgency::Leave));
    assert!(notice.left() <= Some(Duration::from_secs(30)), "{notice:?}");
}

#[tokio::test]
async fn gcp_tells_of_maintenance_that_ends_the_machine() {
    let fake = Fake::start().await;
    fake.tell(|told| told.maintenance = Some("MIGRATE_ON_HOST_MAINTENANCE".into()));
    let mut notices = Notices::at_pace(&section(&fake, NoticeSource::Gcp), PACE);
    fake.tell(|told| told.maintenance = Some("TERMINATE_ON_HOST_MAINTENANCE".into()));
    assert_eq!(cause(&mut notices).await, "GCP ends it for maintenance of its host");
}

#[tokio::test]
async fn azure_tells_of_its_events_and_that_they_are_over() {
    let mut fake = Fake::start().await;
    let mut notices = Notices::at_pace(&section(&fake, NoticeSource::Azure), PACE);
    fake.asked(EVENTS).await;
    let at = "Mon, 19 Sep 2016 18:29:47 GMT";
    fake.tell(|told| told.events = azure_event("e0", "Preempt", r#"["vm_2"]"#, at));
    fake.asked(EVENTS).await;
    fake.tell(|told| told.events = azure_event("e1", "Freeze", r#"["vm_1"]"#, at));
    let notice = next(&mut notices).await.expect("a notice");
    assert_eq!(notice.urgency, Urgency::Avoid);
    fake.tell(|told| told.events = String::new());
    assert_eq!(next(&mut notices).await, None, "it is over");
    fake.tell(|told| told.events = azure_event("e2", "Preempt", r#"["vm_1"]"#, at));
    assert_eq!(cause(&mut notices).await, "Azure evicts it at 18:29:47Z");
    notices.has_left().await;
    let posted = fake.asked("POST /metadata/scheduledevents").await;
    assert!(posted.contains(r#"{"StartRequests":[{"EventId":"e2"}]}"#), "{posted}");
}

#[tokio::test]
async fn a_server_in_trouble_is_asked_again_and_believed_when_it_is_well() {
    for source in [NoticeSource::Aws, NoticeSource::Gcp, NoticeSource::Azure] {
        let asked = match source {
            NoticeSource::Aws => "PUT /latest",
            NoticeSource::Gcp => "GET /computeMetadata",
            _ => "GET /metadata",
        };
        // A server that hangs from the first is given more time than this test has.
        for mood in [Mood::Garbage, Mood::Broken] {
            // One of its own for each: no question of the former is taken for one of this.
            let mut fake = Fake::start().await;
            fake.tell(|told| told.mood = mood);
            let mut notices = Notices::at_pace(&section(&fake, source), PACE);
            for _ in 0..3 {
                fake.asked(asked).await;
            }
            fake.tell(|told| {
                told.mood = Mood::Normal;
                told.action = Some(ACTION.into());
                told.preempted = true;
                told.events = azure_event("e", "Preempt", r#"["vm_1"]"#, "");
            });
            next(&mut notices).await.expect("a notice");
        }
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_given_up_and_asked_again() {
    let mut fake = Fake::start().await;
    fake.tell(|told| told.mood = Mood::Hangs);
    let mut notices = Notices::at_pace(&section(&fake, NoticeSource::Aws), PACE);
    for _ in 0..3 {
        fake.asked(TOKEN).await;
    }
    fake.tell(|told| (told.mood, told.action) = (Mood::Normal, Some(ACTION.into())));
    assert_eq!(cause(&mut notices).await, "AWS reclaims it at 08:22:00Z");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_looked_for_until_it_is() {
    let fake = Fake::start().await;
    let section = section(&fake, NoticeSource::Aws);
    drop(fake);
    let mut aws = Aws::new(&section.endpoint, PACE, false);
    let trouble = aws.look().await.expect_err("nobody is there").to_string();
    assert!(trouble.contains("cannot reach 127.0.0.1:"), "{trouble}");
}

#[test]
fn who_must_leave_comes_before_who_is_avoided_and_the_earliest_first() {
    let notice = |cause: &str, seconds: Option<u64>, urgency| Notice {
        cause: cause.into(),
        deadline: seconds.map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s)),
        urgency,
        acknowledge: None,
    };
    let all = [
        notice("avoid", Some(1), Urgency::Avoid),
        notice("some time", None, Urgency::Leave),
        notice("late", Some(9), Urgency::Leave),
        notice("soon", Some(5), Urgency::Leave),
    ];
    assert_eq!(most_urgent(all).map(|n| n.cause).as_deref(), Some("soon"));
    assert_eq!(most_urgent([]), None);
}

//! Amazon EC2: spot interruptions, two minutes ahead at best, and recommendations to rebalance.
//!
//! Instance metadata version 2: a token first, then the two items, each 404 while there is nothing to
//! tell. ("Spot Instance interruption notices" and "EC2 instance rebalance recommendations" in the EC2
//! user guide.)

use chrono::DateTime;
use hyper::Method;
use serde::Deserialize;

use super::metadata::{Answer, MetadataServer, Question, Trouble};
use super::{Notice, Pace, Source, Urgency, clock};

const OWN: &str = "169.254.169.254";
const TOKEN_PATH: &str = "/latest/api/token";
const ACTION_PATH: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE_PATH: &str = "/latest/meta-data/events/recommendations/rebalance";
/// The longest that AWS grants; one that ends sooner is answered 401 and replaced.
const TOKEN_SECONDS: &str = "21600";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

/// The source "aws".
pub(crate) struct Aws {
    server: MetadataServer,
    pace: Pace,
    act_on_rebalance: bool,
    token: Option<String>,
}

impl Aws {
    pub(crate) fn new(endpoint: &str, pace: Pace, act_on_rebalance: bool) -> Self {
        Self { server: MetadataServer::new(endpoint, OWN), pace, act_on_rebalance, token: None }
    }

    /// An item; `None` when it is not there.
    async fn item(&mut self, path: &'static str) -> Result<Option<String>, Trouble> {
        let mut answer = self.ask(path).await?;
        if answer.status == 401 {
            self.token = None;
            answer = self.ask(path).await?;
        }
        match answer.status {
            200 => Ok(Some(answer.body)),
            404 => Ok(None),
            _ => Err(Trouble::status(path, &answer, "200, or 404 for nothing")),
        }
    }

    async fn ask(&mut self, path: &str) -> Result<Answer, Trouble> {
        let token = match self.token.take() {
            Some(token) => token,
            None => self.new_token().await?,
        };
        let headers = [(TOKEN_HEADER, token.as_str())];
        let answer = self.server.ask(Question::get(path, &headers, self.pace.answer)).await;
        self.token = Some(token);
        answer
    }

    async fn new_token(&self) -> Result<String, Trouble> {
        let answer = self.server.ask(Question {
            method: Method::PUT,
            path: TOKEN_PATH,
            headers: &[("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS)],
            body: String::new(),
            limit: self.pace.answer,
        });
        let answer = answer.await?;
        if answer.status != 200 {
            return Err(Trouble::status(TOKEN_PATH, &answer, "200 and a token"));
        }
        let is_token = !answer.body.is_empty() && answer.body.bytes().all(|b| b.is_ascii_graphic());
        if !is_token {
            return Err(Trouble::garbage(TOKEN_PATH, &answer.body, "a token"));
        }
        Ok(answer.body)
    }
}

impl Source for Aws {
    fn name(&self) -> &'static str {
        "aws"
    }

    async fn look(&mut self) -> Result<Option<Notice>, Trouble> {
        if let Some(body) = self.item(ACTION_PATH).await? {
            return interruption(&body).map(Some);
        }
        let recommendation = self.item(REBALANCE_PATH).await?;
        let urgency = if self.act_on_rebalance { Urgency::Leave } else { Urgency::Avoid };
        recommendation.map(|body| rebalance(&body, urgency)).transpose()
    }
}

#[derive(Deserialize)]
struct InstanceAction {
    action: String,
    time: String,
}

/// `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`.
fn interruption(body: &str) -> Result<Notice, Trouble> {
    let garbage = || {
        let expected = r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#;
        Trouble::garbage(ACTION_PATH, body, expected)
    };
    let found: InstanceAction = serde_json::from_str(body).map_err(|_| garbage())?;
    let at = DateTime::parse_from_rfc3339(&found.time).map_err(|_| garbage())?.into();
    let does = match found.action.as_str() {
        "stop" => "stops",
        "hibernate" => "hibernates",
        _ => "reclaims",
    };
    let cause = format!("AWS {does} it at {}", clock(at));
    Ok(Notice { cause, deadline: Some(at), urgency: Urgency::Leave, acknowledge: None })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rebalance {
    notice_time: String,
}

/// `{"noticeTime": "2020-10-27T08:22:00Z"}`: when it was given, not when anything happens.
fn rebalance(body: &str, urgency: Urgency) -> Result<Notice, Trouble> {
    let garbage = || {
        let expected = r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#;
        Trouble::garbage(REBALANCE_PATH, body, expected)
    };
    let found: Rebalance = serde_json::from_str(body).map_err(|_| garbage())?;
    let at = DateTime::parse_from_rfc3339(&found.notice_time).map_err(|_| garbage())?.into();
    let cause = format!("AWS recommends since {} to rebalance", clock(at));
    Ok(Notice { cause, deadline: None, urgency, acknowledge: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interruptions_say_what_happens_and_when() {
        for (action, expected) in [
            ("terminate", "AWS reclaims it at 08:22:00Z"),
            ("stop", "AWS stops it at 08:22:00Z"),
            ("hibernate", "AWS hibernates it at 08:22:00Z"),
        ] {
            let body = format!(r#"{{"action": "{action}", "time": "2017-09-18T08:22:00Z"}}"#);
            let notice = interruption(&body).expect("a notice");
            assert_eq!(notice.cause, expected);
            let at = notice.deadline.expect("a time").duration_since(std::time::UNIX_EPOCH);
            assert_eq!(at.expect("after 1970").as_secs(), 1_505_722_920);
        }
        for garbage in ["", "[]", r#"{"action": "stop"}"#, r#"{"action":"stop","time":"soon"}"#] {
            let trouble = interruption(garbage).expect_err("garbage").to_string();
            assert!(trouble.contains("expected {\"action\""), "{trouble}");
        }
    }

    #[test]
    fn a_recommendation_has_no_deadline() {
        let body = r#"{"noticeTime": "2020-10-27T08:22:00Z"}"#;
        let notice = rebalance(body, Urgency::Avoid).expect("a notice");
        assert_eq!(notice.cause, "AWS recommends since 08:22:00Z to rebalance");
        assert_eq!((notice.deadline, notice.urgency), (None, Urgency::Avoid));
        rebalance("{}", Urgency::Avoid).expect_err("garbage");
    }
}

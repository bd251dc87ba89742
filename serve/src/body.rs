//! Reads the bodies of invocations within a budget of bytes that all of them share.
//!
//! A body's share is taken before its first byte is read and given back when its job is done, so
//! that what waits is bounded in bytes, not only in number. It parses nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The budget is counted in units of this many bytes: a semaphore gives out at most 2^32 permits at
/// once, and the smallest body still costs something.
const UNIT_BYTES: u64 = 1 << 10;
/// What any body gets to arrive, however small it is.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes a second below which a sender is too slow: its share of the budget is needed by others. A
/// body of the default 8 MiB gets 74 seconds.
const BODY_RATE_MIN: u64 = 128 << 10;

/// A whole body and its share of the budget.
#[derive(Debug)]
pub struct HeldBody {
    /// The body.
    pub bytes: Vec<u8>,
    /// Its share; drop it when nothing of the body is held any more.
    pub share: OwnedSemaphorePermit,
}

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// Larger than any body may be.
    #[error("the body is larger than {max} bytes (serve.body_max)")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// The others hold the whole budget.
    #[error("the bodies of waiting requests fill serve.queue_bytes: try again in a moment")]
    NoRoom,
    /// It did not arrive in time.
    #[error("the body did not arrive within {} seconds", .0.as_secs())]
    TooSlow(Duration),
    /// The connection broke or sent nonsense.
    #[error("the body cannot be read: {0}")]
    Broken(String),
}

impl Unread {
    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoRoom => StatusCode::SERVICE_UNAVAILABLE,
            Self::TooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Broken(_) => StatusCode::BAD_REQUEST,
        }
    }
}

/// The budget that all bodies share.
#[derive(Debug)]
pub struct Intake {
    budget: Arc<Semaphore>,
    budget_units: u32,
    body_max: u64,
    patience: Duration,
}

impl Intake {
    /// Bodies of at most `body_max` bytes, together at most `queue_bytes`. A larger body than the
    /// whole budget takes all of it.
    pub fn new(body_max: u64, queue_bytes: u64) -> Self {
        let budget_units = units(queue_bytes);
        let budget = Arc::new(Semaphore::new(budget_units as usize));
        Self { budget, budget_units, body_max, patience: BODY_PATIENCE }
    }

    /// Bytes held now, in whole units.
    pub fn held_bytes(&self) -> u64 {
        (u64::from(self.budget_units) - self.budget.available_permits() as u64) * UNIT_BYTES
    }

    /// Reads a body. One of unknown length takes the share of the largest until it has arrived.
    pub async fn read(&self, headers: &HeaderMap, body: Body) -> Result<HeldBody, Unread> {
        let length = body.size_hint().exact();
        let expected = length.unwrap_or(self.body_max);
        let patience = self.patience + Duration::from_secs(expected / BODY_RATE_MIN);
        let refusal = match self.share(expected) {
            Ok(mut share) => {
                let read = read_all(body, self.body_max, length.unwrap_or(0));
                let bytes = match tokio::time::timeout(patience, read).await {
                    Ok(read) => read?,
                    Err(_) => return Err(Unread::TooSlow(patience)),
                };
                let needed = units(bytes.len() as u64) as usize;
                drop(share.split(share.num_permits().saturating_sub(needed)));
                return Ok(HeldBody { bytes, share });
            }
            Err(refusal) => refusal,
        };
        // A caller that sends without asking first would see a reset connection instead of the
        // answer if its body were left unread; nothing of it is kept.
        if !headers.contains_key(header::EXPECT) {
            let _ = tokio::time::timeout(patience, discard(body, self.body_max)).await;
        }
        Err(refusal)
    }

    fn share(&self, bytes: u64) -> Result<OwnedSemaphorePermit, Unread> {
        if bytes > self.body_max {
            return Err(Unread::TooLarge { max: self.body_max });
        }
        let share = units(bytes).min(self.budget_units);
        Arc::clone(&self.budget).try_acquire_many_owned(share).map_err(|_| Unread::NoRoom)
    }
}

/// Units that hold so many bytes, at least one.
fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).max(1)
}

async fn read_all(body: Body, max: u64, capacity: u64) -> Result<Vec<u8>, Unread> {
    let mut bytes = Vec::with_capacity(capacity as usize);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|e| Unread::Broken(e.to_string()))?;
        if (bytes.len() + chunk.len()) as u64 > max {
            return Err(Unread::TooLarge { max });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn discard(body: Body, max: u64) {
    let mut left = max;
    let mut chunks = body.into_data_stream();
    while let Some(Ok(chunk)) = chunks.next().await
        && left > chunk.len() as u64
    {
        left -= chunk.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use futures::stream;

    use super::*;

    fn chunked(bytes: usize) -> Body {
        let chunk = Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; bytes]));
        Body::from_stream(stream::iter([chunk]))
    }

    #[tokio::test]
    async fn bodies_share_one_budget() {
        let intake = Intake::new(4096, 10 << 10);
        let headers = HeaderMap::new();
        let first = intake.read(&headers, Body::from(vec![0; 4096])).await.expect("room");
        assert_eq!((first.bytes.len(), intake.held_bytes()), (4096, 4096));
        let second = intake.read(&headers, chunked(100)).await.expect("room");
        assert_eq!(intake.held_bytes(), 5120, "what it did not need is given back");
        let third = intake.read(&headers, Body::from(vec![0; 4095])).await.expect("room");
        let refused = intake.read(&headers, chunked(1)).await.expect_err("could be 4096 bytes");
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        let small = intake.read(&headers, Body::from("x")).await.expect("room for a small one");
        drop((first, second, third, small));
        assert_eq!(intake.held_bytes(), 0);
        for body in [Body::from(vec![0; 4097]), chunked(4097)] {
            let refused = intake.read(&headers, body).await.expect_err("too large");
            assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE);
        }
        assert_eq!(intake.held_bytes(), 0);
    }

    #[tokio::test]
    async fn a_sender_that_stops_loses_its_share() {
        let intake = Intake { patience: Duration::from_millis(20), ..Intake::new(4096, 4096) };
        let begun = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"{"))]);
        let body = Body::from_stream(begun.chain(stream::pending()));
        let refused = intake.read(&HeaderMap::new(), body).await.expect_err("never complete");
        assert_eq!(refused.status(), StatusCode::REQUEST_TIMEOUT);
        assert_eq!(intake.held_bytes(), 0);
    }
}

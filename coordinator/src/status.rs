//! How a coordinator says no: refusals and losses as gRPC statuses, in one voice.

use api::connect::LEADER_KEY;
use coordinator_core::Refusal;
use std::net::SocketAddr;
use tonic::Status;

/// The leader stopped leading while a request or stream was with it. Asking again is right.
pub(crate) fn leadership_lost() -> Status {
    Status::unavailable("this coordinator no longer leads: ask again, another one answers")
}

/// A refusal that the core decided on; `taken` when it is about a name that is taken.
pub(crate) fn refused(refusal: Refusal, taken: bool) -> Status {
    match refusal {
        Refusal::NotFound(text) => Status::not_found(text),
        Refusal::Conflict(text) if taken => Status::already_exists(text),
        Refusal::Conflict(text) => Status::failed_precondition(text),
        Refusal::Invalid(text) => Status::invalid_argument(text),
    }
}

/// A worker asked a coordinator that does not lead.
pub(crate) fn not_leading(leader: Option<SocketAddr>) -> Status {
    let mut status = Status::failed_precondition(match leader {
        Some(address) => format!("this coordinator does not lead, `{address}` does"),
        None => "this coordinator does not lead and knows of no leader yet: ask again".to_owned(),
    });
    if let Some(address) = leader
        && let Ok(value) = address.to_string().parse()
    {
        status.metadata_mut().insert(LEADER_KEY, value);
    }
    status
}

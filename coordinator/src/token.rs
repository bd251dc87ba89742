//! Who may talk to a coordinator: callers that show the cluster token. Not encryption: that is TLS.
//!
//! The token is compared in constant time and appears in no message.

use std::hint::black_box;
use std::sync::Arc;

use api::Secret;
use api::connect::TOKEN_KEY;
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Refuses every call without the cluster token.
#[derive(Clone)]
pub(crate) struct TokenCheck {
    token: Arc<Secret>,
}

impl TokenCheck {
    /// Callers must show `token`.
    pub(crate) fn new(token: Secret) -> Self {
        Self { token: Arc::new(token) }
    }

    /// Whether `shown` is the cluster token.
    pub(crate) fn accepts(&self, shown: &[u8]) -> bool {
        // Revealed for the comparison only.
        equal_in_constant_time(self.token.reveal().as_bytes(), shown)
    }
}

impl Interceptor for TokenCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let shown = request.metadata().get(TOKEN_KEY);
        match shown {
            Some(shown) if self.accepts(shown.as_bytes()) => Ok(request),
            Some(_) => Err(refused("the cluster token that was shown is not this cluster's")),
            None => Err(refused("no cluster token was shown")),
        }
    }
}

/// What a caller with a wrong token is told.
pub(crate) fn refused(what: &str) -> Status {
    Status::unauthenticated(format!(
        "{what}: `cluster.token_file` must name a copy of the coordinator's token file"
    ))
}

/// Takes as long for a wrong guess as for a right one of the same length.
fn equal_in_constant_time(expected: &[u8], shown: &[u8]) -> bool {
    if expected.len() != shown.len() {
        return false;
    }
    let difference = expected.iter().zip(shown).fold(0_u8, |sum, (a, b)| black_box(sum | (a ^ b)));
    difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_token_passes_and_no_refusal_shows_it() {
        let mut check = TokenCheck::new(Secret::new("correct-horse"));
        for (shown, passes) in [
            ("correct-horse", true),
            ("correct-hors", false),
            ("Correct-horse", false),
            ("", false),
        ] {
            assert_eq!(check.accepts(shown.as_bytes()), passes, "{shown:?}");
        }
        let refusal = check.call(Request::new(())).expect_err("no token");
        assert_eq!(refusal.code(), tonic::Code::Unauthenticated);
        assert!(refusal.message().contains("cluster.token_file"), "{refusal}");
        assert!(!format!("{refusal:?}").contains("correct-horse"));
    }
}

//! The secrets that the ranks of one generation prove to one another.
//!
//! They live in the leader's memory only: never in a record, the raft log or a log line. A new
//! leader does not know its predecessor's; it hands out a new generation where it must start ranks.

use std::collections::BTreeMap;

use api::{Generation, Name, Secret};

use crate::random::{RandomError, SECRET_BYTES, random_hex};

/// One secret per (job, generation), drawn at first use.
#[derive(Default)]
pub(crate) struct GangSecrets {
    drawn: BTreeMap<(Name, Generation), Secret>,
}

impl GangSecrets {
    /// The gang's secret.
    pub(crate) fn of(&mut self, job: &Name, generation: Generation) -> Result<Secret, RandomError> {
        let key = (job.clone(), generation);
        if let Some(secret) = self.drawn.get(&key) {
            return Ok(secret.clone());
        }
        let secret = Secret::new(random_hex::<SECRET_BYTES>()?);
        self.drawn.insert(key, secret.clone());
        Ok(secret)
    }

    /// Forgets the secret of this generation and of every older one of the same job, so that the
    /// map does not outgrow the jobs that run.
    pub(crate) fn forget(&mut self, job: &Name, generation: Generation) {
        self.drawn.retain(|(owner, drawn), _| owner != job || *drawn > generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_keeps_its_secret_until_it_is_forgotten() {
        let mut secrets = GangSecrets::default();
        let job: Name = "a".parse().expect("a name");
        let first = secrets.of(&job, Generation(1)).expect("random");
        assert!(first == secrets.of(&job, Generation(1)).expect("random"));
        let second = secrets.of(&job, Generation(2)).expect("random");
        assert!(first != second);
        secrets.forget(&job, Generation(1));
        assert!(second == secrets.of(&job, Generation(2)).expect("random"));
        assert!(first != secrets.of(&job, Generation(1)).expect("random"));
    }
}

//! A job's rank-time on the slots of each market, and what it cost.
//!
//! A worker announces its prices when it attaches. What the slots of the present gang cost is kept
//! in the job's record, because a new leader has to account for workers that it has yet to hear of,
//! or never will.

use std::collections::BTreeMap;

use api::ids::Name;
use api::price::SlotRate;
use api::records::JobStatus;

use super::Leader;

/// Adds the time of every rank of the gang to what the job used.
pub(super) fn charge(status: &mut JobStatus, elapsed_ms: u64) {
    for place in &status.gang {
        let rate = status.rates.get(&place.worker).copied().unwrap_or_default();
        status.cost.charge(&rate, elapsed_ms);
    }
}

impl Leader {
    /// Puts down what the slots of the present gang cost, in place of those of the former one.
    pub(super) fn rate_gang(&self, status: &mut JobStatus) {
        let former = std::mem::take(&mut status.rates);
        let rate = |name: &Name| {
            let known = self.workers.get(name).map(|worker| worker.rate());
            known.or_else(|| former.get(name).copied()).unwrap_or_default()
        };
        let rates: BTreeMap<Name, SlotRate> =
            status.gang.iter().map(|place| (place.worker.clone(), rate(&place.worker))).collect();
        status.rates = rates;
    }
}

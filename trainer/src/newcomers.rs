//! The state on its way to ranks that have just joined, behind the first step of their generation.
//!
//! The ranks that hold the state compute that step among themselves, while the thread of collectives
//! sends its buffers, each holder its part. A newcomer brings nothing to the step's sums and gets
//! them: once it has the state as well, it applies the step like all others, and owns lanes from the
//! next step on. What a holder lends to the transfer comes back however that ends; what a newcomer
//! receives is a state only when all of it has come.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::{Rank, Step};
use collective::{CollectiveError, Communicator, Queue, Work};

use crate::held::{Held, Progress};
use crate::recovery::{Offer, Origin, parts};
use crate::state::TrainState;

/// Who waits for the state, and who sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joining {
    /// Steps applied to it.
    pub step: Step,
    /// Who holds it, in rank order; never empty.
    pub holders: Vec<Rank>,
    /// Who holds nothing, in rank order; never empty.
    pub newcomers: Vec<Rank>,
}

impl Joining {
    /// Who joins behind the step, if anybody may. A pure decision over what is the same on every
    /// rank. The state is shared at once where it is small, where the step is the last or something
    /// else that needs it is due first, and where a receiver holds an older one, which it got by
    /// computing beside the others and not by joining them.
    pub fn of(origin: &Origin, offers: &[Offer], held: &Held, progress: &Progress) -> Option<Self> {
        let Origin::Members { step, holders, receivers } = origin else { return None };
        let is_new = |rank: &Rank| offers.get(rank.0 as usize).is_some_and(Option::is_none);
        let is_worth_it = held.state_bytes() > held.spec.recovery.join_behind_above.0;
        let is_free = step.0 < held.last_step
            && !held.checkpoint_is_due(*step)
            && !held.evaluation_is_due(*step, progress);
        let joins = !receivers.is_empty() && receivers.iter().all(is_new);
        (joins && is_worth_it && is_free).then(|| Self {
            step: *step,
            holders: holders.clone(),
            newcomers: receivers.clone(),
        })
    }

    /// Whether a rank waits for the state.
    pub fn is_newcomer(&self, rank: Rank) -> bool {
        self.newcomers.contains(&rank)
    }
}

/// A transfer under way.
pub struct Transfer {
    joining: Joining,
    is_newcomer: bool,
    /// What is lent to it, or received into; locked while the call runs.
    state: Arc<Mutex<Option<TrainState>>>,
    work: Work<()>,
}

impl Transfer {
    /// Begins to send `state`, or to receive into it.
    pub fn begin(queue: &Queue, joining: Joining, own: Rank, state: TrainState) -> Self {
        let state = Arc::new(Mutex::new(Some(state)));
        let (for_call, holders) = (Arc::clone(&state), joining.holders.clone());
        let work = queue.submit(move |communicator| {
            match &mut *for_call.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(state) => send_parts(state, communicator, &holders),
                None => Ok(()),
            }
        });
        Self { is_newcomer: joining.is_newcomer(own), joining, state, work }
    }

    /// Between whom.
    pub fn joining(&self) -> &Joining {
        &self.joining
    }

    /// Waits for its end, after which `held` is the state as far as this rank has it: what a holder
    /// lent in any case, for nothing has changed it; what a newcomer received if all of it came. How
    /// long the transfer ran.
    pub fn end(self, held: &mut Option<TrainState>) -> Result<Duration, CollectiveError> {
        let ended = self.work.wait();
        if ended.is_ok() || !self.is_newcomer {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(state) = state.take() {
                *held = Some(TrainState { step: self.joining.step, ..state });
            }
        }
        ended.map(|((), ran)| ran)
    }
}

/// Every holder sends its part of every buffer to all.
pub fn send_parts(
    state: &mut TrainState,
    communicator: &mut dyn Communicator,
    holders: &[Rank],
) -> Result<(), CollectiveError> {
    for buffer in [&mut state.values, &mut state.optimizer.m, &mut state.optimizer.v] {
        for (holder, range) in parts(buffer.len(), holders) {
            communicator.broadcast((&mut buffer[range]).into(), holder)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

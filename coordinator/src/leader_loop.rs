//! Leads whenever raft says so: opens a term of office, feeds it inputs and time, closes it.
//!
//! Strictly serial: while one input is decided and committed, the others wait in their order.

use std::sync::Arc;
use std::time::Duration;

use api::NodeId;
use checkpoint::Store;
use coordinator_core::LeaderOptions;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::flight::FlightDesk;
use crate::leadership::{INPUTS_MAX, LeaderInput, Leadership};
use crate::raft_node::RaftHandle;
use crate::sweep::Sweeper;
use crate::term::{Term, TermEnded, TermOptions};
use crate::watch::Feeds;

/// How often the leader looks at leases and waiting work.
const TICK: Duration = Duration::from_millis(200);
/// Pause before leading again: whatever ended the last term has time to show in raft's status.
const REST: Duration = Duration::from_millis(50);

/// The part of a coordinator that leads.
pub(crate) struct LeaderLoop {
    pub(crate) options: LeaderOptions,
    pub(crate) node: NodeId,
    pub(crate) raft: RaftHandle,
    pub(crate) store: Store,
    pub(crate) sweeper: Sweeper,
    pub(crate) desk: Arc<FlightDesk>,
    pub(crate) leaderships: watch::Sender<Option<Leadership>>,
}

impl LeaderLoop {
    /// Runs until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut terms: u64 = 0;
        let mut status = self.raft.watch_status();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                leads = status.wait_for(|status| status.is_leader) => {
                    if leads.is_err() {
                        return;
                    }
                }
            }
            terms += 1;
            let term = status.borrow_and_update().term;
            info!(node = %self.node, term, "leading");
            let ended = self.lead(format!("{}-{term}-{terms}", self.node), &shutdown).await;
            match ended {
                None => return,
                Some(why @ TermEnded::NotLeader) => info!(node = %self.node, %why, "led"),
                Some(why) => error!(node = %self.node, %why, "gave up the lead, beginning anew"),
            }
            tokio::time::sleep(REST).await;
        }
    }

    /// One term; `None` at shutdown.
    async fn lead(&self, office: String, shutdown: &CancellationToken) -> Option<TermEnded> {
        let (inputs, mut queue) = mpsc::channel(INPUTS_MAX);
        let over = CancellationToken::new();
        let feeds = Arc::new(Feeds::default());
        let mut term = Term::begin(TermOptions {
            leader: self.options.clone(),
            node: self.node,
            raft: self.raft.clone(),
            store: self.store.clone(),
            sweeper: self.sweeper.clone(),
            feeds: Arc::clone(&feeds),
            inputs: inputs.downgrade(),
            desk: Arc::clone(&self.desk),
            over: over.clone(),
            office,
        });
        let leadership = Leadership { inputs, feeds, over: over.clone() };
        self.leaderships.send_replace(Some(leadership));
        let ended = tokio::select! {
            biased;
            // Even in the middle of a commit: to the others it is as if this process had died.
            () = shutdown.cancelled() => None,
            ended = serve_term(&mut term, &mut queue) => Some(ended),
        };
        // First no new callers, then those who wait: their answers and sessions end with the term.
        self.leaderships.send_replace(None);
        over.cancel();
        ended
    }
}

/// Feeds the term until it ends.
async fn serve_term(term: &mut Term, queue: &mut mpsc::Receiver<LeaderInput>) -> TermEnded {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let acted = tokio::select! {
            biased;
            ended = term.lost() => return ended,
            _ = ticks.tick() => {
                if queue.is_empty() {
                    term.reads();
                }
                term.tick().await
            }
            Some(input) = queue.recv() => {
                term.reads();
                term.act(input).await
            }
        };
        if let Err(ended) = acted {
            return ended;
        }
    }
}

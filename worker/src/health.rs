//! A check of this host on the leader's order: whether a rank could run here.
//!
//! Three probes at the same time: the data folder, the loopback of the data plane, and a self-test of
//! memory, arithmetic and devices in a process of its own, so that a broken device cannot take the
//! worker down. What hangs is named like what fails; a probe that still hangs is not begun again
//! beside itself.

mod folder;
mod loopback;
mod self_test;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::health::CHECK_TIMEOUT;
use api::session::WorkerMessage;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};

use self::folder::FolderProbe;
use self::loopback::LoopbackProbe;
use crate::ledger::Ledger;

/// One thing that a rank needs of its host.
trait Probe: Send + Sync + 'static {
    /// Stands before what it found, such as "the data folder".
    fn name(&self) -> &'static str;

    /// Looks; blocks for as long as that takes.
    ///
    /// # Errors
    /// What is wrong, in words.
    fn look(&self) -> Result<(), String>;
}

/// A probe and whether it is looking now.
struct Slot {
    probe: Arc<dyn Probe>,
    is_busy: Arc<AtomicBool>,
}

/// The checks of one host.
pub(crate) struct HostCheck {
    slots: Vec<Slot>,
    program: PathBuf,
    limit: Duration,
}

impl HostCheck {
    /// Checks of the host with this data folder, address for ranks and `cluster` binary.
    pub(crate) fn new(folder: PathBuf, address: IpAddr, program: PathBuf) -> Self {
        let probes: [Arc<dyn Probe>; 2] =
            [Arc::new(FolderProbe::new(folder)), Arc::new(LoopbackProbe::new(address))];
        let slots = probes.map(|probe| Slot { probe, is_busy: Arc::default() });
        Self { slots: slots.into(), program, limit: CHECK_TIMEOUT }
    }

    /// What is wrong with the host, a text each; nothing: it is fit. Within [`CHECK_TIMEOUT`].
    pub(crate) async fn run(&self) -> Vec<String> {
        let looks = futures::future::join_all(self.slots.iter().map(|slot| slot.run(self.limit)));
        let (looks, own) = tokio::join!(looks, self_test::run(&self.program, self.limit));
        let found =
            looks.into_iter().chain([own.map_err(|found| format!("the self-test: {found}"))]);
        found.filter_map(Result::err).collect()
    }
}

/// The check that the leader asked for last.
pub(crate) struct Checks {
    check: Arc<HostCheck>,
    ledger: Arc<Ledger>,
    /// Whom a check under way is to answer: the order that came last.
    asked: Arc<Mutex<Option<u64>>>,
    running: Option<JoinHandle<()>>,
}

impl Checks {
    pub(crate) fn new(check: HostCheck, ledger: Arc<Ledger>) -> Self {
        Self { check: Arc::new(check), ledger, asked: Arc::default(), running: None }
    }

    /// Begins a check, unless one is under way: then that one answers this order, too.
    pub(crate) fn begin(&mut self, request: u64, reason: &str) {
        if lock(&self.asked).replace(request).is_some() {
            return;
        }
        info!(reason, "the host is checked");
        self.ledger.set_unhealthy(Some(format!("its check was not done: {reason}")));
        let (check, ledger) = (Arc::clone(&self.check), Arc::clone(&self.ledger));
        let asked = Arc::clone(&self.asked);
        self.running = Some(tokio::spawn(async move {
            let failed = check.run().await;
            let words = (!failed.is_empty()).then(|| failed.join("; "));
            match &words {
                Some(failed) => warn!(failed, "the host failed its check: it gets no ranks"),
                None => info!("the host passed its check"),
            }
            ledger.set_unhealthy(words.map(|failed| format!("it failed its last check: {failed}")));
            if let Some(request) = lock(&asked).take() {
                ledger.answer(&WorkerMessage::Checked { request, failed });
            }
        }));
    }
}

fn lock(asked: &Mutex<Option<u64>>) -> MutexGuard<'_, Option<u64>> {
    // Nothing can panic while it is held.
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Checks {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
        }
    }
}

impl Slot {
    /// On a thread of its own: a disk that hangs must hold up neither the runtime nor its end.
    async fn run(&self, limit: Duration) -> Result<(), String> {
        let name = self.probe.name();
        if self.is_busy.swap(true, Ordering::AcqRel) {
            return Err(format!("{name}: the check before still hangs in it"));
        }
        let (sender, answer) = oneshot::channel();
        let (probe, is_busy) = (Arc::clone(&self.probe), Arc::clone(&self.is_busy));
        let looks = move || {
            let found = probe.look();
            is_busy.store(false, Ordering::Release);
            // Nobody waits any more when it took too long.
            let _ = sender.send(found);
        };
        if let Err(error) = std::thread::Builder::new().name("health".into()).spawn(looks) {
            self.is_busy.store(false, Ordering::Release);
            return Err(format!("{name}: cannot start a thread: {error}"));
        }
        match timeout(limit, answer).await {
            Ok(Ok(found)) => found.map_err(|found| format!("{name}: {found}")),
            Ok(Err(_)) => Err(format!("{name}: its check broke off")),
            Err(_) => Err(format!("{name}: no answer within {} s", limit.as_secs())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// Hangs until it is told to go on.
    struct Hanging(Mutex<Receiver<()>>);

    impl Probe for Hanging {
        fn name(&self) -> &'static str {
            "the disk"
        }

        fn look(&self) -> Result<(), String> {
            self.0.lock().expect("whole").recv().map_err(|error| error.to_string())
        }
    }

    #[tokio::test]
    async fn what_hangs_is_named_and_not_begun_twice() {
        let (go_on, wait) = channel();
        let probe: Arc<dyn Probe> = Arc::new(Hanging(Mutex::new(wait)));
        let slot = Slot { probe, is_busy: Arc::default() };
        let limit = Duration::from_millis(20);
        assert_eq!(slot.run(limit).await, Err("the disk: no answer within 0 s".into()));
        let again = slot.run(limit).await;
        assert_eq!(again, Err("the disk: the check before still hangs in it".into()));
        go_on.send(()).expect("it waits");
        while slot.is_busy.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        go_on.send(()).expect("it will wait");
        assert_eq!(slot.run(Duration::from_secs(60)).await, Ok(()));
    }
}

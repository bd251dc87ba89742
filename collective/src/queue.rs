//! Asynchronous calls: a thread that owns the turns of a communicator, and handles to what it does.
//!
//! Calls run one after another in the order in which they were submitted, so that order is the one
//! thing all ranks must share. A call takes its buffers with it and its handle gives them back: none
//! can be touched while it is reduced, and nothing is copied for it.

use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::communicator::Communicator;
use crate::error::CollectiveError;

/// Calls that may wait: more than a step has buckets; one more blocks who submits it.
const CALLS_MAX: usize = 1024;

type Task = Box<dyn FnOnce(&mut dyn Communicator) + Send>;

/// A communicator whose calls run behind the caller.
///
/// In a world of one there is nothing to wait for: calls run at once, on the caller's thread.
pub struct Queue {
    state: Arc<State>,
    sender: Option<SyncSender<Task>>,
    thread: Option<JoinHandle<()>>,
}

struct State {
    communicator: Mutex<Box<dyn Communicator>>,
    /// Calls submitted and not over.
    open: Mutex<usize>,
    idle: Condvar,
}

/// A call under way.
pub struct Work<R> {
    result: Receiver<(Result<R, CollectiveError>, Duration)>,
}

/// The communicator itself, while no call is under way.
pub struct Turn<'a>(MutexGuard<'a, Box<dyn Communicator>>);

impl Queue {
    /// Takes a communicator over.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(communicator: Box<dyn Communicator>) -> Result<Self, CollectiveError> {
        let alone = communicator.world_size() == 1;
        let state = Arc::new(State {
            communicator: Mutex::new(communicator),
            open: Mutex::new(0),
            idle: Condvar::new(),
        });
        if alone {
            return Ok(Self { state, sender: None, thread: None });
        }
        let (sender, receiver) = sync_channel::<Task>(CALLS_MAX);
        let for_thread = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("collective".to_owned())
            .spawn(move || {
                for task in receiver {
                    task(lock(&for_thread.communicator).as_mut());
                    let mut open = lock(&for_thread.open);
                    *open -= 1;
                    if *open == 0 {
                        for_thread.idle.notify_all();
                    }
                }
            })
            .map_err(|error| CollectiveError::socket("start a thread for collectives", error))?;
        Ok(Self { state, sender: Some(sender), thread: Some(thread) })
    }

    /// Begins a call; what it returns, its buffers among it, comes from the handle.
    pub fn submit<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut dyn Communicator) -> Result<R, CollectiveError> + Send + 'static,
    ) -> Work<R> {
        let (result, receiver) = channel();
        let task: Task = Box::new(move |communicator| {
            let begin = Instant::now();
            let found = call(communicator);
            // Nobody listens where the handle was dropped: the call has run all the same.
            let _ = result.send((found, begin.elapsed()));
        });
        match &self.sender {
            None => task(lock(&self.state.communicator).as_mut()),
            Some(sender) => {
                *lock(&self.state.open) += 1;
                // The thread ends only with this value.
                let _ = sender.send(task);
            }
        }
        Work { result: receiver }
    }

    /// The communicator for blocking calls, once all that was submitted is over.
    pub fn turn(&self) -> Turn<'_> {
        let mut open = lock(&self.state.open);
        while *open > 0 {
            open = self.state.idle.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(lock(&self.state.communicator))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        drop(self.sender.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed; its handles have failed.
            let _ = thread.join();
        }
    }
}

impl<R> Work<R> {
    /// Waits for the call's end: its result, and for how long it ran.
    ///
    /// # Errors
    /// The call's own.
    pub fn wait(self) -> Result<(R, Duration), CollectiveError> {
        let (result, time) = self.result.recv().map_err(|_| ended())?;
        Ok((result?, time))
    }

    /// The result if the call is over, else the handle again.
    ///
    /// # Errors
    /// The call's own.
    pub fn try_wait(self) -> Result<Result<(R, Duration), Self>, CollectiveError> {
        match self.result.try_recv() {
            Ok((result, time)) => Ok(Ok((result?, time))),
            Err(TryRecvError::Empty) => Ok(Err(self)),
            Err(TryRecvError::Disconnected) => Err(ended()),
        }
    }
}

fn ended() -> CollectiveError {
    CollectiveError::Aborted {
        reason: "the thread of this rank's collectives has ended".to_owned(),
    }
}

impl Deref for Turn<'_> {
    type Target = dyn Communicator;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

impl DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.0.as_mut()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

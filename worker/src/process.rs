//! One rank's process: started in its own group with a socket pair as standard input, its end seen
//! before it is reaped, its group killed without ever hitting a reused number.
//!
//! All ranks are forked by one thread that lives as long as the worker: a rank asks the kernel to
//! be killed when its parent *thread* ends (`PR_SET_PDEATHSIG`), so a pool's thread must not fork.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

/// Starts that may wait in line for the forking thread, a millisecond or so each; more wait for
/// room in the line.
const START_QUEUE: usize = 64;

/// What to start.
pub(crate) struct Launch {
    pub(crate) program: PathBuf,
    /// `rank` or `replica`; nothing else is ever in argv.
    pub(crate) role: &'static str,
    pub(crate) environment: BTreeMap<&'static str, String>,
    /// Taken out of the inherited environment.
    pub(crate) without: &'static [&'static str],
}

/// A process that has just been started.
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) guard: KillOnDrop,
    pub(crate) control: UnixStream,
    pub(crate) stdout: ChildStdout,
    pub(crate) stderr: ChildStderr,
    /// How it ended; its group's other members have been killed by then.
    pub(crate) ended: oneshot::Receiver<ExitStatus>,
}

type Request = (Launch, oneshot::Sender<io::Result<Started>>);

/// The forking thread's handle; the thread ends when the last clone is gone.
#[derive(Clone)]
pub(crate) struct Spawner {
    requests: mpsc::Sender<Request>,
}

impl Spawner {
    pub(crate) fn start() -> io::Result<Self> {
        let (requests, mut inbox) = mpsc::channel::<Request>(START_QUEUE);
        std::thread::Builder::new().name("worker-spawn".into()).spawn(move || {
            while let Some((launch, reply)) = inbox.blocking_recv() {
                // Where the caller went away, dropping what was started kills it.
                drop(reply.send(start(&launch)));
            }
        })?;
        Ok(Self { requests })
    }

    pub(crate) async fn spawn(&self, launch: Launch) -> io::Result<Started> {
        let (reply, started) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts processes has ended");
        self.requests.send((launch, reply)).await.map_err(|_| gone())?;
        started.await.map_err(|_| gone())?
    }
}

fn start(launch: &Launch) -> io::Result<Started> {
    let (control, theirs) = UnixStream::pair()?;
    control.set_nonblocking(true)?;
    let mut command = Command::new(&launch.program);
    command
        .arg(launch.role)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    for name in launch.without {
        command.env_remove(name);
    }
    let mut child = command.envs(&launch.environment).spawn().map_err(|error| {
        io::Error::new(error.kind(), format!("{}: {error}", launch.program.display()))
    })?;
    // Our copy of the rank's end; were it open, we would never see the end of its file.
    drop(command);
    let pipes = child.stdout.take().zip(child.stderr.take());
    let (stdout, stderr) = pipes.ok_or_else(|| io::Error::other("the child has no pipes"))?;
    let pid = child.id();
    let group = Group::new(pid);
    let (sender, ended) = oneshot::channel();
    let waited = group.clone();
    std::thread::Builder::new()
        .name(format!("wait-{pid}"))
        .spawn(move || {
            // Nobody asks any more when the task was given up; reaping it was the point.
            let _ = sender.send(waited.wait(child));
        })
        .inspect_err(|_| group.kill())?;
    Ok(Started { pid, guard: KillOnDrop(group), control, stdout, stderr, ended })
}

/// A rank's process group.
#[derive(Clone)]
pub(crate) struct Group {
    /// None once reaped: from then on the number may belong to someone else.
    pid: Arc<Mutex<Option<Pid>>>,
}

impl Group {
    fn new(pid: u32) -> Self {
        let pid = i32::try_from(pid).ok().map(Pid::from_raw);
        Self { pid: Arc::new(Mutex::new(pid)) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Pid>> {
        self.pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SIGKILL to all members, unless the rank is gone already.
    pub(crate) fn kill(&self) {
        kill_group(&self.lock());
    }

    /// Waits for the rank's end, then kills what remains of its group while the rank, not yet
    /// reaped, still holds the group's number.
    fn wait(&self, mut child: Child) -> ExitStatus {
        let pid = *self.lock();
        if let Some(pid) = pid {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            while waitid(Id::Pid(pid), flags) == Err(Errno::EINTR) {}
        }
        let mut held = self.lock();
        kill_group(&held);
        let status = child.wait();
        *held = None;
        status.unwrap_or_else(|error| {
            // Someone else reaped our child; it is gone, how is not known.
            warn!(?pid, %error, "the exit status of a rank is lost");
            ExitStatus::from_raw(Signal::SIGKILL as i32)
        })
    }
}

fn kill_group(pid: &Option<Pid>) {
    if let Some(pid) = pid {
        match killpg(*pid, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => warn!(%pid, %errno, "cannot kill a rank's process group"),
        }
    }
}

/// Kills the group when dropped: a task that is abandoned half-way leaves no process behind.
pub(crate) struct KillOnDrop(pub(crate) Group);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill();
    }
}

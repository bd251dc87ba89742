//! What the kernel says of the threads of a process: all that is left to ask when the process itself
//! cannot answer, and what stands beside its stacks when it can.

use std::fs;
use std::io;
use std::path::Path;

use api::stacks::{THREADS_MAX, ThreadStack, UNINTERRUPTIBLE};

/// Length of a tick of the kernel's accounts, in milliseconds: USER_HZ is 100 on every architecture that
/// Linux supports today.
const TICK_MS: u64 = 10;

/// System calls in which threads wait, by their number on this architecture.
const WAITING_CALLS: [(i64, &str); 27] = [
    (libc::SYS_read, "read"),
    (libc::SYS_pread64, "pread64"),
    (libc::SYS_readv, "readv"),
    (libc::SYS_write, "write"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_futex, "futex"),
    (libc::SYS_ppoll, "ppoll"),
    (libc::SYS_pselect6, "pselect6"),
    (libc::SYS_epoll_pwait, "epoll_pwait"),
    (libc::SYS_nanosleep, "nanosleep"),
    (libc::SYS_clock_nanosleep, "clock_nanosleep"),
    (libc::SYS_recvfrom, "recvfrom"),
    (libc::SYS_recvmsg, "recvmsg"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_accept4, "accept4"),
    (libc::SYS_wait4, "wait4"),
    (libc::SYS_waitid, "waitid"),
    (libc::SYS_flock, "flock"),
    (libc::SYS_ioctl, "ioctl"),
    (libc::SYS_madvise, "madvise"),
    (libc::SYS_sched_yield, "sched_yield"),
];
/// The same of an architecture that has them besides the newer ones.
#[cfg(target_arch = "x86_64")]
const OLDER_CALLS: [(i64, &str); 3] =
    [(libc::SYS_poll, "poll"), (libc::SYS_select, "select"), (libc::SYS_epoll_wait, "epoll_wait")];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_CALLS: [(i64, &str); 0] = [];

/// The threads of a process, the main one first. One that ends meanwhile is left out.
///
/// # Errors
/// Where the process is gone.
pub(crate) fn threads(pid: u32) -> io::Result<Vec<ThreadStack>> {
    let folder = format!("/proc/{pid}/task");
    let mut ids: Vec<u32> = fs::read_dir(&folder)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort_unstable_by_key(|id| (*id != pid, *id));
    let folder = Path::new(&folder);
    let thread = |id: u32| thread(id, &folder.join(id.to_string()));
    Ok(ids.into_iter().filter_map(thread).take(THREADS_MAX).collect())
}

fn thread(id: u32, folder: &Path) -> Option<ThreadStack> {
    let read = |name: &str| fs::read_to_string(folder.join(name));
    let stat = read("stat").ok()?;
    // The command in parentheses may hold anything, so fields are counted from its last one.
    let (before, after) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    // Fields 14 and 15 of the file, of which the third is the first here.
    let ticks = [11, 12].map(|index| fields.get(index).and_then(|field| field.parse::<u64>().ok()));
    let ticks: u64 = ticks.into_iter().flatten().sum();
    let waits_in = read("wchan").ok().filter(|function| !matches!(function.trim(), "" | "0"));
    Some(ThreadStack {
        id,
        name: name.to_owned(),
        state: state(fields.first()?).to_owned(),
        cpu_ms: ticks.saturating_mul(TICK_MS),
        // Another user's, or hidden by the kernel's settings: the rest is told all the same.
        system_call: read("syscall").ok().and_then(|text| system_call(&text)),
        waits_in: waits_in.map(|function| function.trim().to_owned()),
        frames: Vec::new(),
    })
}

fn state(letter: &str) -> &'static str {
    match letter {
        "R" => "running",
        "S" => "sleeping",
        "D" => UNINTERRUPTIBLE,
        "T" => "stopped by a signal",
        "t" => "stopped by a debugger",
        "Z" | "X" => "ended",
        _ => "in a state of which nothing is known",
    }
}

/// The call in a line of /proc/PID/task/TID/syscall: its number comes first; "running" and -1 are none.
fn system_call(line: &str) -> Option<String> {
    let number: i64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    if number < 0 {
        return None;
    }
    let mut known = WAITING_CALLS.iter().chain(&OLDER_CALLS);
    let name = known.find(|(known, _)| *known == number).map(|(_, name)| (*name).to_owned());
    Some(name.unwrap_or_else(|| format!("system call {number}")))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_thread_is_found_by_its_name_and_what_it_waits_in() {
        let (release, waits) = channel::<()>();
        let (tell, told) = channel();
        let waiting = std::thread::Builder::new().name("a (b) thread".into()).spawn(move || {
            tell.send(()).expect("heard");
            waits.recv().expect_err("released");
        });
        told.recv().expect("it runs");
        let own = std::process::id();
        // It is on its way into its wait.
        let found = loop {
            let all = threads(own).expect("it lives");
            assert_eq!(all[0].id, own, "the main thread comes first");
            let found = all.into_iter().find(|thread| thread.name == "a (b) thread");
            let found = found.expect("it runs");
            if found.state == "sleeping" && found.system_call.as_deref() != Some("sched_yield") {
                break found;
            }
            std::thread::yield_now();
        };
        // Some containers hide the calls of threads.
        assert!(found.system_call.is_none_or(|call| call == "futex"));
        drop(release);
        waiting.expect("it started").join().expect("no panic");
    }

    #[test]
    fn calls_are_named_or_numbered() {
        for (line, expected) in [
            (format!("{} 0x7 0x1", libc::SYS_futex), Some("futex")),
            ("99999 0x0".into(), Some("system call 99999")),
            ("-1 0x7ffd 0x7f".into(), None),
            ("running".into(), None),
            (String::new(), None),
        ] {
            assert_eq!(system_call(&line).as_deref(), expected, "{line}");
        }
    }
}

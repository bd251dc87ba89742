//! Groups of several ranks as threads over real loopback sockets: results, failures, hostile peers.

mod algorithms;
mod connections;
mod failures;
mod hostile;
mod moves;
mod queue;
mod results;
mod scripts;

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use api::{Generation, Rank, Secret};

use crate::{
    CollectiveError, GroupOptions, Listener, ProcessGroup, Reduction, TcpOptions, Transport,
};

/// Far beyond what any test needs on a loaded machine; a test that reaches it hangs.
pub(crate) const HANG: Duration = Duration::from_secs(120);
/// What "at once" may take on a loaded machine.
const QUICK: Duration = Duration::from_secs(20);

thread_local! {
    /// What groups of this test use.
    pub(crate) static TRANSPORT: Cell<Transport> = const { Cell::new(Transport::Tcp) };
    static REDUCTION: Cell<Reduction> = const { Cell::new(Reduction::Deterministic) };
    static TCP: RefCell<TcpOptions> = RefCell::default();
    /// The host of each rank, as far as it is not this one's.
    static HOSTS: Cell<&'static str> = const { Cell::new("") };
}

/// Runs tests of this folder once more over shared memory.
macro_rules! also_over_shared_memory {
    ($($test:ident),* $(,)?) => {
        mod shared_memory {
            $(
                #[test]
                fn $test() {
                    crate::tests::TRANSPORT.set(crate::Transport::Shared);
                    super::$test();
                }
            )*
        }
    };
}
use also_over_shared_memory;

/// Runs tests of this folder once more over memory and sockets together: on hosts of one and of
/// several ranks, equally many and not.
macro_rules! also_over_several_hosts {
    ($($test:ident),* $(,)?) => {
        mod several_hosts {
            $(
                #[test]
                fn $test() {
                    for hosts in ["aabbccddeeffgghh", "abbbbccccddddddd", "aaabbbccdddddddd"] {
                        crate::tests::TRANSPORT.set(crate::Transport::Auto);
                        crate::tests::HOSTS.set(hosts);
                        super::$test();
                    }
                }
            )*
        }
    };
}
use also_over_several_hosts;

/// Runs tests once more over each of the two, and some over memory alone.
macro_rules! also_over_memory_and_hosts {
    ($($test:ident),* $(,)?) => {
        super::also_over_memory_and_hosts!($($test),*; only memory:);
    };
    ($($test:ident),* $(,)?; only memory: $($alone:ident),* $(,)?) => {
        super::also_over_shared_memory!($($test,)* $($alone,)*);
        super::also_over_several_hosts!($($test),*);
    };
}
use also_over_memory_and_hosts;

fn options(rank: u32, world_size: u32) -> GroupOptions {
    GroupOptions {
        job: "digits".parse().unwrap(),
        group: "world".to_owned(),
        generation: Generation(3),
        rank: Rank(rank),
        world_size,
        secret: Secret::new("correct horse battery staple"),
        connect_timeout: HANG,
        reduction: REDUCTION.get(),
        transport: TRANSPORT.get(),
        host: HOSTS.get().get(rank as usize..=rank as usize).map(str::to_owned),
    }
}

fn listeners(world: u32) -> (Vec<Listener>, Vec<SocketAddr>) {
    let bind = |_| {
        let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        listener.with_tcp(TCP.with_borrow(Clone::clone))
    };
    let listeners: Vec<Listener> = (0..world).map(bind).collect();
    let peers = listeners.iter().map(Listener::address).collect();
    (listeners, peers)
}

/// Runs one thread per rank; the results by rank.
fn in_parallel<R: Send + 'static>(
    world: u32,
    body: impl Fn(u32, Listener, Vec<SocketAddr>) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let (listeners, peers) = listeners(world);
    let (sender, receiver) = mpsc::channel();
    for (rank, listener) in listeners.into_iter().enumerate() {
        let (body, sender, peers) = (body.clone(), sender.clone(), peers.clone());
        let (transport, reduction, hosts) = (TRANSPORT.get(), REDUCTION.get(), HOSTS.get());
        let tcp = TCP.with_borrow(Clone::clone);
        thread::spawn(move || {
            TRANSPORT.set(transport);
            REDUCTION.set(reduction);
            HOSTS.set(hosts);
            TCP.set(tcp);
            let result = body(rank as u32, listener, peers);
            // The receiver is gone only if the test has failed.
            let _ = sender.send((rank, result));
        });
    }
    drop(sender);
    let mut results: Vec<Option<R>> = (0..world).map(|_| None).collect();
    for _ in 0..world {
        match receiver.recv_timeout(HANG) {
            Ok((rank, result)) => results[rank] = Some(result),
            Err(error) => {
                let missing: Vec<usize> =
                    (0..results.len()).filter(|rank| results[*rank].is_none()).collect();
                panic!("ranks {missing:?} hang or panicked: {error}");
            }
        }
    }
    results.into_iter().flatten().collect()
}

/// Forms a group and runs one thread per rank; the results by rank.
pub(crate) fn group<R: Send + 'static>(
    world: u32,
    body: impl Fn(u32, &mut ProcessGroup) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let formed = Arc::new(Barrier::new(world as usize));
    in_parallel(world, move |rank, listener, peers| {
        let mut communicator = listener.connect(options(rank, world), &peers).unwrap();
        // A rank that fails in its first call must not fail those that are still forming.
        formed.wait();
        body(rank, &mut communicator)
    })
}

/// The error that a test expects.
fn error<R: std::fmt::Debug>(result: Result<R, CollectiveError>) -> CollectiveError {
    result.expect_err("the call fails")
}

const POWERS: [f64; 13] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6];

/// A small seeded generator (splitmix64, Steele et al. 2014): the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Magnitudes from 1e-6 to 1e6, so that another order of a sum gives other bits.
    fn float(&mut self) -> f64 {
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        (unit - 0.5) * POWERS[self.below(13) as usize]
    }
}

//! Ranks as threads, each with a CPU group beside its NCCL group.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use api::{Generation, Rank, Secret};
use collective::nccl::{Device, Libraries, NcclGroup, NcclOptions};
use collective::{GroupOptions, Listener, ProcessGroup, Reduction, Transport};

/// Far beyond what any test needs on a loaded machine; a test that reaches it hangs.
pub const HANG: Duration = Duration::from_secs(120);

pub fn options(group: &str) -> NcclOptions {
    NcclOptions {
        group: group.to_owned(),
        connect_timeout: HANG,
        max_ctas: Some(4),
        shrinkable: false,
    }
}

/// Runs one thread per rank, each with a CPU group; the results by rank.
pub fn ranks<R: Send + 'static>(
    world: u32,
    body: impl Fn(u32, ProcessGroup) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let bind = |_| Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let listeners: Vec<Listener> = (0..world).map(bind).collect();
    let peers: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
    let (sender, receiver) = mpsc::channel();
    for (rank, listener) in (0..world).zip(listeners) {
        let (body, sender, peers) = (body.clone(), sender.clone(), peers.clone());
        thread::spawn(move || {
            let options = GroupOptions {
                job: "digits".parse().unwrap(),
                group: "control".to_owned(),
                generation: Generation(3),
                rank: Rank(rank),
                world_size: world,
                secret: Secret::new("correct horse battery staple"),
                connect_timeout: HANG,
                reduction: Reduction::Deterministic,
                transport: Transport::Tcp,
                host: None,
            };
            let control = listener.connect(options, &peers).unwrap();
            // The receiver is gone only if the test has failed.
            let _ = sender.send((rank, body(rank, control)));
        });
    }
    drop(sender);
    let mut results: Vec<Option<R>> = (0..world).map(|_| None).collect();
    for _ in 0..world {
        let (rank, result) = receiver.recv_timeout(HANG).expect("a rank hangs or panicked");
        results[rank as usize] = Some(result);
    }
    results.into_iter().flatten().collect()
}

/// The same with an NCCL group; `gpus` is how many GPUs the ranks are spread over.
pub fn groups<R: Send + 'static>(
    libraries: &Libraries,
    (world, gpus): (u32, u32),
    options: &NcclOptions,
    body: impl Fn(NcclGroup, &mut ProcessGroup) -> R + Clone + Send + 'static,
) -> Vec<R> {
    let (libraries, options) = (libraries.clone(), options.clone());
    ranks(world, move |rank, mut control| {
        let device = Device::new(&libraries, rank % gpus);
        let group = NcclGroup::connect(device, options.clone(), &mut control).unwrap();
        body(group, &mut control)
    })
}

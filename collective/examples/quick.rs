//! Throwaway timing.
#![allow(missing_docs, clippy::unwrap_used)]
use collective::*;
use std::time::{Duration, Instant};
fn main() {
    let world: u32 = std::env::args().nth(1).unwrap().parse().unwrap();
    let transport =
        if std::env::args().nth(2).unwrap() == "tcp" { Transport::Tcp } else { Transport::Shared };
    let listeners: Vec<_> =
        (0..world).map(|_| Listener::bind("127.0.0.1".parse().unwrap()).unwrap()).collect();
    let peers: Vec<_> = listeners.iter().map(|l| l.address()).collect();
    let mut threads = vec![];
    for (rank, l) in listeners.into_iter().enumerate() {
        let peers = peers.clone();
        threads.push(std::thread::spawn(move || {
            let options = GroupOptions {
                job: "a".parse().unwrap(),
                group: "w".into(),
                generation: api::Generation(1),
                rank: api::Rank(rank as u32),
                world_size: world,
                secret: api::Secret::new("x"),
                connect_timeout: Duration::from_secs(10),
                reduction: Default::default(),
                transport,
                host: None,
            };
            let mut c = l.connect(options, &peers).unwrap();
            for kib in [0usize, 4, 64, 1024, 4096, 16384, 65536] {
                let mut b = vec![1.0f32; kib * 256];
                let n = if kib <= 64 {
                    2000
                } else if kib <= 1024 {
                    200
                } else {
                    20
                };
                let mut times = vec![];
                for i in 0..n {
                    let t = Instant::now();
                    if kib == 0 {
                        c.barrier().unwrap()
                    } else {
                        c.all_reduce((&mut b).into(), ReduceOp::Avg).unwrap()
                    };
                    if i > n / 10 {
                        times.push(t.elapsed().as_secs_f64() * 1e6);
                    }
                }
                times.sort_by(f64::total_cmp);
                if rank == 0 {
                    println!(
                        "{kib:>6} KiB median {:>9.1} us  p10 {:>9.1} p90 {:>9.1}",
                        times[times.len() / 2],
                        times[times.len() / 10],
                        times[times.len() * 9 / 10]
                    );
                }
            }
        }));
    }
    for t in threads {
        t.join().unwrap();
    }
}

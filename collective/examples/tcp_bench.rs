//! How long an `all_reduce` takes over loopback TCP, beside a bare exchange of the same bytes over
//! the same number of sockets: `cargo run --release -p collective --example tcp_bench`.
//!
//! Starts one process per rank. Arguments: worlds, and sizes in KiB, each comma-separated. The bare
//! exchange sends and receives what the cut into chunks must move, `2 (n - 1) / n` of the buffer
//! each way, from and into the same buffer, and adds nothing. In brackets: processor time of one
//! rank, which says more than the clock where other programs run.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::{Generation, Rank, Secret};
use collective::{Communicator, GroupOptions, Listener, ReduceOp, Transport};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

type Failure = Box<dyn std::error::Error>;

/// Time spent on one size, and the fewest and most rounds.
const SIZE_TIME: Duration = Duration::from_millis(1500);
const ROUNDS: (usize, usize) = (7, 2000);

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [kind, rank, world, sizes] = arguments.as_slice()
        && kind.starts_with("--")
    {
        let sizes = numbers(sizes)?;
        return match kind.as_str() {
            "--group" => group(rank.parse()?, world.parse()?, &sizes),
            _ => bare(rank.parse()?, world.parse()?, &sizes),
        };
    }
    let list =
        |index: usize, default: &str| numbers(arguments.get(index).map_or(default, String::as_str));
    let worlds = list(0, "2,4")?;
    let sizes = list(1, "4,16,64,256,1024,4096,16384,65536")?;
    for world in worlds {
        let found = run("--group", world, &sizes)?;
        let floor = run("--bare", world, &sizes)?;
        println!("{world} ranks       all_reduce          bare exchange     of the bare speed");
        for ((size, found), floor) in sizes.iter().zip(found.chunks(2)).zip(floor.chunks(2)) {
            let (wall, cpu) = (floor[0] / found[0] * 100.0, floor[1] / found[1] * 100.0);
            let shown = |times: &[f64]| format!("{:>8.3} ms ({:>7.3})", times[0], times[1]);
            println!(
                "{size:>8} KiB {} {} {wall:>6.0} % ({cpu:>4.0} %)",
                shown(found),
                shown(floor)
            );
        }
    }
    Ok(())
}

fn numbers(text: &str) -> Result<Vec<usize>, std::num::ParseIntError> {
    text.split(',').map(str::parse).collect()
}

/// Starts the ranks, tells them each other's addresses; rank 0's medians in milliseconds.
fn run(kind: &str, world: usize, sizes: &[usize]) -> Result<Vec<f64>, Failure> {
    let sizes = sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let mut ranks: Vec<Child> = Vec::new();
    for rank in 0..world {
        ranks.push(
            Command::new(std::env::current_exe()?)
                .args([kind, &rank.to_string(), &world.to_string(), &sizes])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?,
        );
    }
    let mut outputs = Vec::new();
    let mut addresses = String::new();
    for rank in &mut ranks {
        let mut output = BufReader::new(rank.stdout.take().ok_or("no output")?);
        output.read_line(&mut addresses)?;
        outputs.push(output);
    }
    for rank in &mut ranks {
        rank.stdin.take().ok_or("no input")?.write_all(addresses.as_bytes())?;
    }
    let mut text = String::new();
    outputs[0].read_to_string(&mut text)?;
    for rank in &mut ranks {
        rank.wait()?;
    }
    Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

fn tell_address(address: SocketAddr) -> Result<Vec<SocketAddr>, Failure> {
    println!("{address}");
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

/// Processor time of this process in milliseconds.
fn processor_time() -> Result<f64, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let sum = usage.user_time() + usage.system_time();
    Ok(sum.num_microseconds() as f64 / 1e3)
}

/// Repeats a round; the median and the processor time of one, in milliseconds.
fn median(mut round: impl FnMut(bool) -> Result<bool, Failure>) -> Result<[f64; 2], Failure> {
    let (begun, processor) = (Instant::now(), processor_time()?);
    let mut times = Vec::new();
    let mut last = false;
    while !last {
        let enough = times.len() >= ROUNDS.0 && begun.elapsed() > SIZE_TIME;
        let start = Instant::now();
        last = round(enough || times.len() >= ROUNDS.1)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let processor = (processor_time()? - processor) / times.len() as f64;
    Ok([times[times.len() / 2], processor])
}

fn group(rank: u32, world: u32, sizes: &[usize]) -> Result<(), Failure> {
    let listener = Listener::bind(Ipv4Addr::LOCALHOST.into())?;
    let peers = tell_address(listener.address())?;
    let options = GroupOptions {
        job: "bench".parse()?,
        group: "world".to_owned(),
        generation: Generation(1),
        rank: Rank(rank),
        world_size: world,
        secret: Secret::new("bench"),
        connect_timeout: Duration::from_secs(30),
        reduction: Default::default(),
        transport: Transport::Tcp,
        host: None,
    };
    let mut group = listener.connect(options, &peers)?;
    for size in sizes {
        let mut buffer = vec![1.0f32; size * 1024 / 4];
        // The first element says that rank 0 has enough; the rest stays finite by averaging.
        let found = median(|enough| {
            buffer[0] = if enough && rank == 0 { 1.0 } else { 0.0 };
            group.all_reduce((&mut buffer).into(), ReduceOp::Avg)?;
            Ok(buffer[0] != 0.0)
        })?;
        if rank == 0 {
            println!("{} {}", found[0], found[1]);
        }
        group.barrier()?;
    }
    Ok(())
}

/// A stream with what is still to be sent and received in this round.
struct Bare {
    stream: TcpStream,
    out: usize,
    back: usize,
}

fn bare(rank: u32, world: u32, sizes: &[usize]) -> Result<(), Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let peers = tell_address(listener.local_addr()?)?;
    let mut streams = Vec::new();
    for peer in &peers[..rank as usize] {
        streams.push(TcpStream::connect(peer)?);
    }
    for _ in rank + 1..world {
        streams.push(listener.accept()?.0);
    }
    let mut streams: Vec<Bare> =
        streams.into_iter().map(|stream| Bare { stream, out: 0, back: 0 }).collect();
    for bare in &streams {
        bare.stream.set_nodelay(true)?;
        bare.stream.set_nonblocking(true)?;
    }
    for size in sizes {
        let mut buffer = vec![1u8; size * 1024];
        let bytes = 2 * buffer.len() / world as usize;
        let found = median(|enough| {
            // As above, in the first byte of every message.
            let last = enough && rank == 0;
            let mut seen = last;
            buffer[0] = u8::from(last);
            for bare in &mut streams {
                (bare.out, bare.back) = (bytes, bytes);
            }
            while streams.iter().any(|bare| bare.out > 0 || bare.back > 0) {
                seen |= turn(&mut streams, &mut buffer, bytes, seen)?;
            }
            Ok(seen)
        })?;
        if rank == 0 {
            println!("{} {}", found[0], found[1]);
        }
    }
    Ok(())
}

/// Waits, then reads and writes once per stream; whether a first byte said that this is the last.
fn turn(
    streams: &mut [Bare],
    buffer: &mut [u8],
    bytes: usize,
    last: bool,
) -> Result<bool, Failure> {
    let mut seen = false;
    let mut descriptors: Vec<PollFd<'_>> = Vec::new();
    for bare in streams.iter() {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, bare.back > 0);
        flags.set(PollFlags::POLLOUT, bare.out > 0);
        descriptors.push(PollFd::new(bare.stream.as_fd(), flags));
    }
    poll(&mut descriptors, PollTimeout::NONE)?;
    let ready: Vec<PollFlags> =
        descriptors.iter().map(|d| d.revents().unwrap_or(PollFlags::empty())).collect();
    drop(descriptors);
    // The place of a byte in the buffer does not matter, only that all of it is touched.
    let place = |left: usize, len: usize| {
        let from = (bytes - left) % len;
        from..(from + left).min(len).min(from + (256 << 10))
    };
    for (bare, ready) in streams.iter_mut().zip(ready) {
        if ready.contains(PollFlags::POLLIN) {
            let range = place(bare.back, buffer.len());
            match bare.stream.read(&mut buffer[range.clone()]) {
                Ok(0) => return Err("a peer has ended".into()),
                Ok(read) => {
                    seen |= bare.back == bytes && buffer[range.start] == 1;
                    bare.back -= read;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        if ready.contains(PollFlags::POLLOUT) {
            let range = place(bare.out, buffer.len());
            if bare.out == bytes {
                buffer[range.start] = u8::from(last);
            }
            match bare.stream.write(&buffer[range]) {
                Ok(written) => bare.out -= written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(seen)
}

//! A bare full-duplex exchange with the neighbours on a ring: what sockets cost when nothing but
//! the bytes moves. Non-blocking, driven by `poll`.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Longest buffer; more bytes go round in it.
const BUFFER_BYTES_MAX: u64 = 64 << 20;

/// Connections to both neighbours; among two processes they are one and the same.
pub struct Neighbours {
    next: TcpStream,
    previous: TcpStream,
}

impl Neighbours {
    /// Connects the ring; every rank does it at the same time.
    pub fn connect(
        listener: &TcpListener,
        rank: u32,
        world: u32,
        addresses: &[SocketAddr],
    ) -> Result<Self> {
        let to = addresses
            .get(((rank + 1) % world) as usize)
            .context("an address is missing from the ring")?;
        // The kernel completes a connection before its listener accepts it, so no order is needed.
        let (next, previous) = if world > 2 {
            let next = TcpStream::connect(to)?;
            (next, listener.accept()?.0)
        } else {
            let only = if rank == 0 { TcpStream::connect(to)? } else { listener.accept()?.0 };
            (only.try_clone()?, only)
        };
        for stream in [&next, &previous] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        Ok(Self { next, previous })
    }
}

/// A number of bytes each way.
pub struct Exchange {
    send: u64,
    receive: u64,
    out: Vec<u8>,
    back: Vec<u8>,
}

impl Exchange {
    /// Makes its buffers.
    pub fn new(send: u64, receive: u64) -> Self {
        let buffer = |bytes: u64| vec![1; bytes.min(BUFFER_BYTES_MAX) as usize];
        Self { send, receive, out: buffer(send), back: buffer(receive) }
    }

    /// Sends and receives them once.
    pub fn call(&mut self, ring: &mut Neighbours) -> Result<()> {
        let (mut sent, mut received) = (0, 0);
        while sent < self.send || received < self.receive {
            let before = (sent, received);
            if sent < self.send {
                let from = (sent % self.out.len() as u64) as usize;
                let left = (self.send - sent).min((self.out.len() - from) as u64) as usize;
                sent += moved(ring.next.write(&self.out[from..from + left]))?;
            }
            if received < self.receive {
                let to = (received % self.back.len() as u64) as usize;
                let left = (self.receive - received).min((self.back.len() - to) as u64) as usize;
                received += moved(ring.previous.read(&mut self.back[to..to + left]))?;
            }
            if before == (sent, received) {
                let mut waits = Vec::with_capacity(2);
                if sent < self.send {
                    waits.push(PollFd::new(ring.next.as_fd(), PollFlags::POLLOUT));
                }
                if received < self.receive {
                    waits.push(PollFd::new(ring.previous.as_fd(), PollFlags::POLLIN));
                }
                match poll(&mut waits, PollTimeout::NONE) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(error) => return Err(error).context("cannot wait for the sockets"),
                }
            }
        }
        Ok(())
    }
}

/// Bytes that moved; none if the socket is not ready.
fn moved(result: std::io::Result<usize>) -> Result<u64> {
    match result {
        Ok(0) => bail!("a neighbour on the ring is gone"),
        Ok(count) => Ok(count as u64),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(0)
        }
        Err(error) => Err(error).context("the bare exchange broke"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_crosses_rings_of_two_and_three() {
        for world in [2, 3] {
            let bind = |_| TcpListener::bind("127.0.0.1:0").unwrap();
            let listeners: Vec<TcpListener> = (0..world).map(bind).collect();
            let addresses: Vec<SocketAddr> =
                listeners.iter().map(|l| l.local_addr().unwrap()).collect();
            std::thread::scope(|scope| {
                for (rank, listener) in listeners.iter().enumerate() {
                    let addresses = &addresses;
                    scope.spawn(move || {
                        let mut ring =
                            Neighbours::connect(listener, rank as u32, world, addresses).unwrap();
                        let mut exchange = Exchange::new(3_000_000, 3_000_000);
                        exchange.out.fill(rank as u8);
                        exchange.call(&mut ring).unwrap();
                        let from = (rank as u32 + world - 1) % world;
                        assert!(exchange.back.iter().all(|byte| u32::from(*byte) == from));
                    });
                }
            });
        }
    }
}

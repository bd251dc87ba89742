//! The address on which ranks listen for one another: a connection from this host carries bytes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::Probe;

/// Longest a single call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes each way: they fit any socket buffer, so that one thread can be both ends.
const PROBE_BYTES: usize = 4 << 10;
/// Strangers that may connect first.
const STRANGERS_MAX: usize = 8;

/// Connects the address with itself.
pub(super) struct LoopbackProbe {
    address: IpAddr,
}

impl LoopbackProbe {
    pub(super) fn new(address: IpAddr) -> Self {
        Self { address }
    }

    fn exchange(&self) -> std::io::Result<()> {
        let listener = TcpListener::bind(SocketAddr::new(self.address, 0))?;
        let mut near = TcpStream::connect_timeout(&listener.local_addr()?, CALL_TIMEOUT)?;
        let own = near.local_addr()?;
        // Connected, so that it is in the listener's queue.
        let accepted = (0..STRANGERS_MAX).find_map(|_| match listener.accept() {
            Ok((far, peer)) => (peer == own).then_some(Ok(far)),
            Err(error) => Some(Err(error)),
        });
        let mut far =
            accepted.unwrap_or_else(|| Err(std::io::Error::other("strangers connect")))?;
        let sent: Vec<u8> = (0..PROBE_BYTES).map(|index| (index * 17 % 253) as u8).collect();
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(CALL_TIMEOUT))?;
            stream.set_write_timeout(Some(CALL_TIMEOUT))?;
        }
        let mut received = vec![0; PROBE_BYTES];
        near.write_all(&sent)?;
        far.read_exact(&mut received)?;
        far.write_all(&received)?;
        received.fill(0);
        near.read_exact(&mut received)?;
        if received != sent {
            return Err(std::io::Error::other("other bytes arrived than were sent"));
        }
        Ok(())
    }
}

impl Probe for LoopbackProbe {
    fn name(&self) -> &'static str {
        "the address of its ranks"
    }

    fn look(&self) -> Result<(), String> {
        self.exchange().map_err(|error| format!("TCP on {} with itself: {error}", self.address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_another_host_is_named() {
        assert_eq!(LoopbackProbe::new("127.0.0.1".parse().expect("an address")).look(), Ok(()));
        // Set aside for documentation (RFC 5737): no host has it.
        let foreign = LoopbackProbe::new("192.0.2.1".parse().expect("an address"));
        let found = foreign.look().expect_err("not ours");
        assert!(found.starts_with("TCP on 192.0.2.1 with itself: "), "{found}");
    }
}

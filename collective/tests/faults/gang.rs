//! The ranks that are in the group, from the harness's side.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use collective::Transport;

use crate::message::{Command, Report, now};
use crate::network::Network;
use crate::plan::name;
use crate::process::Process;

pub struct Gang {
    /// In the order of their ranks.
    pub members: Vec<Process>,
    /// The inodes of the memory of all groups so far.
    pub segments: BTreeSet<u64>,
    transport: Transport,
    /// Most descriptors that a group took of a rank.
    descriptors: usize,
}

impl Gang {
    /// Starts the ranks, each in a place of its own if there is a network.
    pub fn start(world: u32, transport: Transport, network: Option<&Network>) -> Self {
        let start = |rank| match network {
            None => Process::start(None, IpAddr::V4(Ipv4Addr::LOCALHOST)),
            Some(network) => Process::start(Some(&network.namespace(rank)), Network::address(rank)),
        };
        let mut members: Vec<Process> = (0..world).map(start).collect();
        members.iter_mut().for_each(Process::ready);
        Self { members, segments: BTreeSet::new(), transport, descriptors: 0 }
    }

    /// Forms the next group; how long each rank took.
    pub fn form(&mut self, generation: u64) -> Vec<Duration> {
        let peers = self.listen();
        (0..self.members.len()).for_each(|rank| self.join(generation, rank, &peers));
        self.formed()
    }

    /// The same while a rank of an older generation tries to take a place in it.
    pub fn form_without(&mut self, stale: &mut Process, generation: u64, old: u64) {
        let peers = self.listen();
        let mut claimed = peers.clone();
        let place = peers.len() - 1;
        claimed[place] = stale.listen();
        // The first rank waits for the others until the stale one has its answer.
        self.join(generation, 0, &peers);
        stale.tell(&form(old, place, &claimed, self.transport));
        match stale.hear() {
            Report::Unformed { error } => {
                let refused = error.contains(&format!("generation g{old}, expected g{generation}"));
                assert!(refused, "{error}");
            }
            report => panic!("a stale rank is in the group: {report:?}"),
        }
        (1..self.members.len()).for_each(|rank| self.join(generation, rank, &peers));
        self.formed();
    }

    /// Checks an all-reduce.
    pub fn sum(&mut self) {
        self.members.iter_mut().for_each(|rank| rank.tell(&Command::Sum));
        for rank in &self.members {
            let report = rank.hear();
            assert!(matches!(report, Report::Summed), "{report:?}");
        }
    }

    /// Pushes an abort as the coordinator would; when.
    pub fn abort(&mut self, reason: &str) -> Duration {
        let at = now();
        let command = Command::Abort { reason: reason.to_owned() };
        self.members.iter_mut().for_each(|rank| rank.tell(&command));
        at
    }

    /// Everyone leaves, and leaves nothing behind.
    pub fn leave(&mut self) {
        self.members.iter_mut().for_each(|rank| rank.tell(&Command::Leave));
        for rank in &mut self.members {
            let report = rank.hear();
            assert!(matches!(report, Report::Left), "{report:?}");
            rank.assert_clean();
        }
    }

    fn listen(&mut self) -> Vec<SocketAddr> {
        self.members.iter_mut().map(Process::listen).collect()
    }

    fn join(&mut self, generation: u64, rank: usize, peers: &[SocketAddr]) {
        self.members[rank].tell(&form(generation, rank, peers, self.transport));
    }

    /// Waits for all, and counts what the group takes.
    fn formed(&mut self) -> Vec<Duration> {
        let (carrier, pieces) = match (self.transport, self.members.len()) {
            (_, 1) | (Transport::Tcp, _) => ("tcp", 0),
            (Transport::Shared, _) | (Transport::Auto, 2) => ("shm", 1),
            // A piece per host, also where a rank is alone on it.
            (Transport::Auto, ranks) => ("shm+tcp", ranks.div_ceil(2)),
        };
        let mut times = Vec::new();
        for rank in &self.members {
            match rank.hear() {
                Report::Formed { took, transport } => {
                    assert_eq!(transport, carrier);
                    times.push(took);
                }
                report => panic!("expected a group, found {report:?}"),
            }
        }
        let first = self.descriptors == 0;
        let mut segments = BTreeSet::new();
        for rank in &mut self.members {
            let census = rank.count();
            let descriptors = rank.descriptors_of_group(&census);
            assert!(first || descriptors <= self.descriptors, "descriptors leak: {census:?}");
            self.descriptors = self.descriptors.max(descriptors);
            segments.extend(census.segments);
        }
        assert_eq!(segments.len(), pieces, "a piece of memory per host");
        assert!(self.segments.is_disjoint(&segments), "a new group has new memory");
        self.segments.extend(segments);
        times
    }
}

fn form(generation: u64, rank: usize, peers: &[SocketAddr], transport: Transport) -> Command {
    let transport = name(transport).to_owned();
    Command::Form { generation, rank: rank as u32, peers: peers.to_vec(), transport }
}

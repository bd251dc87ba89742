//! Groups whose ranks share hosts, but not one: memory inside a host, connections between hosts.
//!
//! A reduction goes up and down once. The ranks of a host reduce in memory, each its share of the
//! buffer; rank i of every host then reduces that share with rank i of the other hosts over their
//! connections, its *rail*; and the ranks of a host spread the results in memory. So a host's link
//! carries what one rank alone would send, and all its ranks carry it. What a host brings to a rail
//! are the sums of the maximal subtrees that its ranks own together: the order of sums is that of
//! any other transport.
//!
//! Calls that only exchange parts between pairs (`all_to_all`, `gather`, `scatter`, small control
//! data) have nothing to gain between hosts and use the connections for all pairs.

mod moves;
mod rail;
mod reduce;

use crate::hosts::Hosts;
use crate::peers::Scratch;
use crate::shared::Shared;

/// This rank's end of its host's memory, and its place among the hosts.
#[derive(Debug)]
pub(crate) struct Mixed {
    shared: Shared,
    hosts: Hosts,
    /// By rank: the number of its host, for those that this rank talks to.
    rail: Vec<Option<usize>>,
    /// This host's sums of this rank's share.
    sums: Scratch,
    /// What a host's ranks spread, where it is not the caller's.
    region: Scratch,
}

impl Mixed {
    pub(crate) fn new(shared: Shared, hosts: Hosts) -> Self {
        let rail = hosts.others_on_rail();
        Self { shared, hosts, rail, sums: Scratch::default(), region: Scratch::default() }
    }
}

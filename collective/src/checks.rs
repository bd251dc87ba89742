//! Whether the arguments of a call fit each other and the group: a wrong call is refused before
//! anything is sent.

use api::Rank;

use crate::buffer::{Buffer, BufferMut};
use crate::call::{Call, CallSite};
use crate::chunk::chunk_range;
use crate::communicator::{Partial, ReduceOp};
use crate::element::Element;
use crate::error::CollectiveError;
use crate::lane_tree::LaneTree;
use crate::peers::Peers;

pub(crate) type Outcome<R> = Result<R, CollectiveError>;

pub(crate) fn invalid<R>(site: CallSite, message: impl Into<String>) -> Outcome<R> {
    Err(CollectiveError::InvalidCall { call: site, message: message.into() })
}

/// An average of integers would round.
pub(crate) fn check_average(site: CallSite) -> Outcome<()> {
    match site.call {
        Call { element: Some(element), reduce: Some(ReduceOp::Avg), .. } if !element.is_float() => {
            invalid(
                site,
                format!("an average of {element} would round: expected a float, or a sum"),
            )
        }
        _ => Ok(()),
    }
}

pub(crate) fn typed<'a, T: Element>(site: CallSite, input: Buffer<'a>) -> Outcome<&'a [T]> {
    let found = input.element();
    match T::view(input) {
        Some(data) => Ok(data),
        None => invalid(site, format!("the input holds {found}, the output {}", T::TYPE)),
    }
}

pub(crate) fn typed_mut<'a, T: Element>(
    site: CallSite,
    output: BufferMut<'a>,
) -> Outcome<&'a mut [T]> {
    let found = output.element();
    match T::view_mut(output) {
        Some(data) => Ok(data),
        None => invalid(site, format!("the output holds {found}, the input {}", T::TYPE)),
    }
}

/// A buffer must be as long as this rank's chunk.
pub(crate) fn check_chunk(
    peers: &Peers,
    site: CallSite,
    what: &str,
    found: usize,
    len: usize,
) -> Outcome<()> {
    let expected = chunk_range(len, peers.world, peers.rank).len();
    if found != expected {
        let rank = Rank(peers.rank);
        return invalid(
            site,
            format!("the {what} holds {found} elements, expected {expected}: the chunk of {rank}"),
        );
    }
    Ok(())
}

pub(crate) fn check_peer(peers: &Peers, site: CallSite, peer: Rank) -> Outcome<()> {
    if peer.0 >= peers.world {
        return invalid(site, format!("{peer} is not below the world size of {}", peers.world));
    }
    if site.call.operation.is_point_to_point() && peer.0 == peers.rank {
        return invalid(site, format!("{peer} is this rank itself"));
    }
    Ok(())
}

pub(crate) fn check_partials(
    peers: &Peers,
    site: CallSite,
    tree: &LaneTree,
    partials: &[Partial<'_>],
    len: usize,
) -> Outcome<()> {
    let owners = tree.owners(peers.world);
    if owners == 0 {
        return invalid(site, "no rank owns a lane: expected one that does");
    }
    if owners > tree.lanes() {
        return invalid(
            site,
            format!("{owners} ranks share {} lanes: expected a lane per rank", tree.lanes()),
        );
    }
    let run = tree.lanes_of(peers.rank, peers.world);
    let expected = tree.owned_subtrees(run);
    if !partials.iter().map(|partial| partial.subtree).eq(expected.iter().copied()) {
        let shown = |nodes: &mut dyn Iterator<Item = String>| nodes.collect::<Vec<_>>().join(", ");
        let found = shown(&mut partials.iter().map(|partial| partial.subtree.to_string()));
        let expected = shown(&mut expected.iter().map(ToString::to_string));
        return invalid(site, format!("partials of lanes `{found}`, expected `{expected}`"));
    }
    for partial in partials {
        if partial.data.len() != len {
            return invalid(
                site,
                format!(
                    "the partial of lanes {} holds {} elements, the output {len}",
                    partial.subtree,
                    partial.data.len()
                ),
            );
        }
    }
    Ok(())
}

/// Input and output of one call are as long.
pub(crate) fn check_equal(site: CallSite, input: usize, output: usize) -> Outcome<()> {
    if input != output {
        return invalid(site, format!("the input holds {input} elements, the output {output}"));
    }
    Ok(())
}

/// A whole buffer is `world` times a part.
pub(crate) fn check_parts(
    peers: &Peers,
    site: CallSite,
    what: &str,
    whole: usize,
    part: usize,
) -> Outcome<()> {
    let expected = part.saturating_mul(peers.world as usize);
    if whole != expected {
        return invalid(
            site,
            format!(
                "the {what} holds {whole} elements, expected {expected}: {part} for each of {} ranks",
                peers.world
            ),
        );
    }
    Ok(())
}

/// One length per rank, which tile a buffer.
pub(crate) fn check_counts(
    peers: &Peers,
    site: CallSite,
    what: &str,
    counts: &[usize],
    len: usize,
) -> Outcome<()> {
    if counts.len() != peers.world as usize {
        let found = counts.len();
        return invalid(
            site,
            format!("{found} {what} lengths, expected one for each of {} ranks", peers.world),
        );
    }
    let total = counts.iter().try_fold(0usize, |total, count| total.checked_add(*count));
    if total != Some(len) {
        return invalid(
            site,
            format!("the {what} lengths do not add up to the buffer's {len} elements"),
        );
    }
    Ok(())
}

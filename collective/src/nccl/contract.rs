//! The methods of the contract, over host memory.

use api::{Generation, Rank};

use crate::abort::AbortHandle;
use crate::axes::Group;
use crate::buffer::{Buffer, BufferMut, ElementType};
use crate::call::{Call, CallSite, Operation};
use crate::checks::{Outcome, check_equal, invalid};
use crate::chunk::chunk_range;
use crate::communicator::{Communicator, Partial, ReduceOp};
use crate::error::CollectiveError;
use crate::lane_tree::{LaneTree, Subtree};
use crate::nccl::batch::Step;
use crate::nccl::host::{NcclCommunicator, SITE_BYTES, check_types, decode, encode, words_of};
use crate::nccl::memory::DeviceMemory;

/// Most bytes per rank in `gather_bytes`, as the contract says.
const GATHER_BYTES_MAX: usize = 4 << 20;
/// And of all ranks together.
const GATHER_TOTAL_BYTES_MAX: usize = 256 << 20;

impl Communicator for NcclCommunicator {
    fn rank(&self) -> Rank {
        self.group.rank()
    }

    fn world_size(&self) -> u32 {
        self.group.world_size()
    }

    fn generation(&self) -> Generation {
        self.group.generation()
    }

    fn all_reduce(&mut self, mut buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, buffer.element(), buffer.len()).reducing(op);
        self.collective(call, |own, site| {
            let len = buffer.len();
            let result = own.reduce_own(site, (op, false), buffer.as_bytes_mut(), len)?;
            own.take(result, buffer.as_bytes_mut());
            Ok(())
        })
    }

    fn name(&self) -> &str {
        &self.group.options.group
    }

    fn all_reduce_into(
        &mut self,
        input: Buffer<'_>,
        mut output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Outcome<()> {
        let call = Call::over(Operation::AllReduce, input.element(), input.len()).reducing(op);
        self.collective(call, |own, site| {
            check_equal(site, input.len(), output.len())?;
            check_types(site, input.element(), output.element())?;
            let result = own.reduce_own(site, (op, false), input.as_bytes(), output.len())?;
            own.take(result, output.as_bytes_mut());
            Ok(())
        })
    }

    fn all_reduce_many(&mut self, buffers: &mut [BufferMut<'_>], op: ReduceOp) -> Outcome<()> {
        let call = Call::over_many(buffers, op);
        let Some(element) = buffers.first().map(BufferMut::element) else {
            // The comparison of the calls is all that is to do.
            return self.collective(call, |_, _| Ok(()));
        };
        self.collective(call, |own, site| {
            let mut together = Vec::new();
            for buffer in buffers.iter() {
                check_types(site, element, buffer.element())?;
                together.extend_from_slice(buffer.as_buffer().as_bytes());
            }
            let result = own.reduce_own(site, (op, false), &together, call.count as usize)?;
            own.take(result, &mut together);
            let mut rest = together.as_slice();
            for buffer in buffers {
                let bytes = buffer.as_bytes_mut();
                let (head, tail) = rest.split_at(bytes.len());
                bytes.copy_from_slice(head);
                rest = tail;
            }
            Ok(())
        })
    }

    fn reduce_scatter(
        &mut self,
        input: Buffer<'_>,
        mut output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceScatter, input.element(), input.len()).reducing(op);
        self.collective(call, |own, site| {
            own.check_chunk(site, "output", output.len(), input.len())?;
            check_types(site, input.element(), output.element())?;
            let result = own.reduce_own(site, (op, true), input.as_bytes(), output.len())?;
            own.take(result, output.as_bytes_mut());
            Ok(())
        })
    }

    fn reduce_scatter_in_place(&mut self, mut buffer: BufferMut<'_>, op: ReduceOp) -> Outcome<()> {
        let call = Call::over(Operation::ReduceScatter, buffer.element(), buffer.len());
        self.collective(call.reducing(op), |own, site| {
            let chunk = chunk_range(buffer.len(), own.group.world, own.group.rank);
            let size = buffer.element().bytes();
            let bytes = buffer.as_bytes_mut();
            let result = own.reduce_own(site, (op, true), bytes, chunk.len())?;
            own.take(result, &mut bytes[chunk.start * size..chunk.end * size]);
            Ok(())
        })
    }

    fn all_gather(&mut self, input: Buffer<'_>, mut output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, output.element(), output.len());
        self.collective(call, |own, site| {
            own.check_chunk(site, "input", input.len(), output.len())?;
            check_types(site, input.element(), output.element())?;
            own.gather_chunks(site, input.element(), input.as_bytes(), output.as_bytes_mut())
        })
    }

    fn all_gather_in_place(&mut self, mut buffer: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllGather, buffer.element(), buffer.len());
        self.collective(call, |own, site| {
            let chunk = chunk_range(buffer.len(), own.group.world, own.group.rank);
            let element = buffer.element();
            let bytes = buffer.as_bytes_mut();
            let mine = bytes[chunk.start * element.bytes()..chunk.end * element.bytes()].to_vec();
            own.gather_chunks(site, element, &mine, bytes)
        })
    }

    fn all_to_all(&mut self, input: Buffer<'_>, mut output: BufferMut<'_>) -> Outcome<()> {
        let call = Call::over(Operation::AllToAll, input.element(), input.len());
        self.collective(call, |own, site| {
            check_equal(site, input.len(), output.len())?;
            check_types(site, input.element(), output.element())?;
            let world = own.group.world as usize;
            own.check_parts(site, "input", input.len(), input.len() / world)?;
            let lens = vec![input.len() / world; world];
            let (from, to) = ((input.as_bytes(), &lens[..]), (output.as_bytes_mut(), &lens[..]));
            own.exchange_parts(site, input.element(), from, to)
        })
    }

    fn all_to_all_v(
        &mut self,
        input: Buffer<'_>,
        send: &[usize],
        mut output: BufferMut<'_>,
        receive: &[usize],
    ) -> Outcome<()> {
        let call = Call::over(Operation::AllToAll, input.element(), 0).with_detail(1);
        self.collective(call, |own, site| {
            check_types(site, input.element(), output.element())?;
            own.check_lengths(site, "send", send, input.len())?;
            own.check_lengths(site, "receive", receive, output.len())?;
            own.agree_on_lengths(site, send, receive)?;
            let (from, to) = ((input.as_bytes(), send), (output.as_bytes_mut(), receive));
            own.exchange_parts(site, input.element(), from, to)
        })
    }

    fn gather(
        &mut self,
        input: Buffer<'_>,
        output: Option<BufferMut<'_>>,
        root: Rank,
    ) -> Outcome<()> {
        let call = Call::over(Operation::Gather, input.element(), input.len());
        self.collective(call.with_detail(root.0), |own, site| {
            own.check_peer(site, root)?;
            if output.is_some() != (own.group.rank == root.0) {
                return invalid(site, "only the root gives an output, and it must");
            }
            if let Some(output) = &output {
                check_types(site, input.element(), output.element())?;
                own.check_parts(site, "output", output.len(), input.len())?;
            }
            let lens = [input.len(), output.as_ref().map_or(0, BufferMut::len)];
            let mut places = own.places(input.element(), &lens)?;
            let (part, whole) = (places.remove(0), places.remove(0));
            let mut calls = own.group.calls();
            calls.gather(&part, output.is_some().then_some(&whole), root)?;
            let upload = Some((part, input.as_bytes()));
            match output {
                Some(mut output) => {
                    own.through(site, upload, calls, Some((whole, output.as_bytes_mut())))
                }
                None => own.through(site, upload, calls, None),
            }
        })
    }

    fn scatter(
        &mut self,
        input: Option<Buffer<'_>>,
        mut output: BufferMut<'_>,
        root: Rank,
    ) -> Outcome<()> {
        let call = Call::over(Operation::Scatter, output.element(), output.len());
        self.collective(call.with_detail(root.0), |own, site| {
            own.check_peer(site, root)?;
            if input.is_some() != (own.group.rank == root.0) {
                return invalid(site, "only the root gives an input, and it must");
            }
            if let Some(input) = &input {
                check_types(site, input.element(), output.element())?;
                own.check_parts(site, "input", input.len(), output.len())?;
            }
            let lens = [output.len(), input.as_ref().map_or(0, Buffer::len)];
            let mut places = own.places(output.element(), &lens)?;
            let (part, whole) = (places.remove(0), places.remove(0));
            let mut calls = own.group.calls();
            calls.scatter(input.is_some().then_some(&whole), &part, root)?;
            let upload = input.as_ref().map(|input| (whole, input.as_bytes()));
            own.through(site, upload, calls, Some((part, output.as_bytes_mut())))
        })
    }

    fn broadcast(&mut self, mut buffer: BufferMut<'_>, root: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Broadcast, buffer.element(), buffer.len());
        self.collective(call.with_detail(root.0), |own, site| {
            own.check_peer(site, root)?;
            let element = buffer.element();
            let whole = own.places(element, &[buffer.len()])?.remove(0);
            let mut calls = own.group.calls();
            calls.broadcast(&whole, &whole, root)?;
            let bytes = buffer.as_bytes_mut();
            if root.0 == own.group.rank {
                own.through(site, Some((whole, bytes)), calls, None)
            } else {
                own.through(site, None, calls, Some((whole, bytes)))
            }
        })
    }

    fn send(&mut self, buffer: Buffer<'_>, to: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Send, buffer.element(), buffer.len()).with_detail(to.0);
        let number = self.sent.get(to.0 as usize).copied().unwrap_or(0);
        let site = CallSite { call, number };
        self.run(|own| {
            own.check_peer(site, to)?;
            own.settle_sends()?;
            let bytes = buffer.as_bytes();
            let all = SITE_BYTES + bytes.len();
            let memory = DeviceMemory::new(&own.group.device, all)?;
            let whole = memory.buffer(ElementType::U8, all)?;
            let mut stage = own.stage(all)?;
            stage.as_mut_slice()[..SITE_BYTES].copy_from_slice(&encode(site));
            stage.as_mut_slice()[SITE_BYTES..all].copy_from_slice(bytes);
            let rank = own.group.rank;
            let group = own.toward(rank, to.0);
            let (mut head, mut body) = (group.calls(), group.calls());
            head.send(&whole.slice(0..SITE_BYTES)?, to)?;
            body.send(&whole.slice(SITE_BYTES..all)?, to)?;
            let steps = vec![
                Step::ToDevice { offset: 0, to: whole },
                Step::Nccl(head.into_calls()),
                Step::Nccl(body.into_calls()),
            ];
            // The bytes are in the stage: the buffer may be reused, and the peer may take its time.
            let pending = group.submit("send", steps, Some(stage))?;
            own.sends.push_back((pending, memory));
            own.sent[to.0 as usize] += 1;
            Ok(())
        })
    }

    fn recv(&mut self, mut buffer: BufferMut<'_>, from: Rank) -> Outcome<()> {
        let call = Call::over(Operation::Recv, buffer.element(), buffer.len()).with_detail(from.0);
        let number = self.received.get(from.0 as usize).copied().unwrap_or(0);
        let site = CallSite { call, number };
        self.run(|own| {
            own.check_peer(site, from)?;
            own.settle_sends()?;
            let bytes = buffer.as_bytes_mut();
            let size = bytes.len().max(SITE_BYTES);
            let whole = own.memory(size)?;
            let rank = own.group.rank;
            let head = own.receive(site, whole.slice(0..SITE_BYTES)?, from)?;
            let theirs = decode(&head.as_slice()[..SITE_BYTES]);
            own.spare.push(head);
            let matches = theirs.is_some_and(|theirs| {
                theirs.number == number
                    && theirs.call == Call { operation: Operation::Send, detail: rank, ..call }
            });
            if !matches {
                let theirs = theirs.map_or("?".to_owned(), |site| site.to_string());
                return invalid(site, format!("{from} called {theirs}"));
            }
            if !bytes.is_empty() {
                let body = own.receive(site, whole.slice(0..bytes.len())?, from)?;
                bytes.copy_from_slice(&body.as_slice()[..bytes.len()]);
                own.spare.push(body);
            }
            own.received[from.0 as usize] += 1;
            Ok(())
        })
    }

    fn barrier(&mut self) -> Outcome<()> {
        self.collective(Call::plain(Operation::Barrier), |own, _| own.group.barrier()?.wait())
    }

    fn gather_bytes(&mut self, mine: &[u8]) -> Outcome<Vec<Vec<u8>>> {
        self.collective(Call::plain(Operation::GatherBytes), |own, site| {
            let (world, rank) = (own.group.world as usize, own.group.rank as usize);
            let most = GATHER_BYTES_MAX.min(GATHER_TOTAL_BYTES_MAX / world);
            if mine.len() > most {
                return invalid(site, format!("{} bytes, at most {most} are allowed", mine.len()));
            }
            let mut lens = vec![0; 8 * world];
            own.gather_equal(site, &(mine.len() as u64).to_le_bytes(), &mut lens)?;
            let lens = words_of(&lens);
            if let Some((rank, len)) = lens.iter().enumerate().find(|(_, len)| **len > most as u64)
            {
                return invalid(site, format!("r{rank} brings {len} bytes, at most {most}"));
            }
            let lens: Vec<usize> = lens.into_iter().map(|len| len as usize).collect();
            let total = lens.iter().sum();
            let whole = own.places(ElementType::U8, &[total])?.remove(0);
            let at: usize = lens[..rank].iter().sum();
            let mut calls = own.group.calls();
            let part = whole.slice(at..at + mine.len())?;
            calls.all_gather_v(&part, &whole, &lens)?;
            let mut bytes = vec![0; total];
            own.through(site, Some((part, mine)), calls, Some((whole, &mut bytes)))?;
            let mut rest = bytes.as_slice();
            Ok(lens
                .iter()
                .map(|len| {
                    let (part, tail) = rest.split_at(*len);
                    rest = tail;
                    part.to_vec()
                })
                .collect())
        })
    }

    fn reduce_lanes(
        &mut self,
        tree: &LaneTree,
        partials: &[Partial<'_>],
        mut output: BufferMut<'_>,
    ) -> Outcome<()> {
        let call = Call::over(Operation::ReduceLanes, output.element(), output.len())
            .reducing(ReduceOp::Sum)
            .with_detail(tree.detail());
        self.collective(call, |own, site| {
            for partial in partials {
                check_types(site, partial.data.element(), output.element())?;
            }
            let inputs: Vec<(Subtree, &[u8])> =
                partials.iter().map(|part| (part.subtree, part.data.as_bytes())).collect();
            let order = (tree.clone(), ReduceOp::Sum, false);
            let result = own.reduce(site, order, &inputs, output.len())?;
            own.take(result, output.as_bytes_mut());
            Ok(())
        })
    }

    fn subgroup(&mut self, group: &Group) -> Outcome<Box<dyn Communicator>> {
        let mine: Vec<u8> = group.ranks.iter().flat_map(|rank| rank.to_le_bytes()).collect();
        // What does not fit is the same error on all ranks: none waits for the others inside NCCL.
        let (color, key) = place_in(group, self.group.rank, &self.gather_bytes(&mine)?)?;
        let name = format!("{}/{}", self.group.options.group, group.name);
        match self.group.split_under(&name, Some(color), key, &[])? {
            Some(made) => Ok(Box::new(Self::new(made, self.reduction)?)),
            None => Err(CollectiveError::unavailable(name, "NCCL made none")),
        }
    }

    fn abort_handle(&self) -> AbortHandle {
        self.group.abort_handle()
    }
}

/// A group's number among those of a split, and this rank's place in it, if all ranks said the same
/// of every group.
fn place_in(group: &Group, own: u32, said: &[Vec<u8>]) -> Outcome<(u32, u32)> {
    let wrong =
        |message| Err(CollectiveError::InvalidOptions { group: group.name.clone(), message });
    let of = |bytes: &[u8]| -> Vec<u32> {
        let (ranks, _) = bytes.as_chunks::<4>();
        ranks.iter().map(|rank| u32::from_le_bytes(*rank)).collect()
    };
    for (rank, bytes) in (0..).zip(said) {
        let ranks = of(bytes);
        let fits = ranks.is_sorted_by(|a, b| a < b)
            && ranks.contains(&rank)
            && ranks.iter().all(|member| said.get(*member as usize) == Some(bytes));
        if !fits {
            let world = said.len();
            return wrong(format!(
                "{} named the ranks {ranks:?}, expected ranks in order below {world}, itself among \
                 them, and the same from each of them",
                Rank(rank)
            ));
        }
    }
    match (group.ranks.first(), group.ranks.iter().position(|rank| *rank == own)) {
        (Some(first), Some(place)) => Ok((*first, place as u32)),
        _ => wrong(format!("{} is not one of its ranks {:?}", Rank(own), group.ranks)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_not_all_members_name_alike_are_refused_everywhere() {
        let say = |ranks: &[u32]| -> Vec<u8> {
            ranks.iter().flat_map(|rank| rank.to_le_bytes()).collect()
        };
        let group = |ranks: &[u32]| Group { name: "tensor".into(), ranks: ranks.to_vec() };
        let said = [say(&[0, 2]), say(&[1]), say(&[0, 2])];
        assert_eq!(place_in(&group(&[0, 2]), 2, &said).unwrap(), (0, 1));
        assert_eq!(place_in(&group(&[1]), 1, &said).unwrap(), (1, 0));
        for wrong in [&[0, 1][..], &[2, 0], &[], &[0, 2, 3], &[1, 1], &[1, 2]] {
            let said = [say(&[0, 2]), say(wrong), say(&[0, 2])];
            for (rank, ranks) in [(0, &[0, 2][..]), (1, wrong), (2, &[0, 2])] {
                assert!(place_in(&group(ranks), rank, &said).is_err(), "{wrong:?} on r{rank}");
            }
        }
    }
}

//! Groups made from a group, and memory registered with one.

use std::fmt;
use std::sync::mpsc::SyncSender;

use api::Rank;

use crate::abort::AbortHandle;
use crate::buffer::ElementType;
use crate::error::CollectiveError;
use crate::nccl::batch::Command;
use crate::nccl::comm::Comm;
use crate::nccl::group::{NcclGroup, NcclOptions};
use crate::nccl::memory::DeviceBuffer;
use crate::nccl::owner::Origin;

/// Memory registered with a group; dropping it ends that.
#[must_use = "dropping it ends the registration"]
pub struct Registration {
    number: u64,
    commands: SyncSender<Command>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        // The owner is gone only with the communicator, which ends its registrations.
        let _ = self.commands.send(Command::Deregister { number: self.number });
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({})", self.number)
    }
}

impl NcclGroup {
    /// Registers memory, so that transfers need no copy where the hardware can do without.
    pub fn register(&mut self, buffer: &DeviceBuffer) -> Result<Registration, CollectiveError> {
        let number = self.ask(|done| Command::Register { buffer: buffer.clone(), done })?;
        Ok(Registration { number, commands: self.commands.clone() })
    }

    /// Makes a group of the ranks with the same color, ordered by key; none for no color. Every
    /// rank of this group calls it; an abort of this group aborts that one too.
    pub fn split(
        &mut self,
        name: &str,
        color: Option<u32>,
        key: u32,
    ) -> Result<Option<Self>, CollectiveError> {
        let aborts = self.aborts.clone();
        self.split_under(name, color, key, &aborts)
    }

    /// The same with a group that these abort too, and no others.
    pub(super) fn split_under(
        &mut self,
        name: &str,
        color: Option<u32>,
        key: u32,
        aborts: &[AbortHandle],
    ) -> Result<Option<Self>, CollectiveError> {
        for (what, number) in [("color", color.unwrap_or(0)), ("key", key)] {
            if i32::try_from(number).is_err() {
                return invalid("split", format!("{what} {number} is above {}", i32::MAX));
            }
        }
        // Who comes along, so that the new group knows its size and its place.
        let members = self.exchange_split(color, key)?;
        let comm = self.ask(|done| Command::Split { color, key, done })?;
        let Some(comm) = comm else { return Ok(None) };
        let rank = members.iter().position(|rank| *rank == self.rank).unwrap_or(0) as u32;
        self.child(name, comm, (rank, members.len() as u32), aborts).map(Some)
    }

    /// Makes the group without these ranks, which need not be alive and do not call it. After a
    /// failure the group must be [`NcclOptions::shrinkable`]; what it ran is stopped first and ends
    /// with an error, and this group is finished.
    pub fn shrink(
        &mut self,
        name: &str,
        excluded: &[Rank],
        after_failure: bool,
    ) -> Result<Self, CollectiveError> {
        let mut gone: Vec<u32> = excluded.iter().map(|rank| rank.0).collect();
        gone.sort_unstable();
        gone.dedup();
        if gone.is_empty() || gone.contains(&self.rank) || gone.iter().any(|r| *r >= self.world) {
            return invalid("shrink", format!("{gone:?} of {} without this rank", self.world));
        }
        let (before, left) =
            (gone.partition_point(|rank| *rank < self.rank), self.world - gone.len() as u32);
        let request = |done| Command::Shrink { excluded: gone, after_failure, done };
        let Some(comm) = self.ask(request)? else {
            return Err(CollectiveError::unavailable("the shrunk group", "NCCL made none"));
        };
        self.child(name, comm, (self.rank - before as u32, left), &self.aborts)
    }

    /// Stops what this rank runs and finishes the group, except for [`Self::shrink`] after a
    /// failure. Needs NCCL 2.29.
    pub fn revoke(&mut self) -> Result<(), CollectiveError> {
        self.ask(|done| Command::Revoke { done })
    }

    fn child(
        &self,
        name: &str,
        comm: Comm,
        (rank, world): (u32, u32),
        parents: &[AbortHandle],
    ) -> Result<Self, CollectiveError> {
        let mut aborts = vec![AbortHandle::new()?];
        aborts.extend(parents.iter().cloned());
        let options = NcclOptions { group: name.to_owned(), ..self.options.clone() };
        let shape = (rank, world, self.generation);
        Self::start(self.device.clone(), options, shape, aborts, Origin::Made(comm))
    }

    /// The ranks with this rank's color, in the order of the new group.
    fn exchange_split(
        &mut self,
        color: Option<u32>,
        key: u32,
    ) -> Result<Vec<u32>, CollectiveError> {
        let word = |color: Option<u32>| color.map_or(-1, i64::from);
        let world = self.world as usize;
        let all = self.scratch(ElementType::I64, 2 * world)?;
        let own = all.slice(2 * self.rank as usize..2 * self.rank as usize + 2)?;
        self.write(&own, (&[word(color), i64::from(key)]).into())?;
        self.all_gather(&own, &all)?.wait()?;
        let mut words = vec![0i64; 2 * world];
        self.read(&all, (&mut words).into())?;
        let mut members: Vec<(i64, u32)> = words
            .chunks_exact(2)
            .zip(0..)
            .filter(|(words, _)| words[0] == word(color))
            .map(|(words, rank)| (words[1], rank))
            .collect();
        members.sort_unstable();
        Ok(members.into_iter().map(|(_, rank)| rank).collect())
    }
}

fn invalid<R>(call: &str, message: String) -> Result<R, CollectiveError> {
    Err(CollectiveError::InvalidDeviceCall { call: call.to_owned(), message })
}

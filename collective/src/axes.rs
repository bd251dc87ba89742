//! The mesh: ranks arranged along named axes, and the groups that follow from it.
//!
//! Pure arithmetic. Ranks are numbered row by row: the last axis is the innermost, so its groups are
//! neighbours and, with ranks numbered host by host, stay inside a host. Every rank computes the
//! same groups from the same mesh; nothing is negotiated. [`crate::Communicator::subgroup`] turns a
//! group into connections.

use std::collections::HashSet;
use std::fmt;

/// The axes of parallel training, outermost first, as [`Mesh::new`] is usually called. ZeRO shards
/// along `shard`; data parallelism is `replicate` and `shard` together.
pub const AXES: [&str; 6] = ["pipeline", "replicate", "shard", "context", "expert", "tensor"];

/// One axis: a name and how many ranks lie along it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// Its name, such as `tensor`.
    pub name: String,
    /// Its length, at least 1.
    pub size: u32,
}

/// Ranks arranged along axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    axes: Vec<Axis>,
}

/// Ranks of a parent that form a group, in the order of their ranks in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// What it is called in every log line and error, such as `shard@pipeline=1,tensor=0`.
    pub name: String,
    /// Its members, as ranks of the parent.
    pub ranks: Vec<u32>,
}

/// A mesh that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// The axes do not multiply to the number of ranks.
    #[error("{product} is {found}, but there are {world} ranks: change an axis or the ranks")]
    Product {
        /// Every factor.
        product: String,
        /// What they multiply to.
        found: u64,
        /// Ranks there are.
        world: u32,
    },
    /// An axis of no length.
    #[error("axis `{0}` has size 0, expected at least 1")]
    Empty(String),
    /// Two axes of one name.
    #[error("axis `{0}` is named twice")]
    Twice(String),
    /// A group along an axis that is not there.
    #[error("there is no axis `{found}`, expected one of {expected}")]
    Unknown {
        /// What was asked for.
        found: String,
        /// What there is.
        expected: String,
    },
    /// An axis that is laid over others must divide what they hold.
    #[error("an overlay of {size} does not divide the {held} ranks along {axes}")]
    Overlay {
        /// The overlay's size.
        size: u32,
        /// Ranks along the axes.
        held: u64,
        /// Those axes.
        axes: String,
    },
    /// A rank outside the mesh.
    #[error("rank {rank} is not below the {world} ranks of {mesh}")]
    Rank {
        /// Which.
        rank: u32,
        /// Ranks there are.
        world: u32,
        /// The mesh.
        mesh: String,
    },
}

impl Mesh {
    /// Arranges `world` ranks along axes, outermost first.
    ///
    /// # Errors
    /// If the axes do not multiply to `world`; the message names every factor.
    pub fn new(axes: &[(&str, u32)], world: u32) -> Result<Self, MeshError> {
        let mut names = HashSet::new();
        for (name, size) in axes {
            if *size == 0 {
                return Err(MeshError::Empty((*name).to_owned()));
            }
            if !names.insert(*name) {
                return Err(MeshError::Twice((*name).to_owned()));
            }
        }
        let axes: Vec<Axis> = axes
            .iter()
            .map(|(name, size)| Axis { name: (*name).to_owned(), size: *size })
            .collect();
        let mesh = Self { axes };
        let found = mesh.axes.iter().fold(1u64, |product, axis| {
            // Saturates far above any world.
            product.saturating_mul(u64::from(axis.size))
        });
        if found != u64::from(world) {
            return Err(MeshError::Product { product: mesh.to_string(), found, world });
        }
        Ok(mesh)
    }

    /// The axes, outermost first.
    pub fn axes(&self) -> &[Axis] {
        &self.axes
    }

    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        self.axes.iter().map(|axis| axis.size).product()
    }

    /// Where a rank lies: its index along every axis.
    ///
    /// # Errors
    /// If the rank is not in the mesh.
    pub fn coordinates(&self, rank: u32) -> Result<Vec<u32>, MeshError> {
        let world = self.world_size();
        if rank >= world {
            return Err(MeshError::Rank { rank, world, mesh: self.to_string() });
        }
        let mut rest = rank;
        let mut found = vec![0; self.axes.len()];
        for (place, axis) in found.iter_mut().zip(&self.axes).rev() {
            *place = rest % axis.size;
            rest /= axis.size;
        }
        Ok(found)
    }

    /// The ranks that differ from `rank` along the named axes only: the group it reduces with.
    ///
    /// # Errors
    /// If an axis or the rank is not in the mesh.
    pub fn group(&self, rank: u32, along: &[&str]) -> Result<Group, MeshError> {
        let free = self.indices(along)?;
        let own = self.coordinates(rank)?;
        let ranks = (0..self.world_size())
            .filter(|other| {
                let mut rest = *other;
                self.axes.iter().enumerate().rev().all(|(index, axis)| {
                    let place = rest % axis.size;
                    rest /= axis.size;
                    free.contains(&index) || place == own[index]
                })
            })
            .collect();
        let fixed: Vec<String> = (self.axes.iter().zip(&own).enumerate())
            .filter(|(index, (axis, _))| !free.contains(index) && axis.size > 1)
            .map(|(_, (axis, place))| format!("{}={place}", axis.name))
            .collect();
        let name = match fixed.is_empty() {
            true => along.join("+"),
            false => format!("{}@{}", along.join("+"), fixed.join(",")),
        };
        Ok(Group { name, ranks })
    }

    /// The group of `rank` on an axis laid *over* others: the ranks along `over` are cut into runs
    /// of `size` neighbours. Expert parallelism overlays the data axes so.
    ///
    /// # Errors
    /// If `size` does not divide the ranks along `over`.
    pub fn overlay(
        &self,
        rank: u32,
        name: &str,
        size: u32,
        over: &[&str],
    ) -> Result<Group, MeshError> {
        let whole = self.group(rank, over)?;
        let held = whole.ranks.len() as u64;
        if size == 0 || !held.is_multiple_of(u64::from(size)) {
            return Err(MeshError::Overlay { size, held, axes: over.join(" × ") });
        }
        let place = whole.ranks.iter().position(|other| *other == rank).unwrap_or(0);
        let run = place / size as usize;
        let ranks = whole.ranks[run * size as usize..(run + 1) * size as usize].to_vec();
        Ok(Group { name: format!("{name}#{run}@{}", whole.name), ranks })
    }

    /// Every group along the named axes, each once, in the order of their first ranks.
    ///
    /// # Errors
    /// If an axis is not in the mesh.
    pub fn groups(&self, along: &[&str]) -> Result<Vec<Group>, MeshError> {
        let mut groups: Vec<Group> = Vec::new();
        for rank in 0..self.world_size() {
            let group = self.group(rank, along)?;
            if group.ranks.first() == Some(&rank) {
                groups.push(group);
            }
        }
        Ok(groups)
    }

    fn indices(&self, along: &[&str]) -> Result<Vec<usize>, MeshError> {
        along
            .iter()
            .map(|name| {
                self.axes.iter().position(|axis| axis.name == *name).ok_or_else(|| {
                    let expected: Vec<String> =
                        self.axes.iter().map(|axis| format!("`{}`", axis.name)).collect();
                    let expected = expected.join(", ");
                    MeshError::Unknown { found: (*name).to_owned(), expected }
                })
            })
            .collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, axis) in self.axes.iter().enumerate() {
            let times = if index == 0 { "" } else { " × " };
            write!(f, "{times}{} {}", axis.name, axis.size)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh() -> Mesh {
        Mesh::new(&[("pipeline", 2), ("replicate", 2), ("shard", 3), ("tensor", 2)], 24).unwrap()
    }

    #[test]
    fn the_product_is_checked_and_every_factor_named() {
        let error = Mesh::new(&[("pipeline", 2), ("shard", 3), ("tensor", 2)], 8).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pipeline 2 × shard 3 × tensor 2 is 12, but there are 8 ranks: change an axis or the \
             ranks"
        );
        assert_eq!(Mesh::new(&[("a", 0)], 0), Err(MeshError::Empty("a".into())));
        assert_eq!(Mesh::new(&[("a", 1), ("a", 1)], 1), Err(MeshError::Twice("a".into())));
        let huge = Mesh::new(&[("a", u32::MAX), ("b", u32::MAX), ("c", u32::MAX)], 1);
        assert!(matches!(huge, Err(MeshError::Product { found: u64::MAX, .. })));
    }

    #[test]
    fn groups_along_any_axes_tile_the_world_and_hold_their_rank() {
        let mesh = mesh();
        let names = ["pipeline", "replicate", "shard", "tensor"];
        for mask in 0u32..16 {
            let along: Vec<&str> = (0..4)
                .filter(|bit| mask & (1 << bit) != 0)
                .map(|bit| names[bit as usize])
                .collect();
            let groups = mesh.groups(&along).unwrap();
            let mut seen: Vec<u32> = groups.iter().flat_map(|group| group.ranks.clone()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..24).collect::<Vec<_>>(), "{along:?}");
            for group in &groups {
                for rank in &group.ranks {
                    assert_eq!(&mesh.group(*rank, &along).unwrap(), group);
                }
            }
        }
    }

    #[test]
    fn the_last_axis_is_the_innermost_and_names_say_where() {
        let mesh = mesh();
        assert_eq!(mesh.coordinates(23), Ok(vec![1, 1, 2, 1]));
        let tensor = mesh.group(0, &["tensor"]).unwrap();
        assert_eq!(tensor.ranks, [0, 1]);
        assert_eq!(tensor.name, "tensor@pipeline=0,replicate=0,shard=0");
        let data = mesh.group(13, &["replicate", "shard"]).unwrap();
        assert_eq!(data.ranks, [13, 15, 17, 19, 21, 23]);
        assert_eq!(data.name, "replicate+shard@pipeline=1,tensor=1");
        let experts = mesh.overlay(19, "expert", 3, &["replicate", "shard"]).unwrap();
        assert_eq!(experts.ranks, [19, 21, 23]);
        assert_eq!(experts.name, "expert#1@replicate+shard@pipeline=1,tensor=1");
        assert!(mesh.overlay(19, "expert", 4, &["replicate", "shard"]).is_err());
        assert!(mesh.group(0, &["context"]).unwrap_err().to_string().contains("`pipeline`"));
        assert!(mesh.coordinates(24).is_err());
    }
}

//! Which algorithm carries a reduction: a table over operation, world size and bytes.
//!
//! Pure. The first rule that applies counts. The deterministic algorithms all give the bits of the
//! fixed tree, so a table changes how long a call takes and nothing else; but every rank of a group
//! must use the same, which forming compares by [`Selection::digest`].

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::call::Operation;
use crate::communicator::Reduction;

/// Larger files are not a table.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Rules beyond this are a mistake: each is looked at in every call.
const RULES_MAX: usize = 256;

/// How the ranks of a group reduce together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Every rank sends everything to all and reduces alone: one step, most bytes.
    Direct,
    /// Every rank reduces a chunk and sends it to all, piece by piece at the same time: two steps,
    /// fewest bytes.
    Scatter,
    /// Neighbours exchange everything, then pairs, then fours: a step per doubling, each to one
    /// rank. Worlds of a power of two.
    RecursiveDoubling,
    /// Neighbours exchange halves, then pairs halves of halves, and back: fewest bytes, each step to
    /// one rank. Worlds of a power of two.
    HalvingDoubling,
    /// Chunks travel from rank to rank and are added on the way: fewest bytes, two connections per
    /// rank. The order of the sum is not the tree's: only where `reduction = "fast"`.
    Ring,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 5] =
        [Self::Direct, Self::Scatter, Self::RecursiveDoubling, Self::HalvingDoubling, Self::Ring];

    /// Its name, as in a table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Scatter => "scatter",
            Self::RecursiveDoubling => "recursive_doubling",
            Self::HalvingDoubling => "halving_doubling",
            Self::Ring => "ring",
        }
    }

    /// Whether it combines neighbours level by level.
    pub fn is_by_pairs(self) -> bool {
        matches!(self, Self::RecursiveDoubling | Self::HalvingDoubling)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The operations that have a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selectable {
    /// `all_reduce`, in its variants.
    AllReduce,
    /// `reduce_lanes`.
    ReduceLanes,
}

impl Selectable {
    /// The operation's choice, if it has one.
    pub fn of(operation: Operation) -> Option<Self> {
        match operation {
            Operation::AllReduce | Operation::AllReduceMany => Some(Self::AllReduce),
            Operation::ReduceLanes => Some(Self::ReduceLanes),
            _ => None,
        }
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// For which operation.
    pub operation: Selectable,
    /// Fewest ranks.
    #[serde(default = "one")]
    pub world_min: u32,
    /// Most ranks; absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub world_max: Option<u32>,
    /// Most bytes of the whole buffer; absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<u64>,
    /// What to do.
    pub algorithm: Algorithm,
}

fn one() -> u32 {
    1
}

impl Rule {
    /// Whether every call of another rule is one of this.
    fn covers(&self, other: &Self) -> bool {
        let most = |world: Option<u32>| world.unwrap_or(u32::MAX);
        let bytes = |bytes: Option<u64>| bytes.unwrap_or(u64::MAX);
        // What applies only to some groups leaves the others to later rules.
        let always = !self.algorithm.is_by_pairs() && self.algorithm != Algorithm::Ring;
        (always || self.algorithm == other.algorithm)
            && self.operation == other.operation
            && self.world_min <= other.world_min
            && most(self.world_max) >= most(other.world_max)
            && bytes(self.bytes_max) >= bytes(other.bytes_max)
    }

    /// What is wrong with it.
    fn fault(&self) -> Option<String> {
        let most = self.world_max.unwrap_or(u32::MAX);
        if self.world_min == 0 || self.world_min > most {
            return Some(format!("worlds of {} to {most} ranks, expected some", self.world_min));
        }
        let power = self.world_min.checked_next_power_of_two();
        if self.algorithm.is_by_pairs() && power.is_none_or(|power| power > most) {
            return Some(format!(
                "`{}` needs a power of two, and none is from {} to {most}",
                self.algorithm, self.world_min
            ));
        }
        None
    }
}

/// What a call is chosen for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Which operation.
    pub operation: Selectable,
    /// Number of ranks.
    pub world: u32,
    /// Bytes of the whole buffer.
    pub bytes: usize,
    /// Whether ranks combine as neighbours, level by level.
    pub pairs: bool,
    /// Whether the order of sums is fixed.
    pub reduction: Reduction,
}

/// A table that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SelectionError {
    /// The file cannot be read or written.
    #[error("algorithm table `{}`: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no table.
    #[error("not a table of algorithms: {0}")]
    Json(#[from] serde_json::Error),
    /// A rule that cannot be.
    #[error("rule {number} of the table of algorithms: {message}")]
    Rule {
        /// Counted from 1.
        number: usize,
        /// What was found, what was expected.
        message: String,
    },
    /// More rules than a call can look at.
    #[error("a table of {found} rules, at most {RULES_MAX} are allowed")]
    Length {
        /// How many.
        found: usize,
    },
}

/// A table of algorithms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Selection {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    rules: Vec<Rule>,
}

impl Default for Selection {
    /// Few steps while a message costs more than its bytes: as measured over loopback with 2 and 4
    /// ranks, estimated beyond. Other networks want their own table.
    fn default() -> Self {
        let rule = |operation, world_max, bytes_max, algorithm| Rule {
            operation,
            world_min: 1,
            world_max,
            bytes_max,
            algorithm,
        };
        let rules = [Selectable::AllReduce, Selectable::ReduceLanes]
            .into_iter()
            .flat_map(|operation| {
                [
                    rule(operation, Some(2), Some(512 << 10), Algorithm::Direct),
                    rule(operation, None, Some(128 << 10), Algorithm::RecursiveDoubling),
                    rule(operation, Some(8), Some(16 << 10), Algorithm::Direct),
                    rule(operation, None, Some(2 << 10), Algorithm::Direct),
                    rule(operation, None, None, Algorithm::Scatter),
                ]
            })
            .collect();
        Self { rules }
    }
}

impl Selection {
    /// A table of rules, the first that applies first; where none does, [`Algorithm::Scatter`].
    ///
    /// # Errors
    /// [`SelectionError::Rule`] for a rule that can never apply, [`SelectionError::Length`].
    pub fn new(rules: Vec<Rule>) -> Result<Self, SelectionError> {
        if rules.len() > RULES_MAX {
            return Err(SelectionError::Length { found: rules.len() });
        }
        for (index, rule) in rules.iter().enumerate() {
            let shadow = || rules[..index].iter().position(|earlier| earlier.covers(rule));
            let message = rule.fault().or_else(|| {
                shadow().map(|by| format!("never applies: rule {} stands before it", by + 1))
            });
            if let Some(message) = message {
                return Err(SelectionError::Rule { number: index + 1, message });
            }
        }
        Ok(Self { rules })
    }

    /// Always the same algorithm, where it applies.
    pub fn only(algorithm: Algorithm) -> Self {
        let rule = |operation| Rule {
            operation,
            world_min: 1,
            world_max: None,
            bytes_max: None,
            algorithm,
        };
        Self { rules: vec![rule(Selectable::AllReduce), rule(Selectable::ReduceLanes)] }
    }

    /// The rules, in order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The algorithm for a call.
    pub fn choose(&self, question: Question) -> Algorithm {
        let Question { operation, world, bytes, pairs, reduction } = question;
        let applies = |rule: &&Rule| {
            rule.operation == operation
                && rule.world_min <= world
                && rule.world_max.is_none_or(|most| world <= most)
                && rule.bytes_max.is_none_or(|most| bytes as u64 <= most)
                && (!rule.algorithm.is_by_pairs() || pairs)
                && (rule.algorithm != Algorithm::Ring || reduction == Reduction::Fast)
        };
        self.rules.iter().find(applies).map_or(Algorithm::Scatter, |rule| rule.algorithm)
    }

    /// A number that is the same for the same table.
    pub fn digest(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        for rule in &self.rules {
            let Rule { operation, world_min, world_max, bytes_max, algorithm } = *rule;
            hasher.update(&[operation as u8, algorithm as u8]);
            hasher.update(&world_min.to_le_bytes());
            hasher.update(&world_max.unwrap_or(u32::MAX).to_le_bytes());
            hasher.update(&bytes_max.unwrap_or(u64::MAX).to_le_bytes());
        }
        let [a, b, c, d, e, f, g, h, ..] = *hasher.finalize().as_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Reads a table from JSON: `{"rules": [{"operation": "all_reduce", "world_max": 8,
    /// "bytes_max": 16384, "algorithm": "direct"}, …]}`.
    ///
    /// # Errors
    /// [`SelectionError::Json`], or as [`Selection::new`].
    pub fn from_json(text: &str) -> Result<Self, SelectionError> {
        let Unchecked { rules } = serde_json::from_str(text)?;
        Self::new(rules)
    }

    /// The table as JSON.
    ///
    /// # Errors
    /// Never for a table that was made here.
    pub fn to_json(&self) -> Result<String, SelectionError> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// Reads a table from a file.
    ///
    /// # Errors
    /// [`SelectionError::File`], or as [`Selection::from_json`].
    pub fn load(path: &Path) -> Result<Self, SelectionError> {
        let failed = |source| SelectionError::File { path: path.to_owned(), source };
        let bytes = std::fs::metadata(path).map_err(failed)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(failed(std::io::Error::other("too large to be a table of algorithms")));
        }
        Self::from_json(&std::fs::read_to_string(path).map_err(failed)?)
    }

    /// Writes the table to a file.
    ///
    /// # Errors
    /// [`SelectionError::File`].
    pub fn save(&self, path: &Path) -> Result<(), SelectionError> {
        let failed = |source| SelectionError::File { path: path.to_owned(), source };
        std::fs::write(path, self.to_json()? + "\n").map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(selection: &Selection, world: u32, bytes: usize, reduction: Reduction) -> Algorithm {
        let operation = Selectable::AllReduce;
        let pairs = world.is_power_of_two();
        selection.choose(Question { operation, world, bytes, pairs, reduction })
    }

    #[test]
    fn the_first_rule_that_applies_counts() {
        let selection = Selection::from_json(
            r#"{"rules": [
                {"operation": "all_reduce", "bytes_max": 100, "algorithm": "direct"},
                {"operation": "reduce_lanes", "algorithm": "direct"},
                {"operation": "all_reduce", "world_min": 8, "algorithm": "ring"},
                {"operation": "all_reduce", "world_max": 8, "algorithm": "halving_doubling"}
            ]}"#,
        )
        .unwrap();
        for (world, bytes, reduction, expected) in [
            (2, 100, Reduction::Deterministic, Algorithm::Direct),
            (2, 101, Reduction::Deterministic, Algorithm::HalvingDoubling),
            (3, 101, Reduction::Deterministic, Algorithm::Scatter),
            (8, 101, Reduction::Deterministic, Algorithm::HalvingDoubling),
            (8, 101, Reduction::Fast, Algorithm::Ring),
            (9, 101, Reduction::Fast, Algorithm::Ring),
            (9, 101, Reduction::Deterministic, Algorithm::Scatter),
        ] {
            let found = ask(&selection, world, bytes, reduction);
            assert_eq!(found, expected, "{bytes} bytes, {world} ranks, {reduction:?}");
        }
        assert_eq!(Selection::from_json(&selection.to_json().unwrap()).unwrap(), selection);
        assert_ne!(selection.digest(), Selection::default().digest());
        for algorithm in Algorithm::ALL {
            let name = serde_json::to_value(algorithm).unwrap();
            assert_eq!(name.as_str(), Some(algorithm.name()));
        }
    }

    #[test]
    fn the_default_is_a_valid_table_and_survives_a_file() {
        let selection = Selection::default();
        assert_eq!(Selection::new(selection.rules.clone()).unwrap(), selection);
        assert_eq!(ask(&selection, 2, 4096, Reduction::Deterministic), Algorithm::Direct);
        assert_eq!(ask(&selection, 4, 1 << 20, Reduction::Fast), Algorithm::Scatter);
        let path = std::env::temp_dir().join(format!("selection-{}.json", std::process::id()));
        selection.save(&path).unwrap();
        assert_eq!(Selection::load(&path).unwrap().digest(), selection.digest());
        std::fs::remove_file(&path).unwrap();
        let error = Selection::load(&path).unwrap_err().to_string();
        assert!(error.contains("selection-") && error.contains("No such file"), "{error}");
    }

    #[test]
    fn tables_that_cannot_be_are_refused_with_the_reason() {
        for (rules, expected) in [
            (r#"[{"operation": "all_reduce", "algorithm": "tree"}]"#, "unknown variant `tree`"),
            (r#"[{"operation": "barrier", "algorithm": "ring"}]"#, "unknown variant `barrier`"),
            (
                r#"[{"operation": "all_reduce", "algorithm": "ring", "ranks": 3}]"#,
                "unknown field `ranks`",
            ),
            (
                r#"[{"operation": "all_reduce", "world_min": 3, "world_max": 2,
                     "algorithm": "direct"}]"#,
                "rule 1 of the table of algorithms: worlds of 3 to 2 ranks",
            ),
            (
                r#"[{"operation": "all_reduce", "world_min": 5, "world_max": 7,
                     "algorithm": "recursive_doubling"}]"#,
                "`recursive_doubling` needs a power of two, and none is from 5 to 7",
            ),
            (
                r#"[{"operation": "all_reduce", "bytes_max": 9, "algorithm": "direct"},
                    {"operation": "all_reduce", "bytes_max": 8, "algorithm": "ring"}]"#,
                "rule 2 of the table of algorithms: never applies: rule 1 stands before it",
            ),
        ] {
            let error = Selection::from_json(&format!("{{\"rules\": {rules}}}")).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}

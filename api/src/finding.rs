//! What the flight logs of a gang say when they are laid side by side: who waits in which call, for
//! whom, and whose calls disagree.
//!
//! The documents and their words; `coordinator-core` finds out what is the case.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::flight::{FlightCall, FlightLog, FlightState};
use crate::ids::{Generation, Name, Rank};
use crate::records::Phase;
use crate::stacks::StackDump;

/// Ranks that a sentence names one by one; beyond, it says how many more.
const RANKS_SHOWN: usize = 8;

/// The flight logs of a gang and what they say: the answer to `cluster flight`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlightReport {
    /// The job.
    pub job: Name,
    /// Where the job is in its life.
    pub phase: Phase,
    /// The generation that the logs are of.
    pub generation: Generation,
    /// Every rank, in order.
    pub ranks: Vec<RankFlight>,
    /// What should be known of the logs themselves.
    pub notes: Vec<String>,
    /// What they say.
    pub findings: Vec<Finding>,
    /// The findings in words.
    pub verdict: Vec<String>,
    /// What threads were in: of ranks that were asked now, else of those that were replaced because
    /// they held their gang up.
    #[serde(default)]
    pub stacks: Vec<StackDump>,
}

/// One rank's log, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankFlight {
    /// The rank.
    pub rank: Rank,
    /// The worker that runs it, where that is known.
    pub worker: Option<Name>,
    /// Its host, where that is known.
    pub host: String,
    /// Where the log comes from.
    pub source: FlightSource,
    /// Why there is no log; empty when there is one.
    pub absent: String,
    /// The log.
    pub log: Option<FlightLog>,
}

/// Where a log comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlightSource {
    /// The running rank told it just now.
    Live,
    /// It was kept when the rank failed or was killed.
    Kept,
    /// There is none.
    None,
}

/// One thing that the logs say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "finding", rename_all = "kebab-case")]
pub enum Finding {
    /// A rank has no log: it is the first suspect.
    Silent {
        /// Which one.
        rank: Rank,
        /// What is known of it.
        why: String,
    },
    /// A rank's log is of another generation.
    OtherGeneration {
        /// Which one.
        rank: Rank,
        /// Its generation.
        found: Generation,
        /// The gang's.
        expected: Generation,
    },
    /// Ranks called different things under one number.
    Mismatch {
        /// In which group.
        group: String,
        /// The first number at which they differ.
        sequence: u64,
        /// Who called what.
        calls: Vec<CallOf>,
    },
    /// Some ranks are in a call, others have yet to come to it.
    Waiting {
        /// In which group.
        group: String,
        /// The call's number.
        sequence: u64,
        /// The call.
        call: FlightCall,
        /// Who is in it.
        ranks: Vec<Rank>,
        /// How far they came: failed when it has failed for any.
        state: FlightState,
        /// The longest time that one of them has been in it.
        nanoseconds: u64,
        /// Who has yet to come to it.
        behind: Vec<Behind>,
        /// Who has it behind.
        done: Vec<Rank>,
    },
    /// No rank of a group is in a call.
    Outside {
        /// Which group.
        group: String,
        /// The last call that each has completed, by number; ranks with the same one together.
        completed: Vec<CompletedBy>,
    },
    /// Ranks ended, with these words.
    Ended {
        /// Which ones.
        ranks: Vec<Rank>,
        /// Why.
        why: String,
    },
}

/// Ranks that made one call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CallOf {
    /// Who.
    pub ranks: Vec<Rank>,
    /// What.
    pub call: FlightCall,
}

/// Ranks that came equally far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompletedBy {
    /// Who.
    pub ranks: Vec<Rank>,
    /// How far; absent: no call yet.
    pub completed: Option<u64>,
}

/// A rank that others wait for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Behind {
    /// Which one.
    pub rank: Rank,
    /// Whether there is a log of it: without one nothing below is known.
    pub has_log: bool,
    /// The last call of the group that it has completed, by number.
    pub completed: Option<u64>,
    /// How long before its log was taken that was.
    pub completed_nanoseconds: Option<u64>,
    /// The call that it is in, with its group; absent: in none.
    pub inside: Option<String>,
    /// What it was doing.
    pub tag: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent { rank, why } => write!(f, "rank {} has no flight log: {why}", rank.0),
            Self::OtherGeneration { rank, found, expected } => write!(
                f,
                "rank {} is in generation {}, expected {}: it was left behind or is ahead",
                rank.0, found.0, expected.0
            ),
            Self::Mismatch { group, sequence, calls } => {
                write!(f, "group `{group}`: the calls #{sequence} disagree: ")?;
                for (index, CallOf { ranks, call }) in calls.iter().enumerate() {
                    let comma = if index > 0 { ", " } else { "" };
                    write!(f, "{comma}{} called {call}", listed(ranks))?;
                }
                f.write_str("; all ranks must make the same calls in the same order")
            }
            Self::Waiting { .. } => self.waiting(f),
            Self::Outside { group, completed } => {
                write!(f, "group `{group}`: no rank is in a call; ")?;
                for (index, CompletedBy { ranks, completed }) in completed.iter().enumerate() {
                    let comma = if index > 0 { ", " } else { "" };
                    let verb = if ranks.len() == 1 { "has" } else { "have" };
                    let what = completed.map_or("none yet".into(), |number| format!("#{number}"));
                    write!(f, "{comma}{} {verb} completed {what}", listed(ranks))?;
                }
                Ok(())
            }
            Self::Ended { ranks, why } => write!(f, "{} ended: {why}", listed(ranks)),
        }
    }
}

impl Finding {
    fn waiting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Waiting { group, sequence, call, ranks, state, nanoseconds, behind, done } = self
        else {
            return Ok(());
        };
        let one = ranks.len() == 1;
        let verb = match (state, behind.is_empty(), one) {
            (FlightState::Failed, ..) => "failed",
            (_, false, true) => "waits",
            (_, false, false) => "wait",
            (_, true, true) => "is",
            (_, true, false) => "are",
        };
        let time = seconds(*nanoseconds);
        let all = behind.is_empty() && done.is_empty() && !one;
        let who = if all { format!("all {} ranks", ranks.len()) } else { listed(ranks) };
        let time = match state {
            FlightState::Failed => format!("after {time}"),
            _ => format!("for {time}"),
        };
        write!(f, "group `{group}`: {who} {verb} in #{sequence} {call} {time}")?;
        for late in behind.iter().take(RANKS_SHOWN) {
            write!(f, "; {late}")?;
        }
        if behind.len() > RANKS_SHOWN {
            write!(f, "; and {} more are behind", behind.len() - RANKS_SHOWN)?;
        }
        if !done.is_empty() {
            let verb = if done.len() == 1 { "has" } else { "have" };
            write!(f, "; {} {verb} completed it", listed(done))?;
        }
        Ok(())
    }
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.has_log {
            return write!(f, "rank {} has no flight log", self.rank.0);
        }
        write!(f, "rank {} is behind: ", self.rank.0)?;
        match (self.completed, self.completed_nanoseconds) {
            (Some(number), Some(ago)) => {
                write!(f, "last completed #{number}, {} ago, ", seconds(ago))?;
            }
            (Some(number), None) => write!(f, "last completed #{number}, ")?,
            (None, _) => f.write_str("completed none yet, ")?,
        }
        match &self.inside {
            Some(call) => write!(f, "is in {call}")?,
            None => f.write_str("is in no collective")?,
        }
        if self.tag.is_empty() { Ok(()) } else { write!(f, " (tag: {})", self.tag) }
    }
}

/// "3.2 s".
pub fn seconds(nanoseconds: u64) -> String {
    let time = Duration::from_nanos(nanoseconds);
    match time.as_secs() {
        0..100 => format!("{:.1} s", time.as_secs_f64()),
        whole => format!("{whole} s"),
    }
}

/// "rank 3", "ranks 0, 2, 3", "ranks 0–6, 9".
pub fn listed(ranks: &[Rank]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(rank.0) => *last = rank.0,
            _ => runs.push((rank.0, rank.0)),
        }
    }
    let mut parts = Vec::new();
    for (first, last) in runs {
        match last - first {
            0 => parts.push(first.to_string()),
            1 => parts.extend([first.to_string(), last.to_string()]),
            _ => parts.push(format!("{first}–{last}")),
        }
    }
    let more = parts.len().saturating_sub(RANKS_SHOWN);
    parts.truncate(RANKS_SHOWN);
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    let tail = if more > 0 { ", …" } else { "" };
    format!("{noun} {}{tail}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_times_read_well() {
        let ranks = |numbers: &[u32]| numbers.iter().copied().map(Rank).collect::<Vec<_>>();
        for (numbers, shown) in [
            (&[3][..], "rank 3"),
            (&[0, 1, 3], "ranks 0, 1, 3"),
            (&[0, 1, 2, 3, 5], "ranks 0–3, 5"),
            (&[0, 2, 4, 6, 8, 10, 12, 14, 16], "ranks 0, 2, 4, 6, 8, 10, 12, 14, …"),
        ] {
            assert_eq!(listed(&ranks(numbers)), shown);
        }
        assert_eq!(seconds(3_240_000_000), "3.2 s");
        assert_eq!(seconds(250_000_000_000), "250 s");
    }
}

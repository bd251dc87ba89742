//! What all ranks must have in common before the first step. Hosts may hold different files under one
//! path, and nothing later would notice.

use api::Rank;
use collective::{CollectiveError, Communicator};

/// Characters of a digest that an error shows.
const SHOWN: usize = 16;
/// Said by a rank that holds a state.
const HOLDS: &str = "holds";

/// A rank that has something else than the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// The first such rank.
    pub rank: Rank,
    /// Others hold a state of the job: they have computed with what they have, so this one is wrong,
    /// and the job need not end for it.
    pub is_newcomer: bool,
    /// What differs.
    pub message: String,
}

/// Compares `inputs`, (what, digest) pairs, the same `what`s everywhere, with those of the first rank
/// that holds a state, or else of rank 0. The same result on every rank.
pub fn agree(
    communicator: &mut dyn Communicator,
    inputs: &[(&str, &str)],
    holds_state: bool,
) -> Result<Result<(), Disagreement>, CollectiveError> {
    let mut mine = vec![if holds_state { HOLDS } else { "" }];
    mine.extend(inputs.iter().map(|(_, digest)| *digest));
    let all = communicator.gather_bytes(mine.join("\n").as_bytes())?;
    let all: Vec<Vec<String>> = all
        .iter()
        .map(|bytes| String::from_utf8_lossy(bytes).split('\n').map(str::to_owned).collect())
        .collect();
    let holder = all.iter().position(|theirs| theirs.first().is_some_and(|word| word == HOLDS));
    let reference = holder.unwrap_or(0);
    let first = all.get(reference).cloned().unwrap_or_default();
    for (rank, theirs) in all.iter().enumerate() {
        for (index, (what, _)) in (1..).zip(inputs) {
            let (expected, found) = (first.get(index), theirs.get(index));
            if expected != found {
                let message = format!(
                    "rank {rank} has other {what} than rank {reference} ({}…, rank {reference} has \
                     {}…): every host must hold the same files under the channels' paths",
                    shown(found),
                    shown(expected)
                );
                let rank = Rank(u32::try_from(rank).unwrap_or(u32::MAX));
                return Ok(Err(Disagreement { rank, is_newcomer: holder.is_some(), message }));
            }
        }
    }
    Ok(Ok(()))
}

fn shown(digest: Option<&String>) -> String {
    digest.map(|text| text.chars().take(SHOWN).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use api::{Generation, Rank, Secret};
    use collective::{GroupOptions, Listener};

    use super::*;

    /// One thread per rank, over real sockets; rank `r` brings `digests[r]`, and a state if it is
    /// `holder`.
    fn outcomes(
        digests: &[[&'static str; 2]],
        holder: Option<usize>,
    ) -> Vec<Result<(), Disagreement>> {
        let listeners: Vec<Listener> = digests
            .iter()
            .map(|_| Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).expect("a port"))
            .collect();
        let peers: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
        let ranks: Vec<_> = listeners
            .into_iter()
            .zip(digests.to_vec())
            .enumerate()
            .map(|(rank, (listener, digests))| {
                let options = GroupOptions {
                    job: "a".parse().expect("a name"),
                    group: "data".into(),
                    generation: Generation(1),
                    rank: Rank(rank as u32),
                    world_size: peers.len() as u32,
                    secret: Secret::new("of the test"),
                    connect_timeout: Duration::from_secs(60),
                    reduction: Default::default(),
                    transport: Default::default(),
                    host: None,
                };
                let peers = peers.clone();
                std::thread::spawn(move || {
                    let mut group = listener.connect(options, &peers).expect("connects");
                    let inputs = [("training data", digests[0]), ("settings", digests[1])];
                    agree(&mut group, &inputs, holder == Some(rank)).expect("compared")
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    }

    #[test]
    fn a_rank_with_other_data_is_named_on_every_rank() {
        let same = outcomes(&[["d", "s"], ["d", "s"], ["d", "s"]], None);
        assert!(same.iter().all(Result::is_ok));
        let refused = outcomes(&[["d", "s"], ["d", "s"], ["e", "s"]], None);
        for outcome in &refused {
            let Disagreement { rank, is_newcomer, message } = outcome.as_ref().expect_err("other");
            assert_eq!((*rank, *is_newcomer), (Rank(2), false));
            let text = "rank 2 has other training data than rank 0";
            assert!(message.starts_with(text), "{message}");
        }
        let refused = outcomes(&[["d", "s"], ["d", "t"]], None);
        assert!(refused[0].as_ref().expect_err("other").message.contains("other settings"));
    }

    #[test]
    fn who_holds_a_state_is_right_even_against_rank_0() {
        let found = outcomes(&[["e", "s"], ["d", "s"], ["d", "s"]], Some(1));
        for outcome in &found {
            let Disagreement { rank, is_newcomer, .. } = outcome.as_ref().expect_err("other");
            assert_eq!((*rank, *is_newcomer), (Rank(0), true));
        }
    }
}

//! What all ranks must have in common before the first step. Hosts may hold different files under one
//! path, and nothing later would notice.

use collective::Communicator;

use crate::error::TrainError;

/// Characters of a digest that an error shows.
const SHOWN: usize = 16;

/// Fails on every rank, naming the first rank and the first thing that differs from rank 0's.
/// `inputs` are (what, digest) pairs, the same `what`s everywhere.
pub fn agree(
    communicator: &mut dyn Communicator,
    inputs: &[(&str, &str)],
) -> Result<(), TrainError> {
    let mine: Vec<&str> = inputs.iter().map(|(_, digest)| *digest).collect();
    let all = communicator.gather_bytes(mine.join("\n").as_bytes())?;
    let read = |bytes: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
    };
    let first = all.first().map(|bytes| read(bytes)).unwrap_or_default();
    for (rank, bytes) in all.iter().enumerate() {
        let theirs = read(bytes);
        for (index, (what, _)) in inputs.iter().enumerate() {
            let (expected, found) = (first.get(index), theirs.get(index));
            if expected != found {
                return Err(TrainError::Job(format!(
                    "rank {rank} has other {what} than rank 0 ({}…, rank 0 has {}…): every host \
                     must hold the same files under the channels' paths",
                    shown(found),
                    shown(expected)
                )));
            }
        }
    }
    Ok(())
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

    /// One thread per rank, over real sockets; rank `r` brings `digests[r]`.
    fn outcomes(digests: &[[&'static str; 2]]) -> Vec<Result<(), String>> {
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
                    agree(&mut group, &inputs).map_err(|error| {
                        assert!(!error.is_retryable(), "the files stay as they are");
                        error.to_string()
                    })
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    }

    #[test]
    fn a_rank_with_other_data_is_named_on_every_rank() {
        assert!(outcomes(&[["d", "s"], ["d", "s"], ["d", "s"]]).iter().all(Result::is_ok));
        let refused = outcomes(&[["d", "s"], ["d", "s"], ["e", "s"]]);
        for outcome in &refused {
            let text = outcome.as_ref().expect_err("other data");
            assert!(text.starts_with("rank 2 has other training data than rank 0"), "{text}");
        }
        let refused = outcomes(&[["d", "s"], ["d", "t"]]);
        assert!(refused[0].as_ref().expect_err("other settings").contains("other settings"));
    }
}

//! Where things lie in the store: the one place that spells keys.
//!
//! Every key that a gang writes carries its generation, so a cut-off gang can never overwrite what
//! its successor wrote. Keys are relative to the store's root, without a leading or trailing `/`.

use api::{Generation, Name, Rank, Step};

/// The weights within a [`model`] folder.
pub const MODEL_WEIGHTS: &str = "model.safetensors";
/// The descriptor within a [`model`] folder: what is needed to serve the weights.
pub const MODEL_DESCRIPTOR: &str = "model.json";
/// The manifest within a [`checkpoint`] folder.
pub const MANIFEST: &str = "manifest.json";

/// The folder of all checkpoints of a job.
pub fn checkpoints(job: &Name) -> String {
    format!("jobs/{job}/checkpoints")
}

/// The folder of one checkpoint; sorted by name, a job's checkpoints are sorted by step.
pub fn checkpoint(job: &Name, step: Step, generation: Generation) -> String {
    format!("jobs/{job}/checkpoints/{:012}-{generation}", step.0)
}

/// The manifest of a checkpoint.
pub fn manifest(job: &Name, step: Step, generation: Generation) -> String {
    format!("{}/{MANIFEST}", checkpoint(job, step, generation))
}

/// One rank's shard of a checkpoint. `writer` is unique to the process that writes it, so that no
/// write ever replaces a shard that some manifest already names.
pub fn shard(job: &Name, step: Step, generation: Generation, rank: Rank, writer: &str) -> String {
    format!("{}/rank-{:05}-{writer}.safetensors", checkpoint(job, step, generation), rank.0)
}

/// The folder of the model that a generation finished.
pub fn model(job: &Name, generation: Generation) -> String {
    format!("jobs/{job}/model/{generation}")
}

/// The folder of a rank's log segments.
pub fn logs(job: &Name, generation: Generation, rank: Rank) -> String {
    format!("jobs/{job}/logs/{generation}/{rank}")
}

/// The folder of all flight logs of a job that were kept.
pub fn flights(job: &Name) -> String {
    format!("jobs/{job}/flight")
}

/// The flight log that was kept of a rank.
pub fn flight(job: &Name, generation: Generation, rank: Rank) -> String {
    format!("{}/{generation}/{rank}.json", flights(job))
}

/// Reads a key that [`flight`] made; anything else is `None`.
pub fn parse_flight(job: &Name, key: &str) -> Option<(Generation, Rank)> {
    let (generation, rank) = parse_beside_flights(job, key, ".json")?;
    (flight(job, generation, rank) == key).then_some((generation, rank))
}

/// The stacks that were kept of a rank, beside its flight log.
pub fn stacks(job: &Name, generation: Generation, rank: Rank) -> String {
    format!("{}/{generation}/{rank}.stacks.json", flights(job))
}

/// Reads a key that [`stacks`] made; anything else is `None`.
pub fn parse_stacks(job: &Name, key: &str) -> Option<(Generation, Rank)> {
    let (generation, rank) = parse_beside_flights(job, key, ".stacks.json")?;
    (stacks(job, generation, rank) == key).then_some((generation, rank))
}

fn parse_beside_flights(job: &Name, key: &str, suffix: &str) -> Option<(Generation, Rank)> {
    let (generation, rank) =
        key.strip_prefix(&flights(job))?.strip_prefix("/g")?.split_once('/')?;
    let rank = rank.strip_prefix('r')?.strip_suffix(suffix)?;
    Some((Generation(generation.parse().ok()?), Rank(rank.parse().ok()?)))
}

/// What a manifest's key says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestKey {
    /// Whose checkpoint.
    pub job: Name,
    /// Steps applied in it.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
}

/// Reads a key that [`manifest`] made; anything else is `None`.
pub fn parse_manifest(key: &str) -> Option<ManifestKey> {
    let mut parts = key.strip_prefix("jobs/")?.split('/');
    let job: Name = parts.next()?.parse().ok()?;
    let folder = parts.nth(1)?;
    let (step, generation) = folder.split_once("-g")?;
    let step = Step(step.parse().ok()?);
    let generation = Generation(generation.parse().ok()?);
    // Written again, it must be the same text: no second spelling of a key is accepted.
    (manifest(&job, step, generation) == key).then_some(ManifestKey { job, step, generation })
}

/// The checkpoint in whose folder an object of `job` lies, and the object's name there; `None` for
/// what lies elsewhere.
pub fn parse_object<'a>(job: &Name, key: &'a str) -> Option<(Step, Generation, &'a str)> {
    let (folder, file) = key.rsplit_once('/')?;
    let ManifestKey { job: owner, step, generation } =
        parse_manifest(&format!("{folder}/{MANIFEST}"))?;
    (owner == *job && !file.is_empty()).then_some((step, generation, file))
}

/// The folder of the checkpoint that a manifest's key names, when it is such a key.
pub(crate) fn folder_of(manifest_key: &str) -> Option<&str> {
    parse_manifest(manifest_key)?;
    manifest_key.strip_suffix(MANIFEST)?.strip_suffix('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flight_log_s_key_reads_back() {
        let job: Name = "digits".parse().expect("a name");
        let key = flight(&job, Generation(7), Rank(12));
        assert_eq!(key, "jobs/digits/flight/g7/r12.json");
        assert_eq!(parse_flight(&job, &key), Some((Generation(7), Rank(12))));
        for bad in ["jobs/digits/flight/g7/r012.json", "jobs/digit/flight/g7/r1.json", "x"] {
            assert_eq!(parse_flight(&job, bad), None, "{bad:?} was accepted");
        }
        let beside = stacks(&job, Generation(7), Rank(12));
        assert_eq!(parse_stacks(&job, &beside), Some((Generation(7), Rank(12))));
        assert_eq!((parse_flight(&job, &beside), parse_stacks(&job, &key)), (None, None));
    }

    #[test]
    fn an_object_s_key_tells_its_checkpoint_and_no_other_job_s() {
        let job: Name = "digits".parse().expect("a name");
        let key = shard(&job, Step(7), Generation(2), Rank(1), "ab");
        let name = "rank-00001-ab.safetensors";
        assert_eq!(parse_object(&job, &key), Some((Step(7), Generation(2), name)));
        for bad in ["jobs/digits/checkpoints/7-g2/x", "jobs/digits/model/g2/x", "", "x"] {
            assert_eq!(parse_object(&job, bad), None, "{bad:?} was accepted");
        }
        assert_eq!(parse_object(&"other".parse().expect("a name"), &key), None);
    }

    #[test]
    fn a_manifest_key_reads_back_and_nothing_else_does() {
        let job: Name = "digits".parse().expect("a name");
        let key = manifest(&job, Step(120), Generation(7));
        assert_eq!(key, "jobs/digits/checkpoints/000000000120-g7/manifest.json");
        let parsed = ManifestKey { job, step: Step(120), generation: Generation(7) };
        assert_eq!(parse_manifest(&key), Some(parsed));
        assert_eq!(folder_of(&key), Some("jobs/digits/checkpoints/000000000120-g7"));
        for bad in [
            "jobs/digits/checkpoints/120-g7/manifest.json",
            "jobs/digits/checkpoints/000000000120-g07/manifest.json",
            "jobs/digits/checkpoints/000000000120-g7/manifest.json/",
            "jobs/digits/checkpoints/000000000120-g7/rank-00000-ab.safetensors",
            "jobs/digits/models/000000000120-g7/manifest.json",
            "jobs/../checkpoints/000000000120-g7/manifest.json",
            "",
        ] {
            assert_eq!(parse_manifest(bad), None, "{bad:?} was accepted");
        }
    }
}

//! A job's data channels as local paths: `file://` ones are used where they lie, `s3://` ones are
//! fetched once per host.

use std::path::PathBuf;

use algorithms::LocalChannels;
use api::JobSpec;
use api::config::StoreSection;
use checkpoint::Store;

use crate::error::TrainError;

/// Names the folder for fetched data; set by the worker.
pub const SCRATCH_VARIABLE: &str = "COHORT_SCRATCH";

/// Every channel's local path, fetched where needed.
pub fn localize(spec: &JobSpec, section: &StoreSection) -> Result<LocalChannels, TrainError> {
    let mut local = LocalChannels::new();
    for (name, channel) in &spec.channels {
        let path = match channel.uri.split_once("://") {
            Some(("file", path)) => PathBuf::from(path),
            Some(("s3", rest)) => fetch(name, rest, section)?,
            _ => return Err(TrainError::Job(format!("channels.{name}.uri = `{}`", channel.uri))),
        };
        if !path.exists() {
            return Err(TrainError::Job(format!(
                "channels.{name}: `{}` does not exist on this host",
                path.display()
            )));
        }
        local.insert(name.clone(), path);
    }
    Ok(local)
}

fn fetch(
    channel: &str,
    bucket_and_key: &str,
    section: &StoreSection,
) -> Result<PathBuf, TrainError> {
    let fail = |error: String| TrainError::Job(format!("channels.{channel}: {error}"));
    let (bucket, key) = bucket_and_key
        .split_once('/')
        .filter(|(_, key)| !key.is_empty())
        .ok_or_else(|| fail(format!("`s3://{bucket_and_key}` names no object")))?;
    let store = Store::open(section, &format!("s3://{bucket}")).map_err(|e| fail(e.to_string()))?;
    let digest = blake3::hash(format!("{}/{bucket_and_key}", section.s3.endpoint).as_bytes());
    let folder = scratch().join(&digest.to_hex()[..16]);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| fail(e.to_string()))?;
    runtime.block_on(store.download(key, &folder)).map_err(|e| fail(e.to_string()))
}

fn scratch() -> PathBuf {
    match std::env::var_os(SCRATCH_VARIABLE) {
        Some(folder) => PathBuf::from(folder),
        None => std::env::temp_dir().join("cohort-scratch"),
    }
}

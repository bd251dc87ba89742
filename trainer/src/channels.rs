//! A job's data channels as local paths: `file://` ones are used where they lie, `s3://` ones are
//! fetched once per host and revision: an object that has changed is fetched again.

use std::path::PathBuf;

use algorithms::LocalChannels;
use api::JobSpec;
use api::config::StoreSection;
use api::control::ControlError;
use api::environment::SCRATCH_VARIABLE;
use checkpoint::Store;

use crate::error::TrainError;

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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| fail(e.to_string()))?;
    runtime.block_on(async {
        let revision = store.revision(key).await.map_err(|e| fail(e.to_string()))?;
        let name = format!("{} {bucket_and_key} {revision}", section.s3.endpoint);
        let digest = blake3::hash(name.as_bytes()).to_hex();
        let path = store.download(key, &scratch().join(&digest[..32])).await;
        let path = path.map_err(|e| fail(e.to_string()))?;
        let now = store.revision(key).await.map_err(|e| fail(e.to_string()))?;
        if now != revision {
            let text =
                format!("channels.{channel}: s3://{bucket_and_key} changed while it was read");
            return Err(ControlError(text).into());
        }
        Ok(path)
    })
}

fn scratch() -> PathBuf {
    match std::env::var_os(SCRATCH_VARIABLE) {
        Some(folder) => PathBuf::from(folder),
        None => std::env::temp_dir().join("cohort-scratch"),
    }
}

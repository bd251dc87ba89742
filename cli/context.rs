//! Which cluster a command talks to: `--config cluster.toml`, or the folder that `cluster up` wrote.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use api::config::{ClusterConfig, StoreSection, TlsSection};
use api::connect::read_token;
use api::{ExitClass, Secret};
use coordinator::ClusterClient;
use serde::{Deserialize, Serialize};

use crate::args::Global;
use crate::error::{CliError, Result};

/// File in a cluster's folder that tells clients how to reach it. Holds paths of secrets, no secret.
pub const CLIENT_FILE: &str = "client.json";
/// Folder of a cluster unless --dir names one.
pub const DIR_DEFAULT: &str = ".cohort";

/// How to reach a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Access {
    /// Coordinators to try.
    pub coordinators: Vec<SocketAddr>,
    /// Certificates of this client.
    pub tls: TlsSection,
    /// File with the cluster token.
    pub token_file: PathBuf,
    /// The object store's URI.
    pub store_uri: String,
    /// The cluster.toml it was started with: how to reach an S3 store is read there.
    #[serde(default)]
    pub config: Option<PathBuf>,
    /// Process that wrote this file.
    pub pid: u32,
}

impl Access {
    /// From the command line's options.
    pub fn find(global: &Global) -> Result<(Self, StoreSection)> {
        if let Some(path) = &global.config {
            let config = ClusterConfig::load(path)?;
            let access = Self {
                coordinators: config.coordinator.members.iter().map(|m| m.address).collect(),
                tls: config.tls.clone(),
                token_file: config.cluster.token_file.clone(),
                store_uri: config.store_uri(),
                config: Some(path.clone()),
                pid: 0,
            };
            let store = StoreSection { uri: access.store_uri.clone(), ..config.store };
            return Ok((access, store));
        }
        let dir = global.dir.clone().unwrap_or_else(|| DIR_DEFAULT.into());
        let access = Self::read(&dir)?;
        let section = match &access.config {
            Some(path) => ClusterConfig::load(path)?.store,
            None => StoreSection::default(),
        };
        let store = StoreSection { uri: access.store_uri.clone(), ..section };
        Ok((access, store))
    }

    /// From a cluster's folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CLIENT_FILE);
        let text = std::fs::read(&path).map_err(|error| {
            CliError::new(
                ExitClass::Unavailable,
                format!(
                    "no cluster in `{}`: cannot read `{}`: {error}",
                    dir.display(),
                    path.display()
                ),
            )
            .with_hint(
                "start one with `cluster up`, name its folder with --dir, or its cluster.toml \
                 with --config; `cluster submit --local` needs none",
            )
        })?;
        serde_json::from_slice(&text)
            .map_err(|e| CliError::usage(format!("`{}` is damaged: {e}", path.display())))
    }

    /// The cluster's token.
    pub fn token(&self) -> Result<Secret> {
        Ok(read_token(&self.token_file)?)
    }

    /// Connects.
    pub async fn connect(&self) -> Result<ClusterClient> {
        Ok(ClusterClient::connect(&self.coordinators, &self.tls, self.token()?).await?)
    }
}

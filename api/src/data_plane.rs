//! How the ranks of a job reach each other, as the worker's cluster.toml says: it goes from worker to
//! rank with the assignment. Certificates and tables are named by their files, which the rank reads:
//! no key travels.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{ClusterConfig, TlsSection};

/// Most connections for data to one peer: beyond this another adds descriptors and no speed.
pub const STREAMS_MAX: u32 = 8;

/// How a rank reaches the others. Apart from the address and the files' places it must be the same
/// on all workers of a job, which the ranks compare when they form their group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataPlane {
    /// Address to listen on.
    pub address: IpAddr,
    /// Connections for data to each peer.
    pub streams: u32,
    /// Table of algorithms; empty: the default one.
    pub algorithms: PathBuf,
    /// Whether the ranks of one host may share memory.
    pub shared_memory: bool,
    /// Certificates; absent: plaintext.
    pub tls: Option<TlsSection>,
}

impl DataPlane {
    /// What a worker's configuration says. Whatever the address, ranks encrypt where there are
    /// certificates: one rule for all, and on one host shared memory carries the data anyway.
    pub fn of(config: &ClusterConfig) -> Self {
        let worker = &config.worker;
        let encrypts = config.tls.is_enabled() && !worker.plaintext_data;
        Self {
            address: worker.data_address,
            streams: worker.data_streams,
            algorithms: worker.algorithms.clone(),
            shared_memory: worker.shared_memory,
            tls: encrypts.then(|| config.tls.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_encrypt_where_there_are_certificates_unless_told_not_to() {
        let mut config = ClusterConfig::default();
        assert_eq!(DataPlane::of(&config).tls, None);
        config.tls.ca = "ca.pem".into();
        assert_eq!(DataPlane::of(&config).tls, Some(config.tls.clone()), "on loopback, too");
        config.worker.data_address = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(DataPlane::of(&config).tls, Some(config.tls.clone()));
        config.worker.plaintext_data = true;
        assert_eq!(DataPlane::of(&config).tls, None);
    }
}

//! The files behind a rank's connections, read: certificates and the table of algorithms.

use std::path::PathBuf;
use std::sync::Arc;

use api::data_plane::DataPlane;
use collective::{Selection, SelectionError, TcpOptions, TlsError, TlsMaterial, Transport};

/// A file of cluster.toml that ranks cannot use.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    /// The table of algorithms.
    #[error("worker.algorithms = `{}`: {}", path.display(), reason(source))]
    Algorithms {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: SelectionError,
    },
    /// The certificates.
    #[error("the certificates of [tls] cannot be used: {0}")]
    Certificates(#[from] TlsError),
}

/// Without the path, which is told already.
fn reason(error: &SelectionError) -> String {
    match error {
        SelectionError::File { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}

/// What a listener is told. Workers call it before they run any rank, so that a wrong file is found
/// when they start.
///
/// # Errors
/// [`DataPlaneError`].
pub fn tcp_options(data: &DataPlane) -> Result<TcpOptions, DataPlaneError> {
    let selection = match data.algorithms.as_path() {
        path if path.as_os_str().is_empty() => Selection::default(),
        path => Selection::load(path)
            .map_err(|source| DataPlaneError::Algorithms { path: path.to_owned(), source })?,
    };
    let tls = match &data.tls {
        Some(tls) => Some(Arc::new(TlsMaterial::load(&tls.ca, &tls.certificate, &tls.key)?)),
        None => None,
    };
    Ok(TcpOptions { streams: data.streams as usize, tls, selection })
}

/// How the ranks of one host reach each other.
pub fn transport(data: &DataPlane) -> Transport {
    if data.shared_memory { Transport::Auto } else { Transport::Tcp }
}

#[cfg(test)]
mod tests {
    use api::config::{ClusterConfig, TlsSection};

    use super::*;

    #[test]
    fn a_file_that_cannot_be_used_is_named_once() {
        let folder = tempfile::tempdir().unwrap();
        let table = folder.path().join("table.json");
        let mut data = DataPlane::of(&ClusterConfig::default());
        assert_eq!(tcp_options(&data).unwrap().streams, 1);

        data.algorithms = table.clone();
        let missing = tcp_options(&data).unwrap_err().to_string();
        assert_eq!(missing.matches("table.json").count(), 1, "{missing}");
        assert!(missing.starts_with("worker.algorithms") && missing.contains("No such file"));
        std::fs::write(&table, r#"{"rules": [{"operation": "all_reduce"}]}"#).unwrap();
        let bad = tcp_options(&data).unwrap_err().to_string();
        assert!(bad.contains("table.json") && bad.contains("missing field `algorithm`"), "{bad}");
        Selection::default().save(&table).unwrap();
        assert_eq!(tcp_options(&data).unwrap().selection, Selection::default());

        let tls = TlsSection { ca: table, certificate: "none.pem".into(), key: "none.key".into() };
        data.tls = Some(tls);
        let missing = tcp_options(&data).unwrap_err().to_string();
        assert!(missing.contains("tls.certificate `none.pem`: No such file"), "{missing}");
    }
}

//! Makes a cluster's certificate authority, certificates and token. Keys are readable by their
//! owner only.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::config::TlsSection;
use api::connect::CERTIFICATE_NAME;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::error::{CliError, Result};

/// A cluster's authority in a folder: `ca.pem` and `ca.key`.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

fn failed(what: &str, error: impl std::fmt::Display) -> CliError {
    CliError::internal(format!("cannot make {what}: {error}"))
}

impl Authority {
    /// The authority in `folder`, made when there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let (pem, key) = (folder.join("ca.pem"), folder.join("ca.key"));
        if pem.exists() && key.exists() {
            let read = |path: &Path| {
                fs::read_to_string(path)
                    .map_err(|e| CliError::usage(format!("cannot read `{}`: {e}", path.display())))
            };
            let key_pair = KeyPair::from_pem(&read(&key)?).map_err(|e| failed("the CA key", e))?;
            let issuer = Issuer::new(authority_params(), key_pair);
            return Ok(Self { folder: folder.to_owned(), issuer });
        }
        make_private_folder(folder)?;
        let params = authority_params();
        let key_pair = KeyPair::generate().map_err(|e| failed("the CA key", e))?;
        let certificate =
            params.self_signed(&key_pair).map_err(|e| failed("the CA certificate", e))?;
        write_private(&key, key_pair.serialize_pem().as_bytes())?;
        write_private(&pem, certificate.pem().as_bytes())?;
        Ok(Self { folder: folder.to_owned(), issuer: Issuer::new(params, key_pair) })
    }

    /// A certificate for one host, for both sides of a connection; made once.
    pub fn issue(&self, host: &str) -> Result<TlsSection> {
        let section = TlsSection {
            ca: self.folder.join("ca.pem"),
            certificate: self.folder.join(format!("{host}.pem")),
            key: self.folder.join(format!("{host}.key")),
        };
        if section.certificate.exists() && section.key.exists() {
            return Ok(section);
        }
        let mut params = CertificateParams::new(vec![CERTIFICATE_NAME.to_owned()])
            .map_err(|e| failed("a certificate", e))?;
        params.distinguished_name.push(DnType::CommonName, host);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key_pair = KeyPair::generate().map_err(|e| failed("a key", e))?;
        let certificate =
            params.signed_by(&key_pair, &self.issuer).map_err(|e| failed("a certificate", e))?;
        write_private(&section.key, key_pair.serialize_pem().as_bytes())?;
        write_private(&section.certificate, certificate.pem().as_bytes())?;
        Ok(section)
    }
}

/// What is in an authority's certificate besides its key: the same every time, so that the key alone
/// is enough to issue more.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Cohort cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// The cluster token in `path`, drawn when there is none.
pub fn ensure_token(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        make_private_folder(folder)?;
    }
    // A fresh key's private part is as good a random number as any.
    let key = KeyPair::generate().map_err(|e| failed("the cluster token", e))?;
    let token: String = key.serialized_der().iter().map(|b| format!("{b:02x}")).collect();
    let token = &token[token.len().saturating_sub(200)..];
    let digest = blake3::derive_key("cohort 2026 cluster token", token.as_bytes());
    let text: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    write_private(path, format!("{text}\n").as_bytes())
}

/// Makes a folder that only its owner may enter.
pub fn make_private_folder(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| CliError::usage(format!("cannot make the folder `{}`: {e}", folder.display())))
}

/// Writes a file that only its owner may read: whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let unwritable =
        |e: std::io::Error| CliError::usage(format!("cannot write `{}`: {e}", path.display()));
    let temporary = path.with_extension("partial");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(unwritable)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(unwritable)?;
    fs::rename(&temporary, path).map_err(unwritable)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn authority_and_token_are_made_once_and_private() {
        let folder = tempfile::tempdir().expect("a folder");
        let tls = folder.path().join("tls");
        let first = Authority::open(&tls).expect("made").issue("a").expect("issued");
        let ca = fs::read(tls.join("ca.pem")).expect("written");
        Authority::open(&tls).expect("opened").issue("b").expect("issued");
        assert_eq!(fs::read(tls.join("ca.pem")).expect("kept"), ca);
        let mode = fs::metadata(&first.key).expect("written").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let token = folder.path().join("token");
        ensure_token(&token).expect("made");
        let text = fs::read(&token).expect("written");
        ensure_token(&token).expect("kept");
        assert_eq!(fs::read(&token).expect("kept"), text);
        assert!(api::connect::read_token(&token).is_ok());
    }
}

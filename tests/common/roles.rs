//! Coordinators and workers as processes of their own.

use std::path::{Path, PathBuf};

use super::{Running, cluster, run};

/// Makes an authority, certificates and a token in the folder `tls`.
pub fn make_certificates(folder: &Path) {
    let mut certs = cluster();
    run(certs.args(["certs", "--output"]).arg(folder.join("tls"))).expect_code(0);
}

/// cluster.toml of a role with the certificates of [`make_certificates`] and a folder as its store:
/// all coordinators on `address`, at these ports. `more` goes to its end.
pub fn write_config(
    folder: &Path,
    name: &str,
    node: usize,
    (address, ports): (&str, &[u16]),
    more: &str,
) -> PathBuf {
    let members: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(i, port)| format!("{{ node = {}, address = \"{address}:{port}\" }}", i + 1))
        .collect();
    let text = format!(
        "[cluster]\nid = \"three\"\ndir = \"{0}/{name}\"\ntoken_file = \"{1}/token\"\n\
         [coordinator]\nnode = {node}\nmembers = [{2}]\n\
         [store]\nuri = \"file://{0}/store\"\n\
         [tls]\nca = \"{1}/ca.pem\"\ncertificate = \"{1}/host.pem\"\nkey = \"{1}/host.key\"\n{more}",
        folder.display(),
        folder.join("tls").display(),
        members.join(", ")
    );
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).expect("written");
    path
}

/// A coordinator.
pub fn start_coordinator(config: &Path) -> Running {
    Running::start(cluster().arg("coordinator").arg("--config").arg(config))
}

/// A worker on loopback.
pub fn start_worker(folder: &Path, name: &str, slots: u32, ports: &[u16]) -> Running {
    let config = write_config(folder, name, 1, ("127.0.0.1", ports), "");
    let mut command = cluster();
    command.args(["worker", "--slots", &slots.to_string(), "--name", name]);
    Running::start(command.arg("--config").arg(config))
}

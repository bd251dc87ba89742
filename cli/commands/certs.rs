//! `cluster certs`: an authority, certificates and a token for a cluster of several hosts.

use api::Name;

use crate::args::{Certs, Global};
use crate::certificates::{Authority, ensure_token};
use crate::error::Result;
use crate::output;

/// Makes what is missing; what is there already is kept.
pub fn make(global: &Global, args: &Certs) -> Result<()> {
    let hosts: Vec<Name> =
        args.hosts.iter().map(|host| host.parse()).collect::<std::result::Result<_, _>>()?;
    let authority = Authority::open(&args.output)?;
    ensure_token(&args.output.join("token"))?;
    for host in &hosts {
        let tls = authority.issue(host.as_str())?;
        if global.json {
            output::json(&serde_json::json!({ "host": host, "tls": tls }));
        } else {
            output::line(&format!("{host}: {}", tls.certificate.display()));
        }
    }
    if !global.json {
        output::line(&format!(
            "copy ca.pem, token and each host's .pem and .key there; keep `{}` safe",
            args.output.join("ca.key").display()
        ));
    }
    Ok(())
}

//! How a bucket is reached: cluster.toml first, then the AWS_* variables that every S3 tool knows.
//!
//! Resolving is a pure function of (section, environment); nothing here talks to a server.

use std::fmt;
use std::sync::{Arc, Once};
use std::time::Duration;

use api::config::S3Section;
use api::ids::Secret;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::error::{Place, StoreError};

/// Retries of one request that was throttled or broke off, by the library.
const RETRIES_MAX: usize = 8;
/// After this long no retry is begun: a dead server is reported within about a minute.
const RETRY_TIMEOUT: Duration = Duration::from_secs(45);
/// First wait between retries, doubled up to the second, with jitter.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Time for a connection; a host that is down is known by then.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one request with its body: one 16 MiB part over a slow uplink (1.5 Mbit/s).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);

/// Variables by which clusters and hosts hand out roles, passed on as they are.
const ROLE_VARIABLES: [(&str, AmazonS3ConfigKey); 6] = [
    ("AWS_WEB_IDENTITY_TOKEN_FILE", AmazonS3ConfigKey::WebIdentityTokenFile),
    ("AWS_ROLE_ARN", AmazonS3ConfigKey::RoleArn),
    ("AWS_ROLE_SESSION_NAME", AmazonS3ConfigKey::RoleSessionName),
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", AmazonS3ConfigKey::ContainerCredentialsRelativeUri),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", AmazonS3ConfigKey::ContainerCredentialsFullUri),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", AmazonS3ConfigKey::ContainerAuthorizationTokenFile),
];

/// Everything a bucket needs, from whichever source.
#[derive(Clone, Debug, PartialEq)]
struct Settings {
    endpoint: Option<String>,
    region: String,
    allow_http: bool,
    credentials: Credentials,
}

/// Who we are to the server.
#[derive(Clone, PartialEq)]
enum Credentials {
    /// A key pair, and the session token that belongs to it.
    Static { key_id: String, secret: Secret, token: Option<Secret> },
    /// A role that the environment points to.
    Role(Vec<(AmazonS3ConfigKey, String)>),
    /// The role of the machine, asked from its metadata service; on AWS only.
    Instance,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Static { .. } => "static",
            Self::Role(_) => "role",
            Self::Instance => "instance",
        })
    }
}

/// Opens a bucket.
pub(crate) fn open(
    section: &S3Section,
    bucket: &str,
) -> Result<(Arc<dyn ObjectStore>, Place), StoreError> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let settings = resolve(section, bucket, &variable)?;
    let place = place(&settings, bucket);
    install_crypto();
    let store = builder(&settings, bucket).build();
    // The library's text holds settings' names, not their values.
    let store = store.map_err(|error| StoreError::Settings(format!("{place}: {error}")))?;
    Ok((Arc::new(store), place))
}

/// TLS needs one process-wide provider; whoever comes first installs the same.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

fn place(settings: &Settings, bucket: &str) -> Place {
    let aws = || format!("https://s3.{}.amazonaws.com", settings.region);
    let endpoint = settings.endpoint.clone().unwrap_or_else(aws);
    Place::Bucket { bucket: bucket.to_owned(), endpoint }
}

fn resolve(
    section: &S3Section,
    bucket: &str,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Settings, StoreError> {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let first = |names: &[&str]| names.iter().find_map(|name| variable(name));
    let endpoint = given(&section.endpoint)
        .or_else(|| first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]))
        .map(|endpoint| endpoint.trim_end_matches('/').to_owned());
    let region = given(&section.region)
        .or_else(|| first(&["AWS_REGION", "AWS_DEFAULT_REGION"]))
        .unwrap_or_else(|| "us-east-1".to_owned());
    let allow_http = section.allow_http
        || variable("AWS_ALLOW_HTTP").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    if let Some(endpoint) = &endpoint {
        check_endpoint(endpoint, allow_http)?;
    }
    let credentials = credentials(section, variable)?;
    let settings = Settings { endpoint, region, allow_http, credentials };
    if settings.endpoint.is_some() && settings.credentials == Credentials::Instance {
        // Only AWS hands out roles by metadata; asking would only cost time.
        let place = place(&settings, bucket);
        return Err(StoreError::Denied { place, code: "none given".into() });
    }
    Ok(settings)
}

fn check_endpoint(endpoint: &str, allow_http: bool) -> Result<(), StoreError> {
    let bad = |problem: &str| {
        Err(StoreError::Settings(format!("S3 endpoint `{endpoint}` cannot be used: {problem}")))
    };
    let rest = match (endpoint.strip_prefix("https://"), endpoint.strip_prefix("http://")) {
        (Some(rest), _) => rest,
        (None, Some(_)) if !allow_http => {
            return bad(
                "it is not encrypted: use https://, or set `allow_http = true` under [store.s3] \
                 on a network you trust",
            );
        }
        (None, Some(rest)) => rest,
        (None, None) => return bad("expected https://host or http://host"),
    };
    if rest.is_empty() || rest.contains(['@', '?', '#', ' ']) {
        return bad("expected https://host or http://host, without user, query or fragment");
    }
    Ok(())
}

fn credentials(
    section: &S3Section,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Credentials, StoreError> {
    let from_file = !section.access_key_id.is_empty();
    let key_id = match from_file {
        true => Some(section.access_key_id.clone()),
        false => variable("AWS_ACCESS_KEY_ID"),
    };
    let present = |secret: &Option<Secret>| secret.clone().filter(|s| !s.reveal().is_empty());
    let secret = present(&section.secret_access_key)
        .or_else(|| variable("AWS_SECRET_ACCESS_KEY").map(Secret::new));
    // A token belongs to its key: one from the environment must not meet a key from the file.
    let token = present(&section.session_token).or_else(|| {
        let token = variable("AWS_SESSION_TOKEN").filter(|_| !from_file);
        token.map(Secret::new)
    });
    match (key_id, secret) {
        (Some(key_id), Some(secret)) => Ok(Credentials::Static { key_id, secret, token }),
        (Some(_), None) => Err(StoreError::Settings(
            "an S3 access key id is set but no secret: set `secret_access_key` under [store.s3] \
             in cluster.toml, or AWS_SECRET_ACCESS_KEY"
                .into(),
        )),
        (None, Some(_)) => Err(StoreError::Settings(
            "an S3 secret is set but no access key id: set `access_key_id` under [store.s3] in \
             cluster.toml, or AWS_ACCESS_KEY_ID"
                .into(),
        )),
        (None, None) => {
            let role: Vec<_> = ROLE_VARIABLES
                .iter()
                .filter_map(|(name, key)| Some((*key, variable(name)?)))
                .collect();
            Ok(if role.is_empty() { Credentials::Instance } else { Credentials::Role(role) })
        }
    }
}

fn builder(settings: &Settings, bucket: &str) -> AmazonS3Builder {
    let client = ClientOptions::new()
        .with_allow_http(settings.allow_http)
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_timeout(REQUEST_TIMEOUT);
    let retry = RetryConfig {
        backoff: BackoffConfig { init_backoff: BACKOFF_FIRST, max_backoff: BACKOFF_MAX, base: 2.0 },
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIMEOUT,
    };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(&settings.region)
        .with_client_options(client)
        .with_retry(retry)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // One request per object: every S3 server has it, and we delete few.
        .with_disable_bulk_delete(true);
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    match &settings.credentials {
        Credentials::Static { key_id, secret, token } => {
            // Revealed to the library that signs requests with it.
            builder = builder.with_access_key_id(key_id).with_secret_access_key(secret.reveal());
            if let Some(token) = token {
                builder = builder.with_token(token.reveal());
            }
        }
        Credentials::Role(role) => {
            for (key, value) in role {
                builder = builder.with_config(*key, value);
            }
        }
        Credentials::Instance => {}
    }
    builder
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn resolved(section: &S3Section, variables: &[(&str, &str)]) -> Result<Settings, StoreError> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        resolve(section, "b", &|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn the_file_comes_first_and_the_environment_fills_what_is_empty() {
        let env = [
            ("AWS_ACCESS_KEY_ID", "env-key"),
            ("AWS_SECRET_ACCESS_KEY", "env-secret"),
            ("AWS_SESSION_TOKEN", "env-token"),
            ("AWS_DEFAULT_REGION", "eu-west-3"),
            ("AWS_ENDPOINT_URL", "https://s3.example/"),
        ];
        let settings = resolved(&S3Section::default(), &env).expect("resolves");
        assert_eq!(settings.region, "eu-west-3");
        assert_eq!(settings.endpoint.as_deref(), Some("https://s3.example"));
        let expected = Credentials::Static {
            key_id: "env-key".into(),
            secret: Secret::new("env-secret"),
            token: Some(Secret::new("env-token")),
        };
        assert!(settings.credentials == expected);
        assert!(!format!("{settings:?}").contains("secret"), "{settings:?}");

        let section = S3Section {
            region: "here".into(),
            access_key_id: "file-key".into(),
            secret_access_key: Some(Secret::new("file-secret")),
            ..S3Section::default()
        };
        let settings = resolved(&section, &env).expect("resolves");
        assert_eq!(settings.region, "here");
        let expected = Credentials::Static {
            key_id: "file-key".into(),
            secret: Secret::new("file-secret"),
            token: None,
        };
        assert!(settings.credentials == expected, "the environment's token has another key");
    }

    #[test]
    fn what_is_missing_or_unsafe_is_said_before_any_request() {
        let text = |section: &S3Section, env: &[(&str, &str)]| {
            resolved(section, env).expect_err("refused").to_string()
        };
        let plain = S3Section { endpoint: "http://s3.lan:9000".into(), ..S3Section::default() };
        assert!(text(&plain, &[]).contains("allow_http = true"), "{}", text(&plain, &[]));
        let tls = S3Section { endpoint: "https://s3.lan:9000".into(), ..S3Section::default() };
        let none = text(&tls, &[]);
        assert!(none.contains("`b` at `https://s3.lan:9000`"), "{none}");
        assert!(none.contains("AWS_ACCESS_KEY_ID") && none.contains("[store.s3]"), "{none}");
        let half = text(&tls, &[("AWS_ACCESS_KEY_ID", "k")]);
        assert!(half.contains("AWS_SECRET_ACCESS_KEY"), "{half}");
        let half = text(&tls, &[("AWS_SECRET_ACCESS_KEY", "hidden")]);
        assert!(half.contains("AWS_ACCESS_KEY_ID") && !half.contains("hidden"), "{half}");
        let aws = resolved(&S3Section::default(), &[]).expect("the machine's role");
        assert_eq!(aws.credentials, Credentials::Instance);
        for bad in ["s3.lan:9000", "https://", "https://me@s3.lan"] {
            let section = S3Section { endpoint: bad.into(), ..S3Section::default() };
            assert!(resolved(&section, &[]).is_err(), "{bad} was accepted");
        }
    }
}

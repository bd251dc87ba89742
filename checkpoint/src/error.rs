//! What can go wrong with an object store, in the words of the person who has to act.
//!
//! The text of a server's answer is never passed on: it may hold key ids and signatures. Only its
//! status and its error code are.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::PathBuf;

use object_store::client::{HttpError, HttpErrorKind};

use crate::sealing::SealError;

/// Which store an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A folder of this host.
    Folder(PathBuf),
    /// A bucket of an S3 server.
    Bucket {
        /// Its name.
        bucket: String,
        /// The server, as people know it.
        endpoint: String,
    },
    /// A store that the caller brought.
    Other(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "folder `{}`", path.display()),
            Self::Bucket { bucket, endpoint } => write!(f, "bucket `{bucket}` at `{endpoint}`"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl Place {
    /// What lets people in.
    fn key_to_it(&self) -> &'static str {
        match self {
            Self::Bucket { .. } => "credentials",
            _ => "access",
        }
    }

    fn advice(&self) -> &'static str {
        match self {
            Self::Bucket { .. } => {
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) in the \
                 environment, or access_key_id and secret_access_key under [store.s3] in \
                 cluster.toml, and that they may read and write there"
            }
            _ => "change the owner or mode of the folder, or `uri` under [store] in cluster.toml",
        }
    }
}

/// Why the store did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The URI names no store.
    #[error("store uri `{uri}` cannot be used: {problem}")]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The settings contradict each other or the server.
    #[error("{0}")]
    Settings(String),
    /// A key that no store can hold.
    #[error("`{key}` is not a valid key: {problem}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no such object.
    #[error("`{key}` is not in {place}")]
    NotFound {
        /// Its key.
        key: String,
        /// Where it was looked for.
        place: Place,
    },
    /// There is no such bucket.
    #[error("{0} does not exist: create the bucket, or correct the store's uri")]
    NoBucket(Place),
    /// The credentials are missing, wrong, expired, or not allowed to do this.
    #[error("{} refused for {place} ({code}): {}", place.key_to_it(), place.advice())]
    Denied {
        /// Who refused.
        place: Place,
        /// The server's error code, or what is known.
        code: String,
    },
    /// The store cannot be reached or asks to wait; trying again may help.
    #[error("failed to {operation} `{key}`: {place} is unavailable: {problem}")]
    Unavailable {
        /// What was attempted.
        operation: &'static str,
        /// On which key.
        key: String,
        /// Where.
        place: Place,
        /// What happened.
        problem: String,
        /// Whether the request may have taken effect all the same.
        may_have_happened: bool,
    },
    /// No space is left.
    #[error("failed to write `{key}`: {place} is full: free some space, or lower checkpoint.keep")]
    Full {
        /// The key.
        key: String,
        /// Where.
        place: Place,
    },
    /// The store understood and will not do it.
    #[error("failed to {operation} `{key}`: {place} answered {problem}")]
    Refused {
        /// What was attempted.
        operation: &'static str,
        /// On which key.
        key: String,
        /// Where.
        place: Place,
        /// What it said.
        problem: String,
    },
    /// An object is larger than it may be.
    #[error("`{key}` has {bytes} bytes, expected at most {max}")]
    TooLarge {
        /// Its key.
        key: String,
        /// Its size.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// An object is not what was written.
    #[error("`{key}` is damaged: {problem}")]
    Corrupt {
        /// Its key.
        key: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// An object, or the whole store, is encrypted and the key is missing or another; or it is not
    /// encrypted and should be.
    #[error(
        "`{key}` in {place} cannot be used: {problem}; check key_file or key_command under \
         [store.encryption] in cluster.toml, which must give the same key on every host"
    )]
    Encryption {
        /// The object.
        key: String,
        /// Where.
        place: Place,
        /// What is wrong.
        problem: String,
    },
    /// The store does not keep the promise that checkpoints rest on.
    #[error("{place} cannot hold checkpoints: {problem}; use another store")]
    Unsafe {
        /// Which store.
        place: Place,
        /// What it did.
        problem: String,
    },
    /// Something on this host, not in the store, failed.
    #[error("`{path}`: {problem}")]
    Host {
        /// A path of this host.
        path: String,
        /// What happened.
        problem: String,
    },
}

impl StoreError {
    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Full { .. })
    }

    /// Whether it is certain that the request changed nothing in the store.
    pub fn has_no_side_effects(&self) -> bool {
        !matches!(self, Self::Unavailable { may_have_happened: true, .. })
    }

    /// Whether the object or its bucket is absent.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NoBucket(_))
    }

    /// Whether the key at hand is missing or another than the store's: nothing but another
    /// configuration helps.
    pub fn is_key_mistake(&self) -> bool {
        matches!(self, Self::Encryption { .. })
    }

    /// Something on this host failed.
    pub(crate) fn host(path: &std::path::Path, error: &io::Error) -> Self {
        Self::Host { path: path.display().to_string(), problem: error.to_string() }
    }
}

/// What was being done when an error came.
#[derive(Clone, Copy)]
pub(crate) struct Attempt<'a> {
    pub place: &'a Place,
    pub operation: &'static str,
    pub key: &'a str,
}

/// Codes by which S3 servers say that it is the credentials.
const CREDENTIAL_CODES: [&str; 9] = [
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "UnauthorizedAccess",
];
/// Codes by which S3 servers say that the bucket is in another region.
const REGION_CODES: [&str; 4] = [
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
];

impl Attempt<'_> {
    /// Puts a library error into one of our classes.
    pub(crate) fn failed(self, error: object_store::Error) -> StoreError {
        use object_store::Error as E;
        let text = error.to_string();
        match &error {
            E::NotFound { .. } if text.contains("NoSuchBucket") => {
                StoreError::NoBucket(self.place.clone())
            }
            E::NotFound { .. } => {
                StoreError::NotFound { key: self.key.to_owned(), place: self.place.clone() }
            }
            E::PermissionDenied { .. } => self.denied(&text, "403"),
            E::Unauthenticated { .. } => self.denied(&text, "401"),
            E::InvalidPath { source } => {
                StoreError::Key { key: self.key.to_owned(), problem: source.to_string() }
            }
            E::NotImplemented { .. } | E::NotSupported { .. } => {
                self.refused("that it does not support this operation".into())
            }
            E::AlreadyExists { .. } => self.refused("that the object exists".into()),
            E::Precondition { .. } | E::NotModified { .. } => {
                self.refused("that a precondition failed".into())
            }
            E::JoinError { source } => self.unavailable(source.to_string(), true),
            _ => self.generic(&error, &text),
        }
    }

    fn generic(self, error: &object_store::Error, text: &str) -> StoreError {
        match find::<SealError>(error) {
            Some(error @ (SealError::Plain | SealError::OtherKey { .. })) => {
                return self.encryption(error.to_string());
            }
            Some(error @ SealError::Damaged) => {
                return StoreError::Corrupt {
                    key: self.key.to_owned(),
                    problem: error.to_string(),
                };
            }
            Some(SealError::Short) => return self.short(),
            Some(error) => return self.refused(error.to_string()),
            None => {}
        }
        if text.contains("Requested range was invalid") || text.contains("Out of range of file") {
            return self.short();
        }
        if let Some(io) = find::<io::Error>(error)
            && !matches!(self.place, Place::Bucket { .. })
        {
            return self.io(io);
        }
        let code = code_of(text);
        let is_region = code.is_some_and(|code| REGION_CODES.contains(&code))
            || text.contains("redirect without LOCATION");
        if is_region {
            return StoreError::Settings(format!(
                "{} is in another region than the one configured: set `region` under [store.s3] \
                 in cluster.toml, or AWS_REGION",
                self.place
            ));
        }
        if code.is_some_and(|code| CREDENTIAL_CODES.contains(&code)) {
            return self.denied(text, "");
        }
        if text.contains("169.254.") {
            // Instance metadata, asked only when nothing else gave credentials.
            let code = "none given, and no instance role answers".into();
            return StoreError::Denied { place: self.place.clone(), code };
        }
        match status_of(text) {
            Some(416) => self.short(),
            Some(status @ (400..=407 | 409..=428 | 430..=499 | 501)) => {
                self.refused(answer(status, code))
            }
            // 5xx, 429, 408, or an error inside a successful answer.
            Some(status) => self.unavailable(answer(status, code), true),
            None => {
                let kind = find::<HttpError>(error).map(HttpError::kind);
                self.unavailable(root_cause(error), kind != Some(HttpErrorKind::Connect))
            }
        }
    }

    /// Puts an error of this host's own into one of our classes.
    pub(crate) fn io(self, error: &io::Error) -> StoreError {
        use io::ErrorKind as K;
        match error.kind() {
            K::PermissionDenied | K::ReadOnlyFilesystem => {
                StoreError::Denied { place: self.place.clone(), code: error.to_string() }
            }
            K::StorageFull | K::QuotaExceeded => {
                StoreError::Full { key: self.key.to_owned(), place: self.place.clone() }
            }
            K::NotADirectory | K::IsADirectory | K::InvalidInput | K::InvalidFilename => {
                self.refused(error.to_string())
            }
            _ => self.unavailable(error.to_string(), true),
        }
    }

    fn denied(self, text: &str, otherwise: &str) -> StoreError {
        let code = code_of(text).unwrap_or(otherwise).to_owned();
        StoreError::Denied { place: self.place.clone(), code }
    }

    fn short(self) -> StoreError {
        let problem = "it is shorter than it was when it was written".to_owned();
        StoreError::Corrupt { key: self.key.to_owned(), problem }
    }

    fn refused(self, problem: String) -> StoreError {
        let (operation, key, place) = (self.operation, self.key.to_owned(), self.place.clone());
        StoreError::Refused { operation, key, place, problem }
    }

    pub(crate) fn encryption(self, problem: String) -> StoreError {
        StoreError::Encryption { key: self.key.to_owned(), place: self.place.clone(), problem }
    }

    pub(crate) fn unavailable(self, problem: String, may_have_happened: bool) -> StoreError {
        let (operation, key, place) = (self.operation, self.key.to_owned(), self.place.clone());
        StoreError::Unavailable { operation, key, place, problem, may_have_happened }
    }
}

fn answer(status: u16, code: Option<&str>) -> String {
    match code {
        Some(code) => format!("status {status} ({code})"),
        None => format!("status {status}"),
    }
}

/// `<Code>…</Code>` of an S3 error document, when it looks like one.
fn code_of(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let is_code = code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    is_code.then_some(code)
}

/// The library keeps the status to itself; its text has it, which the tests against real servers
/// hold in place.
fn status_of(text: &str) -> Option<u16> {
    if text.contains("Server returned error response:") {
        return Some(503);
    }
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

type Cause = dyn StdError + 'static;

fn find<T: StdError + 'static>(error: &Cause) -> Option<&T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn root_cause(error: &Cause) -> String {
    let mut root = error;
    while let Some(deeper) = root.source() {
        root = deeper;
    }
    let root = root.to_string();
    // A root that repeats a server's document is cut before it.
    let end = root.find('<').unwrap_or(root.len()).min(300);
    root.get(..end).unwrap_or("an error that cannot be shown").trim().to_owned()
}

//! What a failed command prints and the code it exits with.
//!
//! One message for the person who typed the command: what was found, what was expected, what to do.
//! The chain of causes is printed once, here.

use std::fmt;

use api::ExitClass;

/// A failed command.
#[derive(Debug)]
pub struct CliError {
    class: ExitClass,
    message: String,
    hint: Option<String>,
    in_result: bool,
}

/// What every command returns.
pub type Result<T> = std::result::Result<T, CliError>;

impl CliError {
    /// A failure of one class.
    pub fn new(class: ExitClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), hint: None, in_result: false }
    }

    /// A mistake in the command line or a file.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Usage, message)
    }

    /// Something failed that is not the user's doing.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ExitClass::Internal, message)
    }

    /// Adds the next step.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Marks that the printed result tells the failure already, so that --json's last line stays the
    /// result.
    #[must_use]
    pub fn told_by_result(mut self) -> Self {
        self.in_result = true;
        self
    }

    /// Whether the printed result tells the failure already.
    pub fn is_told_by_result(&self) -> bool {
        self.in_result
    }

    /// What happened, without the hint.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The class that decides the exit code.
    pub fn class(&self) -> ExitClass {
        self.class
    }

    /// The failure as one JSON document, for `--json`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "error": self.message, "class": self.class, "hint": self.hint })
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<coordinator::ClientError> for CliError {
    fn from(error: coordinator::ClientError) -> Self {
        Self::new(error.exit_class(), error.to_string())
    }
}

impl From<api::job::JobError> for CliError {
    fn from(error: api::job::JobError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<api::config::ConfigError> for CliError {
    fn from(error: api::config::ConfigError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<api::connect::ConnectError> for CliError {
    fn from(error: api::connect::ConnectError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<api::ids::NameError> for CliError {
    fn from(error: api::ids::NameError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<algorithms::DataError> for CliError {
    fn from(error: algorithms::DataError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<algorithms::AlgorithmError> for CliError {
    fn from(error: algorithms::AlgorithmError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<trainer::TrainError> for CliError {
    fn from(error: trainer::TrainError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<trainer::DataPlaneError> for CliError {
    fn from(error: trainer::DataPlaneError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<checkpoint::StoreError> for CliError {
    fn from(error: checkpoint::StoreError) -> Self {
        use checkpoint::StoreError as E;
        let class = match &error {
            E::NotFound { .. } | E::NoBucket(_) => ExitClass::NotFound,
            E::Uri { .. } | E::Settings(_) | E::Key { .. } => ExitClass::Usage,
            E::Denied { .. } => ExitClass::Denied,
            E::Corrupt { .. } | E::TooLarge { .. } => ExitClass::Corrupt,
            E::Host { .. } => ExitClass::Internal,
            _ => ExitClass::Unavailable,
        };
        Self::new(class, error.to_string())
    }
}

/// Of a command that takes a checkpoint as it is: what does not fit together in it is damage.
impl From<checkpoint::RestoreError> for CliError {
    fn from(error: checkpoint::RestoreError) -> Self {
        use checkpoint::RestoreError as E;
        match error {
            E::Store(error) => error.into(),
            E::Runtime(_) => Self::internal(error.to_string()),
            _ => Self::new(ExitClass::Corrupt, error.to_string()),
        }
    }
}

impl From<coordinator::CoordinatorError> for CliError {
    fn from(error: coordinator::CoordinatorError) -> Self {
        Self::new(error.exit_class(), error.to_string())
    }
}

impl From<worker::WorkerError> for CliError {
    fn from(error: worker::WorkerError) -> Self {
        use worker::WorkerError::{Connect, Denied, Locked, Options};
        let class = match &error {
            Denied { .. } => ExitClass::Denied,
            Locked { .. } => ExitClass::Conflict,
            Options(_) | Connect(_) => ExitClass::Usage,
            _ => ExitClass::Internal,
        };
        Self::new(class, error.to_string())
    }
}

impl From<serve::ServeError> for CliError {
    fn from(error: serve::ServeError) -> Self {
        Self::new(error.exit_class(), error.to_string())
    }
}

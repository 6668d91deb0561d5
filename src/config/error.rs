//! Why a configuration cannot be used.

/// An invalid configuration: one line without secrets that names the source, the key and what is accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A configuration or URL file cannot be used.
    #[error("{path}: {reason}")]
    File {
        /// As given.
        path: String,
        /// Where in the file, and why.
        reason: String,
    },
    /// A key does not exist.
    #[error("{subject}: unknown key {key}: expected one of {accepted}")]
    UnknownKey {
        /// The file or variable.
        subject: String,
        /// As `section.key`.
        key: String,
        /// The keys of the section.
        accepted: String,
    },
    /// A key has another name now.
    #[error("{subject}: unknown key {old}: renamed to {new}")]
    RenamedKey {
        /// The file or variable.
        subject: String,
        /// As `section.key`.
        old: String,
        /// The new name.
        new: &'static str,
    },
    /// A value has the wrong type or is out of bounds.
    #[error("{subject}{value}: {reason}")]
    Value {
        /// The source, and the key if the source does not name it.
        subject: String,
        /// ` = value`, masked if it may contain a password; empty for a table.
        value: String,
        /// Why it is refused, or what is accepted.
        reason: String,
    },
    /// An environment variable is not text.
    #[error("environment {0}: not valid UTF-8")]
    NotUtf8(String),
}

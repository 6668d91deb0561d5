//! The id of a task in a compact form.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

/// A task id: 16 bytes if it is a UUID in Celery's notation, or else the text itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TaskId {
    /// In Celery's notation: lower case, with hyphens.
    Uuid([u8; 16]),
    /// Any other text.
    Text(Box<str>),
}

/// Maximum bytes of an id that is not a UUID. A longer id is replaced with its prefix and a hash. The result is not
/// longer than this limit, so the stored id is also found when it is looked up itself.
const MAX_TEXT_ID: usize = 256;
const MAX_TEXT_PREFIX: usize = MAX_TEXT_ID - "…".len() - 16;

impl TaskId {
    /// The id of a text.
    #[must_use]
    pub fn new(text: &str) -> Self {
        if let Ok(uuid) = Uuid::try_parse(text)
            && text.len() == 36
            // Without an early exit, this takes a few vector instructions.
            && !text.bytes().fold(false, |found, byte| found | byte.is_ascii_uppercase())
        {
            return Self::Uuid(*uuid.as_bytes());
        }
        if text.len() <= MAX_TEXT_ID {
            return Self::Text(text.into());
        }
        let hash = xxh3_64(text.as_bytes());
        Self::Text(format!("{}…{hash:016x}", &text[..text.floor_char_boundary(MAX_TEXT_PREFIX)]).into())
    }
}

impl std::fmt::Display for TaskId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Uuid(bytes) => Uuid::from_bytes(*bytes).fmt(formatter),
            Self::Text(text) => formatter.write_str(text),
        }
    }
}

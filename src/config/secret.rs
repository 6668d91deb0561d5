//! Text that may contain a password is not printed.

use std::fmt;

use serde::Deserialize;

/// A string that `Display` and `Debug` mask.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text that is printed instead.
    pub(crate) const MASK: &str = "***";

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::MASK)
    }
}

/// `text` if it is safe to print, otherwise a mask. A URL in the wrong setting may contain a password, and so may the
/// content of a file in place of its path.
pub(crate) fn printable(text: &str) -> &str {
    if text.contains("://") || text.contains("-----BEGIN") || text.contains('\n') { Secret::MASK } else { text }
}

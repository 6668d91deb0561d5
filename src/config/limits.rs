//! Bounds of values that have no bound of their own.

/// The longest duration, in milliseconds. A longer one is most likely a typo.
pub(super) const TEN_YEARS: u64 = 315_576_000_000;

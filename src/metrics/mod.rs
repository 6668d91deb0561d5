//! The six families: their series, copies of their numbers, and the text that Prometheus reads.
//!
//! [`Series`] is what the ingest loop moves; it is keyed by the real label tuples. A scrape gets a [`Snapshot`], a copy
//! of the numbers taken in slices, and writes it with [`text::Exposition`] somewhere else, so that neither the
//! series nor a lock on them is held while megabytes are formatted.

mod collector;
mod family;
mod histogram;
mod label;
mod saved;
mod series;
mod snapshot;
pub mod text;

#[cfg(test)]
mod tests;

pub use collector::FlowerCollector;
pub use family::{Family, Kind};
pub use label::OTHER;
pub use saved::{SavedGauges, SavedPair};
pub use series::{MAX_TYPES, PairId, Series, TaskLabel, WorkerRow};
pub use snapshot::{Copying, Snapshot};

//! Flower's six metric families: their series, a snapshot of them per scrape, and the exposition formats.
//! The ingest loop alone owns the [`SeriesTable`]. Nothing here blocks, does I/O or knows the meaning of an event.
//!
//! A scrape copies the values into a [`Snapshot`], in short steps between events. Another thread then encodes the
//! snapshot with [`encode::Exposition`], so neither the series nor a lock on them is held while megabytes are
//! formatted.

mod collector;
mod dirty;
pub mod encode;
mod event_count;
mod exemplars;
mod family;
mod histogram;
mod keys;
mod label_escaping;
mod native;
mod options;
mod persist;
mod series;
mod series_clock;
mod snapshot;
mod worker_groups;

#[cfg(test)]
mod tests;

pub use collector::FlowerCollector;
pub(crate) use dirty::DirtySet;
pub use family::{Family, MetricType};
pub use keys::{SeriesKey, TaskName, WorkerKey};
pub use label_escaping::OTHER;
pub use options::SeriesOptions;
pub use persist::{SavedGauges, SavedTaskSeries};
pub use series::{MAX_EVENT_TYPES, SeriesTable};
pub use snapshot::{Snapshot, SnapshotBuilder};

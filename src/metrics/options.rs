//! What the series contain, and how many there may be.

use std::time::Duration;

use super::native::schema_of_factor;
use crate::config::{MetricsConfig, WorkerGroups};

/// The options of a [`SeriesTable`](super::SeriesTable).
#[derive(Clone, Debug)]
pub struct SeriesOptions {
    /// Maximum number of (worker, task) label sets. Beyond it, tasks are counted under task `(other)`.
    pub max_label_sets: usize,
    /// Upper bounds of the runtime histogram in seconds, ascending, without `+Inf`.
    pub bounds: Vec<f64>,
    /// The workers that share the label sets of their tasks.
    pub worker_groups: Option<WorkerGroups>,
    /// The resolution of native histograms. `None`: there are none.
    pub native_schema: Option<i8>,
    /// Whether the last task of each bucket, and the last one that failed, is kept.
    pub exemplars: bool,
    /// How long a counter or histogram that an event creates shows zero.
    pub zero_first: Duration,
}

impl SeriesOptions {
    /// The options that a configuration sets.
    #[must_use]
    pub fn new(config: &MetricsConfig) -> Self {
        Self {
            max_label_sets: config.max_label_sets,
            bounds: config.task_runtime_metric_buckets.clone(),
            worker_groups: config.worker_groups.clone(),
            native_schema: config.native_histogram_bucket_factor.map(schema_of_factor),
            exemplars: config.exemplars,
            zero_first: config.zero_first,
        }
    }
}

impl Default for SeriesOptions {
    fn default() -> Self {
        Self::new(&MetricsConfig::default())
    }
}

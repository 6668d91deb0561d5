//! Names, help texts and types of the six families, identical to those of Flower 2.2.0 (`flower/events.py`).

use prometheus::proto;

/// A Prometheus metric type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "Prometheus's names")]
pub enum MetricType {
    Counter,
    Gauge,
    Histogram,
}

impl MetricType {
    /// The type of a family of a `prometheus::Registry`, which has counters, gauges and histograms.
    pub(super) fn of(family: &proto::MetricFamily) -> Self {
        match family.get_field_type() {
            proto::MetricType::COUNTER => Self::Counter,
            proto::MetricType::HISTOGRAM => Self::Histogram,
            _ => Self::Gauge,
        }
    }

    /// The text after `# TYPE name`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One of the six metric families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `flower_events_total{task,type,worker}`
    Events,
    /// `flower_task_runtime_seconds{task,worker}`
    Runtime,
    /// `flower_task_prefetch_time_seconds{task,worker}`
    PrefetchTime,
    /// `flower_worker_prefetched_tasks{task,worker}`
    Prefetched,
    /// `flower_worker_online{worker}`
    Online,
    /// `flower_worker_number_of_currently_executing_tasks{worker}`
    Executing,
}

impl Family {
    /// All families, in the order of the exposition.
    pub const ALL: [Self; 6] =
        [Self::Events, Self::Runtime, Self::PrefetchTime, Self::Prefetched, Self::Online, Self::Executing];

    /// The name in the text format. The name of a counter ends in `_total`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Events => "flower_events_total",
            Self::Runtime => "flower_task_runtime_seconds",
            Self::PrefetchTime => "flower_task_prefetch_time_seconds",
            Self::Prefetched => "flower_worker_prefetched_tasks",
            Self::Online => "flower_worker_online",
            Self::Executing => "flower_worker_number_of_currently_executing_tasks",
        }
    }

    /// The name of the samples with start timestamps, for counters and histograms.
    #[must_use]
    pub const fn created_name(self) -> Option<&'static str> {
        match self {
            Self::Events => Some("flower_events_created"),
            Self::Runtime => Some("flower_task_runtime_seconds_created"),
            _ => None,
        }
    }

    /// The text after `# HELP name`.
    #[must_use]
    pub const fn help(self) -> &'static str {
        match self {
            Self::Events => "Number of events",
            Self::Runtime => "Task runtime",
            Self::PrefetchTime => "The time the task spent waiting at the celery worker to be executed.",
            Self::Prefetched => "Number of tasks of given type prefetched at a worker",
            Self::Online => "Worker online status",
            Self::Executing => "Number of tasks currently executing at a worker",
        }
    }

    /// The metric type.
    #[must_use]
    pub const fn metric_type(self) -> MetricType {
        match self {
            Self::Events => MetricType::Counter,
            Self::Runtime => MetricType::Histogram,
            _ => MetricType::Gauge,
        }
    }

    /// The label names, in the order of the exposition.
    #[must_use]
    pub const fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Events => &["task", "type", "worker"],
            Self::Online | Self::Executing => &["worker"],
            _ => &["task", "worker"],
        }
    }
}

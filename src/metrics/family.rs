//! Names, help texts and types of the six families: Flower 2.2.0's, to the letter (`flower/events.py`).

/// A Prometheus metric type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "Prometheus' own names")]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    /// As written after `# TYPE name`.
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
    /// The six, in the order they are served.
    pub const ALL: [Self; 6] =
        [Self::Events, Self::Runtime, Self::PrefetchTime, Self::Prefetched, Self::Online, Self::Executing];

    /// The name in the text format; a counter's ends in `_total`.
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

    /// The type.
    #[must_use]
    pub const fn kind(self) -> Kind {
        match self {
            Self::Events => Kind::Counter,
            Self::Runtime => Kind::Histogram,
            _ => Kind::Gauge,
        }
    }

    /// The label names, in the order they are written.
    #[must_use]
    pub const fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Events => &["task", "type", "worker"],
            Self::Online | Self::Executing => &["worker"],
            _ => &["task", "worker"],
        }
    }
}

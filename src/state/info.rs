//! Workers and tasks as the embedding program sees them.

use std::time::{Duration, SystemTime};

use super::tasks::{Task, TaskState};
use super::workers::{Presence, Worker};
use crate::celery::event::system_time;

/// A worker.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct WorkerInfo {
    /// The node name, for example `celery@host`.
    pub hostname: String,
    /// Whether the worker is online: the value of `flower_worker_online`.
    pub online: bool,
    /// The last reported number of tasks it executes.
    pub active: Option<f64>,
    /// The last reported number of tasks accepted since it started.
    pub processed: Option<f64>,
    /// The load average of its host over 1, 5 and 15 minutes.
    pub loadavg: Option<[f64; 3]>,
    /// The time between its periodic heartbeats.
    pub freq: Option<Duration>,
    /// `sw_ident`: `py-celery`.
    pub sw_ident: Option<String>,
    /// `sw_ver`: Celery's version.
    pub sw_ver: Option<String>,
    /// `sw_sys`: the operating system.
    pub sw_sys: Option<String>,
    /// Time since its last event of any type, without the time during which the exporter was not subscribed.
    pub since_last_event: Duration,
    /// Event counts by type since the worker was first seen, for at most 64 types.
    pub events: Vec<(String, u64)>,
}

impl WorkerInfo {
    pub(super) fn new(worker: &Worker, now: Duration) -> Self {
        let [ident, ver, sys] = worker.software.each_ref().map(|text| text.as_deref().map(str::to_owned));
        Self {
            hostname: worker.hostname.to_string(),
            online: worker.presence == Presence::Online,
            active: worker.active,
            processed: worker.processed,
            loadavg: worker.loadavg,
            freq: worker.freq.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            sw_ident: ident,
            sw_ver: ver,
            sw_sys: sys,
            since_last_event: now.saturating_sub(worker.last_seen),
            events: worker.events.iter().map(|(name, count)| (name.to_string(), *count)).collect(),
        }
    }
}

/// A task. Times are by the sender's clock.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TaskInfo {
    /// The id: a UUID, unless the application set another.
    pub uuid: String,
    /// The name; empty if no event contained it.
    pub name: String,
    /// The state according to its events.
    pub state: TaskState,
    /// Hostname of the worker that last sent an event of this task, if the worker is still tracked.
    pub worker: Option<String>,
    /// When the client sent it.
    pub sent: Option<SystemTime>,
    /// When a worker last received it.
    pub received: Option<SystemTime>,
    /// When a worker last started it.
    pub started: Option<SystemTime>,
    /// When it last ended, in any final state or for a retry.
    pub ended: Option<SystemTime>,
    /// The runtime that its last `task-succeeded` reported.
    pub runtime: Option<Duration>,
    /// Number of retries, by the last event that contained it.
    pub retries: u32,
    /// The earliest time to run it, as Celery wrote it (ISO 8601).
    pub eta: Option<String>,
}

impl TaskInfo {
    pub(super) fn new(task: &Task, name: &str, worker: Option<&str>) -> Self {
        let known = |time: f64| Some(time).filter(|time| *time != 0.0).and_then(system_time);
        Self {
            uuid: task.id.to_string(),
            name: name.to_owned(),
            state: task.state,
            worker: worker.map(str::to_owned),
            sent: known(task.sent),
            received: known(task.received),
            started: known(task.started),
            ended: known(task.ended),
            runtime: Duration::try_from_secs_f64(task.runtime).ok(),
            retries: task.retries,
            eta: task.eta.as_deref().map(ToString::to_string),
        }
    }
}

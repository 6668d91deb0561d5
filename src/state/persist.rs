//! The saved state: one record per worker, label set and task, encoded with postcard and keyed by its slot.
//!
//! A save encodes only the records that changed. It runs between two messages, so the saved records are consistent.

use std::borrow::Cow;
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use super::interner::NameId;
use super::tasks::{PrefetchEntry, Run, Task};
use super::workers::{Presence, Worker, WorkerId};
use super::{Limits, State, TaskState};
use crate::celery::{TaskId, truncate_label};
use crate::metrics::{OTHER, SavedGauges, SavedTaskSeries, SeriesKey, WorkerKey};

/// The version of these records and of the message hashes stored with them. A file of another version is
/// moved aside. From the first release on, the previous version must also be readable.
pub const FORMAT: u32 = 7;

/// Encoded records by key. A key without a record was removed.
#[derive(Debug, Default)]
pub struct RecordBatch {
    /// Each key, and the end of its record in `bytes`. An empty record means removed.
    ends: Vec<(u32, usize)>,
    bytes: Vec<u8>,
}

impl RecordBatch {
    fn put(&mut self, key: u32, record: Option<&impl Serialize>) {
        if let Some(record) = record
            && let Err(error) = postcard::to_io(record, &mut self.bytes)
        {
            // Writing to memory cannot fail, so this is a bug.
            tracing::error!(%error, "failed to encode record");
        }
        self.ends.push((key, self.bytes.len()));
    }

    /// All keys, each with its record, or `None` if it was removed.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Option<&[u8]>)> {
        let mut start = 0;
        self.ends.iter().map(move |(key, end)| {
            let record = &self.bytes[std::mem::replace(&mut start, *end)..*end];
            (*key, (!record.is_empty()).then_some(record))
        })
    }

    /// Total size of the records in bytes.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The records that changed since the last save.
#[derive(Debug, Default)]
pub struct Delta {
    /// Whether it contains every record, so that records it does not contain were removed.
    pub is_full: bool,
    /// Data that all records refer to: bucket bounds, event types and the next worker id.
    pub header: Vec<u8>,
    /// Workers and clients.
    pub workers: RecordBatch,
    /// Series of (worker, task) label sets.
    pub task_series: RecordBatch,
    /// Tasks.
    pub tasks: RecordBatch,
}

impl Delta {
    /// Total size of the records in bytes.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.workers.byte_len() + self.task_series.byte_len() + self.tasks.byte_len()
    }
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    bounds: Cow<'a, [f64]>,
    has_native_histograms: bool,
    #[serde(borrow)]
    event_types: Vec<Cow<'a, str>>,
    next_worker_id: u32,
    /// The key of worker `(other)`.
    other: Option<u32>,
    /// The entries of `metrics.worker_groups`. Their groups have the first keys.
    #[serde(borrow)]
    worker_groups: Vec<Cow<'a, str>>,
}

#[derive(Serialize, Deserialize)]
struct SavedWorker<'a> {
    id: WorkerId,
    key: u32,
    #[serde(borrow)]
    hostname: Cow<'a, str>,
    presence: Presence,
    timed_out: bool,
    epoch: u32,
    active: Option<f64>,
    processed: Option<f64>,
    freq: Option<f64>,
    loadavg: Option<[f64; 3]>,
    software: Cow<'a, [Option<Box<str>>; 3]>,
    events: Cow<'a, [(Box<str>, u64)]>,
    gauges: SavedGauges,
    last_timestamp: f64,
    last_started: f64,
    idle_at: f64,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct SavedRun {
    key: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct SavedTask<'a> {
    id: Cow<'a, TaskId>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    state: TaskState,
    retries: u32,
    #[serde(borrow)]
    eta: Option<Cow<'a, str>>,
    worker: WorkerId,
    sent: f64,
    received: f64,
    started: f64,
    ended: f64,
    runtime: Option<f64>,
    received_by: WorkerId,
    entry: Option<(WorkerId, u32, u32)>,
    run: Option<SavedRun>,
    started_by: WorkerId,
    ended_by: WorkerId,
    is_counted: bool,
    order: u64,
}

impl State {
    /// Starts to track changes for saves. The first save contains every record.
    pub fn track_changes(&mut self) {
        self.tasks.dirty.enable();
        self.workers.dirty.enable();
        self.series.track_changes();
        self.require_full_save = true;
    }

    /// Makes the next save contain every record.
    pub fn require_full_save(&mut self) {
        self.require_full_save = true;
    }

    /// Whether there is anything to save.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        self.require_full_save
            || !self.tasks.dirty.is_empty()
            || !self.workers.dirty.is_empty()
            || self.series.has_changes()
    }

    /// Returns the changes since the last call, and treats them as saved.
    pub fn take_changes(&mut self) -> Delta {
        let is_full = std::mem::take(&mut self.require_full_save);
        if is_full {
            self.mark_all_dirty();
        }
        let mut delta = Delta { is_full, header: self.header(), ..Delta::default() };
        for slot in self.workers.dirty.take() {
            let worker = self.workers.slots().get(slot as usize).map(|worker| self.worker_record(worker));
            delta.workers.put(slot, worker.as_ref());
        }
        for key in self.series.take_changes() {
            let series = self.series.task_series_record(key, |id| self.names.text(NameId(id)));
            delta.task_series.put(key, series.as_ref());
        }
        for slot in self.tasks.dirty.take() {
            delta.tasks.put(slot, Some(&self.task_record(self.tasks.get(slot))));
        }
        delta
    }

    fn mark_all_dirty(&mut self) {
        self.workers.mark_all_dirty();
        self.series.mark_all_dirty();
        self.tasks.mark_all_dirty();
    }

    fn header(&self) -> Vec<u8> {
        let header = Header {
            bounds: self.series.bounds().into(),
            has_native_histograms: self.series.has_native_histograms(),
            event_types: self.series.event_types().into_iter().map(Cow::Borrowed).collect(),
            next_worker_id: self.workers.next_id,
            other: self.other.map(WorkerKey::to_u32),
            worker_groups: self.series.worker_groups().iter().map(|entry| Cow::Borrowed(&**entry)).collect(),
        };
        let mut batch = RecordBatch::default();
        batch.put(0, Some(&header));
        batch.bytes
    }

    fn worker_record<'a>(&'a self, worker: &'a Worker) -> SavedWorker<'a> {
        SavedWorker {
            id: worker.id,
            key: worker.key.to_u32(),
            hostname: Cow::Borrowed(&worker.hostname),
            presence: worker.presence,
            timed_out: worker.timed_out,
            epoch: worker.epoch,
            active: worker.active,
            processed: worker.processed,
            freq: worker.freq,
            loadavg: worker.loadavg,
            software: Cow::Borrowed(&worker.software),
            events: Cow::Borrowed(&worker.events),
            gauges: self.series.gauges_record(worker.key),
            last_timestamp: worker.last_timestamp,
            last_started: worker.last_started,
            idle_at: worker.idle_at,
        }
    }

    fn task_record<'a>(&'a self, task: &'a Task) -> SavedTask<'a> {
        SavedTask {
            id: Cow::Borrowed(&task.id),
            name: Cow::Borrowed(self.names.text(task.name)),
            state: task.state,
            retries: task.retries,
            eta: task.eta.as_deref().map(|eta| Cow::Borrowed(&**eta)),
            worker: task.worker,
            sent: task.sent,
            received: task.received,
            started: task.started,
            ended: task.ended,
            runtime: (task.runtime >= 0.0).then_some(task.runtime),
            received_by: task.received_by,
            entry: task.entry.map(|entry| (entry.worker, entry.epoch, entry.key.to_u32())),
            run: task.run.map(|run| SavedRun { key: run.key.map(SeriesKey::to_u32) }),
            started_by: task.started_by,
            ended_by: task.ended_by,
            is_counted: task.is_counted,
            order: task.order,
        }
    }
}

/// The saved records are invalid or inconsistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Corrupt(&'static str);

/// Restores a state from its records: first the workers, then the label sets, then the tasks, each in any order.
#[derive(Debug)]
pub struct Restorer {
    state: State,
    same_histograms: bool,
    same_groups: bool,
    /// The next save contains every record, because a restored record has a key other than its saved
    /// one, or because the buckets or the worker groups have changed.
    needs_full_save: bool,
    /// The restored keys by the saved ones.
    worker_keys: HashMap<u32, WorkerKey, RandomState>,
    series_keys: HashMap<u32, SeriesKey, RandomState>,
}

impl Restorer {
    /// Starts with the header.
    ///
    /// # Errors
    /// Returns an error if the header is invalid.
    pub fn start(limits: &Limits, header: &[u8]) -> Result<Self, Corrupt> {
        let header: Header = decode(header)?;
        let mut state = State::new(limits);
        state.series.restore_event_types(&header.event_types).ok_or(Corrupt("invalid event types"))?;
        state.workers.next_id = header.next_worker_id.max(1);
        let same_groups = header.worker_groups == state.series.worker_groups();
        if !same_groups {
            tracing::warn!("metrics.worker_groups differ from the saved state; all series of tasks start empty");
        }
        let mut worker_keys = HashMap::default();
        if same_groups {
            worker_keys.extend(state.series.group_keys().map(|key| (key.to_u32(), key)));
        }
        // The groups and worker (other) are the first ones restored, so they have the first keys.
        let mut needs_full_save = !same_groups;
        if let Some(other) = header.other {
            let key = state.other_worker();
            needs_full_save |= key.to_u32() != other;
            worker_keys.insert(other, key);
        }
        let same_histograms = same_histograms(&header, limits);
        Ok(Self { state, same_histograms, same_groups, needs_full_save, worker_keys, series_keys: HashMap::default() })
    }

    /// Restores a worker or client. Its timeout starts again.
    ///
    /// # Errors
    /// Returns an error if the record is invalid or the worker was restored before.
    pub fn worker(&mut self, slot: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedWorker = decode(record)?;
        let State { workers, series, .. } = &mut self.state;
        let is_new = workers.find(&saved.hostname).is_none()
            && workers.by_id(saved.id).is_none()
            && !self.worker_keys.contains_key(&saved.key);
        if !is_new || !saved.id.was_issued_before(workers.next_id) || &*saved.hostname == OTHER {
            return Err(Corrupt("invalid or duplicate worker"));
        }
        let hostname = truncate_label(&saved.hostname);
        let key = series.add_worker(&hostname);
        series.restore_gauges(key, saved.gauges).ok_or(Corrupt("invalid gauge value"))?;
        let counted_as = series.group_of(&hostname).unwrap_or(key);
        let mut worker = Worker::new(saved.id, &hostname, key, counted_as, Duration::ZERO);
        worker.presence = saved.presence;
        worker.timed_out = saved.timed_out;
        worker.epoch = saved.epoch;
        (worker.active, worker.processed, worker.loadavg) = (saved.active, saved.processed, saved.loadavg);
        worker.freq = saved.freq.filter(|freq| *freq > 0.0).map(Worker::cap_freq);
        worker.software = saved.software.into_owned();
        worker.events = saved.events.into_owned();
        worker.last_timestamp = saved.last_timestamp;
        (worker.last_started, worker.idle_at) = (saved.last_started, saved.idle_at);
        (worker.may_hold_prefetched, worker.may_hold_runs) = (true, true);
        let restored_slot = workers.insert(worker);
        self.needs_full_save |= restored_slot != slot as usize || key.to_u32() != saved.key;
        self.worker_keys.insert(saved.key, key);
        Ok(())
    }

    /// Restores the series of a (worker, task) label set.
    ///
    /// # Errors
    /// Returns an error if the record is invalid, the worker is unknown, or the label set was restored before.
    pub fn task_series(&mut self, saved_key: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedTaskSeries = decode(record)?;
        if !self.same_groups {
            return Ok(());
        }
        let worker_key =
            |key| self.worker_keys.get(&key).copied().ok_or(Corrupt("label set references unknown worker"));
        let worker = worker_key(saved.worker)?;
        let writer = saved.prefetch_time_writer.map(worker_key).transpose()?;
        let State { series, names, .. } = &mut self.state;
        let name = saved.task.as_deref().map(|text| names.intern(text).0);
        let key = series.restore_task_series(worker, name, saved, self.same_histograms);
        let key = key.ok_or(Corrupt("invalid or duplicate label set"))?;
        if let Some(writer) = writer {
            series.restore_prefetch_time_writer(key, writer);
        }
        self.needs_full_save |= key.to_u32() != saved_key || !self.same_histograms;
        if self.series_keys.insert(saved_key, key).is_some() {
            return Err(Corrupt("duplicate label set"));
        }
        Ok(())
    }

    /// Restores a task.
    ///
    /// # Errors
    /// Returns an error if the record is invalid, references an unknown label set, or the task was restored before.
    pub fn task(&mut self, slot: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedTask = decode(record)?;
        if self.state.tasks.find(&saved.id).is_some() {
            return Err(Corrupt("duplicate task"));
        }
        let mut task = Task::new(saved.id.into_owned());
        task.entry = self.entry(saved.entry)?;
        task.run = self.run(saved.started_by, saved.run)?;
        task.name = self.state.names.intern(&saved.name);
        (task.state, task.retries, task.is_counted) = (saved.state, saved.retries, saved.is_counted);
        task.order = saved.order;
        task.eta = saved.eta.map(|eta| Box::new(truncate_label(&eta).into()));
        (task.sent, task.received) = (saved.sent, saved.received);
        (task.started, task.ended) = (saved.started, saved.ended);
        task.runtime = saved.runtime.unwrap_or(task.runtime);
        (task.worker, task.received_by) = (saved.worker, saved.received_by);
        (task.started_by, task.ended_by) = (saved.started_by, saved.ended_by);
        let restored_slot = self.state.tasks.restore(task);
        self.needs_full_save |= restored_slot != slot;
        Ok(())
    }

    fn entry(&mut self, saved: Option<(WorkerId, u32, u32)>) -> Result<Option<PrefetchEntry>, Corrupt> {
        let Some((worker, epoch, key)) = saved else { return Ok(None) };
        let Some(key) = self.series_key(worker, key)? else { return Ok(None) };
        let State { workers, series, .. } = &mut self.state;
        if let Some(worker) = workers.by_id(worker).filter(|worker| worker.epoch == epoch) {
            series.restore_prefetched(key, worker.key);
        }
        Ok(Some(PrefetchEntry { worker, epoch, key }))
    }

    fn run(&self, worker: WorkerId, saved: Option<SavedRun>) -> Result<Option<Run>, Corrupt> {
        let Some(SavedRun { key }) = saved else { return Ok(None) };
        let key = key.map(|key| self.series_key(worker, key)).transpose()?.flatten();
        Ok(Some(Run { key }))
    }

    /// The restored key of a label set that a task refers to, or `None` if the worker has been removed, or all
    /// label sets have been left out.
    fn series_key(&self, worker: WorkerId, saved_key: u32) -> Result<Option<SeriesKey>, Corrupt> {
        if !self.same_groups || self.state.workers.by_id(worker).is_none() {
            return Ok(None);
        }
        self.series_keys.get(&saved_key).copied().map(Some).ok_or(Corrupt("task references unknown label set"))
    }

    /// The restored state, which tracks its changes.
    #[must_use]
    pub fn finish(self) -> State {
        let Self { mut state, needs_full_save, .. } = self;
        let evicted = state.tasks.finish_restore();
        for task in &evicted {
            state.forget_task(task);
        }
        state.track_changes();
        state.require_full_save = needs_full_save || !evicted.is_empty();
        state
    }
}

/// Whether saved histograms have the configured buckets.
fn same_histograms(header: &Header, limits: &Limits) -> bool {
    let reason = if *header.bounds != *limits.series.bounds {
        "metrics.task_runtime_metric_buckets differ from the saved state; runtime histograms start empty"
    } else if limits.series.native_schema.is_some() && !header.has_native_histograms {
        "metrics.native_histogram_bucket_factor was not set when the state was saved; runtime histograms start empty"
    } else {
        return true;
    };
    tracing::warn!("{reason}");
    false
}

fn decode<'a, T: Deserialize<'a>>(record: &'a [u8]) -> Result<T, Corrupt> {
    match postcard::take_from_bytes(record) {
        Ok((value, [])) => Ok(value),
        _ => Err(Corrupt("invalid record")),
    }
}

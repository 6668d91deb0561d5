//! The state as it is saved and restored: one record a worker, pair and task, by number, each encoded with postcard.
//!
//! Only what changed is encoded, between two messages, so that what is saved is the state at one moment.

use std::borrow::Cow;
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use super::names::NameId;
use super::tasks::{Entry, Run, Task, TaskId};
use super::workers::{Presence, Worker, WorkerId};
use super::{Limits, State, TaskState};
use crate::celery::cut;
use crate::metrics::{OTHER, PairId, SavedGauges, SavedPair, WorkerRow};

/// The version of these records, and of the hashes beside them. Any other is not read.
pub const FORMAT: u32 = 2;

/// What a save writes: the records of rows by number, none for a row that is gone.
#[derive(Debug, Default)]
pub struct Rows {
    /// Number, where its record ends in `bytes`. An empty record is none.
    rows: Vec<(u32, usize)>,
    bytes: Vec<u8>,
}

impl Rows {
    fn put(&mut self, number: u32, record: Option<&impl Serialize>) {
        if let Some(record) = record
            && let Err(error) = postcard::to_io(record, &mut self.bytes)
        {
            // Memory takes any bytes, and the records' types have a size: this is a mistake in this program.
            tracing::error!(%error, "a record cannot be encoded");
        }
        self.rows.push((number, self.bytes.len()));
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Option<&[u8]>)> {
        let mut start = 0;
        self.rows.iter().map(move |(number, end)| {
            let record = &self.bytes[std::mem::replace(&mut start, *end)..*end];
            (*number, (!record.is_empty()).then_some(record))
        })
    }

    /// How many bytes of records.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// What changed since the last save.
#[derive(Debug, Default)]
pub struct Changes {
    /// Everything is in it: what is not is gone.
    pub whole: bool,
    /// What the rows have in common.
    pub header: Vec<u8>,
    /// Workers and clients.
    pub workers: Rows,
    /// (worker, task) pairs.
    pub pairs: Rows,
    /// Tasks.
    pub tasks: Rows,
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    bounds: Cow<'a, [f64]>,
    #[serde(borrow)]
    types: Vec<Cow<'a, str>>,
    next_worker: u32,
    /// The row of worker `(other)`.
    other: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct SavedWorker<'a> {
    id: WorkerId,
    row: u32,
    #[serde(borrow)]
    hostname: Cow<'a, str>,
    presence: Presence,
    lost: bool,
    epoch: u32,
    active: Option<f64>,
    processed: Option<f64>,
    freq: Option<f64>,
    loadavg: Option<[f64; 3]>,
    software: Cow<'a, [Option<Box<str>>; 3]>,
    events: Cow<'a, [(Box<str>, u64)]>,
    gauges: SavedGauges,
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
    run: Option<(WorkerId, Option<u32>)>,
    started_by: WorkerId,
    is_ours: bool,
    order: u64,
}

impl State {
    /// From now on, remembers what changed; first of all, everything.
    pub fn keep_changes(&mut self) {
        self.tasks.marks.start();
        self.workers.marks.start();
        self.series.keep_marks();
        self.save_all = true;
    }

    /// The next save has everything in it.
    pub fn save_all(&mut self) {
        self.save_all = true;
    }

    /// Whether there is anything to save.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        self.save_all || !self.tasks.marks.is_empty() || !self.workers.marks.is_empty() || self.series.has_marks()
    }

    /// What changed since the last time, which is then regarded as saved.
    pub fn take_changes(&mut self) -> Changes {
        let whole = std::mem::take(&mut self.save_all);
        if whole {
            self.mark_all();
        }
        let mut changes = Changes { whole, header: self.header(), ..Changes::default() };
        for slot in self.workers.marks.take() {
            let worker = self.workers.slots().get(slot as usize).map(|worker| self.save_worker(worker));
            changes.workers.put(slot, worker.as_ref());
        }
        for number in self.series.take_marks() {
            let pair = self.series.save_pair(number, |id| self.names.text(NameId(id)));
            changes.pairs.put(number, pair.as_ref());
        }
        for slot in self.tasks.marks.take() {
            changes.tasks.put(slot, Some(&self.save_task(self.tasks.get(slot))));
        }
        changes
    }

    fn mark_all(&mut self) {
        self.workers.mark_all();
        self.series.mark_all();
        self.tasks.mark_all();
    }

    fn header(&self) -> Vec<u8> {
        let header = Header {
            bounds: self.series.bounds().into(),
            types: self.series.types().into_iter().map(Cow::Borrowed).collect(),
            next_worker: self.workers.next_id,
            other: self.other.map(WorkerRow::number),
        };
        let mut rows = Rows::default();
        rows.put(0, Some(&header));
        rows.bytes
    }

    fn save_worker<'a>(&'a self, worker: &'a Worker) -> SavedWorker<'a> {
        SavedWorker {
            id: worker.id,
            row: worker.row.number(),
            hostname: Cow::Borrowed(&worker.hostname),
            presence: worker.presence,
            lost: worker.lost,
            epoch: worker.epoch,
            active: worker.active,
            processed: worker.processed,
            freq: worker.freq,
            loadavg: worker.loadavg,
            software: Cow::Borrowed(&worker.software),
            events: Cow::Borrowed(&worker.events),
            gauges: self.series.save_gauges(worker.row),
        }
    }

    fn save_task<'a>(&'a self, task: &'a Task) -> SavedTask<'a> {
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
            entry: task.entry.map(|entry| (entry.worker, entry.epoch, entry.pair.number())),
            run: task.run.map(|run| (run.worker, run.pair.map(PairId::number))),
            started_by: task.started_by,
            is_ours: task.is_ours,
            order: task.order,
        }
    }
}

/// The saved records cannot be those of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Corrupt(&'static str);

/// A state that is being restored: workers first, then pairs, then tasks, each in any order.
#[derive(Debug)]
pub struct Restoring {
    state: State,
    same_bounds: bool,
    /// What is held in other rows than it was saved in has to be saved again.
    moved: bool,
    rows: HashMap<u32, WorkerRow, RandomState>,
    pairs: HashMap<u32, PairId, RandomState>,
}

impl Restoring {
    /// Starts with the header.
    ///
    /// # Errors
    /// It is none.
    pub fn start(limits: &Limits, header: &[u8]) -> Result<Self, Corrupt> {
        let header: Header = read(header)?;
        let mut state = State::new(limits);
        state.series.restore_types(&header.types).ok_or(Corrupt("the event types contradict each other"))?;
        state.workers.next_id = header.next_worker.max(1);
        let mut rows = HashMap::default();
        if let Some(other) = header.other {
            rows.insert(other, state.other_row());
        }
        let same_bounds = *header.bounds == *limits.buckets;
        if !same_bounds {
            tracing::warn!(
                "metrics.task_runtime_metric_buckets differ from those of the saved state: the runtime histograms begin anew"
            );
        }
        // The row of worker (other) need not be the one it was.
        let moved = header.other.is_some_and(|row| row != 0);
        Ok(Self { state, same_bounds, moved, rows, pairs: HashMap::default() })
    }

    /// A worker or client. It gets a fresh timeout.
    ///
    /// # Errors
    /// It contradicts another, or cannot be.
    pub fn worker(&mut self, number: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedWorker = read(record)?;
        let State { workers, series, .. } = &mut self.state;
        let is_new = workers.find(&saved.hostname).is_none()
            && workers.by_id(saved.id).is_none()
            && !self.rows.contains_key(&saved.row);
        if !is_new || !saved.id.is_before(workers.next_id) || &*saved.hostname == OTHER {
            return Err(Corrupt("two workers contradict each other"));
        }
        let hostname = cut(&saved.hostname);
        let row = series.add_worker(&hostname);
        series.restore_gauges(row, saved.gauges).ok_or(Corrupt("a gauge that cannot be"))?;
        let mut worker = Worker::new(saved.id, &hostname, row, Duration::ZERO);
        worker.presence = saved.presence;
        worker.lost = saved.lost;
        worker.epoch = saved.epoch;
        (worker.active, worker.processed, worker.loadavg) = (saved.active, saved.processed, saved.loadavg);
        worker.freq = saved.freq.filter(|freq| *freq > 0.0).map(Worker::bounded_freq);
        worker.software = saved.software.into_owned();
        worker.events = saved.events.into_owned();
        worker.holds = true;
        let slot = workers.insert(worker);
        self.moved |= slot != number as usize || row.number() != saved.row;
        self.rows.insert(saved.row, row);
        Ok(())
    }

    /// A (worker, task) pair.
    ///
    /// # Errors
    /// It contradicts what was restored before, or cannot be.
    pub fn pair(&mut self, number: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedPair = read(record)?;
        let row = *self.rows.get(&saved.worker).ok_or(Corrupt("a pair of no worker"))?;
        let State { series, names, .. } = &mut self.state;
        let name = saved.task.as_deref().map(|text| names.hold_text(text).0);
        let pair = series.restore_pair(row, name, saved, self.same_bounds).ok_or(Corrupt("a pair that cannot be"))?;
        self.moved |= pair.number() != number || !self.same_bounds;
        if self.pairs.insert(number, pair).is_some() {
            return Err(Corrupt("two pairs of one number"));
        }
        Ok(())
    }

    /// A task.
    ///
    /// # Errors
    /// It contradicts what was restored before, or cannot be.
    pub fn task(&mut self, number: u32, record: &[u8]) -> Result<(), Corrupt> {
        let saved: SavedTask = read(record)?;
        if self.state.tasks.find(&saved.id).is_some() {
            return Err(Corrupt("two tasks of one id"));
        }
        let mut task = Task::new(saved.id.into_owned());
        task.entry = self.entry(saved.entry)?;
        task.run = self.run(saved.run)?;
        task.name = self.state.names.hold_text(&saved.name);
        (task.state, task.retries, task.is_ours) = (saved.state, saved.retries, saved.is_ours);
        task.order = saved.order;
        task.eta = saved.eta.map(|eta| Box::new(cut(&eta).into()));
        (task.sent, task.received) = (saved.sent, saved.received);
        (task.started, task.ended) = (saved.started, saved.ended);
        task.runtime = saved.runtime.unwrap_or(task.runtime);
        (task.worker, task.received_by, task.started_by) = (saved.worker, saved.received_by, saved.started_by);
        let slot = self.state.tasks.restore(task);
        self.moved |= slot != number;
        Ok(())
    }

    fn entry(&self, saved: Option<(WorkerId, u32, u32)>) -> Result<Option<Entry>, Corrupt> {
        let Some((worker, epoch, pair)) = saved else { return Ok(None) };
        let pair = self.pair_of(worker, pair)?;
        Ok(pair.map(|pair| Entry { worker, epoch, pair }))
    }

    fn run(&self, saved: Option<(WorkerId, Option<u32>)>) -> Result<Option<Run>, Corrupt> {
        let Some((worker, pair)) = saved else { return Ok(None) };
        let pair = pair.map(|pair| self.pair_of(worker, pair)).transpose()?.flatten();
        Ok(Some(Run { worker, pair }))
    }

    /// A pair that a task speaks of; none if its worker is gone, and the pair with it.
    fn pair_of(&self, worker: WorkerId, pair: u32) -> Result<Option<PairId>, Corrupt> {
        if self.state.workers.by_id(worker).is_none() {
            return Ok(None);
        }
        self.pairs.get(&pair).copied().map(Some).ok_or(Corrupt("a task of no pair"))
    }

    /// The state, which remembers what changes from here on.
    #[must_use]
    pub fn finish(self) -> State {
        let Self { mut state, moved, .. } = self;
        let beyond = state.tasks.restored();
        for task in &beyond {
            state.forget_task(task);
        }
        state.keep_changes();
        state.save_all = moved || !beyond.is_empty();
        state
    }
}

fn read<'a, T: Deserialize<'a>>(record: &'a [u8]) -> Result<T, Corrupt> {
    match postcard::take_from_bytes(record) {
        Ok((value, [])) => Ok(value),
        _ => Err(Corrupt("a record that is none")),
    }
}

//! The tasks held in memory, at most `state.max_tasks`: finished ones give way first, the oldest first.

use std::hash::{BuildHasher, Hash};
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::names::NameId;
use super::workers::WorkerId;
use crate::marks::Marks;
use crate::metrics::PairId;

/// A task's id: 16 bytes for a UUID as Celery writes it, the text itself otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum TaskId {
    Uuid([u8; 16]),
    Text(Box<str>),
}

/// Bytes of an id that is no UUID; of a longer one the beginning and a hash are kept, of the same length together, so
/// that it can be asked for by what is kept of it.
const MAX_TEXT_ID: usize = 256;
const MAX_BEGINNING: usize = MAX_TEXT_ID - "…".len() - 16;

impl TaskId {
    pub(super) fn of(text: &str) -> Self {
        if let Ok(uuid) = Uuid::try_parse(text)
            && text.len() == 36
            && !text.bytes().any(|byte| byte.is_ascii_uppercase())
        {
            return Self::Uuid(*uuid.as_bytes());
        }
        if text.len() <= MAX_TEXT_ID {
            return Self::Text(text.into());
        }
        let hash = foldhash::quality::FixedState::default().hash_one(text);
        Self::Text(format!("{}…{hash:016x}", &text[..text.floor_char_boundary(MAX_BEGINNING)]).into())
    }
}

impl std::fmt::Display for TaskId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Uuid(bytes) => Uuid::from_bytes(*bytes).fmt(formatter),
            Self::Text(text) => formatter.write_str(text),
        }
    }
}

/// Where a task is, by the events seen (`celery.states`, in the order of their precedence).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "Celery's own names")]
pub enum TaskState {
    Pending,
    Retried,
    Rejected,
    Received,
    Started,
    Revoked,
    Cancelled,
    Failed,
    Succeeded,
}

impl TaskState {
    /// Whether nothing more is expected to come.
    #[must_use]
    pub const fn is_finished(self) -> bool {
        !matches!(self, Self::Pending | Self::Retried | Self::Received | Self::Started)
    }

    /// The state after an event: late news of an earlier state does not count, except around a retry.
    pub(super) fn after(self, told: Self) -> Self {
        if told == Self::Retried || self == Self::Retried || told > self { told } else { self }
    }
}

/// A task prefetched by a worker and not yet started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) worker: WorkerId,
    pub(super) epoch: u32,
    /// The pair it was counted under.
    pub(super) pair: PairId,
}

/// A task that runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) worker: WorkerId,
    /// The pair whose prefetch time it set.
    pub(super) pair: Option<PairId>,
}

/// What is remembered of a task, in 136 bytes: there may be a million. Times are Unix seconds by the sender's clock, 0
/// for none.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) name: NameId,
    pub(super) state: TaskState,
    pub(super) retries: u32,
    /// Few tasks have one: not more than a pointer's room for those that do not.
    pub(super) eta: Option<Box<Box<str>>>,
    pub(super) worker: WorkerId,
    pub(super) sent: f64,
    pub(super) received: f64,
    pub(super) started: f64,
    pub(super) ended: f64,
    /// In seconds; below 0 for none.
    pub(super) runtime: f64,
    /// Whose `received` it is.
    pub(super) received_by: WorkerId,
    pub(super) entry: Option<Entry>,
    pub(super) run: Option<Run>,
    /// Who started it last.
    pub(super) started_by: WorkerId,
    /// An event of it was counted here; otherwise only its name is of use.
    pub(super) is_ours: bool,
    /// Grows from task to task as they are put into their lists.
    pub(super) order: u64,
    older: u32,
    newer: u32,
    listed_finished: bool,
}

const _: () = assert!(size_of::<Task>() == 136);

impl Task {
    pub(super) fn new(id: TaskId) -> Self {
        Self {
            id,
            name: NameId::EMPTY,
            state: TaskState::Pending,
            retries: 0,
            eta: None,
            worker: WorkerId::NONE,
            sent: 0.0,
            received: 0.0,
            started: 0.0,
            ended: 0.0,
            runtime: -1.0,
            received_by: WorkerId::NONE,
            entry: None,
            run: None,
            started_by: WorkerId::NONE,
            is_ours: false,
            order: 0,
            older: NOBODY,
            newer: NOBODY,
            listed_finished: false,
        }
    }

    fn belongs_to_finished(&self) -> bool {
        self.state.is_finished() || !self.is_ours
    }
}

const NOBODY: u32 = u32::MAX;
const CHUNK: usize = 1024;
const SHARDS: usize = 64;

/// Two ends of a list of tasks, oldest to newest.
#[derive(Clone, Copy, Debug)]
struct Ends {
    oldest: u32,
    newest: u32,
}

/// The table of tasks. It grows in chunks and its index in shards, so that no event waits for a million others.
#[derive(Debug)]
pub(super) struct Tasks {
    chunks: Vec<Vec<Task>>,
    index: Vec<HashTable<u32>>,
    hasher: RandomState,
    unfinished: Ends,
    finished: Ends,
    len: usize,
    max: usize,
    next_order: u64,
    /// Slots that changed since the last save.
    pub(super) marks: Marks,
}

impl Tasks {
    pub(super) fn new(max: usize) -> Self {
        let empty = Ends { oldest: NOBODY, newest: NOBODY };
        Self {
            chunks: Vec::new(),
            index: std::iter::repeat_with(HashTable::new).take(SHARDS).collect(),
            hasher: RandomState::default(),
            unfinished: empty,
            finished: empty,
            len: 0,
            max,
            next_order: 0,
            marks: Marks::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn find(&self, id: &TaskId) -> Option<u32> {
        let hash = self.hasher.hash_one(id);
        self.index[shard(hash)].find(hash, |slot| self.get(*slot).id == *id).copied()
    }

    /// The task that has to go before another can be added.
    pub(super) fn victim(&self) -> Option<u32> {
        if self.len < self.max {
            return None;
        }
        [self.finished.oldest, self.unfinished.oldest].into_iter().find(|slot| *slot != NOBODY)
    }

    /// Adds a task in the place of `victim`, or in a new one. Returns its slot and the task that went.
    pub(super) fn add(&mut self, id: TaskId, victim: Option<u32>) -> (u32, Option<Task>) {
        let task = Task::new(id);
        let (slot, gone) = match victim {
            Some(slot) => {
                self.unlink(slot);
                self.forget(slot);
                (slot, Some(std::mem::replace(self.get_mut(slot), task)))
            }
            None => (self.push(task), None),
        };
        self.enter(slot);
        self.link(slot, false);
        (slot, gone)
    }

    /// Takes in a task that was saved; [`Tasks::restored`] has to follow the last one.
    pub(super) fn restore(&mut self, task: Task) -> u32 {
        let slot = self.push(task);
        self.enter(slot);
        slot
    }

    /// Puts the tasks that were restored into their lists, in their old order. Returns those beyond the
    /// bound, which are gone, in which case the slots of the others are new ones.
    pub(super) fn restored(&mut self) -> Vec<Task> {
        let mut order: Vec<u32> = (0..number(self.len)).collect();
        let excess = self.len.saturating_sub(self.max);
        // Where some have to go, those that would go first.
        order.sort_unstable_by_key(|slot| {
            let task = self.get(*slot);
            (excess > 0 && !task.belongs_to_finished(), task.order)
        });
        if excess > 0 {
            let mut all: Vec<_> = std::mem::take(&mut self.chunks).into_iter().flatten().map(Some).collect();
            let mut in_order = order.iter().filter_map(|slot| all[*slot as usize].take());
            let gone = in_order.by_ref().take(excess).collect();
            *self = Self { marks: std::mem::take(&mut self.marks), ..Self::new(self.max) };
            for task in in_order {
                let slot = self.restore(task);
                self.link_by_state(slot);
            }
            return gone;
        }
        for slot in order {
            self.link_by_state(slot);
        }
        Vec::new()
    }

    pub(super) fn mark_all(&mut self) {
        let Self { marks, len, .. } = self;
        (0..number(*len)).for_each(|slot| marks.mark(slot));
    }

    fn link_by_state(&mut self, slot: u32) {
        let task = self.get(slot);
        let (order, finished) = (task.order, task.belongs_to_finished());
        self.link(slot, finished);
        self.get_mut(slot).order = order;
        self.next_order = self.next_order.max(order.saturating_add(1));
    }

    fn enter(&mut self, slot: u32) {
        let Self { index, chunks, hasher, .. } = self;
        let hash = hasher.hash_one(&place(chunks, slot).id);
        index[shard(hash)].insert_unique(hash, slot, |slot| hasher.hash_one(&place(chunks, *slot).id));
    }

    fn push(&mut self, task: Task) -> u32 {
        if self.len.is_multiple_of(CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.push(task);
        }
        self.len += 1;
        number(self.len - 1)
    }

    fn forget(&mut self, slot: u32) {
        let hash = self.hasher.hash_one(&self.get(slot).id);
        if let Ok(entry) = self.index[shard(hash)].find_entry(hash, |known| *known == slot) {
            entry.remove();
        }
    }

    pub(super) fn get(&self, slot: u32) -> &Task {
        place(&self.chunks, slot)
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Task {
        &mut self.chunks[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    /// Moves a task to the list of its state, where it is the newest.
    pub(super) fn relist(&mut self, slot: u32) {
        let task = self.get(slot);
        let finished = task.belongs_to_finished();
        if finished != task.listed_finished {
            self.unlink(slot);
            self.link(slot, finished);
        }
    }

    fn link(&mut self, slot: u32, finished: bool) {
        let before = if finished { self.finished.newest } else { self.unfinished.newest };
        let order = self.next_order;
        self.next_order = self.next_order.saturating_add(1);
        let task = self.get_mut(slot);
        (task.older, task.newer, task.listed_finished) = (before, NOBODY, finished);
        task.order = order;
        if before != NOBODY {
            self.get_mut(before).newer = slot;
        }
        let ends = self.ends(finished);
        ends.newest = slot;
        if before == NOBODY {
            ends.oldest = slot;
        }
    }

    fn unlink(&mut self, slot: u32) {
        let task = self.get(slot);
        let (older, newer, finished) = (task.older, task.newer, task.listed_finished);
        if older == NOBODY {
            self.ends(finished).oldest = newer;
        } else {
            self.get_mut(older).newer = newer;
        }
        if newer == NOBODY {
            self.ends(finished).newest = older;
        } else {
            self.get_mut(newer).older = older;
        }
    }

    fn ends(&mut self, finished: bool) -> &mut Ends {
        if finished { &mut self.finished } else { &mut self.unfinished }
    }

    /// The tasks in the slots from `start` on, in no particular order.
    pub(super) fn iter_from(&self, start: usize) -> impl Iterator<Item = &Task> {
        (start..self.len).map(|slot| &self.chunks[slot / CHUNK][slot % CHUNK])
    }
}

#[allow(clippy::cast_possible_truncation, reason = "at most 100 million tasks")]
fn number(slot: usize) -> u32 {
    slot as u32
}

fn place(chunks: &[Vec<Task>], slot: u32) -> &Task {
    &chunks[slot as usize / CHUNK][slot as usize % CHUNK]
}

/// The upper bits choose the shard: the table within it uses the lower ones.
fn shard(hash: u64) -> usize {
    #[allow(clippy::cast_possible_truncation, reason = "six bits")]
    let shard = (hash >> 40) as usize % SHARDS;
    shard
}

/// A task as a program that embeds the exporter reads it. Times are Unix seconds by the sender's clock.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TaskView {
    /// The id, a UUID unless the user chose another.
    pub uuid: String,
    /// The name; empty where no event has told it.
    pub name: String,
    /// Where it is.
    pub state: TaskState,
    /// Hostname of the worker that last sent an event of it, while that is known.
    pub worker: Option<String>,
    /// When the client sent it.
    pub sent: Option<f64>,
    /// When a worker last received it.
    pub received: Option<f64>,
    /// When a worker last started it.
    pub started: Option<f64>,
    /// When it last ended, in whatever way.
    pub ended: Option<f64>,
    /// How long it ran, if it succeeded.
    pub runtime: Option<Duration>,
    /// How often it was retried, by the last event that told.
    pub retries: u32,
    /// When it is to run, as Celery wrote it (ISO 8601).
    pub eta: Option<String>,
}

impl TaskView {
    pub(super) fn of(task: &Task, name: &str, worker: Option<&str>) -> Self {
        let known = |time: f64| (time != 0.0).then_some(time);
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

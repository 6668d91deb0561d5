//! The tracked tasks, at most `state.max_tasks`. Finished tasks, and those of which only metadata is used, are evicted
//! first, in the order in which they became such.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use serde::{Deserialize, Serialize};

use super::interner::NameId;
use super::workers::WorkerId;
use crate::celery::TaskId;
use crate::metrics::{DirtySet, SeriesKey};

/// The state of a task according to its events, in ascending order of precedence (`celery.states`; `Cancelled` is the
/// state after `task-cancelled`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the event types")]
#[non_exhaustive]
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
    /// Whether no further event is expected.
    #[must_use]
    pub const fn is_finished(self) -> bool {
        !matches!(self, Self::Pending | Self::Retried | Self::Received | Self::Started)
    }

    /// The state after an event with the state `next`, which replaces this one if it has higher precedence, or if
    /// either one is `Retried`.
    pub(super) fn after(self, next: Self) -> Self {
        if next == Self::Retried || self == Self::Retried || next > self { next } else { self }
    }
}

/// A task prefetched by a worker and not yet started.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefetchEntry {
    pub(super) worker: WorkerId,
    pub(super) epoch: u32,
    /// The label set it was counted under.
    pub(super) key: SeriesKey,
}

/// What a task stores about its open run, which belongs to the worker that last started the task and began then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// The label set whose prefetch time it set.
    pub(super) key: Option<SeriesKey>,
}

/// An open run with its worker and its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenRun {
    pub(super) worker: WorkerId,
    /// By the worker's clock.
    pub(super) started: f64,
    /// The label set whose prefetch time it set.
    pub(super) key: Option<SeriesKey>,
}

/// What an evicted task has left behind.
#[derive(Clone, Copy, Debug)]
pub(super) struct EvictedTask {
    pub(super) name: NameId,
    pub(super) entry: Option<PrefetchEntry>,
    pub(super) run: Option<OpenRun>,
    pub(super) is_unfinished: bool,
}

/// A tracked task, 136 bytes, because there may be a million. Times are Unix seconds by the sender's clock; 0 means
/// unknown.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) id: TaskId,
    pub(super) name: NameId,
    pub(super) state: TaskState,
    pub(super) retries: u32,
    /// Boxed twice, so that a task without an eta, which is the usual case, spends one pointer on it.
    pub(super) eta: Option<Box<Box<str>>>,
    pub(super) worker: WorkerId,
    pub(super) sent: f64,
    pub(super) received: f64,
    pub(super) started: f64,
    pub(super) ended: f64,
    /// In seconds; negative means unknown.
    pub(super) runtime: f64,
    /// The worker that `received` came from.
    pub(super) received_by: WorkerId,
    pub(super) entry: Option<PrefetchEntry>,
    pub(super) run: Option<Run>,
    /// The worker that `started` came from.
    pub(super) started_by: WorkerId,
    /// The worker that `ended` came from.
    pub(super) ended_by: WorkerId,
    /// An event of this task was counted. Otherwise only its metadata is used.
    pub(super) is_counted: bool,
    /// Its position in its list. Increases from older to newer.
    pub(super) order: u64,
    older: u32,
    newer: u32,
    listed_first: bool,
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
            ended_by: WorkerId::NONE,
            is_counted: false,
            order: 0,
            older: NIL,
            newer: NIL,
            listed_first: false,
        }
    }

    /// The open run, if there is one.
    pub(super) fn open_run(&self) -> Option<OpenRun> {
        self.run.map(|run| OpenRun { worker: self.started_by, started: self.started, key: run.key })
    }

    /// What remains to be done when the task is evicted.
    pub(super) fn evicted(&self) -> EvictedTask {
        let is_unfinished = self.is_counted && !self.state.is_finished();
        EvictedTask { name: self.name, entry: self.entry, run: self.open_run(), is_unfinished }
    }

    fn is_evicted_first(&self) -> bool {
        self.state.is_finished() || !self.is_counted
    }
}

const NIL: u32 = u32::MAX;
const CHUNK: usize = 1024;
const SHARDS: usize = 64;

/// The ends of a linked list of tasks.
#[derive(Clone, Copy, Debug)]
struct Ends {
    oldest: u32,
    newest: u32,
}

/// The table of tasks. It grows in chunks and its index in shards, so that no single event pays for moving a million
/// tasks.
#[derive(Debug)]
pub(super) struct Tasks {
    chunks: Vec<Vec<Task>>,
    index: Vec<HashTable<u32>>,
    hasher: RandomState,
    evict_last: Ends,
    evict_first: Ends,
    len: usize,
    pub(super) max: usize,
    next_order: u64,
    /// Slots that changed since the last save.
    pub(super) dirty: DirtySet,
}

impl Tasks {
    pub(super) fn new(max: usize) -> Self {
        let empty = Ends { oldest: NIL, newest: NIL };
        Self {
            chunks: Vec::new(),
            index: std::iter::repeat_with(HashTable::new).take(SHARDS).collect(),
            hasher: RandomState::default(),
            evict_last: empty,
            evict_first: empty,
            len: 0,
            max,
            next_order: 0,
            dirty: DirtySet::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn find(&self, id: &TaskId) -> Option<u32> {
        let hash = self.hasher.hash_one(id);
        self.index[shard(hash)].find(hash, |slot| self.get(*slot).id == *id).copied()
    }

    /// The slot to evict before another task can be added, if the table is full.
    pub(super) fn eviction_candidate(&self) -> Option<u32> {
        if self.len < self.max {
            return None;
        }
        [self.evict_first.oldest, self.evict_last.oldest].into_iter().find(|slot| *slot != NIL)
    }

    /// Adds a task in the slot of `eviction_candidate`, or in a new slot. Returns the slot and what was evicted.
    pub(super) fn add(&mut self, id: TaskId, eviction_candidate: Option<u32>) -> (u32, Option<EvictedTask>) {
        let (slot, evicted) = match eviction_candidate {
            Some(slot) => {
                self.unlink(slot);
                self.index_remove(slot);
                let task = self.get_mut(slot);
                let evicted = task.evicted();
                *task = Task::new(id);
                (slot, Some(evicted))
            }
            None => (self.push(Task::new(id)), None),
        };
        self.index_insert(slot);
        self.link(slot, false);
        (slot, evicted)
    }

    /// Adds a saved task without linking it. Call [`Tasks::finish_restore`] after the last one.
    pub(super) fn restore(&mut self, task: Task) -> u32 {
        let slot = self.push(task);
        self.index_insert(slot);
        slot
    }

    /// Links the restored tasks into their lists, in the saved order. Returns the tasks that exceed the limit; if there
    /// are any, the others have moved to new slots.
    pub(super) fn finish_restore(&mut self) -> Vec<EvictedTask> {
        let mut order: Vec<u32> = (0..to_u32(self.len)).collect();
        let excess = self.len.saturating_sub(self.max);
        // Over the limit, the tasks that would be evicted first come first.
        order.sort_unstable_by_key(|slot| {
            let task = self.get(*slot);
            (excess > 0 && !task.is_evicted_first(), task.order)
        });
        if excess > 0 {
            let mut all: Vec<_> = std::mem::take(&mut self.chunks).into_iter().flatten().map(Some).collect();
            let mut in_order = order.iter().filter_map(|slot| all[*slot as usize].take());
            let evicted = in_order.by_ref().take(excess).map(|task| task.evicted()).collect();
            *self = Self { dirty: std::mem::take(&mut self.dirty), ..Self::new(self.max) };
            for task in in_order {
                let slot = self.restore(task);
                self.link_by_state(slot);
            }
            return evicted;
        }
        for slot in order {
            self.link_by_state(slot);
        }
        Vec::new()
    }

    pub(super) fn mark_all_dirty(&mut self) {
        let Self { dirty, len, .. } = self;
        (0..to_u32(*len)).for_each(|slot| dirty.mark(slot));
    }

    fn link_by_state(&mut self, slot: u32) {
        let task = self.get(slot);
        let (order, evict_first) = (task.order, task.is_evicted_first());
        self.link(slot, evict_first);
        self.get_mut(slot).order = order;
        self.next_order = self.next_order.max(order.saturating_add(1));
    }

    fn index_insert(&mut self, slot: u32) {
        let Self { index, chunks, hasher, .. } = self;
        let hash = hasher.hash_one(&task_at(chunks, slot).id);
        index[shard(hash)].insert_unique(hash, slot, |slot| hasher.hash_one(&task_at(chunks, *slot).id));
    }

    fn push(&mut self, task: Task) -> u32 {
        if self.len.is_multiple_of(CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.push(task);
        }
        self.len += 1;
        to_u32(self.len - 1)
    }

    fn index_remove(&mut self, slot: u32) {
        let hash = self.hasher.hash_one(&self.get(slot).id);
        if let Ok(entry) = self.index[shard(hash)].find_entry(hash, |known| *known == slot) {
            entry.remove();
        }
    }

    pub(super) fn get(&self, slot: u32) -> &Task {
        task_at(&self.chunks, slot)
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Task {
        &mut self.chunks[slot as usize / CHUNK][slot as usize % CHUNK]
    }

    /// Moves a task to the newest end of the list that it belongs in, unless it is in that list.
    pub(super) fn move_to_list(&mut self, slot: u32) {
        let task = self.get(slot);
        let evict_first = task.is_evicted_first();
        if evict_first != task.listed_first {
            self.unlink(slot);
            self.link(slot, evict_first);
        }
    }

    fn link(&mut self, slot: u32, evict_first: bool) {
        let before = if evict_first { self.evict_first.newest } else { self.evict_last.newest };
        let order = self.next_order;
        self.next_order = self.next_order.saturating_add(1);
        let task = self.get_mut(slot);
        (task.older, task.newer, task.listed_first) = (before, NIL, evict_first);
        task.order = order;
        if before != NIL {
            self.get_mut(before).newer = slot;
        }
        let ends = self.ends(evict_first);
        ends.newest = slot;
        if before == NIL {
            ends.oldest = slot;
        }
    }

    fn unlink(&mut self, slot: u32) {
        let task = self.get(slot);
        let (older, newer, evict_first) = (task.older, task.newer, task.listed_first);
        if older == NIL {
            self.ends(evict_first).oldest = newer;
        } else {
            self.get_mut(older).newer = newer;
        }
        if newer == NIL {
            self.ends(evict_first).newest = older;
        } else {
            self.get_mut(newer).older = older;
        }
    }

    fn ends(&mut self, evict_first: bool) -> &mut Ends {
        if evict_first { &mut self.evict_first } else { &mut self.evict_last }
    }

    /// The tasks from slot `start`, in no particular order.
    pub(super) fn iter_from(&self, start: usize) -> impl Iterator<Item = &Task> {
        (start..self.len).map(|slot| &self.chunks[slot / CHUNK][slot % CHUNK])
    }
}

#[allow(clippy::cast_possible_truncation, reason = "at most 100 million tasks")]
fn to_u32(slot: usize) -> u32 {
    slot as u32
}

fn task_at(chunks: &[Vec<Task>], slot: u32) -> &Task {
    &chunks[slot as usize / CHUNK][slot as usize % CHUNK]
}

/// Selects the shard by bits that the table within the shard does not use for its buckets.
fn shard(hash: u64) -> usize {
    #[allow(clippy::cast_possible_truncation, reason = "six bits")]
    let shard = (hash >> 40) as usize % SHARDS;
    shard
}

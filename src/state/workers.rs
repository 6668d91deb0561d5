//! The hostnames that send events: workers, and the clients that send `task-sent`.

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashTable};
use serde::{Deserialize, Serialize};
use slab::Slab;

use super::{Arrival, Timeouts};
use crate::celery::{Event, EventKind, truncate_label};
use crate::metrics::{DirtySet, MAX_EVENT_TYPES, WorkerKey};

/// Identifies a worker that is or was tracked. A worker that returns after its purge gets a new id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkerId(u32);

impl WorkerId {
    /// No worker.
    pub const NONE: Self = Self(0);

    /// Whether this id was issued, given that `next` is the next one.
    pub(super) fn was_issued_before(self, next: u32) -> bool {
        self != Self::NONE && self.0 < next
    }
}

/// Cap on a worker's heartbeat interval, in seconds (24 hours). It bounds the timeout that the interval extends.
const MAX_FREQ: f64 = 86_400.0;

/// What a hostname's events show about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// It has only sent `task-sent`.
    Client,
    /// It has sent task events, but neither `worker-online` nor a heartbeat, or it was online and has timed out since.
    Unconfirmed,
    /// It has sent `worker-online` or a heartbeat.
    Online,
    /// It has sent `worker-offline`. It holds no prefetch entries until it is online again.
    Offline,
}

/// The baseline for detecting a worker that processes tasks without sending task events: the last heartbeat before
/// `processed` rose.
#[derive(Clone, Copy, Debug)]
pub struct TaskEventBaseline {
    /// When the heartbeat arrived.
    pub since: Duration,
    /// Its `processed`.
    pub processed: f64,
}

/// A worker or client.
#[derive(Debug)]
pub struct Worker {
    /// Identifies the worker in task records.
    pub id: WorkerId,
    /// The value of the worker label: at most 256 bytes, plus `…` if it was truncated.
    pub hostname: Box<str>,
    /// Its key in the series.
    pub key: WorkerKey,
    /// The key that its tasks are counted under: that of its group, or its own.
    pub counted_as: WorkerKey,
    /// When its last event of any type arrived, by the clock that runs only while the exporter is subscribed.
    pub last_seen: Duration,
    /// What its events show about it.
    pub presence: Presence,
    /// No event has arrived within its timeout.
    pub timed_out: bool,
    /// Incremented each time its prefetched tasks are cleared. Entries of an earlier epoch no longer count.
    pub epoch: u32,
    /// The last reported number of tasks it executes.
    pub active: Option<f64>,
    /// The last reported number of tasks accepted since it started.
    pub processed: Option<f64>,
    /// Seconds between its periodic heartbeats.
    pub freq: Option<f64>,
    /// The load average of its host over 1, 5 and 15 minutes.
    pub loadavg: Option<[f64; 3]>,
    /// `sw_ident`, `sw_ver`, `sw_sys`.
    pub software: [Option<Box<str>>; 3],
    /// Event counts by type.
    pub events: Vec<(Box<str>, u64)>,
    /// The index in `events` of each kind that is one type, so that its name needs no lookup.
    events_by_kind: [Option<u8>; EventKind::COUNT],
    /// The baseline since its last task event.
    pub task_event_baseline: Option<TaskEventBaseline>,
    /// The group of starting workers that it belongs to, until its first task event. 0: none.
    pub(super) starting_group: u32,
    /// Tasks may hold prefetch entries of the current epoch.
    pub(super) may_hold_prefetched: bool,
    /// The time of its last event, by its own clock.
    pub(super) last_timestamp: f64,
    /// When it last started a task whose prefetch time was set, by its own clock.
    pub(super) last_started: f64,
    /// When it last reported that it executes nothing after such a start, by its own clock. Runs that began earlier
    /// have ended.
    pub(super) idle_at: f64,
    /// Runs may have set prefetch times since `idle_at`.
    pub(super) may_hold_runs: bool,
}

impl Worker {
    pub(super) fn new(id: WorkerId, hostname: &str, key: WorkerKey, counted_as: WorkerKey, now: Duration) -> Self {
        Self {
            id,
            hostname: hostname.into(),
            key,
            counted_as,
            last_seen: now,
            presence: Presence::Client,
            timed_out: false,
            epoch: 0,
            active: None,
            processed: None,
            freq: None,
            loadavg: None,
            software: [const { None }; 3],
            events: Vec::new(),
            events_by_kind: [None; EventKind::COUNT],
            task_event_baseline: None,
            starting_group: 0,
            may_hold_prefetched: false,
            last_timestamp: 0.0,
            last_started: 0.0,
            idle_at: 0.0,
            may_hold_runs: false,
        }
    }

    /// Records that it has sent an event, and is therefore alive.
    pub(super) fn record_event(&mut self, timestamp: Option<f64>, arrival: Arrival) {
        self.last_seen = arrival.at;
        self.timed_out = false;
        if let Some(timestamp) = timestamp {
            let earliest = if arrival.may_be_late { self.last_timestamp } else { timestamp };
            self.last_timestamp = timestamp.max(earliest);
        }
    }

    /// Whether it has sent `worker-offline` or has timed out.
    pub(super) fn is_offline(&self) -> bool {
        self.timed_out || self.presence == Presence::Offline
    }

    /// Records the start of a run that sets a prefetch time.
    pub(super) fn record_start(&mut self, time: f64) {
        self.last_started = time;
        // If the clock has stepped back, this run is not one of those that have ended.
        self.idle_at = self.idle_at.min(time);
        self.may_hold_runs = true;
    }

    /// Records that no run that began before `time` is open any more. Returns whether there may have been one.
    pub(super) fn end_runs(&mut self, time: f64) -> bool {
        if !self.may_hold_runs || time <= self.last_started {
            return false;
        }
        self.idle_at = time;
        self.may_hold_runs = false;
        true
    }

    /// Whether a run that began at this time had ended when the worker last reported that it executes nothing.
    pub(super) fn was_idle_after(&self, started: f64) -> bool {
        started < self.idle_at
    }

    /// Updates the fields that a worker event reports, except for the presence.
    pub(super) fn update(&mut self, event: &Event) {
        if event.kind != EventKind::WorkerOffline {
            // A reply to a `heartbeat` broadcast carries a default `freq` instead of the worker's own. Such a reply has
            // neither `active` nor `processed`.
            let is_periodic = event.active.is_some() || event.processed.is_some();
            if let Some(freq) = event.freq.filter(|freq| is_periodic && *freq > 0.0) {
                self.freq = Some(Self::cap_freq(freq));
            }
            self.processed = event.processed.or(self.processed);
        }
        self.active = event.active.or(self.active);
        self.loadavg = event.loadavg.or(self.loadavg);
        for (known, next) in self.software.iter_mut().zip([&event.sw_ident, &event.sw_ver, &event.sw_sys]) {
            if let Some(next) = next.as_deref()
                && known.as_deref() != Some(next)
            {
                *known = Some(truncate_label(next).into());
            }
        }
    }

    pub(super) fn cap_freq(freq: f64) -> f64 {
        freq.min(MAX_FREQ)
    }

    /// Counts an event by its type.
    #[inline]
    pub(super) fn count(&mut self, kind: EventKind, event_type: &str) {
        let known = self.events_by_kind.get(kind as usize).copied().flatten();
        match known.and_then(|index| self.events.get_mut(usize::from(index))) {
            Some((_, count)) => *count += 1,
            None => self.count_by_name(kind, event_type),
        }
    }

    fn count_by_name(&mut self, kind: EventKind, event_type: &str) {
        let name = truncate_label(event_type);
        let index = self.events.iter().position(|(known, _)| **known == *name).unwrap_or(self.events.len());
        match self.events.get_mut(index) {
            Some((_, count)) => *count += 1,
            None if index < MAX_EVENT_TYPES => self.events.push((name.into(), 1)),
            None => return,
        }
        self.events_by_kind[kind as usize] = u8::try_from(index).ok().filter(|_| !kind.is_custom());
    }

    /// The time since which `processed` has risen without a task event, if it has.
    pub(super) fn task_events_missing_since(&self) -> Option<Duration> {
        let (baseline, processed) = self.task_event_baseline.zip(self.processed)?;
        (processed > baseline.processed).then_some(baseline.since)
    }

    /// `timeout` (`state.worker_timeout`), or three of the worker's own heartbeat intervals if that is longer.
    fn effective_timeout(&self, timeout: Duration) -> Duration {
        self.freq.map_or(timeout, |freq| timeout.max(Duration::from_secs_f64(freq * 3.0)))
    }

    /// The order of eviction: clients first, then workers that are offline or have timed out. Live workers are never
    /// evicted.
    fn eviction_class(&self) -> Option<u8> {
        match self.presence {
            Presence::Client => Some(0),
            Presence::Offline => Some(1),
            _ if self.timed_out => Some(1),
            _ => None,
        }
    }
}

/// The table of workers and clients, at most `max` of them.
#[derive(Debug)]
pub struct Workers {
    slots: Slab<Worker>,
    slots_by_hostname: HashTable<u32>,
    slots_by_id: HashMap<WorkerId, u32, RandomState>,
    hasher: RandomState,
    last_found: usize,
    pub(super) next_id: u32,
    pub(super) max: usize,
    /// The workers to evict next, the next one last. Each has the eviction class that it had at the last scan, which
    /// may have changed since.
    eviction_candidates: Vec<(u32, WorkerId, u8)>,
    /// The last scan found no candidate, and no worker has become one since.
    no_candidates: bool,
    /// Slots that changed since the last save.
    pub(super) dirty: DirtySet,
}

impl Workers {
    pub(super) fn new(max: usize) -> Self {
        Self {
            slots: Slab::new(),
            slots_by_hostname: HashTable::new(),
            slots_by_id: HashMap::default(),
            hasher: RandomState::default(),
            last_found: 0,
            next_id: 1,
            max,
            eviction_candidates: Vec::new(),
            no_candidates: false,
            dirty: DirtySet::default(),
        }
    }

    /// The slot of a hostname. All events of a message have the same sender, so the last slot found is tried first.
    #[inline]
    pub(super) fn find(&mut self, hostname: &str) -> Option<usize> {
        if self.slots.get(self.last_found).is_some_and(|worker| *worker.hostname == *hostname) {
            return Some(self.last_found);
        }
        let hostname = truncate_label(hostname);
        let hash = self.hasher.hash_one(&*hostname);
        let is_match = |slot: &u32| *self.slots[*slot as usize].hostname == *hostname;
        let slot = *self.slots_by_hostname.find(hash, is_match)?;
        self.last_found = slot as usize;
        Some(self.last_found)
    }

    /// Adds a hostname that [`Workers::find`] does not find. The table must not be full.
    pub(super) fn add(&mut self, hostname: &str, key: WorkerKey, counted_as: WorkerKey, now: Duration) -> usize {
        let id = WorkerId(self.next_id);
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        // The new entry is a client at first, and clients are evicted before all others.
        self.eviction_candidates.retain(|(.., class)| *class == 0);
        self.insert(Worker::new(id, &truncate_label(hostname), key, counted_as, now))
    }

    /// Inserts a worker whose hostname and id are not in the table.
    pub(super) fn insert(&mut self, worker: Worker) -> usize {
        let (id, hash) = (worker.id, self.hasher.hash_one(&*worker.hostname));
        self.no_candidates = false;
        let index = self.slots.insert(worker);
        let slot = to_u32(index);
        self.dirty.mark(slot);
        let Self { slots, slots_by_hostname, hasher, .. } = self;
        slots_by_hostname.insert_unique(hash, slot, |slot| hasher.hash_one(&*slots[*slot as usize].hostname));
        self.slots_by_id.insert(id, slot);
        index
    }

    pub(super) fn is_full(&self) -> bool {
        self.slots.len() >= self.max
    }

    /// The worker to evict for a new hostname, if there is one: the longest inactive one of the first eviction class
    /// that has any.
    pub(super) fn eviction_candidate(&mut self) -> Option<usize> {
        if self.eviction_candidates.is_empty() && !self.no_candidates {
            self.find_eviction_candidates();
        }
        while let Some((slot, id, class)) = self.eviction_candidates.pop() {
            let worker = self.slots.get(slot as usize);
            if worker.is_some_and(|worker| worker.id == id && worker.eviction_class() == Some(class)) {
                return Some(slot as usize);
            }
        }
        None
    }

    fn find_eviction_candidates(&mut self) {
        let mut ranked: Vec<_> = self
            .slots
            .iter()
            .filter_map(|(slot, worker)| Some((worker.eviction_class()?, worker.last_seen, slot, worker.id)))
            .collect();
        ranked.sort_unstable_by_key(|(class, last_seen, ..)| (*class, *last_seen));
        let first = ranked.first().map(|(class, ..)| *class);
        let candidates = ranked.iter().take_while(|(class, ..)| Some(*class) == first).take(self.max / 16 + 1);
        self.eviction_candidates.extend(candidates.map(|(class, _, slot, id)| (to_u32(*slot), *id, *class)));
        self.eviction_candidates.reverse();
        self.no_candidates = self.eviction_candidates.is_empty();
    }

    /// Marks a worker that sent no event within its timeout.
    pub(super) fn mark_timed_out(&mut self, slot: usize) {
        let worker = &mut self[slot];
        worker.timed_out = true;
        if worker.presence == Presence::Online {
            worker.presence = Presence::Unconfirmed;
        }
        self.no_candidates = false;
    }

    /// Marks a worker that sent `worker-offline`.
    pub(super) fn mark_offline(&mut self, slot: usize) {
        self[slot].presence = Presence::Offline;
        self.no_candidates = false;
    }

    /// Forgets the baselines of all workers after a gap. Returns the slots of the workers that may hold prefetch entries.
    pub(super) fn forget_baselines(&mut self) -> Vec<usize> {
        let prefetching = self.slots.iter_mut().filter_map(|(slot, worker)| {
            // Its task events may have been lost in the gap.
            worker.task_event_baseline = None;
            worker.may_hold_prefetched.then_some(slot)
        });
        prefetching.collect()
    }

    /// Removes a worker.
    pub(super) fn remove(&mut self, slot: usize) -> Worker {
        self.dirty.mark(to_u32(slot));
        let worker = self.slots.remove(slot);
        let hash = self.hasher.hash_one(&*worker.hostname);
        if let Ok(entry) = self.slots_by_hostname.find_entry(hash, |known| *known as usize == slot) {
            entry.remove();
        }
        self.slots_by_id.remove(&worker.id);
        worker
    }

    /// The slots of the workers that have exceeded their timeout and are not marked as timed out.
    pub(super) fn newly_timed_out(&self, timeout: Duration, now: Duration) -> Vec<usize> {
        let is_overdue = |worker: &Worker| {
            !worker.timed_out
                && worker.presence != Presence::Client
                && now.saturating_sub(worker.last_seen) >= worker.effective_timeout(timeout)
        };
        self.slots.iter().filter(|(_, worker)| is_overdue(worker)).map(|(slot, _)| slot).collect()
    }

    /// The slots of the hostnames whose last event is too old. A live worker must also have exceeded its timeout.
    pub(super) fn purgeable(&self, timeouts: &Timeouts, now: Duration) -> Vec<usize> {
        let is_purgeable = |worker: &Worker| {
            let is_stopped = worker.presence == Presence::Offline;
            let age = if is_stopped { timeouts.purge_stopped_workers } else { timeouts.purge_offline_workers };
            let timeout = timeouts.worker_timeout.filter(|_| worker.eviction_class().is_none());
            let timeout = timeout.map(|timeout| worker.effective_timeout(timeout));
            age.is_some_and(|age| now.saturating_sub(worker.last_seen) >= age.max(timeout.unwrap_or_default()))
        };
        self.slots.iter().filter(|(_, worker)| is_purgeable(worker)).map(|(slot, _)| slot).collect()
    }

    /// The worker with this id, if it is still tracked.
    pub(super) fn by_id(&self, id: WorkerId) -> Option<&Worker> {
        self.slots_by_id.get(&id).map(|slot| &self.slots[*slot as usize])
    }

    /// All workers and clients.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.slots.iter().map(|(_, worker)| worker)
    }

    pub(super) fn mark_all_dirty(&mut self) {
        let Self { slots, dirty, .. } = self;
        slots.iter().for_each(|(slot, _)| dirty.mark(to_u32(slot)));
    }

    /// All workers and clients by slot.
    pub(super) fn slots(&self) -> &Slab<Worker> {
        &self.slots
    }

    /// Number of tracked hostnames.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }
}

impl std::ops::Index<usize> for Workers {
    type Output = Worker;

    fn index(&self, slot: usize) -> &Worker {
        &self.slots[slot]
    }
}

impl std::ops::IndexMut<usize> for Workers {
    fn index_mut(&mut self, slot: usize) -> &mut Worker {
        self.dirty.mark(to_u32(slot));
        &mut self.slots[slot]
    }
}

#[allow(clippy::cast_possible_truncation, reason = "at most a million workers")]
fn to_u32(slot: usize) -> u32 {
    slot as u32
}

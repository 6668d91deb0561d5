//! The hostnames that send events: workers, and the clients that send `task-sent`.

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashTable};
use serde::{Deserialize, Serialize};
use slab::Slab;

use crate::celery::{Event, EventKind, cut};
use crate::marks::Marks;
use crate::metrics::{MAX_TYPES, WorkerRow};

/// A worker that is or was known. Never used twice: one that comes back after its purge is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkerId(u32);

impl WorkerId {
    /// No worker.
    pub const NONE: Self = Self(0);

    /// Whether it was given out, if `next` is the next one.
    pub(super) fn is_before(self, next: u32) -> bool {
        self != Self::NONE && self.0 < next
    }
}

/// How long a worker's word is kept for: 24 hours between two heartbeats are as good as never.
const MAX_FREQ: f64 = 86_400.0;

/// What a hostname has said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Presence {
    /// Only `task-sent` came from it.
    Client,
    /// Task events came from it, and no word of itself, or it was lost since.
    Worker,
    /// `worker-online` or a heartbeat.
    Online,
    /// `worker-offline`: its set stays empty until it is heard online again.
    Offline,
}

/// The last heartbeat before `processed` rose, without a task event since.
#[derive(Clone, Copy, Debug)]
pub struct Mute {
    /// When it came in.
    pub since: Duration,
    /// What it said.
    pub processed: f64,
}

/// One hostname.
#[derive(Debug)]
pub struct Worker {
    /// Who it is.
    pub id: WorkerId,
    /// Its label, at most 256 bytes and `…`.
    pub hostname: Box<str>,
    /// Its row in the series.
    pub row: WorkerRow,
    /// When any event of it came in last, by the clock that runs while we listen.
    pub heard: Duration,
    /// What it has said of itself.
    pub presence: Presence,
    /// Nothing was heard from it for its timeout.
    pub lost: bool,
    /// Counts how often its set of prefetched tasks was emptied: entries of an earlier epoch are gone.
    pub epoch: u32,
    /// Tasks it executes, by its last word.
    pub active: Option<f64>,
    /// Tasks accepted since its start, by its last word.
    pub processed: Option<f64>,
    /// Seconds between its periodic heartbeats.
    pub freq: Option<f64>,
    /// Its machine's load average.
    pub loadavg: Option<[f64; 3]>,
    /// `sw_ident`, `sw_ver`, `sw_sys`.
    pub software: [Option<Box<str>>; 3],
    /// Events by type.
    pub events: Vec<(Box<str>, u64)>,
    /// Its heartbeats since its last task event.
    pub mute: Option<Mute>,
    /// Its set may hold entries of this epoch.
    pub(super) holds: bool,
    /// Events were missing since it last said that it executes nothing.
    pub(super) doubtful: bool,
}

impl Worker {
    pub(super) fn new(id: WorkerId, hostname: &str, row: WorkerRow, now: Duration) -> Self {
        Self {
            id,
            hostname: hostname.into(),
            row,
            heard: now,
            presence: Presence::Client,
            lost: false,
            epoch: 0,
            active: None,
            processed: None,
            freq: None,
            loadavg: None,
            software: [const { None }; 3],
            events: Vec::new(),
            mute: None,
            holds: false,
            doubtful: false,
        }
    }

    /// Takes over what a worker event says, apart from `online`.
    pub(super) fn learn(&mut self, event: &Event) {
        if event.kind != EventKind::WorkerOffline {
            // The answer to a `heartbeat` broadcast has a `freq` that is not the worker's own, and neither of these two.
            let periodic = event.active.is_some() || event.processed.is_some();
            if let Some(freq) = event.freq.filter(|freq| periodic && *freq > 0.0) {
                self.freq = Some(Self::bounded_freq(freq));
            }
            self.processed = event.processed.or(self.processed);
        }
        self.active = event.active.or(self.active);
        self.loadavg = event.loadavg.or(self.loadavg);
        for (known, told) in self.software.iter_mut().zip([&event.sw_ident, &event.sw_ver, &event.sw_sys]) {
            if let Some(told) = told.as_deref()
                && known.as_deref() != Some(told)
            {
                *known = Some(cut(told).into());
            }
        }
    }

    pub(super) fn bounded_freq(freq: f64) -> f64 {
        freq.min(MAX_FREQ)
    }

    pub(super) fn count(&mut self, name_of_type: &str) {
        let name = cut(name_of_type);
        if let Some((_, count)) = self.events.iter_mut().find(|(known, _)| **known == *name) {
            *count += 1;
        } else if self.events.len() < MAX_TYPES {
            self.events.push((name.into(), 1));
        }
    }

    /// How long it may be silent before it counts as lost; `timeout` is `state.worker_timeout`.
    fn patience(&self, timeout: Duration) -> Duration {
        self.freq.map_or(timeout, |freq| timeout.max(Duration::from_secs_f64(freq * 3.0)))
    }

    /// Who gives way first when room is needed: clients, then lost and offline workers; live workers do not.
    fn dispensable(&self) -> Option<u8> {
        match self.presence {
            Presence::Client => Some(0),
            Presence::Offline => Some(1),
            _ if self.lost => Some(1),
            _ => None,
        }
    }
}

/// The table of workers, at most `max` of them.
#[derive(Debug)]
pub struct Workers {
    slots: Slab<Worker>,
    index: HashTable<u32>,
    slot_of: HashMap<WorkerId, u32, RandomState>,
    hasher: RandomState,
    last: usize,
    pub(super) next_id: u32,
    max: usize,
    /// Slots to evict next, worst last, all of one kind, as of the last look at all workers.
    victims: Vec<(u32, WorkerId, u8)>,
    /// The last look found none, and none has become dispensable since.
    barren: bool,
    /// Slots that changed since the last save.
    pub(super) marks: Marks,
}

impl Workers {
    pub(super) fn new(max: usize) -> Self {
        Self {
            slots: Slab::new(),
            index: HashTable::new(),
            slot_of: HashMap::default(),
            hasher: RandomState::default(),
            last: 0,
            next_id: 1,
            max,
            victims: Vec::new(),
            barren: false,
            marks: Marks::default(),
        }
    }

    /// The slot of a hostname. Batches come from one worker, so the last one found is tried first.
    #[inline]
    pub(super) fn find(&mut self, hostname: &str) -> Option<usize> {
        if self.slots.get(self.last).is_some_and(|worker| *worker.hostname == *hostname) {
            return Some(self.last);
        }
        let hostname = cut(hostname);
        let hash = self.hasher.hash_one(&*hostname);
        let slot = *self.index.find(hash, |slot| *self.slots[*slot as usize].hostname == *hostname)?;
        self.last = slot as usize;
        Some(self.last)
    }

    /// Adds a hostname that [`Workers::find`] does not know. There must be room.
    pub(super) fn add(&mut self, hostname: &str, row: WorkerRow, now: Duration) -> usize {
        let id = WorkerId(self.next_id);
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        // It begins as a client, and those give way first.
        self.victims.retain(|(.., kind)| *kind == 0);
        self.insert(Worker::new(id, &cut(hostname), row, now))
    }

    /// Takes a worker in that is not there yet.
    pub(super) fn insert(&mut self, worker: Worker) -> usize {
        let (id, hash) = (worker.id, self.hasher.hash_one(&*worker.hostname));
        self.barren = false;
        let slot = self.slots.insert(worker);
        let number = number(slot);
        self.marks.mark(number);
        self.index.insert_unique(hash, number, |slot| self.hasher.hash_one(&*self.slots[*slot as usize].hostname));
        self.slot_of.insert(id, number);
        slot
    }

    pub(super) fn is_full(&self) -> bool {
        self.slots.len() >= self.max
    }

    /// The worker that gives way to a new hostname, if one may: the one silent for longest of the first kind that
    /// has any.
    pub(super) fn victim(&mut self) -> Option<usize> {
        if self.victims.is_empty() && !self.barren {
            self.look_for_victims();
        }
        while let Some((slot, id, kind)) = self.victims.pop() {
            let still = self.slots.get(slot as usize);
            if still.is_some_and(|worker| worker.id == id && worker.dispensable() == Some(kind)) {
                return Some(slot as usize);
            }
        }
        None
    }

    fn look_for_victims(&mut self) {
        let mut ranked: Vec<_> = self
            .slots
            .iter()
            .filter_map(|(slot, worker)| Some((worker.dispensable()?, worker.heard, slot, worker.id)))
            .collect();
        ranked.sort_unstable_by_key(|(kind, heard, ..)| (*kind, *heard));
        let first = ranked.first().map(|(kind, ..)| *kind);
        let of_first_kind = ranked.iter().take_while(|(kind, ..)| Some(*kind) == first).take(self.max / 16 + 1);
        self.victims.extend(of_first_kind.map(|(kind, _, slot, id)| (number(*slot), *id, *kind)));
        self.victims.reverse();
        self.barren = self.victims.is_empty();
    }

    /// Nothing was heard from it for its timeout.
    pub(super) fn lose(&mut self, slot: usize) {
        let worker = &mut self[slot];
        worker.lost = true;
        if worker.presence == Presence::Online {
            worker.presence = Presence::Worker;
        }
        self.barren = false;
    }

    /// It said goodbye.
    pub(super) fn leave(&mut self, slot: usize) {
        self[slot].presence = Presence::Offline;
        self.barren = false;
    }

    /// Events are missing: nothing is known of what their workers execute. Returns the slots whose sets may hold entries.
    pub(super) fn doubt(&mut self) -> Vec<usize> {
        let doubted = self.slots.iter_mut().filter_map(|(slot, worker)| {
            worker.doubtful = true;
            // Its task events may be among the missing ones.
            worker.mute = None;
            worker.holds.then_some(slot)
        });
        doubted.collect()
    }

    /// Forgets a worker.
    pub(super) fn remove(&mut self, slot: usize) -> Worker {
        self.marks.mark(number(slot));
        let worker = self.slots.remove(slot);
        let hash = self.hasher.hash_one(&*worker.hostname);
        if let Ok(entry) = self.index.find_entry(hash, |known| *known as usize == slot) {
            entry.remove();
        }
        self.slot_of.remove(&worker.id);
        worker
    }

    /// The slots of the workers that were silent for longer than they may, and are not known as lost.
    pub(super) fn silent(&self, timeout: Duration, now: Duration) -> Vec<usize> {
        let silent = |worker: &Worker| {
            !worker.lost
                && worker.presence != Presence::Client
                && now.saturating_sub(worker.heard) >= worker.patience(timeout)
        };
        self.slots.iter().filter(|(_, worker)| silent(worker)).map(|(slot, _)| slot).collect()
    }

    /// The slots of the hostnames whose last event is `age` ago, but for workers that may be silent for longer.
    pub(super) fn older_than(&self, age: Duration, timeout: Option<Duration>, now: Duration) -> Vec<usize> {
        let old = |worker: &Worker| {
            let granted = timeout.filter(|_| worker.dispensable().is_none()).map(|timeout| worker.patience(timeout));
            now.saturating_sub(worker.heard) >= age.max(granted.unwrap_or_default())
        };
        self.slots.iter().filter(|(_, worker)| old(worker)).map(|(slot, _)| slot).collect()
    }

    /// A worker by its id, while it is known.
    pub(super) fn by_id(&self, id: WorkerId) -> Option<&Worker> {
        self.slot_of.get(&id).map(|slot| &self.slots[*slot as usize])
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.slots.iter().map(|(_, worker)| worker)
    }

    pub(super) fn mark_all(&mut self) {
        let Self { slots, marks, .. } = self;
        slots.iter().for_each(|(slot, _)| marks.mark(number(slot)));
    }

    /// All of them, with their slots.
    pub(super) fn slots(&self) -> &Slab<Worker> {
        &self.slots
    }

    /// How many hostnames are known.
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
        self.marks.mark(number(slot));
        &mut self.slots[slot]
    }
}

#[allow(clippy::cast_possible_truncation, reason = "at most a million workers")]
fn number(slot: usize) -> u32 {
    slot as u32
}

/// A worker as a program that embeds the exporter reads it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct WorkerView {
    /// The node name, for example `celery@host`.
    pub hostname: String,
    /// Heard online and not lost since: what `flower_worker_online` shows.
    pub online: bool,
    /// Tasks it executes, by its last word.
    pub active: Option<f64>,
    /// Tasks accepted since its start, by its last word.
    pub processed: Option<f64>,
    /// The load average of its machine over 1, 5 and 15 minutes.
    pub loadavg: Option<[f64; 3]>,
    /// Seconds between its periodic heartbeats.
    pub freq: Option<f64>,
    /// `sw_ident`: `py-celery`.
    pub sw_ident: Option<String>,
    /// `sw_ver`: Celery's version.
    pub sw_ver: Option<String>,
    /// `sw_sys`: the operating system.
    pub sw_sys: Option<String>,
    /// How long ago any event of it came in, not counting time we were not listening.
    pub last_heard: Duration,
    /// Events by type since it is known; at most 64 types.
    pub events: Vec<(String, u64)>,
}

impl WorkerView {
    pub(super) fn of(worker: &Worker, now: Duration) -> Self {
        let [ident, ver, sys] = worker.software.each_ref().map(|text| text.as_deref().map(str::to_owned));
        Self {
            hostname: worker.hostname.to_string(),
            online: worker.presence == Presence::Online,
            active: worker.active,
            processed: worker.processed,
            loadavg: worker.loadavg,
            freq: worker.freq,
            sw_ident: ident,
            sw_ver: ver,
            sw_sys: sys,
            last_heard: now.saturating_sub(worker.heard),
            events: worker.events.iter().map(|(name, count)| (name.to_string(), *count)).collect(),
        }
    }
}

//! The gauges of worker groups: which member contributes what, so that it can be taken back when the member restarts,
//! times out or is removed.
//!
//! The members of a group share its label sets. Counters and histograms are sums, and stay when a member is removed.
//! The number of prefetched tasks is the sum of the members' numbers, and the prefetch time is the last one that any
//! member set.

use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};

use super::keys::{SeriesKey, WorkerKey};
use crate::config::WorkerGroups;

#[derive(Debug, Default)]
pub(super) struct GroupMembers {
    groups: Option<WorkerGroups>,
    /// The series of the groups, in the order of [`WorkerGroups::names`].
    keys: Vec<WorkerKey>,
    members: HashMap<WorkerKey, Member, RandomState>,
    /// The member that set a label set's prefetch time last, unless that run has ended.
    writers: HashMap<SeriesKey, WorkerKey, RandomState>,
}

/// What a member contributes. Both tables contain only what is not 0, so that tasks and label sets bound them.
#[derive(Debug, Default)]
struct Member {
    prefetched: HashMap<SeriesKey, u32, RandomState>,
    /// The label sets of which it is the writer.
    written: HashSet<SeriesKey, RandomState>,
}

impl GroupMembers {
    pub(super) fn new(groups: WorkerGroups, keys: Vec<WorkerKey>) -> Self {
        Self { groups: Some(groups), keys, ..Self::default() }
    }

    /// The entries as configured.
    pub(super) fn entries(&self) -> &[String] {
        self.groups.as_ref().map_or(&[], WorkerGroups::entries)
    }

    pub(super) fn keys(&self) -> &[WorkerKey] {
        &self.keys
    }

    pub(super) fn find(&self, hostname: &str) -> Option<WorkerKey> {
        self.groups.as_ref()?.find(hostname).map(|group| self.keys[group])
    }

    pub(super) fn add_prefetched(&mut self, member: WorkerKey, key: SeriesKey) {
        *self.members.entry(member).or_default().prefetched.entry(key).or_default() += 1;
    }

    pub(super) fn remove_prefetched(&mut self, member: WorkerKey, key: SeriesKey) {
        let Some(member) = self.members.get_mut(&member) else { return };
        if let Some(count) = member.prefetched.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                member.prefetched.remove(&key);
            }
        }
    }

    /// Takes back the prefetched tasks of a member.
    pub(super) fn take_prefetched(&mut self, member: WorkerKey) -> impl Iterator<Item = (SeriesKey, u32)> + use<> {
        let member = self.members.get_mut(&member);
        member.map(|member| std::mem::take(&mut member.prefetched)).into_iter().flatten()
    }

    pub(super) fn writer(&self, key: SeriesKey) -> Option<WorkerKey> {
        self.writers.get(&key).copied()
    }

    pub(super) fn set_writer(&mut self, member: WorkerKey, key: SeriesKey) {
        let before = self.writers.insert(key, member);
        if before == Some(member) {
            return;
        }
        if let Some(before) = before.and_then(|before| self.members.get_mut(&before)) {
            before.written.remove(&key);
        }
        self.members.entry(member).or_default().written.insert(key);
    }

    /// Forgets that a member set the prefetch time of a label set last. Returns whether it did.
    pub(super) fn take_writer(&mut self, member: WorkerKey, key: SeriesKey) -> bool {
        let is_written = self.members.get_mut(&member).is_some_and(|member| member.written.remove(&key));
        if is_written {
            self.writers.remove(&key);
        }
        is_written
    }

    /// Forgets all prefetch times that a member set last.
    pub(super) fn take_written(&mut self, member: WorkerKey) -> impl Iterator<Item = SeriesKey> + use<> {
        let written = self.members.get_mut(&member).map(|member| std::mem::take(&mut member.written));
        for key in written.iter().flatten() {
            self.writers.remove(key);
        }
        written.into_iter().flatten()
    }

    /// Forgets a member that contributes nothing any more.
    pub(super) fn remove(&mut self, member: WorkerKey) {
        self.members.remove(&member);
    }
}

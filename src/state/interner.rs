//! Interned task names: each is stored once, and reference-counted by the tasks and series that use it.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use slab::Slab;

use crate::celery::truncate_label;

/// A task name. Valid while at least one reference to it is retained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameId(pub(crate) u32);

impl NameId {
    /// The empty name, used until an event contains the task's name.
    pub const EMPTY: Self = Self(0);
}

#[derive(Debug)]
struct Name {
    text: Box<str>,
    references: u32,
}

/// The table of names.
#[derive(Debug)]
pub struct NameInterner {
    slots: Slab<Name>,
    index: HashTable<u32>,
    hasher: RandomState,
}

impl Default for NameInterner {
    fn default() -> Self {
        let mut names = Self { slots: Slab::new(), index: HashTable::new(), hasher: RandomState::default() };
        names.intern("");
        names
    }
}

impl NameInterner {
    /// Returns the id of a name and adds a reference to it. The caller releases the reference.
    pub fn intern(&mut self, text: &str) -> NameId {
        let text = truncate_label(text);
        let hash = self.hasher.hash_one(&*text);
        if let Some(id) = self.index.find(hash, |id| *self.slots[*id as usize].text == *text) {
            self.slots[*id as usize].references += 1;
            return NameId(*id);
        }
        #[allow(clippy::cast_possible_truncation, reason = "tasks and label sets hold them, both bounded below 2^32")]
        let id = self.slots.insert(Name { text: text.into(), references: 1 }) as u32;
        self.index.insert_unique(hash, id, |id| self.hasher.hash_one(&*self.slots[*id as usize].text));
        NameId(id)
    }

    /// Adds a reference to a name.
    pub fn retain(&mut self, id: NameId) {
        self.slots[id.0 as usize].references += 1;
    }

    /// Drops a reference to a name, and the name with the last reference. The empty name is never dropped.
    pub fn release(&mut self, id: NameId) {
        if id == NameId::EMPTY {
            return;
        }
        let name = &mut self.slots[id.0 as usize];
        name.references -= 1;
        if name.references > 0 {
            return;
        }
        let hash = self.hasher.hash_one(&*name.text);
        if let Ok(entry) = self.index.find_entry(hash, |known| *known == id.0) {
            entry.remove();
        }
        self.slots.remove(id.0 as usize);
    }

    /// The text of a name, not escaped.
    #[must_use]
    pub fn text(&self, id: NameId) -> &str {
        &self.slots[id.0 as usize].text
    }

    /// Number of names, including the empty one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }
}

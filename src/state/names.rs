//! Task names, each kept once for as long as a task or a series holds it.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use slab::Slab;

use crate::celery::cut;

/// A task name. Valid as long as somebody holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NameId(pub(crate) u32);

impl NameId {
    /// The empty name, of tasks whose name nobody has told.
    pub const EMPTY: Self = Self(0);
}

#[derive(Debug)]
struct Name {
    text: Box<str>,
    holders: u32,
}

/// The table of names.
#[derive(Debug)]
pub struct Names {
    slots: Slab<Name>,
    index: HashTable<u32>,
    hasher: RandomState,
}

impl Default for Names {
    fn default() -> Self {
        let mut names = Self { slots: Slab::new(), index: HashTable::new(), hasher: RandomState::default() };
        names.hold_text("");
        names
    }
}

impl Names {
    /// The id of a name, held once more. Release it when it is not needed any longer.
    pub fn hold_text(&mut self, text: &str) -> NameId {
        let text = cut(text);
        let hash = self.hasher.hash_one(&*text);
        if let Some(id) = self.index.find(hash, |id| *self.slots[*id as usize].text == *text) {
            self.slots[*id as usize].holders += 1;
            return NameId(*id);
        }
        #[allow(clippy::cast_possible_truncation, reason = "held by tasks and pairs, which are bounded below 2^32")]
        let id = self.slots.insert(Name { text: text.into(), holders: 1 }) as u32;
        self.index.insert_unique(hash, id, |id| self.hasher.hash_one(&*self.slots[*id as usize].text));
        NameId(id)
    }

    /// Holds a name once more.
    pub fn hold(&mut self, id: NameId) {
        self.slots[id.0 as usize].holders += 1;
    }

    /// Holds a name once less; the last one forgets it. The empty name stays.
    pub fn release(&mut self, id: NameId) {
        if id == NameId::EMPTY {
            return;
        }
        let name = &mut self.slots[id.0 as usize];
        name.holders -= 1;
        if name.holders > 0 {
            return;
        }
        let hash = self.hasher.hash_one(&*name.text);
        if let Ok(entry) = self.index.find_entry(hash, |known| *known == id.0) {
            entry.remove();
        }
        self.slots.remove(id.0 as usize);
    }

    /// The name's text.
    #[must_use]
    pub fn text(&self, id: NameId) -> &str {
        &self.slots[id.0 as usize].text
    }

    /// How many names are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }
}

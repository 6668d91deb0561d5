//! Tracks which slots of a table changed since the last save.

/// A set of slots. It ignores all marks until it is enabled.
#[derive(Debug, Default)]
pub struct DirtySet {
    enabled: bool,
    bits: Vec<u64>,
    slots: Vec<u32>,
}

impl DirtySet {
    /// Starts to record marks.
    pub fn enable(&mut self) {
        self.enabled = true;
    }

    /// Marks a slot whose content changed or was removed.
    #[inline]
    pub fn mark(&mut self, slot: u32) {
        if self.enabled {
            self.insert(slot);
        }
    }

    fn insert(&mut self, slot: u32) {
        let (index, bit) = index_and_bit(slot);
        if index >= self.bits.len() {
            self.bits.resize(index + 1, 0);
        }
        if self.bits[index] & bit == 0 {
            self.bits[index] |= bit;
            self.slots.push(slot);
        }
    }

    /// Whether no slot is marked.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Returns the marked slots, each once, and clears the set.
    pub fn take(&mut self) -> Vec<u32> {
        for slot in &self.slots {
            let (index, bit) = index_and_bit(*slot);
            self.bits[index] &= !bit;
        }
        std::mem::take(&mut self.slots)
    }
}

fn index_and_bit(slot: u32) -> (usize, u64) {
    (slot as usize / 64, 1 << (slot % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_listed_once_until_taken() {
        let mut dirty = DirtySet::default();
        dirty.mark(7);
        assert!(dirty.is_empty(), "not enabled");
        dirty.enable();
        for slot in [200, 7, 200] {
            dirty.mark(slot);
        }
        assert_eq!(dirty.take(), [200, 7]);
        assert!(dirty.is_empty());
        dirty.mark(200);
        assert_eq!(dirty.take(), [200]);
    }
}

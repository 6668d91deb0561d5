//! Which rows of a table changed since the last save.

/// Marks of rows by number; does nothing until it is started.
#[derive(Debug, Default)]
pub struct Marks {
    on: bool,
    bits: Vec<u64>,
    list: Vec<u32>,
}

impl Marks {
    /// From now on, marks are kept.
    pub fn start(&mut self) {
        self.on = true;
    }

    /// The row has changed, or is gone.
    #[inline]
    pub fn mark(&mut self, row: u32) {
        if self.on {
            self.set(row);
        }
    }

    fn set(&mut self, row: u32) {
        let (word, bit) = place(row);
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        if self.bits[word] & bit == 0 {
            self.bits[word] |= bit;
            self.list.push(row);
        }
    }

    /// Whether nothing is marked.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The marked rows, each once, which are marked no longer.
    pub fn take(&mut self) -> Vec<u32> {
        for row in &self.list {
            let (word, bit) = place(*row);
            self.bits[word] &= !bit;
        }
        std::mem::take(&mut self.list)
    }
}

fn place(row: u32) -> (usize, u64) {
    (row as usize / 64, 1 << (row % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_marked_once_until_it_is_taken() {
        let mut marks = Marks::default();
        marks.mark(7);
        assert!(marks.is_empty(), "not started");
        marks.start();
        for row in [200, 7, 200] {
            marks.mark(row);
        }
        assert_eq!(marks.take(), [200, 7]);
        assert!(marks.is_empty());
        marks.mark(200);
        assert_eq!(marks.take(), [200]);
    }
}

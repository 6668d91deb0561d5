//! Changes of the workers' presence, collected for the log: many at once give one line.

/// Maximum number of hostnames in a line.
const MAX_NAMES: usize = 5;

/// Workers with the same change.
#[derive(Debug, Default)]
struct Changed {
    count: usize,
    /// The first of them.
    names: Vec<Box<str>>,
}

impl Changed {
    fn add(&mut self, hostname: &str) {
        self.count += 1;
        if self.names.len() < MAX_NAMES {
            self.names.push(hostname.into());
        }
    }

    /// The hostnames, and how many more there are. `None` if there are none.
    fn describe(&self) -> Option<String> {
        let names = self.names.join(", ");
        match self.count - self.names.len() {
            _ if self.count == 0 => None,
            0 => Some(names),
            more => Some(format!("{names} and {more} more")),
        }
    }
}

/// The changes since the last call of [`State::take_worker_changes`](super::State::take_worker_changes).
#[derive(Debug, Default)]
pub struct WorkerChanges {
    timed_out: Changed,
    went_offline: Changed,
    came_back: Changed,
}

impl WorkerChanges {
    pub(super) fn timed_out(&mut self, hostname: &str) {
        self.timed_out.add(hostname);
    }

    pub(super) fn went_offline(&mut self, hostname: &str) {
        self.went_offline.add(hostname);
    }

    pub(super) fn came_back(&mut self, hostname: &str) {
        self.came_back.add(hostname);
    }

    /// Logs one line for each kind of change.
    pub fn log(&self) {
        if let Some(worker) = self.timed_out.describe() {
            tracing::warn!(worker, count = self.timed_out.count, "worker timed out; marked offline");
        }
        if let Some(worker) = self.went_offline.describe() {
            tracing::info!(worker, count = self.went_offline.count, "worker went offline");
        }
        if let Some(worker) = self.came_back.describe() {
            tracing::info!(worker, count = self.came_back.count, "worker is online again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_names_and_the_number_of_others_are_described() {
        let mut changed = Changed::default();
        assert_eq!(changed.describe(), None);
        changed.add("a");
        assert_eq!(changed.describe().as_deref(), Some("a"));
        for _ in 0..1000 {
            changed.add("b");
        }
        assert_eq!(changed.describe().as_deref(), Some("a, b, b, b, b and 996 more"));
        assert_eq!(changed.names.len(), MAX_NAMES);
    }
}

//! Exemplars: the task behind a sample, for `OpenMetrics` and protobuf.

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use super::keys::SeriesKey;
use crate::celery::TaskId;

/// The label of the id.
pub(super) const LABEL: &str = "task_id";
/// `OpenMetrics` limits the names and values of an exemplar's labels to 128 characters.
const MAX_ID: usize = 128 - LABEL.len();

/// A task, the value that it added, and when.
#[derive(Clone, Debug)]
pub(super) struct Exemplar {
    id: TaskId,
    pub(super) value: f64,
    /// In milliseconds since the epoch.
    pub(super) time: u64,
}

impl Exemplar {
    /// The task id.
    pub(super) fn id(&self) -> String {
        self.id.to_string()
    }
}

/// The exemplars of a label set.
#[derive(Clone, Debug, Default)]
pub(super) struct Exemplars {
    failed: Option<Exemplar>,
    /// By the index of the bucket.
    buckets: Vec<(u8, Exemplar)>,
}

impl Exemplars {
    /// The last task that failed.
    pub(super) fn failed(&self) -> Option<&Exemplar> {
        self.failed.as_ref()
    }

    /// The last observation of a bucket.
    pub(super) fn bucket(&self, bucket: usize) -> Option<&Exemplar> {
        self.buckets.iter().find(|(index, _)| usize::from(*index) == bucket).map(|(_, exemplar)| exemplar)
    }
}

/// The exemplars of all label sets that have any.
#[derive(Debug, Default)]
pub(super) struct ExemplarTable(HashMap<SeriesKey, Exemplars, RandomState>);

impl ExemplarTable {
    pub(super) fn get(&self, key: SeriesKey) -> Option<&Exemplars> {
        self.0.get(&key)
    }

    pub(super) fn remove(&mut self, key: SeriesKey) {
        self.0.remove(&key);
    }

    pub(super) fn set_failed(&mut self, key: SeriesKey, id: &TaskId, time: u64) {
        if let Some(exemplar) = exemplar(id, 1.0, time) {
            self.0.entry(key).or_default().failed = Some(exemplar);
        }
    }

    pub(super) fn set_bucket(&mut self, key: SeriesKey, bucket: usize, id: &TaskId, value: f64, time: u64) {
        let Some((exemplar, bucket)) = exemplar(id, value, time).zip(u8::try_from(bucket).ok()) else { return };
        let buckets = &mut self.0.entry(key).or_default().buckets;
        if let Some((_, last)) = buckets.iter_mut().find(|(index, _)| *index == bucket) {
            *last = exemplar;
        } else {
            buckets.reserve_exact(1);
            buckets.push((bucket, exemplar));
        }
    }
}

/// `None` if the id is too long.
fn exemplar(id: &TaskId, value: f64, time: u64) -> Option<Exemplar> {
    let fits = match id {
        TaskId::Uuid(_) => true,
        TaskId::Text(text) => text.chars().count() <= MAX_ID,
    };
    fits.then(|| Exemplar { id: id.clone(), value, time })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::SeriesKey;

    #[test]
    fn the_last_task_of_each_bucket_is_kept_unless_its_id_is_too_long() {
        let mut table = ExemplarTable::default();
        let key = SeriesKey::from_index(0);
        for (bucket, id, value) in [(0, "a", 0.5), (3, "b", 2.0), (0, "c", 0.25), (3, &"x".repeat(122), 3.0)] {
            table.set_bucket(key, bucket, &TaskId::new(id), value, 7);
        }
        table.set_failed(key, &TaskId::new(&"é".repeat(121)), 9);
        let exemplars = table.get(key).unwrap();
        let of = |bucket| exemplars.bucket(bucket).map(|exemplar: &Exemplar| (exemplar.id(), exemplar.value));
        assert_eq!((of(0), of(1), of(3)), (Some(("c".to_owned(), 0.25)), None, Some(("b".to_owned(), 2.0))));
        assert_eq!(exemplars.failed().map(|exemplar| (exemplar.value, exemplar.time)), Some((1.0, 9)));
        table.remove(key);
        assert!(table.get(key).is_none());
    }
}

//! A histogram with non-cumulative counts per bucket. The last bucket is `+Inf`.

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Histogram {
    pub(super) counts: Box<[u64]>,
    pub(super) sum: f64,
    /// The start timestamp, in milliseconds since the epoch.
    pub(super) created: u64,
}

impl Histogram {
    /// Creates an empty histogram. `bounds` are the upper bounds, ascending, without `+Inf`.
    pub(super) fn new(bounds: &[f64], created: u64) -> Self {
        Self { counts: vec![0; bounds.len() + 1].into(), sum: 0.0, created }
    }

    pub(super) fn observe(&mut self, bounds: &[f64], value: f64) {
        let bucket = bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }
}

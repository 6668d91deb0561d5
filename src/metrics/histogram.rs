//! One histogram: counts by bucket, not cumulated, the last one being `+Inf`.

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Histogram {
    pub(super) counts: Box<[u64]>,
    pub(super) sum: f64,
}

impl Histogram {
    /// `bounds` are the upper bounds without `+Inf`, ascending.
    pub(super) fn new(bounds: &[f64]) -> Self {
        Self { counts: vec![0; bounds.len() + 1].into(), sum: 0.0 }
    }

    pub(super) fn observe(&mut self, bounds: &[f64], value: f64) {
        let bucket = bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }
}

//! A histogram with non-cumulative counts per bucket. The last bucket is `+Inf`.

use super::native::NativeBuckets;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Histogram {
    pub(super) counts: Box<[u64]>,
    pub(super) sum: f64,
    /// The start timestamp, in milliseconds since the epoch.
    pub(super) created: u64,
    /// `None`: native histograms are off.
    pub(super) native: Option<Box<NativeBuckets>>,
}

impl Histogram {
    /// Creates an empty histogram. `bounds` are the upper bounds, ascending, without `+Inf`.
    pub(super) fn new(bounds: &[f64], native_schema: Option<i8>, created: u64) -> Self {
        let native = native_schema.map(|schema| Box::new(NativeBuckets::new(schema)));
        Self { counts: vec![0; bounds.len() + 1].into(), sum: 0.0, created, native }
    }

    pub(super) fn observe(&mut self, bounds: &[f64], value: f64) {
        self.counts[bucket_of(bounds, value)] += 1;
        self.sum += value;
        if let Some(native) = &mut self.native {
            native.observe(value);
        }
    }
}

/// The index of the bucket that contains a value.
pub(super) fn bucket_of(bounds: &[f64], value: f64) -> usize {
    bounds.partition_point(|bound| *bound < value)
}

//! The sparse, exponential buckets of a native histogram, as `client_golang` keeps them
//! (`prometheus/histogram.go`, and <https://prometheus.io/docs/specs/native_histograms/>).

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// More buckets than this halve the resolution.
pub(super) const MAX_BUCKETS: usize = 160;
/// Values up to this are in the zero bucket.
pub(super) const ZERO_THRESHOLD: f64 = 1.0 / (1_u128 << 127) as f64 / 2.0;
/// The highest and the lowest resolution: 2^8 buckets for each power of two, and one for 2^4 powers of two.
const MAX_SCHEMA: i8 = 8;
const MIN_SCHEMA: i8 = -4;

/// The upper bounds of the buckets between 0.5 and 1 at the highest resolution.
static BOUNDS: LazyLock<[f64; 256]> =
    LazyLock::new(|| std::array::from_fn(|index| 0.5 * 2_f64.powf(index as f64 / 256.0)));

/// The resolution of the buckets that are `factor` apart or less, as `client_golang` chooses it.
#[must_use]
pub fn schema_of_factor(factor: f64) -> i8 {
    let exponent = -factor.log2().log2().floor();
    #[allow(clippy::cast_possible_truncation, reason = "clamped")]
    let schema = exponent.clamp(MIN_SCHEMA.into(), MAX_SCHEMA.into()) as i8;
    schema
}

/// The count of bucket `key`, which ends at 2^(key · 2^-schema). Twelve bytes instead of sixteen: a label set can have 160.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[repr(C, packed(4))]
pub(super) struct Bucket {
    key: i32,
    count: u64,
}

/// Counts of values in exponential buckets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct NativeBuckets {
    pub(super) schema: i8,
    pub(super) zero_count: u64,
    /// The buckets that are not empty, by ascending key.
    pub(super) buckets: Vec<Bucket>,
}

impl NativeBuckets {
    pub(super) fn new(schema: i8) -> Self {
        Self { schema, zero_count: 0, buckets: Vec::new() }
    }

    /// Observes a positive value.
    pub(super) fn observe(&mut self, value: f64) {
        if value <= ZERO_THRESHOLD {
            self.zero_count += 1;
            return;
        }
        let key = key(value, self.schema);
        match self.buckets.binary_search_by_key(&key, |bucket| bucket.key) {
            Ok(index) => self.buckets[index].count += 1,
            Err(index) => {
                // Doubling the capacity would waste a kilobyte.
                if self.buckets.len() == self.buckets.capacity() {
                    self.buckets.reserve_exact(8);
                }
                self.buckets.insert(index, Bucket { key, count: 1 });
                while self.buckets.len() > MAX_BUCKETS && self.schema > MIN_SCHEMA {
                    self.halve_resolution();
                }
            }
        }
    }

    /// Merges pairs of buckets.
    fn halve_resolution(&mut self) {
        self.schema -= 1;
        for bucket in &mut self.buckets {
            bucket.key = (bucket.key + 1) >> 1;
        }
        self.buckets.dedup_by(|next, merged| {
            let is_same = next.key == merged.key;
            merged.count += if is_same { next.count } else { 0 };
            is_same
        });
    }

    /// Checks restored buckets against the number of observations, and lowers their resolution to `schema`. `None` if
    /// they are invalid.
    pub(super) fn restore(mut self, schema: i8, observations: u64) -> Option<Self> {
        let is_ascending = self.buckets.is_sorted_by(|one, next| one.key < next.key);
        let sum = self.buckets.iter().try_fold(self.zero_count, |sum, bucket| sum.checked_add(bucket.count));
        let in_range = (MIN_SCHEMA..=MAX_SCHEMA).contains(&self.schema) && self.buckets.len() <= MAX_BUCKETS;
        let is_any_empty = self.buckets.iter().any(|bucket| bucket.count == 0);
        if !is_ascending || !in_range || is_any_empty || sum != Some(observations) {
            return None;
        }
        while self.schema > schema {
            self.halve_resolution();
        }
        Some(self)
    }
}

/// The key of the bucket that contains a positive value. Infinity is beyond the largest finite value.
fn key(value: f64, schema: i8) -> i32 {
    let finest = if value.is_finite() {
        let (fraction, exponent) = frexp(value);
        let bounds = i32::try_from(BOUNDS.partition_point(|bound| *bound < fraction)).unwrap_or(i32::MAX);
        bounds + (exponent - 1) * 256
    } else {
        f64::MAX_EXP * 256 + 1
    };
    let shift = MAX_SCHEMA - schema;
    (finest + (1 << shift) - 1) >> shift
}

/// A positive, finite value as a fraction from 0.5 to 1 and a power of two.
fn frexp(value: f64) -> (f64, i32) {
    const EXPONENT_SHIFT: u32 = f64::MANTISSA_DIGITS - 1;
    if value < f64::MIN_POSITIVE {
        let (fraction, exponent) = frexp(value * (1_u64 << 54) as f64);
        return (fraction, exponent - 54);
    }
    let bits = value.to_bits();
    let exponent = i32::try_from(bits >> EXPONENT_SHIFT).unwrap_or_default() - 1022;
    (f64::from_bits(bits & ((1 << EXPONENT_SHIFT) - 1) | 1022 << EXPONENT_SHIFT), exponent)
}

/// Runs of buckets, each with its offset from the end of the run before it, and the difference of each bucket's count
/// from the one before it. Short gaps are empty buckets, as in `client_golang`.
pub(super) fn spans(buckets: &[Bucket]) -> (Vec<(i32, u32)>, Vec<i64>) {
    const MAX_GAP: i32 = 2;
    let (mut spans, mut deltas) = (Vec::<(i32, u32)>::new(), Vec::new());
    let (mut next, mut before) = (0, 0);
    for &Bucket { key, count } in buckets {
        let gap = key - next;
        match spans.last_mut() {
            Some((_, length)) if gap <= MAX_GAP => {
                for _ in 0..gap {
                    deltas.push(-before);
                    before = 0;
                    *length += 1;
                }
                *length += 1;
            }
            _ => spans.push((gap, 1)),
        }
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        deltas.push(count - before);
        (next, before) = (key + 1, count);
    }
    (spans, deltas)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_schema_is_that_of_client_golang() {
        for (factor, schema) in [
            (1.000_1, 8),
            (1.002_8, 8),
            (1.005_5, 7),
            (1.1, 3),
            (1.5, 1),
            (2.0, 0),
            (2.1, 0),
            (4.0, -1),
            (65_536.0, -4),
            (1e9, -4),
        ] {
            assert_eq!(schema_of_factor(factor), schema, "{factor}");
        }
    }

    #[test]
    fn keys_are_those_of_the_specification() {
        assert!(ZERO_THRESHOLD == 2_f64.powi(-128));
        for schema in MIN_SCHEMA..=MAX_SCHEMA {
            let base = 2_f64.powf(2_f64.powi(-i32::from(schema)));
            assert_eq!((key(1.0, schema), key(1.0_f64.next_up(), schema)), (0, 1), "an upper bound is inclusive");
            assert_eq!(key(base, schema), 1);
            assert_eq!(key(base.next_up(), schema), 2);
            assert_eq!(key(f64::INFINITY, schema), key(f64::MAX, schema) + 1);
        }
        assert_eq!((key(0.25, 0), key(0.26, 0), key(8.0, 0), key(9.0, 0)), (-2, -1, 3, 4));
        assert_eq!((key(f64::from_bits(1), 0), key(f64::MIN_POSITIVE, 0)), (-1074, -1022));
    }

    #[test]
    fn a_bucket_is_small() {
        assert_eq!(size_of::<Bucket>(), 12);
    }

    #[test]
    fn short_gaps_are_filled_and_long_ones_begin_a_span() {
        let buckets = [(-3, 2), (-2, 5), (1, 1), (7, 4)].map(|(key, count)| Bucket { key, count });
        let (spans, deltas) = spans(&buckets);
        assert_eq!(spans, [(-3, 5), (5, 1)]);
        assert_eq!(deltas, [2, 3, -5, 0, 1, 3]);
        assert_eq!(super::spans(&[]), (Vec::new(), Vec::new()));
    }

    proptest! {
        /// For any values, the buckets are those of a histogram that has had their resolution from the start.
        #[test]
        fn a_lower_resolution_merges_whole_buckets(exponents in prop::collection::vec(-300.0..300.0_f64, 1..600)) {
            let mut buckets = NativeBuckets::new(MAX_SCHEMA);
            let values: Vec<f64> = exponents.iter().map(|exponent| 10_f64.powf(*exponent)).collect();
            for value in &values {
                buckets.observe(*value);
            }
            prop_assert!(buckets.buckets.len() <= MAX_BUCKETS);
            let mut expected = std::collections::BTreeMap::<i32, u64>::new();
            for value in values.iter().filter(|value| **value > ZERO_THRESHOLD) {
                *expected.entry(key(*value, buckets.schema)).or_default() += 1;
            }
            let counts: Vec<_> = buckets.buckets.iter().map(|bucket| (bucket.key, bucket.count)).collect();
            prop_assert_eq!(counts, expected.into_iter().collect::<Vec<_>>());
            let count = values.len() as u64;
            prop_assert_eq!(buckets.clone().restore(MAX_SCHEMA, count), Some(buckets.clone()));
            prop_assert_eq!(buckets.clone().restore(MIN_SCHEMA, count).map(|buckets| buckets.schema), Some(MIN_SCHEMA));
            prop_assert!(buckets.restore(MIN_SCHEMA, count + 1).is_none());
        }
    }
}

//! Messages of `metrics.proto`, in protobuf's wire format.

use crate::metrics::exemplars::{self, Exemplar};
use crate::metrics::native::{NativeBuckets, ZERO_THRESHOLD, spans};

/// Numbers of fields.
mod field {
    pub(super) mod metric {
        pub(in super::super) const LABEL: u32 = 1;
        pub(in super::super) const GAUGE: u32 = 2;
        pub(in super::super) const COUNTER: u32 = 3;
        pub(in super::super) const HISTOGRAM: u32 = 7;
    }
    pub(super) mod counter {
        pub(in super::super) const EXEMPLAR: u32 = 2;
        pub(in super::super) const CREATED: u32 = 3;
    }
    pub(super) mod histogram {
        pub(in super::super) const COUNT: u32 = 1;
        pub(in super::super) const SUM: u32 = 2;
        pub(in super::super) const BUCKET: u32 = 3;
        pub(in super::super) const SCHEMA: u32 = 5;
        pub(in super::super) const ZERO_THRESHOLD: u32 = 6;
        pub(in super::super) const ZERO_COUNT: u32 = 7;
        pub(in super::super) const POSITIVE_SPAN: u32 = 12;
        pub(in super::super) const POSITIVE_DELTA: u32 = 13;
        pub(in super::super) const CREATED: u32 = 15;
    }
    pub(super) const BUCKET_EXEMPLAR: u32 = 3;
    pub(super) const EXEMPLAR_TIMESTAMP: u32 = 3;
}

/// The only field, or the first of two.
const VALUE: u32 = 1;
/// The second of two fields.
const SECOND: u32 = 2;

/// A message under construction.
#[derive(Debug, Default)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    /// Begins a metric with encoded labels.
    pub(super) fn start(&mut self, labels: &[&[u8]]) {
        self.0.clear();
        for labels in labels {
            self.0.extend_from_slice(labels);
        }
    }

    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    #[inline]
    pub(super) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            let [low, ..] = value.to_le_bytes();
            self.0.push(low | 0x80);
            value >>= 7;
        }
        let [low, ..] = value.to_le_bytes();
        self.0.push(low);
    }

    pub(super) fn number(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    /// A message within this one, shorter than 128 bytes.
    fn short(&mut self, field: u32, write: impl FnOnce(&mut Self)) {
        self.key(field, 2);
        let start = self.0.len();
        self.0.push(0);
        write(self);
        let length = self.0.len() - start - 1;
        debug_assert!(length < 0x80, "{length}");
        self.0[start] = u8::try_from(length).unwrap_or_default();
    }

    fn timestamp(&mut self, field: u32, milliseconds: u64) {
        self.short(field, |message| {
            message.number(VALUE, milliseconds / 1000);
            message.number(SECOND, milliseconds % 1000 * 1_000_000);
        });
    }

    pub(super) fn label(&mut self, name: &str, value: &[u8]) {
        self.key(field::metric::LABEL, 2);
        self.varint((2 + name.len() + 1 + varint_len(value.len() as u64) + value.len()) as u64);
        self.bytes(VALUE, name.as_bytes());
        self.bytes(SECOND, value);
    }

    /// The labels of a text such as `task="…",worker="…"`.
    pub(super) fn labels(&mut self, text: &str) {
        let mut rest = text;
        while let Some((name, after)) = rest.split_once("=\"") {
            let (value, end) = unescape(after);
            self.label(name, &value);
            rest = after[end..].trim_start_matches(',');
        }
    }

    pub(super) fn gauge(&mut self, value: f64) {
        self.short(field::metric::GAUGE, |gauge| gauge.double(VALUE, value));
    }

    /// A message of any length within this one.
    fn nested(&mut self, field: u32, write: impl FnOnce(&mut Self)) {
        self.key(field, 2);
        let start = self.0.len();
        write(self);
        let end = self.0.len();
        self.varint((end - start) as u64);
        let length = self.0.len() - end;
        self.0[start..].rotate_right(length);
    }

    /// A signed number in the zigzag encoding.
    fn signed(&mut self, field: u32, value: i64) {
        self.key(field, 0);
        self.zigzag(value);
    }

    fn zigzag(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)).cast_unsigned());
    }

    pub(super) fn counter(&mut self, value: f64, exemplar: Option<&Exemplar>, created: u64) {
        let write = |counter: &mut Self| {
            counter.double(VALUE, value);
            counter.exemplar(field::counter::EXEMPLAR, exemplar);
            counter.timestamp(field::counter::CREATED, created);
        };
        match exemplar {
            None => self.short(field::metric::COUNTER, write),
            Some(_) => self.nested(field::metric::COUNTER, write),
        }
    }

    fn exemplar(&mut self, field: u32, exemplar: Option<&Exemplar>) {
        let Some(exemplar) = exemplar else { return };
        self.nested(field, |message| {
            message.label(exemplars::LABEL, exemplar.id().as_bytes());
            message.double(SECOND, exemplar.value);
            message.timestamp(field::EXEMPLAR_TIMESTAMP, exemplar.time);
        });
    }

    /// A histogram; `buckets` are upper bounds with cumulative counts and exemplars. `+Inf` is left out, unless it has
    /// an exemplar.
    pub(super) fn histogram<'a>(
        &mut self,
        (count, sum, created): (u64, f64, u64),
        buckets: impl Iterator<Item = (f64, u64, Option<&'a Exemplar>)>,
        native: Option<&NativeBuckets>,
    ) {
        self.nested(field::metric::HISTOGRAM, |histogram| {
            histogram.number(field::histogram::COUNT, count);
            histogram.double(field::histogram::SUM, sum);
            for (bound, cumulative, exemplar) in
                buckets.filter(|(bound, _, exemplar)| bound.is_finite() || exemplar.is_some())
            {
                let write = |bucket: &mut Self| {
                    bucket.number(VALUE, cumulative);
                    bucket.double(SECOND, bound);
                    bucket.exemplar(field::BUCKET_EXEMPLAR, exemplar);
                };
                match exemplar {
                    None => histogram.short(field::histogram::BUCKET, write),
                    Some(_) => histogram.nested(field::histogram::BUCKET, write),
                }
            }
            if let Some(native) = native {
                histogram.native(native);
            }
            histogram.timestamp(field::histogram::CREATED, created);
        });
    }

    fn native(&mut self, native: &NativeBuckets) {
        self.signed(field::histogram::SCHEMA, native.schema.into());
        self.double(field::histogram::ZERO_THRESHOLD, ZERO_THRESHOLD);
        self.number(field::histogram::ZERO_COUNT, native.zero_count);
        let (spans, deltas) = spans(&native.buckets);
        for (offset, length) in spans {
            self.short(field::histogram::POSITIVE_SPAN, |span| {
                span.signed(VALUE, offset.into());
                span.number(SECOND, length.into());
            });
        }
        self.nested(field::histogram::POSITIVE_DELTA, |packed| deltas.iter().for_each(|delta| packed.zigzag(*delta)));
    }
}

pub(super) fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// The value of a label at the start of `text`, up to the closing quote, and where the rest begins.
fn unescape(text: &str) -> (std::borrow::Cow<'_, [u8]>, usize) {
    let bytes = text.as_bytes();
    let end = bytes.iter().position(|byte| matches!(byte, b'"' | b'\\')).unwrap_or(bytes.len());
    if bytes.get(end) != Some(&b'\\') {
        return (bytes[..end].into(), bytes.len().min(end + 1));
    }
    let mut value = bytes[..end].to_vec();
    let mut at = end;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return (value.into(), at + 1),
            b'\\' if at + 1 < bytes.len() => {
                value.push(if bytes[at + 1] == b'n' { b'\n' } else { bytes[at + 1] });
                at += 2;
            }
            byte => {
                value.push(byte);
                at += 1;
            }
        }
    }
    (value.into(), at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_encoding() {
        for value in [0, 1, 127, 128, 300, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut message = Message::default();
            message.varint(value);
            assert_eq!(message.0.len(), varint_len(value), "{value}");
        }
        let mut message = Message::default();
        message.label("task", "a".repeat(200).as_bytes());
        assert_eq!(message.0[..4], [0x0a, 0xd1, 0x01, 0x0a]);
        assert_eq!(message.0.len(), 3 + 0xd1);
    }

    #[test]
    fn labels_are_unescaped() {
        for (text, value, rest) in
            [(r#"a",x"#, "a", ",x"), (r#"","#, "", ","), (r#"a\"b\\c\nd","#, "a\"b\\c\nd", ","), ("ö", "ö", "")]
        {
            let (unescaped, end) = unescape(text);
            assert_eq!((std::str::from_utf8(&unescaped).unwrap(), &text[end..]), (value, rest));
        }
    }
}

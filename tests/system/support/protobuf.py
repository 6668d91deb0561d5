"""Decodes the protobuf exposition: length-delimited messages of io.prometheus.client.MetricFamily."""

import struct


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data):
    """{field number: [values]}: integers, floats for 64-bit values, and bytes."""
    found, at = {}, 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        elif key & 7 == 1:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        else:
            assert key & 7 == 2, key
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        found.setdefault(key >> 3, []).append(value)
    assert at == len(data)
    return found


def _timestamp(data):
    parts = fields(data)
    return parts[1][0] + parts.get(2, [0])[0] / 1e9


def families(data):
    """{name: (help, type, [(labels, value, start)])}; a histogram's value is (count, sum, {bound: cumulative count})."""
    found, at = {}, 0
    while at < len(data):
        length, at = _varint(data, at)
        family, at = fields(data[at : at + length]), at + length
        metrics = []
        for metric in map(fields, family.get(4, [])):
            labels = {pair[1][0].decode(): pair[2][0].decode() for pair in map(fields, metric.get(1, []))}
            [number] = metric.keys() - {1}
            body = fields(metric[number][0])
            if number == 7:
                buckets = {bucket[2][0]: bucket[1][0] for bucket in map(fields, body.get(3, []))}
                value, start = (body[1][0], body[2][0], buckets), _timestamp(body[15][0])
            else:
                value, start = body[1][0], _timestamp(body[3][0]) if number == 3 else None
            metrics.append((labels, value, start))
        found[family[1][0].decode()] = family[2][0].decode(), {0: "counter", 1: "gauge", 4: "histogram"}[family[3][0]], metrics
    return found


def metrics(data, name):
    """[(labels, fields of the counter or histogram)] of a family."""
    at = 0
    while at < len(data):
        length, at = _varint(data, at)
        family, at = fields(data[at : at + length]), at + length
        if family[1][0].decode() == name:
            for metric in map(fields, family.get(4, [])):
                [number] = metric.keys() - {1}
                yield _labels(metric), fields(metric[number][0])


def _labels(message):
    return {pair[1][0].decode(): pair[2][0].decode() for pair in map(fields, message.get(1, []))}


def _signed(value):
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


def native(histogram):
    """(schema, zero threshold, zero count, {key: count}), or None without native buckets."""
    if 5 not in histogram:
        return None
    deltas, at = [], 0
    packed = histogram[13][0]
    while at < len(packed):
        delta, at = _varint(packed, at)
        deltas.append(_signed(delta))
    buckets, key, count, deltas = {}, 0, 0, iter(deltas)
    for span in map(fields, histogram.get(12, [])):
        key += _signed(span[1][0])
        for _ in range(span[2][0]):
            count += next(deltas)
            buckets[key] = count
            key += 1
    assert next(deltas, None) is None
    return _signed(histogram[5][0]), histogram[6][0], histogram[7][0], {key: count for key, count in buckets.items() if count}


def exemplar(message, field):
    """(labels, value, time) of a counter (2) or a bucket (3), or None."""
    found = [(_labels(exemplar), exemplar[2][0], _timestamp(exemplar[3][0])) for exemplar in map(fields, message.get(field, []))]
    return found[0] if found else None


def exemplars(histogram):
    """{bound: exemplar} of the buckets that have one."""
    buckets = [(bucket[2][0], exemplar(bucket, 3)) for bucket in map(fields, histogram.get(3, []))]
    return {bound: found for bound, found in buckets if found}

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

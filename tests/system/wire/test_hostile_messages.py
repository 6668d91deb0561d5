"""Messages that are made to break a parser, through real brokers. Good events around them must all be counted.

Smaller messages are in test_messages.py, limits of names in test_limits.py.
"""

import json

import pytest

from support import events as ev
from support.events import W, good
from support.exporter import SELF_METRICS
from support.exposition import EVENTS, ONLINE, PREFETCHED, RUNTIME
from support.flood import flood
from support.publish import DEEP, envelope
from support.resources import MIB, peak_memory

OTHER = "(other)"


@pytest.fixture
def self_metrics_harness(services, shared_redis):
    """A harness whose exporter serves its own metrics."""
    return services.harness(shared_redis, SELF_METRICS)


def invalid_messages(harness):
    """{reason: number of messages and events}"""
    samples = harness.exporter.metrics()
    return {
        dict(labels)["reason"]: value
        for (name, labels), value in samples.items()
        if name == "flower_exporter_invalid_messages_total" and value
    }


def message_of_size(harness, size, **fields):
    """A function that publishes an event whose message has exactly this size. On Redis that includes the envelope."""
    event = ev.received(**fields, args="")
    if harness.publisher.broker.name == "rabbitmq":
        body = json.dumps(event)
        body = body.replace('"args": ""', '"args": "%s"' % ("x" * (size - len(body))))
        return lambda: harness.publisher.raw(body.encode())
    # Escaped text instead of base64, so that every size is possible.
    message = json.dumps(envelope(json.dumps(event), encoding=None))
    message = message.replace(r"\"args\": \"\"", r"\"args\": \"%s\"" % ("x" * (size - len(message))))
    assert len(message) == size
    return lambda: harness.publisher.bytes(message)


@pytest.mark.parametrize("limit", [2048, 16 * MIB], ids=["2 KiB", "16 MiB"])
def test_message_max_bytes_is_exact(services, broker, limit):
    """A small limit, and the default."""
    harness = services.harness(broker, {"events": {"message_max_bytes": limit}, **SELF_METRICS})
    sizes = {"below": limit - 1, "at": limit, "over": limit + 1, "far over": limit + 4 * MIB}
    for name, size in sizes.items():
        samples = harness.publish(good(name), message_of_size(harness, size, uuid=name, name=name))
    assert [samples.events("received", W, name) for name in ("good", *sizes)] == [4, 1, 1, 0, 0]
    assert invalid_messages(harness) == {"too_large": 2}


def test_too_large_message_is_not_buffered(services, redis):
    """On Redis not even while it is being received."""
    harness = services.harness(redis, {"events": {"message_max_bytes": "64KiB"}})
    memory = peak_memory(harness.exporter)
    for number in range(1, 4):
        samples = harness.publish(good(number), lambda: harness.publisher.bytes(b"x" * 20 * MIB))
        assert samples.events("received", W, "good") == number
    assert peak_memory(harness.exporter) - memory < 4 * MIB


DEEP_FIELDS = ["args", "name", "uuid", "type", "hostname", "timestamp", "runtime", "eta", "loadavg", "terminated"]


@pytest.mark.parametrize("key", DEEP_FIELDS)
def test_deeply_nested_fields_are_skipped(harness, key):
    """Each field contains 100,000 levels of nesting, in a single event and in a batch."""
    deep = json.dumps({**ev.received("x", name="deep"), key: "DEEP"}).replace('"DEEP"', DEEP.decode()).encode()
    batch = b"[%s, %s, %s]" % (json.dumps(good(1)).encode(), deep, json.dumps(good(2)).encode())
    samples = harness.publish(good(3), lambda: harness.publisher.raw(deep), lambda: harness.publisher.raw(batch), good(4))
    assert samples.events("received", W, "good") == 4
    assert samples.total(EVENTS) == (4 if key in ("uuid", "type", "hostname", "timestamp") else 6)


DEEP_PARTS = {"headers": 1, "properties": 0, "body": 0, "content-type": 1, "more": 1}


@pytest.mark.parametrize("key, counted", DEEP_PARTS.items(), ids=DEEP_PARTS)
def test_deeply_nested_envelopes_are_skipped(harness, key, counted):
    """On Redis the event is counted if the exporter ignores the nested part."""
    deep = json.dumps({**envelope(json.dumps(ev.received("x", name="deep"))), key: "DEEP"})
    deep = deep.replace('"DEEP"', DEEP.decode())
    samples = harness.publish(good(1), lambda: harness.publisher.bytes(deep), good(2))
    assert samples.events("received", W, "good") == 2
    assert samples.events("received", W, "deep") == counted


@pytest.mark.timeout(3600)
def test_memory_is_bounded_with_many_task_names(services, redis, request):
    """Memory is constant once the limits are reached, and every event is counted."""
    names, bound, batch = request.config.getoption("--names"), 1000, 1000
    limits = {"metrics": {"max_label_sets": bound, "self_metrics": True}, "state": {"max_tasks": bound}}
    harness = services.harness(redis, limits)
    stream, memory = flood(harness), 0
    for start in range(0, names, batch):
        numbers = range(start, start + batch)
        fields = {"type": "task-received", "hostname": W, "timestamp": 1}
        stream.send(stream.message([{**fields, "uuid": f"task {n}", "name": f"tasks.{n}.{n * 7919}"} for n in numbers]))
        if start % (20 * batch) == 0:
            stream.finish()
            stream.send(b"CLIENT REPLY OFF\r\n")
            harness.publish()
            memory = memory or peak_memory(harness.exporter)
    stream.finish()
    samples = harness.publish(good(1))
    assert samples.total(EVENTS) == names + 1
    assert samples.events("received", W, OTHER) > names - bound
    assert samples.total(PREFETCHED) == bound == harness.exporter.metrics().one("flower_exporter_tracked_tasks")
    assert harness.exporter.metrics().one("flower_exporter_tracked_label_sets") <= bound + 1
    assert peak_memory(harness.exporter) - memory < 8 * MIB


def test_memory_is_bounded_with_megabyte_texts(services, broker):
    """Labels are truncated, and the exporter retains no other part of the texts."""
    harness = services.harness(broker)
    samples, memory = harness.publish(good(1)), []
    for number in range(12):
        text = f"{number:03}" + "é" * (MIB // 2)
        for event in (
            ev.heartbeat(text, sw_ident=text, sw_ver=text, sw_sys=text),
            ev.received(text, text, name=text, eta=text),
            ev.task(text, text, text, name=text),
        ):
            harness.publisher.raw(json.dumps(event, ensure_ascii=False).encode())
        samples = harness.publish(good(2))
        memory.append(peak_memory(harness.exporter))
    assert samples.events("received", W, "good") == 13
    assert max(len(value.encode()) for _, labels in samples for _, value in labels) == 256 + len("…".encode())
    assert len([labels for name, labels in samples if name == ONLINE]) == 12
    assert memory[-1] - memory[len(memory) // 2] < 24 * MIB, "after 55 MiB of text"


SAME, UUID = "x" * 256, "0b7a3d4e-1111-4222-8333-c0ffee000001"
IDS = {
    "the same for 256 bytes": [SAME, SAME + "a", SAME + "b", SAME + "…"],
    "the same for a megabyte": ["x" * MIB, "x" * MIB + "x", "x" * MIB + "y"],
    "spellings of one UUID": [
        UUID, UUID.upper(), UUID.replace("-", ""), f"{{{UUID}}}", f"urn:uuid:{UUID}", f" {UUID}", f"{UUID}\0",
    ],
    "blanks and nothing": ["", " ", "\n", "\0"],
}  # fmt: skip


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_similar_ids_are_different_tasks(harness, ids):
    """All are prefetched, and each one starts separately."""
    assert harness.publish(*map(ev.received, ids)).total(PREFETCHED) == len(ids)
    for left, uuid in reversed(list(enumerate(ids))):
        assert harness.publish(ev.started(uuid, at=1)).total(PREFETCHED) == left


def test_same_id_from_many_workers_is_one_task(harness):
    """The task is at one worker at a time. Every event is counted for its sender."""
    workers = [f"w{n}@tests" for n in range(20)]
    samples = harness.publish(*map(ev.heartbeat, workers), *[ev.received("a", w, at=n) for n, w in enumerate(workers)])
    assert samples.total(PREFETCHED) == samples.one(PREFETCHED, worker=workers[-1], task="add") == 1
    assert samples.events("received") == samples.total(ONLINE) == len(workers)
    assert harness.publish(*[ev.started("a", w, at=30 + n) for n, w in enumerate(workers)]).total(PREFETCHED) == 0


#: Python writes the first two and parses all of them.
OUT_OF_RANGE = ["Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "0." + "0" * 400 + "1", "1e-999", "1E+400"]


@pytest.mark.parametrize("number", OUT_OF_RANGE, ids=lambda text: text[:9])
def test_out_of_range_numbers_are_ignored(harness, number):
    """In ignored fields the event is counted; in other fields the value is ignored. Single events and a batch."""
    fields = "runtime", "retries", "clock", "pid", "utcoffset", "custom"
    odd = [json.dumps({**ev.succeeded(key, name="odd"), key: "NUMBER"}) for key in fields]
    beats = "active", "processed", "freq", "timestamp"
    odd += [json.dumps({**ev.heartbeat("odd@tests"), key: "NUMBER"}) for key in beats]
    odd = [text.replace('"NUMBER"', number).encode() for text in odd]
    for item in (*odd, b"[%s]" % b", ".join(odd)):
        harness.publisher.raw(item)
    samples = harness.publish(good(1))
    assert samples.events("received", W, "good") == 1
    assert samples.one(ONLINE, worker="odd@tests") == 1
    assert samples.events("succeeded", W, "odd") == 2 * len(fields)
    assert samples.total(f"{RUNTIME}_sum") < 1


@pytest.mark.parametrize("number", OUT_OF_RANGE, ids=lambda text: text[:9])
def test_out_of_range_timestamps_keep_metrics_finite(harness, number):
    """Such an event may be invalid, but all metrics of its task stay finite."""
    odd = json.dumps({**ev.received("a", name="odd"), "timestamp": "NUMBER"}).replace('"NUMBER"', number)
    samples = harness.publish(good(1), lambda: harness.publisher.raw(odd.encode()), ev.started("a", name="odd", at=5))
    assert samples.events("received", W, "good") == samples.events("started", W) == 1
    assert all(abs(value) < 1e300 for value in samples.values())


TEXTS = {
    "lone surrogate": (rb"\ud800", 1),
    "surrogates in reverse order": (rb"\udfff\ud800x", 1),
    "invalid UTF-8": (b"\xff\xfe", 1),
    "lone surrogate in UTF-8": (b"\xed\xa0\x80", 1),
    "control characters": (rb"\u0000\u001b[31m\n\u2028", 1),
    "unescaped control characters": (b"\0\1\x1b[31m\n", 0),
    "invalid escape": (rb"\x41", 0),
    "incomplete escape": (rb"\u00", 0),
}


@pytest.mark.parametrize("key", ["name", "hostname", "uuid", "type"])
@pytest.mark.parametrize("text, counted", TEXTS.values(), ids=TEXTS)
def test_invalid_text_is_sanitized_or_rejected(harness, key, text, counted):
    """The text is sanitized and the exposition stays valid, or the message is invalid JSON."""
    event = json.dumps({**ev.received("x", name="odd"), key: "task-TEXT"}).encode().replace(b"TEXT", text)
    samples = harness.publish(good(1), lambda: harness.publisher.raw(event), good(2))
    assert samples.events("received", W, "good") == 2
    assert samples.total(EVENTS) == 2 + counted


def test_batch_of_100_000_events_is_counted(services, broker):
    """All of them in one message."""
    harness = services.harness(broker)
    fields = {"type": "task-sent", "hostname": "c", "timestamp": 1, "name": "n"}
    batch = [{**fields, "uuid": f"{n}"} for n in range(100_000)]
    samples = harness.publish(good(1), lambda: harness.publisher.raw(json.dumps(batch).encode()), good(2))
    assert samples.events("sent", "c", "n") == 100_000
    assert samples.events("received", W, "good") == 2


ELEMENTS = {b"1": "not_an_event", b"[]": "not_an_event", b"{}": "no_type", b"x": "json", b"}": "json"}


@pytest.mark.parametrize("element, reason", ELEMENTS.items())
def test_million_invalid_elements_do_not_block_http(self_metrics_harness, element, reason):
    """Each element is cheap: scrapes and /healthz respond in time."""
    count = 4 * MIB // (len(element) + 1)
    body = b"[" + b",".join([element] * count) + b"]"
    self_metrics_harness.publisher.raw(body)
    assert self_metrics_harness.exporter.healthz()[0] == 200
    assert self_metrics_harness.publish(good(1)).events("received", W, "good") == 1
    assert invalid_messages(self_metrics_harness) == {reason: count}


def test_empty_messages_are_counted_or_dropped(services, broker):
    """Each one is counted as invalid or as dropped."""
    harness = services.harness(broker, SELF_METRICS)
    stream, count, memory = flood(harness), 100_000, peak_memory(harness.exporter)
    harness.publish(good(1))
    stream.send(stream.publish(b"") * count)
    stream.finish()
    assert harness.publish(good(2), deadline=60).events("received", W, "good") == 2
    assert sum(invalid_messages(harness).values()) + harness.exporter.metrics().one("flower_exporter_dropped_messages_total") == count
    assert peak_memory(harness.exporter) - memory < 32 * MIB

"""Messages made to break a reader, through real brokers, with good events around them that must all count.

Smaller ones are in test_messages.py, bounds of names in test_limits.py.
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
def own(services, shared_redis):
    """A harness that shows the exporter's own metrics."""
    return services.harness(shared_redis, SELF_METRICS)


def rejected(harness):
    """{reason: messages and events}"""
    samples = harness.exporter.metrics()
    return {
        dict(labels)["reason"]: value
        for (name, labels), value in samples.items()
        if name == "flower_exporter_rejected_total" and value
    }


def of_size(harness, size, **fields):
    """What to publish for an event whose message has so many bytes: on Redis, its envelope counts."""
    event = ev.received(**fields, args="")
    if harness.publisher.broker.name == "rabbitmq":
        body = json.dumps(event)
        body = body.replace('"args": ""', '"args": "%s"' % ("x" * (size - len(body))))
        return lambda: harness.publisher.raw(body.encode())
    # Escaped text instead of base64, so that every byte can be had.
    whole = json.dumps(envelope(json.dumps(event), encoding=None))
    whole = whole.replace(r"\"args\": \"\"", r"\"args\": \"%s\"" % ("x" * (size - len(whole))))
    assert len(whole) == size
    return lambda: harness.publisher.bytes(whole)


@pytest.mark.parametrize("limit", [2048, 16 * MIB], ids=["2 KiB", "16 MiB"])
def test_up_to_max_message(services, broker, limit):
    """To the byte, and the default, too."""
    harness = services.harness(broker, {"events": {"max_message": limit}, **SELF_METRICS})
    sizes = {"below": limit - 1, "at": limit, "over": limit + 1, "far over": limit + 4 * MIB}
    for name, size in sizes.items():
        samples = harness.publish(good(name), of_size(harness, size, uuid=name, name=name))
    assert [samples.events("received", W, name) for name in ("good", *sizes)] == [4, 1, 1, 0, 0]
    assert rejected(harness) == {"too_large": 2}


def test_a_message_that_is_too_large_is_not_kept(services, redis):
    """On Redis, not even while it comes in."""
    harness = services.harness(redis, {"events": {"max_message": "64KiB"}})
    memory = peak_memory(harness.exporter)
    for number in range(1, 4):
        samples = harness.publish(good(number), lambda: harness.publisher.bytes(b"x" * 20 * MIB))
        assert samples.events("received", W, "good") == number
    assert peak_memory(harness.exporter) - memory < 4 * MIB


DEEP_FIELDS = ["args", "name", "uuid", "type", "hostname", "timestamp", "runtime", "eta", "loadavg", "terminated"]


@pytest.mark.parametrize("key", DEEP_FIELDS)
def test_deep_fields(harness, key):
    """Nested 100,000 deep: as a field of any other kind of that name, alone and in a batch."""
    deep = json.dumps({**ev.received("x", name="deep"), key: "DEEP"}).replace('"DEEP"', DEEP.decode()).encode()
    batch = b"[%s, %s, %s]" % (json.dumps(good(1)).encode(), deep, json.dumps(good(2)).encode())
    samples = harness.publish(good(3), lambda: harness.publisher.raw(deep), lambda: harness.publisher.raw(batch), good(4))
    assert samples.events("received", W, "good") == 4
    assert samples.total(EVENTS) == (4 if key in ("uuid", "type", "hostname", "timestamp") else 6)


DEEP_PARTS = {"headers": 1, "properties": 0, "body": 0, "content-type": 1, "more": 1}


@pytest.mark.parametrize("key, counted", DEEP_PARTS.items(), ids=DEEP_PARTS)
def test_deep_envelopes(harness, key, counted):
    """On Redis: where nothing is looked for there, the event counts."""
    deep = json.dumps({**envelope(json.dumps(ev.received("x", name="deep"))), key: "DEEP"})
    deep = deep.replace('"DEEP"', DEEP.decode())
    samples = harness.publish(good(1), lambda: harness.publisher.bytes(deep), good(2))
    assert samples.events("received", W, "good") == 2
    assert samples.events("received", W, "deep") == counted


@pytest.mark.timeout(3600)
def test_names_without_end(services, redis, request):
    """However many there are, memory stays where it is once the bounds are reached, and every event counts."""
    names, bound, batch = request.config.getoption("--names"), 1000, 1000
    limits = {"metrics": {"max_label_pairs": bound, "self_metrics": True}, "state": {"max_tasks": bound}}
    harness = services.harness(redis, limits)
    stream, memory = flood(harness), 0
    for start in range(0, names, batch):
        numbers = range(start, start + batch)
        usual = {"type": "task-received", "hostname": W, "timestamp": 1}
        stream.send(stream.message([{**usual, "uuid": f"task {n}", "name": f"tasks.{n}.{n * 7919}"} for n in numbers]))
        if start % (20 * batch) == 0:
            stream.finish()
            stream.send(b"CLIENT REPLY OFF\r\n")
            harness.publish()
            memory = memory or peak_memory(harness.exporter)
    stream.finish()
    samples = harness.publish(good(1))
    assert samples.total(EVENTS) == names + 1
    assert samples.events("received", W, OTHER) > names - bound
    assert samples.total(PREFETCHED) == bound == harness.exporter.metrics().one("flower_exporter_tasks")
    assert harness.exporter.metrics().one("flower_exporter_label_pairs") <= bound + 1
    assert peak_memory(harness.exporter) - memory < 8 * MIB


def test_texts_of_a_megabyte(services, broker):
    """In every field that is remembered: labels are cut, and of the texts nothing else is kept."""
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
    assert memory[-1] - memory[len(memory) // 2] < 24 * MIB, "while 55 MiB of texts came"


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
def test_ids_that_nearly_collide(harness, ids):
    """Each is a task of its own: all are prefetched, and each leaves alone."""
    assert harness.publish(*map(ev.received, ids)).total(PREFETCHED) == len(ids)
    for left, uuid in reversed(list(enumerate(ids))):
        assert harness.publish(ev.started(uuid, at=1)).total(PREFETCHED) == left


def test_ids_that_do_collide(harness):
    """One id sent by many workers is one task, at one of them at a time; every event counts for its sender."""
    workers = [f"w{n}@tests" for n in range(20)]
    samples = harness.publish(*map(ev.heartbeat, workers), *[ev.received("a", w, at=n) for n, w in enumerate(workers)])
    assert samples.total(PREFETCHED) == samples.one(PREFETCHED, worker=workers[-1], task="add") == 1
    assert samples.events("received") == samples.total(ONLINE) == len(workers)
    assert harness.publish(*[ev.started("a", w, at=30 + n) for n, w in enumerate(workers)]).total(PREFETCHED) == 0


#: Python writes the first two and reads them all.
BEYOND = ["Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "0." + "0" * 400 + "1", "1e-999", "1E+400"]


@pytest.mark.parametrize("number", BEYOND, ids=lambda text: text[:9])
def test_numbers_beyond_all_bounds(harness, number):
    """Where no number matters, the event counts; where one does, it is no number. Alone, and in a batch."""
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


@pytest.mark.parametrize("number", BEYOND, ids=lambda text: text[:9])
def test_timestamps_beyond_all_bounds(harness, number):
    """An event with such a time may be refused; what others show of its task stays a number."""
    odd = json.dumps({**ev.received("a", name="odd"), "timestamp": "NUMBER"}).replace('"NUMBER"', number)
    samples = harness.publish(good(1), lambda: harness.publisher.raw(odd.encode()), ev.started("a", name="odd", at=5))
    assert samples.events("received", W, "good") == samples.events("started", W) == 1
    assert all(abs(value) < 1e300 for value in samples.values())


TEXTS = {
    "half a pair": (rb"\ud800", 1),
    "pairs the wrong way": (rb"\udfff\ud800x", 1),
    "no UTF-8": (b"\xff\xfe", 1),
    "half a pair in UTF-8": (b"\xed\xa0\x80", 1),
    "control characters": (rb"\u0000\u001b[31m\n\u2028", 1),
    "control characters as they are": (b"\0\1\x1b[31m\n", 0),
    "no escape": (rb"\x41", 0),
    "half an escape": (rb"\u00", 0),
}


@pytest.mark.parametrize("key", ["name", "hostname", "uuid", "type"])
@pytest.mark.parametrize("text, counted", TEXTS.values(), ids=TEXTS)
def test_texts_that_are_none(harness, key, text, counted):
    """Mended, and readable in the exposition; or no JSON at all."""
    event = json.dumps({**ev.received("x", name="odd"), key: "task-TEXT"}).encode().replace(b"TEXT", text)
    samples = harness.publish(good(1), lambda: harness.publisher.raw(event), good(2))
    assert samples.events("received", W, "good") == 2
    assert samples.total(EVENTS) == 2 + counted


def test_a_batch_of_100_000(services, broker):
    """In one message."""
    harness = services.harness(broker)
    usual = {"type": "task-sent", "hostname": "c", "timestamp": 1, "name": "n"}
    batch = [{**usual, "uuid": f"{n}"} for n in range(100_000)]
    samples = harness.publish(good(1), lambda: harness.publisher.raw(json.dumps(batch).encode()), good(2))
    assert samples.events("sent", "c", "n") == 100_000
    assert samples.events("received", W, "good") == 2


ELEMENTS = {b"1": "not_an_event", b"[]": "not_an_event", b"{}": "no_type", b"x": "json", b"}": "json"}


@pytest.mark.parametrize("element, reason", ELEMENTS.items())
def test_a_batch_of_millions_that_are_none(own, element, reason):
    """Each costs little: scrapes are answered in time, and so is /healthz."""
    count = 4 * MIB // (len(element) + 1)
    body = b"[" + b",".join([element] * count) + b"]"
    own.publisher.raw(body)
    assert own.exporter.healthz()[0] == 200
    assert own.publish(good(1)).events("received", W, "good") == 1
    assert rejected(own) == {reason: count}


def test_messages_of_nothing(services, broker):
    """A great many empty ones: each is counted as what it is, or as dropped."""
    harness = services.harness(broker, SELF_METRICS)
    stream, count, memory = flood(harness), 100_000, peak_memory(harness.exporter)
    harness.publish(good(1))
    stream.send(stream.publish(b"") * count)
    stream.finish()
    assert harness.publish(good(2), deadline=60).events("received", W, "good") == 2
    assert sum(rejected(harness).values()) + harness.exporter.metrics().one("flower_exporter_dropped_messages_total") == count
    assert peak_memory(harness.exporter) - memory < 32 * MIB

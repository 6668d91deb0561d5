"""Unusual and invalid messages: an invalid one loses only itself, and all events around it are counted."""

import json
import re

import pytest

from support import events as ev
from support.events import W, good
from support.exposition import EVENTS, MARKER
from support.publish import DEEP

INVALID_BODIES = {
    "empty": b"",
    "not JSON": b"not json",
    "invalid UTF-8": b'{"type": "\xff\xfe"}',
    "truncated": json.dumps(ev.received()).encode()[:-9],
    "only null": b"null",
    "a number": b"42",
    "text": b'"task-sent"',
    "an empty object": b"{}",
    "an empty list": b"[]",
    "a list without events": b'[1, null, "x", [], {}]',
    "two in a row": b"{} {}",
    "deep lists": b"[" * 100_000,
    "deep objects": DEEP,
    "pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "zeros": b"\0" * 5000,
}

INCOMPLETE_EVENTS = {
    "no type": ev.without(ev.received("x"), "type"),
    "type null": {**ev.received("x"), "type": None},
    "type a number": {**ev.received("x"), "type": 5},
    "type a list": {**ev.received("x"), "type": ["task-received"]},
    "no hostname": ev.without(ev.received("x"), "hostname"),
    "hostname null": {**ev.received("x"), "hostname": None},
    "hostname an object": {**ev.received("x"), "hostname": {}},
    "no uuid": ev.without(ev.received("x"), "uuid"),
    "uuid null": {**ev.received("x"), "uuid": None},
    "no timestamp": ev.without(ev.received("x"), "timestamp"),
    "timestamp null": {**ev.received("x"), "timestamp": None},
    "timestamp text": {**ev.received("x"), "timestamp": "1750000000"},
    "timestamp true": {**ev.received("x"), "timestamp": True},
    "heartbeat without hostname": ev.without(ev.heartbeat(), "hostname"),
}


def assert_only_good_counted(harness, *items):
    """Publishes the items between two good events: only the good events are counted."""
    samples = harness.publish(good(1), *items, good(2))
    assert samples.short() == {("events", W, "received", "good"): 2, ("prefetched", W, "good"): 2}


@pytest.mark.parametrize("body", INVALID_BODIES.values(), ids=INVALID_BODIES)
def test_invalid_body_is_skipped(services, broker, body):
    harness = services.harness(broker)
    assert_only_good_counted(harness, lambda: harness.publisher.raw(body))


@pytest.mark.parametrize("event", INCOMPLETE_EVENTS.values(), ids=INCOMPLETE_EVENTS)
def test_incomplete_event_is_skipped(harness, event):
    """As a single event, and in a batch whose other events are counted."""
    assert_only_good_counted(harness, lambda: harness.publisher.raw(json.dumps(event).encode()))
    samples = harness.publish([ev.received("b1", name="batch"), event, ev.received("b2", name="batch")])
    assert samples.short() == {
        ("events", W, "received", "good"): 2,
        ("prefetched", W, "good"): 2,
        ("events", W, "received", "batch"): 2,
        ("prefetched", W, "batch"): 2,
    }


def test_invalid_elements_of_a_batch_are_skipped(services, broker):
    """The other elements are counted."""
    harness = services.harness(broker)
    fine = [json.dumps(ev.received(f"{n}")).encode() for n in range(3)]
    body = (
        b"[" + b", ".join([b"null", fine[0], b'{"type": 1e999}', fine[1], b"[[]]", DEEP, fine[2], b'"\\ud800"']) + b"]"
    )
    assert harness.publish(lambda: harness.publisher.raw(body, routing_key="task.multi")).events("received") == 3


@pytest.mark.parametrize("spoil", [b"not json", b"{", b"nul", b'{"type": "task-received", }'])
def test_batch_with_invalid_json_keeps_next_message(services, broker, spoil):
    """Elements after invalid JSON may be lost, but the next message is counted."""
    harness = services.harness(broker)
    body = b"[" + json.dumps(good(9)).encode() + b", " + spoil + b"]"
    samples = harness.publish(good(1), lambda: harness.publisher.raw(body, routing_key="task.multi"), good(2))
    assert samples.events("received", W, "good") in (2, 3)


UNUSUAL_EVENTS = {
    "lone surrogates": {"args": "('\ud800', '\udfff\ud800')", "kwargs": "{'\udc00': 1}"},
    "NaN and Infinity": {"custom": float("nan"), "more": [float("inf"), -float("inf")]},
    "an id that is not a UUID": {"uuid": 'order 77 / "ж" \n'},
    "an id with a lone surrogate": {"uuid": "\ud800"},
    "an empty id": {"uuid": ""},
    "a long id": {"uuid": "x" * 10_000},
    "whole seconds": {"timestamp": ev.BASE, "utcoffset": -2, "clock": 10**15, "pid": 1.0},
    "ignored fields of wrong types": {
        "args": [1, {"a": 2}],
        "kwargs": None,
        "retries": "3",
        "pid": "x",
        "clock": None,
        "utcoffset": "east",
        "root_id": 5,
        "parent_id": {},
        "expires": [],
        "queue": 1,
    },
    "large fields": {"args": "x" * 1_000_000},
    "many fields": {f"field{n}": n for n in range(1000)},
    "nested fields": {
        "headers": {"type": "task-failed", "uuid": "no", "hostname": "no", "name": "no", "list": [{"a": [[[]]]}]}
    },
    "large numbers": {"big": 10**400, "float": 1e308, "small": 5e-324},
    "control characters": {"args": "".join(map(chr, range(32)))},
}


@pytest.mark.parametrize("odd", UNUSUAL_EVENTS.values(), ids=UNUSUAL_EVENTS)
@pytest.mark.parametrize("batch", [False, True], ids=["single", "in a batch"])
def test_unusual_event_is_counted(services, broker, odd, batch):
    harness = services.harness(broker)
    event = {**ev.received(name="odd"), **odd}
    started = ev.started(event["uuid"], at=1)
    samples = harness.publish([good(1), event, started] if batch else event, *[] if batch else [started])
    assert samples.events("received", W, "odd") == samples.events("started", W, "odd") == 1


def test_keys_may_have_any_order(services, broker):
    harness = services.harness(broker)
    event = ev.received(name="add")
    for keys in (reversed(event), sorted(event), sorted(event, key=lambda key: key[::-1])):
        harness.publisher.raw(json.dumps({key: event[key] for key in keys}).encode())
    # The last one of duplicate keys wins, as in Python.
    harness.publisher.raw(b'{"name": "first", ' + json.dumps(event).encode()[1:])
    assert harness.publish().events("received", W, "add") == 4


def test_equivalent_json_spellings_are_counted(services, broker):
    """JSON of other libraries than Python's: plain UTF-8, unnecessary escapes and whitespace."""
    harness = services.harness(broker)
    event = ev.received(name='räkna.算💐 "\\')
    raw = json.dumps(event, ensure_ascii=False, indent=3, separators=(" ,\n", " :\t")).encode()
    escaped = "".join(f"\\u{ord(c):04x}" for c in "task-received")
    harness.publisher.raw(b"\n " + raw + b" \n")
    harness.publisher.raw(json.dumps(event).replace("task-received", escaped).replace('"uuid"', '"\\u0075uid"').encode())
    assert harness.publish().events("received", W, event["name"]) == 2


CODINGS = {
    "msgpack": {"content_type": "application/x-msgpack"},
    "yaml": {"content_type": "application/x-yaml"},
    "pickle": {"content_type": "application/x-python-serialize"},
    "unknown": {"content_type": "text/x-unknown"},
    "compressed": {"headers": {"compression": "application/x-gzip", "hostname": "w"}},
}


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_unsupported_encoding_is_skipped(services, broker, coding):
    """The log contains its name. This also applies to a body that is JSON."""
    harness = services.harness(broker)
    assert_only_good_counted(harness, lambda: harness.publisher.raw(json.dumps(ev.received("x", name="coded")).encode(), **coding))
    assert coding.get("content_type", "compression") in harness.exporter.log()


@pytest.mark.parametrize("large", [150_000, 1_000_000])
def test_larger_than_message_max_bytes_is_skipped(services, broker, large):
    """Events within the limit are counted."""
    harness = services.harness(broker, {"events": {"message_max_bytes": "100KiB"}})
    within = ev.received("within", name="within", args="x" * 60_000)
    assert_only_good_counted(harness, ev.received("x", name="large", args="x" * large))
    assert harness.publish(within).events("received", W, "within") == 1


def test_invalid_messages_are_logged_once_a_minute(services, broker):
    """At most one line per minute and reason, with the first bytes of the message escaped."""
    harness = services.harness(broker)
    for n in range(200):
        harness.publisher.raw(b"garb\x01age-%d\n\x1b[31m" % n)
        harness.publisher.raw(b'{"type": "task-received", "uuid": "%d"}' % n)
        harness.publisher.raw(b"{}", content_type="application/x-msgpack")
    assert harness.publish(good(1)).events("received") == 1
    log = harness.exporter.log()
    assert sum("age-" in line for line in log.splitlines()) == 1
    assert "\x01" not in log and "\x1b[31m" not in log
    assert len(re.findall("WARN|ERROR", log)) == 3, log


def test_hostnames_selects_workers(services, broker):
    """Only matching workers are counted. Events of other workers still provide task names."""
    harness = services.harness(broker, {"events": {"hostnames": ["*@here", MARKER]}})
    samples = harness.publish(
        ev.sent(client="gen1@there"),
        ev.received(worker="w@there", at=1),
        ev.heartbeat("w@there", active=2),
        ev.started(worker="w@here", at=2),
        ev.succeeded(worker="w@here", at=3, runtime=1.0),
        ev.heartbeat("w@here"),
        ev.offline("v@there"),
        ev.heartbeat("w@here.not"),
    )
    assert samples.labels("worker") == {"w@here"}
    assert samples.total(EVENTS, worker="w@here", task="add") == 2
    assert samples.one("flower_worker_online", worker="w@here") == 1


@pytest.mark.parametrize("hostnames", [["w[0-9]@*", MARKER], ["w?@tests", MARKER], ["w1@tests", "*x", MARKER]])
def test_hostname_globs_match_whole_names(services, shared_redis, hostnames):
    harness = services.harness(shared_redis, {"events": {"hostnames": hostnames}})
    samples = harness.publish(ev.heartbeat("w1@tests"), ev.heartbeat("wx1@tests"), ev.heartbeat("1w1@tests"))
    assert samples.labels("worker") == {"w1@tests"}


def test_longest_exchange_name_leaves_room_for_the_queue_name(services, vhost):
    """RabbitMQ's names have at most 255 bytes, and the name of an unnamed queue ends with a dot and a UUID."""
    name = "x" * 218
    exporter = services.exporter(vhost, {"events": {"exchange": name}})
    services.publisher(vhost, name).send(ev.heartbeat())
    exporter.wait_for(lambda m: m.one("flower_worker_online", worker=W) == 1)

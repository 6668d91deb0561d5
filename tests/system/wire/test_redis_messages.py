"""Redis: kombu's message envelope, its channel names, and how the exporter connects."""

import json

import pytest

from support import events as ev
from support.events import W, good
from support.processes import wait_until
from support.publish import DEEP, Publisher, envelope
from support.redis import Redis

BODY = json.dumps(ev.received())

ENVELOPES = {
    "a base64 body": envelope(BODY),
    "a text body": envelope(BODY, encoding=None),
    "a text body with body_encoding": {**envelope(BODY, encoding=None), "properties": {"body_encoding": "utf-8"}},
    "no properties": {key: value for key, value in envelope(BODY, encoding=None).items() if key != "properties"},
    "no headers": {key: value for key, value in envelope(BODY).items() if key != "headers"},
    "headers null": {**envelope(BODY), "headers": None},
    "no content-encoding": {key: value for key, value in envelope(BODY).items() if key != "content-encoding"},
    "content-encoding binary": {**envelope(BODY), "content-encoding": "binary"},
    "keys in reverse": dict(reversed(envelope(BODY).items())),
    "the body first": {"body": envelope(BODY)["body"], **envelope(BODY)},
    "additional keys": {**envelope(BODY), "extra": {"body": "no", "properties": {"body_encoding": None}}},
    "lone surrogates beside the body": {**envelope(BODY), "headers": {"hostname": "\ud800", "compression": None}},
}


@pytest.mark.parametrize("message", ENVELOPES.values(), ids=ENVELOPES)
def test_envelope_is_counted(services, shared_redis, message):
    harness = services.harness(shared_redis)
    assert harness.publish(lambda: harness.publisher.bytes(json.dumps(message))).events("received", W, "add") == 1


INVALID_ENVELOPES = {
    "empty": b"",
    "not JSON": b"hello",
    "null": b"null",
    "a list": b"[]",
    "an event": BODY.encode(),
    "no body": b"{}",
    "body a number": json.dumps({**envelope(BODY), "body": 5}),
    "body null": json.dumps({**envelope(BODY), "body": None}),
    "invalid base64": json.dumps({**envelope(BODY), "body": "***"}),
    "truncated base64": json.dumps({**envelope(BODY), "body": envelope(BODY)["body"][:-6] + "="}),
    "content-type missing": json.dumps({key: value for key, value in envelope(BODY).items() if key != "content-type"}),
    "content-type a number": json.dumps({**envelope(BODY), "content-type": 7}),
    "properties a list": json.dumps({**envelope(BODY), "properties": []}),
    "deep": DEEP,
    "invalid UTF-8": b"\xff" * 100,
}


@pytest.mark.parametrize("message", INVALID_ENVELOPES.values(), ids=INVALID_ENVELOPES)
def test_invalid_envelope_is_skipped(services, shared_redis, message):
    """All good events around it are counted."""
    harness = services.harness(shared_redis)
    samples = harness.publish(good(1), lambda: harness.publisher.bytes(message), good(2))
    assert samples.events("received", W, "good") == 2


NAMES = {
    "plain": ({}, 0),
    "database": ({}, 7),
    "global_keyprefix": ({"global_keyprefix": "my:app:"}, 0),
    "global_keyprefix and database": ({"global_keyprefix": "my:app:"}, 3),
    "fanout_prefix text": ({"fanout_prefix": "own."}, 2),
    "fanout_prefix text with the database": ({"fanout_prefix": "own-{db}."}, 2),
    "no fanout_prefix": ({"fanout_prefix": False}, 0),
    "no fanout_patterns": ({"fanout_patterns": False}, 0),
    "neither": ({"fanout_prefix": False, "fanout_patterns": False}, 1),
    "glob characters": ({"global_keyprefix": "[a-c]*?\\^x"}, 0),
    "glob characters, no patterns": ({"global_keyprefix": "[a-c]*?\\^x", "fanout_patterns": False}, 0),
}


@pytest.mark.parametrize("options, db", NAMES.values(), ids=NAMES)
def test_channel_names_follow_transport_options(services, redis, options, db):
    """The exporter uses kombu's transport options, and ignores events on other channels."""
    own = Redis(start=False, db=db, options=options)
    other = Redis(start=False, db=db, options={"global_keyprefix": "a__^x"})
    own.port = other.port = redis.port
    exporter = services.exporter(own, {"broker": {"redis": options}})
    with Publisher(other) as publisher:
        publisher.send(ev.heartbeat("other@tests"))
    with Publisher(own) as publisher:
        publisher.send(ev.received())
        publisher.send([ev.started(at=1), ev.succeeded(at=2)])
    samples = exporter.wait_for(lambda m: m.events("succeeded", W, "add") == 1)
    assert samples.labels("worker") == {W}


@pytest.mark.parametrize(
    "options", [{}, {"global_keyprefix": "my:app:"}, {"fanout_prefix": False}, {"fanout_patterns": False}], ids=str
)
def test_real_worker_with_transport_options_is_counted(services, redis, options):
    """A real worker with these options receives broadcasts, and its events are counted.

    Celery 5.7 itself supports neither text as fanout_prefix nor glob characters.
    """
    broker = Redis(start=False, db=4, options=options)
    broker.port = redis.port
    worker = services.worker(broker).ready()
    exporter = services.exporter(broker, {"broker": {"redis": options}, "events": {"enable_interval": "300ms"}})
    wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
    exporter.wait_for(lambda m: m.one("flower_worker_online", worker=worker.hostname) == 1, 10)


def test_unix_socket_url_connects(services, redis):
    exporter = services.exporter(None, {"broker": {"url": f"redis+socket://{redis.socket}?virtual_host=6"}}).ready()
    broker = Redis(start=False, db=6)
    broker.port = redis.port
    services.publisher(broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


def test_password_is_percent_decoded(services):
    """The log contains neither form of it."""
    harness = services.harness(services.redis(password="p@ss/w:rd%#?[] ä"))
    assert harness.publish(ev.received()).events("received") == 1
    assert "p@ss" not in harness.exporter.log() and "p%40ss" not in harness.exporter.log()


def test_user_and_password_are_percent_decoded(services, redis):
    redis.client().execute_command("ACL", "SETUSER", "us/er", "on", ">pa:ss", "allchannels", "allkeys", "+@all")
    exporter = services.exporter(None, {"broker": {"url": f"redis://us%2Fer:pa%3Ass@127.0.0.1:{redis.port}/0"}}).ready()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


def test_forbidden_channel_is_logged(services, redis):
    """The server refuses the subscription: not ready, and the log contains the reason."""
    redis.client().execute_command("ACL", "SETUSER", "restricted", "on", ">pass", "resetchannels", "allkeys", "+@all")
    exporter = services.exporter(None, {"broker": {"url": f"redis://restricted:pass@127.0.0.1:{redis.port}/0"}})
    wait_until(lambda: "NOPERM" in exporter.log() or "permission" in exporter.log().lower(), 15, exporter.log)
    assert exporter.healthz(ready=True)[0] == 503 and exporter.healthz()[0] == 200

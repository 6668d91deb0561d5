"""Signals: a clean end at any time, and settings that change while it runs."""

import json
import signal
import socket

import pytest

from support import events as ev
from support.exposition import ONLINE
from support.processes import accepts, free_port, wait_until

ENDINGS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@ENDINGS
def test_ends_well(services, broker, number):
    """Code 0 within 5 s, with events coming in."""
    harness = services.harness(broker)
    harness.publish(*[ev.received(f"{n}") for n in range(100)])
    harness.publisher.send([ev.received(f"{n}") for n in range(1000)])
    harness.exporter.terminate(number)


@ENDINGS
@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}/0", "amqp://guest:guest@127.0.0.1:{}//"])
def test_ends_well_without_broker(services, url, number):
    """Also while it waits for its next attempt."""
    exporter = services.exporter(None, {"broker": {"url": url.format(free_port()), "reconnect_max": "60s"}})
    assert exporter.healthz(ready=True)[0] == 503
    exporter.terminate(number)


def test_ends_well_when_the_broker_has_gone(services, redis):
    harness = services.harness(redis)
    redis.stop(signal.SIGKILL)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 503, 10, "not ready")
    harness.exporter.terminate()


def test_second_signal_ends_at_once(services, shared_redis):
    """The first waits for a scrape in flight; this one is never read to its end."""
    exporter = services.exporter(shared_redis, terminate=False)
    slow = socket.create_connection(("127.0.0.1", exporter.port))
    slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    exporter.request()  # whoever came before has been let in
    exporter.send(signal.SIGTERM)
    wait_until(lambda: not accepts(exporter.port), 5, "it no longer listens")
    exporter.send(signal.SIGTERM)
    exporter.wait(1)
    slow.close()
    assert "panicked" not in exporter.log()


def test_hangup_reads_the_settings_again(services, shared_redis):
    """What can change live does: the log's level, timeouts. What cannot is named."""
    harness = services.harness(shared_redis, {"log": {"level": "error"}})
    exporter = harness.exporter
    harness.publish(ev.without(ev.heartbeat(), "freq"), lambda: harness.publisher.raw(b"no JSON"))
    assert exporter.log() == ""
    exporter.settings["log"] = {"level": "warn"}
    exporter.settings["state"] = {"worker_timeout": "1s"}
    exporter.settings["http"]["max_connections"] = 7
    exporter.write(exporter.settings)
    exporter.send(signal.SIGHUP)
    exporter.wait_for(lambda m: m.one(ONLINE, worker=ev.W) == 0, 10, "worker_timeout is 1 s now")
    assert "max_connections" in exporter.log()
    harness.publish(lambda: harness.publisher.raw(b"{}"))
    assert "hostname" in exporter.log() or "type" in exporter.log(), "the bad message is logged now"


def test_hangup_can_stop_the_broadcasts(services, redis):
    with redis.client().pubsub() as pubsub:
        pubsub.subscribe("/0.celery.pidbox")
        exporter = services.exporter(redis, {"events": {"enable_interval": "100ms"}})

        def broadcast():
            message = pubsub.get_message(ignore_subscribe_messages=True, timeout=0.4)
            return message and json.loads(message["data"])

        wait_until(broadcast, 10, "a broadcast")
        exporter.settings["events"]["enable_events"] = False
        exporter.write(exporter.settings)
        exporter.send(signal.SIGHUP)
        wait_until(lambda: not broadcast(), 10, "0.4 s of silence, although it broadcast every 0.1 s")


@pytest.mark.parametrize(
    "bad",
    [
        "state = nonsense [",
        '[state]\nworker_timeout = "soon"',
        "[state]\nno_such_key = 1",
        '[broker]\nurl = "sqs://key:secret@"',
    ],
)
def test_hangup_with_a_bad_file_changes_nothing(harness, bad):
    """And is reported, with the key; the exporter goes on."""
    exporter = harness.exporter
    harness.publish(ev.heartbeat())
    before = exporter.log()
    exporter.write(bad)
    exporter.send(signal.SIGHUP)
    wait_until(lambda: str(exporter.config) in exporter.log()[len(before) :], 5, "the bad file is reported")
    assert "secret" not in exporter.log()
    assert harness.publish(ev.received()).one(ONLINE, worker=ev.W) == 1
    assert exporter.healthz(ready=True)[0] == 200


def test_save_signal_is_harmless(harness):
    """SIGUSR1 saves state; there is none to save yet, and it must not end the process as it does by default."""
    harness.exporter.send(signal.SIGUSR1)
    assert harness.publish(ev.received()).events("received") == 1

"""Signals: a clean stop at any time, and a reload of the configuration."""

import json
import signal
import socket

import pytest

from support import events as ev
from support.exposition import ONLINE
from support.processes import accepts, free_port, wait_until

STOP_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@STOP_SIGNALS
def test_stops_while_events_arrive(services, broker, number):
    """Exit code 0 within 5 s."""
    harness = services.harness(broker)
    harness.publish(*[ev.received(f"{n}") for n in range(100)])
    harness.publisher.send([ev.received(f"{n}") for n in range(1000)])
    harness.exporter.terminate(number)


@STOP_SIGNALS
@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}/0", "amqp://guest:guest@127.0.0.1:{}//"])
def test_stops_without_a_broker(services, url, number):
    """Even while it waits for the next attempt."""
    exporter = services.exporter(None, {"broker": {"url": url.format(free_port()), "reconnect_backoff_max": "60s"}})
    assert exporter.healthz(ready=True)[0] == 503
    exporter.terminate(number)


def test_stops_during_an_outage(services, redis):
    harness = services.harness(redis)
    redis.stop(signal.SIGKILL)
    wait_until(lambda: harness.exporter.healthz(ready=True)[0] == 503, 10, "not ready")
    harness.exporter.terminate()


def test_second_signal_exits_immediately(services, shared_redis):
    """After the first signal it waits for a scrape in progress, which never completes here."""
    exporter = services.exporter(shared_redis, terminate=False)
    slow = socket.create_connection(("127.0.0.1", exporter.port))
    slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    exporter.request()  # the earlier connection is accepted now
    exporter.send(signal.SIGTERM)
    wait_until(lambda: not accepts(exporter.port), 5, "it no longer accepts connections")
    exporter.send(signal.SIGTERM)
    exporter.wait(1)
    slow.close()
    assert "panicked" not in exporter.log()


def test_sighup_reloads_the_configuration(services, shared_redis):
    """The log level and timeouts change immediately. The log contains the settings that require a restart."""
    harness = services.harness(shared_redis, {"log": {"level": "error"}})
    exporter = harness.exporter
    harness.publish(ev.without(ev.heartbeat(), "freq"), lambda: harness.publisher.raw(b"not JSON"))
    assert exporter.log() == ""
    exporter.settings["log"] = {"level": "warn"}
    exporter.settings["state"] = {"worker_timeout": "1s"}
    exporter.settings["http"]["max_connections"] = 7
    exporter.write(exporter.settings)
    exporter.send(signal.SIGHUP)
    exporter.wait_for(lambda m: m.one(ONLINE, worker=ev.W) == 0, 10, "worker_timeout is 1 s now")
    assert "max_connections" in exporter.log()
    harness.publish(lambda: harness.publisher.raw(b"{}"))
    assert "hostname" in exporter.log() or "type" in exporter.log(), "the invalid message is logged"


def test_sighup_can_disable_broadcasts(services, redis):
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
        wait_until(lambda: not broadcast(), 10, "no broadcast for 0.4 s at an interval of 0.1 s")


@pytest.mark.parametrize(
    "bad",
    [
        "state = nonsense [",
        '[state]\nworker_timeout = "soon"',
        "[state]\nno_such_key = 1",
        '[broker]\nurl = "sqs://key:secret@"',
    ],
)
def test_sighup_with_an_invalid_file_changes_nothing(harness, bad):
    """The error is logged, and the exporter continues."""
    exporter = harness.exporter
    harness.publish(ev.heartbeat())
    before = exporter.log()
    exporter.write(bad)
    exporter.send(signal.SIGHUP)
    wait_until(lambda: str(exporter.config) in exporter.log()[len(before) :], 5, "the invalid file is logged")
    assert "secret" not in exporter.log()
    assert harness.publish(ev.received()).one(ONLINE, worker=ev.W) == 1
    assert exporter.healthz(ready=True)[0] == 200


def test_sigusr1_without_persistence_does_not_exit(harness):
    """SIGUSR1 requests a save. Its default action would terminate the process."""
    harness.exporter.send(signal.SIGUSR1)
    assert harness.publish(ev.received()).events("received") == 1

"""Peers that misbehave beneath the protocol: silent, frozen, flapping, or something else altogether."""

import contextlib
import signal
import socket
import threading
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import ONLINE
from support.processes import wait_until
from support.resources import descriptors_and_threads


@contextlib.contextmanager
def listener(talk):
    """Something that accepts connections; `talk` is called with each, on a thread of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=talk, args=[server.accept()[0]], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


def has_left_nothing(exporter, before):
    wait_until(
        lambda: all(now <= then + 3 for now, then in zip(descriptors_and_threads(exporter), before)), 5, lambda: (descriptors_and_threads(exporter), before)
    )


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_peer_that_never_answers_costs_nothing(services, scheme):
    """Every attempt that was given up has left nothing behind."""
    connections = []
    with listener(lambda connection: connections.append(connection)) as port:
        settings = {"broker": {"url": f"{scheme}://127.0.0.1:{port}/", "connect_timeout": "100ms", "reconnect_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: len(connections) >= 5, 10, "some attempts")
        before = descriptors_and_threads(exporter)
        wait_until(lambda: len(connections) >= 40, 30, "many attempts")
        has_left_nothing(exporter, before)
        assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503


@pytest.mark.parametrize(
    "answer",
    [b"*1\r\n" * 1_000_000, b"*1000000000\r\n", b"$10000000000\r\n" + b"x" * 1_000_000, b"+" * 1_000_000, b"HTTP/1.1 400\r\n\r\n"],
    ids=["nested", "wide", "long", "endless", "http"],
)
def test_a_server_that_is_no_redis(services, answer):
    """Refused with a hint, and the exporter runs on."""

    def talk(connection):
        with contextlib.suppress(OSError):
            connection.recv(100)
            connection.sendall(answer)
            time.sleep(5)

    with listener(talk) as port:
        settings = {"broker": {"url": f"redis://127.0.0.1:{port}/", "connect_timeout": "1s", "reconnect_max": "100ms"}}
        exporter = services.exporter(None, settings)
        wait_until(lambda: "is that a Redis server?" in exporter.log(), 10, exporter.log)
        assert exporter.healthz()[0] == 200


def test_a_server_that_confirms_nothing(services):
    """Any answer is not a confirmation."""

    def talk(connection):
        with contextlib.suppress(OSError):
            while connection.recv(100):
                connection.sendall(b"+OK\r\n")

    with listener(talk) as port:
        exporter = services.exporter(None, {"broker": {"url": f"redis://127.0.0.1:{port}/", "reconnect_max": "100ms"}})
        wait_until(lambda: "PSUBSCRIBE: the server answers" in exporter.log(), 10, exporter.log)
        assert exporter.healthz(ready=True)[0] == 503


def test_a_frozen_broker_kills_no_worker(services, redis):
    """The clock by which workers time out stands still while the broker gives no sign of life."""
    settings = {"state": {"worker_timeout": "4s"}, "broker": {"reconnect_max": "1s", "connect_timeout": "1s"}}
    harness = services.harness(redis, settings)
    assert harness.publish(ev.heartbeat()).one(ONLINE, worker=W) == 1
    redis.process.send(signal.SIGSTOP)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert harness.metrics().one(ONLINE, worker=W) == 1
        time.sleep(0.2)
    redis.process.send(signal.SIGCONT)
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 15, "silent for itself")


def test_a_subscription_that_is_cut_again_and_again_leaves_no_client(services, redis):
    """Also when a broadcast was under way."""
    settings = {"broker": {"reconnect_max": "100ms"}, "events": {"enable_interval": "100ms"}}
    harness = services.harness(redis, settings)
    client = redis.client()
    for _ in range(40):
        wait_until(lambda: client.pubsub_numpat() == 1, 10, "subscribed")
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    harness.exporter.ready(10)
    wait_until(lambda: len(client.client_list()) <= 5, 10, client.client_list)


CONFIRMED = {"redis": b"psubscribe", "rabbitmq": b"\x00\x3c\x00\x15"}  # basic.consume-ok


def test_a_subscription_that_ends_as_it_begins_leaves_nothing(services, broker):
    """The connection for broadcasts, on Redis, has hardly been thought of then."""
    path = services.proxy(broker)
    exporter = services.exporter(path, {"broker": {"reconnect_max": "100ms"}})
    before = descriptors_and_threads(exporter)
    path.close_after(CONFIRMED[broker.name])
    path.cut()
    wait_until(lambda: exporter.log().count("listening for events") >= 60, 90, exporter.log)
    path.close_after(None)
    exporter.ready(10)
    has_left_nothing(exporter, before)


def test_complaints_do_not_hide_each_other(services, redis):
    """Each broker of a list is named with its own error, and a new error of the same broker is told, too."""
    redis.client().config_set("requirepass", "secret")
    urls = f"redis://127.0.0.1:1/;redis://127.0.0.1:{redis.port}/"
    exporter = services.exporter(None, {"broker": {"url": urls, "reconnect_max": "100ms"}})
    wait_until(lambda: "127.0.0.1:1/" in exporter.log() and "NOAUTH" in exporter.log(), 10, exporter.log)
    redis.stop(signal.SIGKILL)
    wait_until(lambda: exporter.log().count("refused") >= 2, 10, exporter.log)
    assert exporter.log().count("NOAUTH") == 1

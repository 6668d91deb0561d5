"""Several addresses, several URLs, and Redis servers that change their role."""

import contextlib
import os
import re
import socket

import pytest

from support import events as ev
from support.events import W
from support.processes import directory, wait_until

pytestmark = pytest.mark.every_release

RECONNECT_MAX = 2
SETTINGS = {"events": {"enable_interval": "500ms"}, "broker": {"reconnect_backoff_max": "1s"}}


def hosts_file(broker):
    """The hosts file of `broker.test`, the environment that makes the exporter use it, and the broker's URL with that name."""
    hosts = directory("hosts") / "hosts"
    env = {"LD_PRELOAD": "libnss_wrapper.so", "NSS_WRAPPER_HOSTS": hosts}
    return hosts, env, broker.url.replace("127.0.0.1", "broker.test")


def test_host_name_is_resolved_on_every_attempt(services, broker):
    """The name does not resolve at first."""
    hosts, env, url = hosts_file(broker)
    hosts.write_text("")
    os.utime(hosts, (0, 0))  # the library compares modification times in whole seconds
    settings = {"broker": {"url": url, "reconnect_backoff_max": f"{RECONNECT_MAX}s"}}
    exporter = services.exporter(None, settings, env=env)
    wait_until(lambda: "lookup" in exporter.log(), 5, exporter.log)
    assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503
    hosts.write_text("127.0.0.1 broker.test\n")
    exporter.ready(RECONNECT_MAX + 1)
    services.publisher(broker).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)


def test_unreachable_address_is_skipped(services, broker):
    """The first address of the host name drops packets, and the next one responds."""
    port = int(re.search(r"127\.0\.0\.1:(\d+)/", broker.url)[1])
    hosts, env, url = hosts_file(broker)
    hosts.write_text("127.0.0.9 broker.test\n127.0.0.1 broker.test\n")
    with socket.create_server(("127.0.0.9", port), backlog=0), contextlib.ExitStack() as full:
        for _ in range(2):  # a full backlog accepts no connection
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.9", port))
        harness = services.harness(broker, {"broker": {"url": url}}, env=env)
        worker = services.worker(broker, conf={"event_exchange": harness.exchange}).ready()
        wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
        assert harness.publish(ev.received()).events("received", W) == 1


def test_hung_address_does_not_block_the_others(services, broker):
    """The first address of the host name accepts connections and never responds, like a hung process."""
    port = int(re.search(r"127\.0\.0\.1:(\d+)/", broker.url)[1])
    hosts, env, url = hosts_file(broker)
    hosts.write_text("127.0.0.9 broker.test\n127.0.0.1 broker.test\n")
    with socket.create_server(("127.0.0.9", port), backlog=64):
        settings = {"broker": {"url": url, "connect_timeout": "1s", "reconnect_backoff_max": "1s"}}
        exporter = services.exporter(None, settings, env=env)
        exporter.ready(3)
        assert "did not respond within 1 s" in exporter.log()
        services.publisher(broker).send(ev.received())
        exporter.wait_for(lambda m: m.events("received") == 1)


def test_url_of_a_failed_session_is_tried_last(services, broker):
    """The broker at the first URL accepts the subscription and then closes the connection."""
    path = services.proxy(broker)
    settings = {"broker": {"url": f"{path.url};{broker.url}", "reconnect_backoff_max": "1s"}}
    exporter = services.exporter(None, settings)
    wait_until(lambda: "subscribed to" in exporter.log(), 10, exporter.log)
    path.cut()
    wait_until(lambda: exporter.log().count("subscribed to") == 2, 3, exporter.log)
    assert path.url.split("@")[-1] not in exporter.log_lines("subscribed to")[-1]


class Workers:
    """Counts the broadcasts that reach the workers on a Redis server."""

    def __init__(self, stack, server):
        self.pubsub = stack.enter_context(server.client().pubsub())
        self.pubsub.subscribe("/0.celery.pidbox")

    def received(self, deadline, what):
        wait_until(lambda: self.pubsub.get_message(ignore_subscribe_messages=True, timeout=0.1), deadline, what)


@pytest.mark.short_form
def test_reconnects_when_server_is_demoted(services, redis):
    """A replica also delivers events, but broadcasts published there reach no worker: the exporter reconnects to the new master."""
    old, new, path = redis, services.redis(), services.proxy(redis)
    with old.client().pubsub() as worker:
        worker.subscribe("/0.celery.pidbox")
        harness = services.harness(old, {"events": {"enable_interval": "200ms"}}, path=path)
        wait_until(lambda: worker.get_message(ignore_subscribe_messages=True, timeout=0.1), 5, "a broadcast")
    path.redirect_to(new)
    old.client().replicaof("127.0.0.1", new.port)
    wait_until(lambda: new.client().pubsub_numpat() == 1, 10, harness.exporter.log)
    assert "server demoted to replica" in harness.exporter.log()
    harness.publisher = services.publisher(new, harness.exchange)
    assert harness.publish(ev.received("b")).events("received", W) == 1


def test_configured_replica_is_kept(services, redis):
    """Its events are counted, and the exporter does not look for another master."""
    redis.client().replicaof("127.0.0.1", services.redis().port)
    harness = services.harness(redis, {"events": {"enable_interval": "100ms"}})
    broadcasts = lambda: redis.client().info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"]  # noqa: E731
    before = broadcasts()
    wait_until(lambda: broadcasts() >= before + 5, 10, "broadcasts")
    assert harness.publish(ev.received()).events("received", W) == 1
    assert harness.exporter.log().count("subscribed to") == 1


@pytest.mark.short_form
def test_demoted_server_is_not_used_again(services, redis):
    """With two URLs, broadcasts reach the workers on the new master, and the exporter stays there."""
    old, new = redis, services.redis()
    settings = {**SETTINGS, "broker": {**SETTINGS["broker"], "url": f"{old.url};{new.url}"}}
    exporter = services.exporter(None, settings)
    wait_until(lambda: old.client().pubsub_numpat() == 1, 10, exporter.log)
    with contextlib.ExitStack() as stack:
        workers = Workers(stack, new)
        old.client().replicaof("127.0.0.1", new.port)
        workers.received(0.5 + 1 + 1, exporter.log)
        for _ in range(4):
            workers.received(2, "another broadcast")
    assert "server demoted to replica" in exporter.log()
    assert [exporter.log().count(f"subscribed to channels /0.celeryev/* broker={server.url}") for server in (old, new)] == [1, 1]
    new.client().client_kill_filter(_type="pubsub")
    wait_until(lambda: exporter.log().count("subscribed to") == 3, 10, exporter.log)
    assert str(new.port) in exporter.log_lines("subscribed to")[-1], "the other server is a replica"


def test_address_that_follows_the_master_late(services, redis):
    """Like the DNS name of a managed Redis. Until then the address leads to a server that is a replica now."""
    old, new, path = redis, services.redis(), services.proxy(redis)
    with contextlib.ExitStack() as stack:
        workers_before, workers_after = Workers(stack, old), Workers(stack, new)
        exporter = services.exporter(path, SETTINGS)
        workers_before.received(5, "a broadcast")
        old.client().replicaof("127.0.0.1", new.port)
        old.client().client_kill_filter(_type="pubsub", skipme=False)
        wait_until(lambda: "server is a replica; waiting for a master" in exporter.log(), 10, exporter.log)
        assert exporter.healthz(ready=True)[0] == 503
        path.redirect_to(new)
        workers_after.received(1 + 1, exporter.log)
    exporter.ready(2)


@pytest.mark.short_form
def test_replica_is_used_only_while_no_server_is_a_master(services, redis):
    """The exporter starts with a replica at the first URL, while the master at the second one is down."""
    replica, master = redis, services.redis()
    replica.client().replicaof("127.0.0.1", master.port)
    settings = {**SETTINGS, "broker": {**SETTINGS["broker"], "url": f"{replica.url};{master.url}"}}
    exporter = services.exporter(None, settings)
    wait_until(lambda: "subscribed to" in exporter.log(), 10, exporter.log)
    assert str(master.port) in exporter.log_lines("subscribed to")[0]
    exporter.terminate()
    master.stop()
    exporter = services.exporter(None, settings)
    wait_until(lambda: "subscribed to" in exporter.log(), 10, exporter.log)
    assert str(replica.port) in exporter.log_lines("subscribed to")[0]
    with contextlib.ExitStack() as stack:
        master.start()
        Workers(stack, master).received(0.5 + 1 + 1, exporter.log)
    assert f"{master.port} is the master" in exporter.log()

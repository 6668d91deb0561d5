"""Redis Sentinel, with real Sentinels, a master and its replica."""

import json
import signal
import time

import pytest

from support import events as ev
from support.certificates import Authority
from support.events import W
from support.exporter import merge, nested
from support.processes import accepts, free_port, wait_until
from support.publish import envelope
from support.sentinel import MASTER, Sentinel, SentinelDeployment
from support.worker import client

pytestmark = [pytest.mark.every_release, pytest.mark.usefixtures("redis_release")]


def assert_follows(services, harness, server, deadline=5):
    """Events that are published at this server are counted within the deadline."""
    publisher = services.publisher(server, harness.exchange)
    before = harness.metrics().events("received", W)

    def counted():
        publisher.send(ev.received(f"{time.monotonic()}"))
        return harness.metrics().events("received", W) > before

    since = time.monotonic()
    wait_until(counted, deadline, harness.exporter.log)
    print(f"at the new master after {time.monotonic() - since:.2f} s")


def subscribers(server):
    return server.client().pubsub_numpat()


@pytest.mark.short_form
def test_forced_failover_is_followed(services):
    """The exporter is at the new master within 5 s, although the old one is still up as a replica that accepts subscriptions."""
    deployment = SentinelDeployment(services)
    harness = services.harness(deployment, deployment.settings())
    assert harness.publish(ev.received()).events("received", W) == 1
    assert f"the master at 127.0.0.1:{deployment.master.port}" in harness.exporter.log()
    old, new = deployment.failover()
    assert_follows(services, harness, new)
    assert old.process.running and (subscribers(old), subscribers(new)) == (0, 1)
    wait_until(lambda: old.client().role()[0] == b"slave", 15, "the old master is a replica")
    assert harness.exporter.healthz(ready=True)[0] == 200 and (subscribers(old), subscribers(new)) == (0, 1)


def test_failover_after_the_master_died_is_followed(services):
    deployment = SentinelDeployment(services)
    harness = services.harness(deployment, deployment.settings())
    old = deployment.master
    old.stop(signal.SIGKILL)
    wait_until(lambda: deployment.master is not old, 60, "a new master")
    assert_follows(services, harness, deployment.master)


def test_unavailable_sentinels_are_skipped(services):
    """One Sentinel is down at the start and another one freezes later. The exporter uses the remaining ones."""
    deployment = SentinelDeployment(services)
    dead, other, *_ = deployment.sentinels
    dead.stop()
    harness = services.harness(deployment, deployment.settings())
    harness.publish(ev.received())
    other.process.send(signal.SIGSTOP)
    try:
        since = time.monotonic()
        # Long enough for a query to it to fail.
        wait_until(lambda: time.monotonic() > since + 3, 5, "some seconds")
        assert harness.publish(ev.received("b")).events("received", W) == 2
        assert harness.exporter.log().count("subscribed to") == 1
    finally:
        other.process.send(signal.SIGCONT)
    _, new = deployment.failover()
    assert_follows(services, harness, new)


def test_passwords_of_servers_and_sentinels(services):
    """The URL contains the servers' password, and the settings that of the Sentinels. The database is not 0."""
    deployment = SentinelDeployment(services, password="server-secret", sentinel_password="sentinel-secret", db=3)
    harness = services.harness(deployment, deployment.settings())
    assert harness.publish(ev.received()).events("received", W) == 1
    wrong = services.exporter(None, merge({"broker": {"url": deployment.url}}, deployment.settings(sentinel_password="planted")))
    wait_until(lambda: "WRONGPASS" in wrong.log(), 10, wrong.log)
    for log in harness.exporter.log(), wrong.log():
        assert "secret" not in log and "planted" not in log


def test_unknown_master_is_logged(services):
    deployment = SentinelDeployment(services)
    exporter = services.exporter(None, merge({"broker": {"url": deployment.url}}, deployment.settings(master_name="unknown")))
    wait_until(lambda: 'no master named \\"unknown\\"; check broker.redis.master_name' in exporter.log(), 10, exporter.log)
    assert exporter.healthz(ready=True)[0] == 503


def test_replica_reported_as_master_is_refused(services):
    """A Sentinel still reports a replica as the master."""
    deployment = SentinelDeployment(services)
    [replica] = [server for server in deployment.servers.values() if server is not deployment.master]
    outdated = Sentinel(replica)
    services.callback(outdated.stop)
    wait_until(lambda: accepts(outdated.port), 10, outdated.process.log)
    exporter = services.exporter(None, merge({"broker": {"url": f"sentinel://127.0.0.1:{outdated.port}/0"}}, deployment.settings()))
    wait_until(lambda: "its role is slave" in exporter.log(), 10, exporter.log)
    assert subscribers(replica) == 0


@pytest.mark.short_form
@pytest.mark.parametrize("compat", [False, True])
def test_real_worker_over_sentinel(services, compat):
    """A Celery 5.7 worker over Sentinel. Each event counts once, even if it is published to two channels."""
    deployment = SentinelDeployment(services, options={"sentinel_fanout_compat": True} if compat else {})
    settings = merge(deployment.settings(sentinel_fanout_compat=compat), {"events": {"enable_interval": "500ms"}})
    exporter = services.exporter(deployment, settings)
    worker = services.worker(deployment).ready()
    wait_until(lambda: "enabled by remote" in worker.log(), 20, worker.log)
    with client(deployment) as app:
        for _ in range(5):
            app.send_task("add", (1, 2))
    exporter.wait_for(lambda m: m.events("succeeded", task="add") == 5)
    metrics = exporter.metrics()
    assert [metrics.events(kind, task="add") for kind in ("received", "started", "succeeded")] == [5, 5, 5]


def test_fanout_compat_counts_each_message_once(services):
    """The exporter subscribes to both names. A message under both counts once; messages without a delivery tag are all counted."""
    deployment = SentinelDeployment(services, db=2)
    harness = services.harness(deployment, deployment.settings(sentinel_fanout_compat=True))
    server, names = deployment.client(), (f"/2.{harness.exchange}/task.received", f"/{{db}}.{harness.exchange}/task.received")

    def send(tagged, *channels):
        message = envelope(json.dumps(ev.received(f"{time.monotonic()}")), exchange=harness.exchange)
        if not tagged:
            del message["properties"]["delivery_tag"]
        for channel in channels:
            assert server.publish(channel, json.dumps(message)) == 1, channel

    for tagged, channels, count in [(True, names, 1), (True, names[:1], 2), (True, names[1:], 3), (False, names, 5)]:
        send(tagged, *channels)
        assert harness.publish().events("received", W) == count


def test_fanout_compat_broadcasts_to_both_names(services):
    """The same message is published to both names."""
    deployment = SentinelDeployment(services, db=2)
    listener = deployment.client().pubsub()
    listener.subscribe("/2.celery.pidbox", "/{db}.celery.pidbox")
    services.exporter(deployment, merge(deployment.settings(sentinel_fanout_compat=True), {"events": {"enable_interval": "500ms"}}))
    received = []

    def both():
        message = listener.get_message(ignore_subscribe_messages=True)
        if message:
            received.append((message["channel"], message["data"]))
        return any((b"/{db}.celery.pidbox", data) in received for channel, data in received if channel == b"/2.celery.pidbox")

    wait_until(both, 10, lambda: received)


@pytest.mark.parametrize("enabled", [True, None])
def test_tls_to_sentinels_and_master(services, enabled):
    """The setting enables TLS to Sentinels and master; the URL's parameters only to the master, as in kombu."""
    if not services.tested["redis"].has_tls:
        pytest.skip("this server is built without TLS")
    authority = Authority()
    files = authority.issue("server")
    options = {"tls-cert-file": files.cert, "tls-key-file": files.key, "tls-ca-cert-file": authority.file, "tls-auth-clients": "no"}
    port, sentinel_port = free_port(), free_port()
    server = services.redis(args=["--tls-port", port, *(part for name, value in options.items() for part in (f"--{name}", value))])
    server.port, plain_port = port, server.port
    conf = [*(f"{name} {value}" for name, value in options.items()), f"tls-port {sentinel_port}", "tls-replication yes"]
    sentinel = Sentinel(server, conf=conf)
    server.port = plain_port
    services.callback(sentinel.stop)
    wait_until(lambda: sentinel.has_discovered(0, 0), 10, sentinel.process.log)
    if enabled:
        broker = {"url": f"sentinel://127.0.0.1:{sentinel_port}/0", "tls": {"enabled": True, "ca_file": str(authority.file)}}
    else:
        broker = {"url": f"sentinel://127.0.0.1:{sentinel.port}/0?ssl_cert_reqs=required&ssl_ca_certs={authority.file}"}
    exporter = services.exporter(None, merge({"broker": broker}, nested("broker.redis.master_name", MASTER))).ready()
    services.publisher(server).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)

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
from support.sentinel import MASTER, Sentinel, Watched
from support.worker import client

pytestmark = [pytest.mark.every_release, pytest.mark.usefixtures("redis_release")]


def follows(services, harness, server, deadline=5):
    """What is published at this server is counted, within the deadline."""
    publisher = services.publisher(server, harness.exchange)
    before = harness.metrics().events("received", W)

    def counted():
        publisher.send(ev.received(f"{time.monotonic()}"))
        return harness.metrics().events("received", W) > before

    since = time.monotonic()
    wait_until(counted, deadline, harness.exporter.log)
    print(f"at the new master after {time.monotonic() - since:.2f} s")


def listens_at(server):
    return server.client().pubsub_numpat()


@pytest.mark.short_form
def test_forced_failover(services):
    """There within 5 s, though the old master stays up as a replica that would take our subscription."""
    watched = Watched(services)
    harness = services.harness(watched, watched.settings())
    assert harness.publish(ev.received()).events("received", W) == 1
    assert f"the master at 127.0.0.1:{watched.master.port}" in harness.exporter.log()
    old, new = watched.failover()
    follows(services, harness, new)
    assert old.process.running and (listens_at(old), listens_at(new)) == (0, 1)
    wait_until(lambda: old.client().role()[0] == b"slave", 15, "the old master is a replica")
    assert harness.exporter.healthz(ready=True)[0] == 200 and (listens_at(old), listens_at(new)) == (0, 1)


def test_master_dies(services):
    watched = Watched(services)
    harness = services.harness(watched, watched.settings())
    old = watched.master
    old.stop(signal.SIGKILL)
    wait_until(lambda: watched.master is not old, 60, "a new master")
    follows(services, harness, watched.master)


def test_sentinels_die(services):
    """One that is away at the start is passed over; one that goes later costs nothing; the others are asked on."""
    watched = Watched(services)
    dead, other, *_ = watched.sentinels
    dead.stop()
    harness = services.harness(watched, watched.settings())
    harness.publish(ev.received())
    other.process.send(signal.SIGSTOP)
    try:
        since = time.monotonic()
        # Long enough for a question to it to fail.
        wait_until(lambda: time.monotonic() > since + 3, 5, "some seconds")
        assert harness.publish(ev.received("b")).events("received", W) == 2
        assert harness.exporter.log().count("listening for events") == 1
    finally:
        other.process.send(signal.SIGCONT)
    _, new = watched.failover()
    follows(services, harness, new)


def test_passwords(services):
    """Those of the servers from the URL, that of the Sentinels from the settings; and a database of its own."""
    watched = Watched(services, password="server-secret", sentinel_password="sentinel-secret", db=3)
    harness = services.harness(watched, watched.settings())
    assert harness.publish(ev.received()).events("received", W) == 1
    wrong = services.exporter(None, merge({"broker": {"url": watched.url}}, watched.settings(sentinel_password="planted")))
    wait_until(lambda: "WRONGPASS" in wrong.log(), 10, wrong.log)
    for log in harness.exporter.log(), wrong.log():
        assert "secret" not in log and "planted" not in log


def test_unknown_master(services):
    watched = Watched(services)
    exporter = services.exporter(None, merge({"broker": {"url": watched.url}}, watched.settings(master_name="nobody")))
    wait_until(lambda: 'no master named "nobody": see broker.redis.master_name' in exporter.log(), 10, exporter.log)
    assert exporter.healthz(ready=True)[0] == 503


def test_a_master_that_is_none(services):
    """A Sentinel that still names a replica is not believed."""
    watched = Watched(services)
    [replica] = [server for server in watched.servers.values() if server is not watched.master]
    liar = Sentinel(replica)
    services.callback(liar.stop)
    wait_until(lambda: accepts(liar.port), 10, liar.process.log)
    exporter = services.exporter(None, merge({"broker": {"url": f"sentinel://127.0.0.1:{liar.port}/0"}}, watched.settings()))
    wait_until(lambda: "its role is slave" in exporter.log(), 10, exporter.log)
    assert listens_at(replica) == 0


@pytest.mark.short_form
@pytest.mark.parametrize("compat", [False, True])
def test_real_worker(services, compat):
    """Celery 5.7 over Sentinel, told by us to send events; each counts once, under however many names it is sent."""
    watched = Watched(services, options={"sentinel_fanout_compat": True} if compat else {})
    settings = merge(watched.settings(sentinel_fanout_compat=compat), {"events": {"enable_interval": "500ms"}})
    exporter = services.exporter(watched, settings)
    worker = services.worker(watched).ready()
    wait_until(lambda: "enabled by remote" in worker.log(), 20, worker.log)
    with client(watched) as app:
        for _ in range(5):
            app.send_task("add", (1, 2))
    exporter.wait_for(lambda m: m.events("succeeded", task="add") == 5)
    metrics = exporter.metrics()
    assert [metrics.events(kind, task="add") for kind in ("received", "started", "succeeded")] == [5, 5, 5]


def test_compat(services):
    """Both names are heard, a message under both counts once, one without a tag never counts as another."""
    watched = Watched(services, db=2)
    harness = services.harness(watched, watched.settings(sentinel_fanout_compat=True))
    server, names = watched.client(), (f"/2.{harness.exchange}/task.received", f"/{{db}}.{harness.exchange}/task.received")

    def send(tagged, *channels):
        message = envelope(json.dumps(ev.received(f"{time.monotonic()}")), exchange=harness.exchange)
        if not tagged:
            del message["properties"]["delivery_tag"]
        for channel in channels:
            assert server.publish(channel, json.dumps(message)) == 1, channel

    for tagged, channels, count in [(True, names, 1), (True, names[:1], 2), (True, names[1:], 3), (False, names, 5)]:
        send(tagged, *channels)
        assert harness.publish().events("received", W) == count


def test_compat_broadcasts(services):
    """The same message to both names."""
    watched = Watched(services, db=2)
    listener = watched.client().pubsub()
    listener.subscribe("/2.celery.pidbox", "/{db}.celery.pidbox")
    services.exporter(watched, merge(watched.settings(sentinel_fanout_compat=True), {"events": {"enable_interval": "500ms"}}))
    heard = []

    def both():
        message = listener.get_message(ignore_subscribe_messages=True)
        if message:
            heard.append((message["channel"], message["data"]))
        return any((b"/{db}.celery.pidbox", data) in heard for channel, data in heard if channel == b"/2.celery.pidbox")

    wait_until(both, 10, lambda: heard)


@pytest.mark.parametrize("enabled", [True, None])
def test_tls(services, enabled):
    """By the setting to Sentinels and master, by the URL's parameters to the master alone, as in kombu."""
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
    wait_until(lambda: sentinel.knows(0, 0), 10, sentinel.process.log)
    if enabled:
        broker = {"url": f"sentinel://127.0.0.1:{sentinel_port}/0", "tls": {"enabled": True, "ca_file": str(authority.file)}}
    else:
        broker = {"url": f"sentinel://127.0.0.1:{sentinel.port}/0?ssl_cert_reqs=required&ssl_ca_certs={authority.file}"}
    exporter = services.exporter(None, merge({"broker": broker}, nested("broker.redis.master_name", MASTER))).ready()
    services.publisher(server).send(ev.received())
    exporter.wait_for(lambda m: m.events("received") == 1)

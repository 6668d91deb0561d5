"""The minimal permissions of docs/installation.md suffice. With fewer ones, the exporter logs one clear line and continues."""

import itertools
import re

import pytest

from support import events as ev
from support.events import W
from support.processes import ROOT, wait_until

pytestmark = pytest.mark.every_release

PAGE = (ROOT / "docs/installation.md").read_text().replace(r"\|", "|")
RABBITMQ = {
    "configure": r"^(celeryev(\..*)?|celery\.pidbox)$",
    "write": r"^(celeryev\..*|celery\.pidbox)$",
    "read": r"^celeryev(\..*)?$",
}
numbers = itertools.count()
REDIS = "resetchannels &/0.celeryev/* &/0.celery.pidbox -@all +auth +ping +psubscribe +publish"


def grant(vhost, configure, write, read):
    """The URL of a new user that has only these permissions in this virtual host."""
    user = f"{vhost.vhost}-{next(numbers)}"
    vhost.server.ctl("add_user", user, "secret")
    vhost.server.ctl("set_permissions", "-p", vhost.vhost, user, configure, write, read)
    return re.sub("//.*@", f"//{user}:secret@", vhost.url)


def declare_exchanges(vhost):
    """Declares the exchanges as a worker does."""
    with vhost.connection() as connection:
        channel = connection.channel()
        channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
        channel.exchange_declare("celery.pidbox", "fanout", durable=False, auto_delete=False)


def assert_counts_and_broadcasts(services, broker, exporter):
    """Events are counted, and a worker that was started without -E is enabled to send them."""
    exporter.ready()
    services.publisher(broker).send(ev.received("a"))
    exporter.wait_for(lambda m: m.events("received", W) == 1)
    worker = services.worker(broker).ready()
    wait_until(lambda: "enabled by remote" in worker.log(), 20, worker.log)
    assert "failed" not in exporter.log()


@pytest.mark.short_form
def test_rabbitmq_minimal_permissions(services, vhost):
    assert all(f"`{pattern}`" in PAGE for pattern in RABBITMQ.values())
    url = grant(vhost, **RABBITMQ)
    assert_counts_and_broadcasts(services, vhost, services.exporter(None, {"broker": {"url": url}}))


@pytest.mark.short_form
def test_rabbitmq_named_queue_permissions(services, vhost):
    """All three permissions include the queue's name, which is also the name of the exchange of the witnesses."""
    more = r"^flower-exporter$"
    assert f"`{more}`" in PAGE
    url = grant(vhost, **{right: f"^({pattern}|{more})$" for right, pattern in RABBITMQ.items()})
    exporter = services.exporter(None, {"broker": {"url": url, "amqp": {"queue": "flower-exporter"}}})
    assert_counts_and_broadcasts(services, vhost, exporter)
    assert "no permission" not in exporter.log()


def test_rabbitmq_without_permission_to_broadcast_and_declare(services, vhost):
    """The exporter counts events of workers that send them anyway, and logs the missing permission once."""
    declare_exchanges(vhost)
    url = grant(vhost, r"^celeryev\..*$", r"^celeryev\..*$", r"^celeryev(\..*)?$")
    exporter = services.exporter(None, {"broker": {"url": url}, "events": {"enable_interval": "100ms"}})
    exporter.ready()
    publisher = services.publisher(vhost)
    for n in range(20):
        publisher.send(ev.received(f"{n}"))
        exporter.wait_for(lambda m, n=n: m.events("received", W) == n + 1)
    wait_until(lambda: exporter.log().count("failed to broadcast enable_events to workers") == 1, 5, exporter.log)
    assert "celery.pidbox" in exporter.log()
    assert exporter.log().count("subscribed to") == 1, "the refusals close no connection"


@pytest.mark.short_form
def test_redis_minimal_permissions(services, redis):
    assert f"`{REDIS}`" in PAGE
    redis.client().execute_command("ACL", "SETUSER", "least", "on", ">secret", *REDIS.split())
    url = redis.url.replace("//", "//least:secret@")
    assert_counts_and_broadcasts(services, redis, services.exporter(None, {"broker": {"url": url}}))


def test_redis_without_permission_to_broadcast(services, redis):
    rights = "resetchannels &/0.celeryev/* -@all +auth +ping +psubscribe"
    redis.client().execute_command("ACL", "SETUSER", "least", "on", ">secret", *rights.split())
    url = redis.url.replace("//", "//least:secret@")
    exporter = services.exporter(None, {"broker": {"url": url}, "events": {"enable_interval": "100ms"}})
    exporter.ready()
    services.publisher(redis).send(ev.received())
    exporter.wait_for(lambda m: m.events("received", W) == 1)
    wait_until(lambda: exporter.log().count("failed to broadcast enable_events to workers") == 1, 5, exporter.log)
    assert "secret" not in exporter.log()

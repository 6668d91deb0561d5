"""What the exporter says to the workers. A wrong envelope takes a cluster down, so it is compared with Celery's own."""

import base64
import json
import time
import uuid

import pytest

from support import events as ev
from support.exposition import ONLINE
from support.processes import wait_until
from support.worker import VERSIONS, client

pytestmark = pytest.mark.every_release

ENABLE = b'{"method": "enable_events", "arguments": {}, "destination": null, "pattern": null, "matcher": null}'
HEARTBEAT = ENABLE.replace(b"enable_events", b"heartbeat")


class RedisTap:
    """Everything that is published to one control channel."""

    def __init__(self, broker, exchange="celery"):
        self.exchange = f"{exchange}.pidbox"
        self.pubsub = broker.client().pubsub()
        self.pubsub.subscribe(f"/{broker.db}.{self.exchange}")
        self.envelopes = []

    def bodies(self):
        while message := self.pubsub.get_message(timeout=0.01):
            if message["type"] == "message":
                self.envelopes.append(json.loads(message["data"]))
        return [base64.b64decode(envelope["body"]) for envelope in self.envelopes]

    def close(self):
        self.pubsub.close()


class AmqpTap:
    """Everything that is published to one control exchange, which need not exist yet."""

    def __init__(self, broker, exchange="celery"):
        self.connection = broker.connection()
        channel = self.connection.channel()
        # As kombu declares it; the exporter's own declaration is refused where it differs.
        channel.exchange_declare(f"{exchange}.pidbox", "fanout", durable=False, auto_delete=False)
        queue = channel.queue_declare(exclusive=True).queue
        channel.queue_bind(queue, f"{exchange}.pidbox")
        self.messages = []
        channel.basic_consume(queue, no_ack=True, callback=self.messages.append)

    def bodies(self):
        try:
            while True:
                self.connection.drain_events(timeout=0.02)
        except TimeoutError:
            pass
        return [message.body if isinstance(message.body, bytes) else message.body.encode() for message in self.messages]

    def close(self):
        self.connection.close()


@pytest.fixture
def tap(lab, broker):
    def tap(exchange="celery"):
        made = (RedisTap if broker.name == "redis" else AmqpTap)(broker, exchange)
        lab.callback(made.close)
        return made

    return tap


@pytest.mark.short_form
def test_redis_envelope(lab, redis):
    """Every key and value as Celery 5.7 itself publishes them, but a delivery tag of its own for each."""
    tap = RedisTap(redis)
    lab.callback(tap.close)
    with client(redis) as app:
        app.control.broadcast("enable_events")
    [reference_body] = wait_until(tap.bodies, 10, "Celery's own broadcast")
    [reference] = tap.envelopes
    assert json.loads(reference_body).keys() >= json.loads(ENABLE).keys()

    lab.exporter(redis, {"events": {"enable_interval": "100ms"}})
    wait_until(lambda: tap.bodies().count(ENABLE) >= 5, 10, "five broadcasts")
    ours = tap.envelopes[1:]
    assert set(tap.bodies()[1:]) == {ENABLE, HEARTBEAT}
    assert {json.dumps(envelope["properties"]["body_encoding"]) for envelope in ours} == {'"base64"'}
    for envelope in ours:
        assert envelope.keys() == reference.keys()
        assert envelope["content-type"] == reference["content-type"] == "application/json"
        assert envelope["content-encoding"] == reference["content-encoding"] == "utf-8"
        assert isinstance(envelope["headers"], dict)
        properties = envelope["properties"]
        assert properties.keys() == reference["properties"].keys() - {"reply_to"}
        for key in ("body_encoding", "delivery_info", "delivery_mode", "priority"):
            assert properties[key] == reference["properties"][key], key
    tags = [envelope["properties"]["delivery_tag"] for envelope in ours]
    assert len(set(tags)) == len(tags)
    assert all(str(uuid.UUID(tag)) == tag and uuid.UUID(tag).version == 4 for tag in tags)


@pytest.mark.short_form
def test_rabbitmq_message(lab, vhost):
    """Body and properties; the exchange is declared as kombu declares it, or its declaration would be refused."""
    tap = AmqpTap(vhost)
    lab.callback(tap.close)
    lab.exporter(vhost, {"events": {"enable_interval": "100ms"}})
    wait_until(lambda: tap.bodies().count(ENABLE) >= 5, 10, "five broadcasts")
    assert set(tap.bodies()) == {ENABLE, HEARTBEAT}
    for message in tap.messages:
        assert message.properties["content_type"] == "application/json"
        assert message.properties["content_encoding"] == "utf-8"
        assert "reply_to" not in message.properties
        assert message.delivery_info["routing_key"] == ""
        assert message.delivery_info["exchange"] == "celery.pidbox"


@pytest.mark.short_form
def test_rabbitmq_exchange_is_made(lab, vhost):
    """When no worker has been there yet; and workers may declare both exchanges after us."""
    lab.exporter(vhost, {"events": {"enable_interval": "100ms"}})
    with vhost.connection() as connection:
        channel = connection.channel()

        def exists():
            channel.exchange_declare("celery.pidbox", "fanout", durable=False, auto_delete=False)
            channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
            return True

        wait_until(exists, 10, "the exchange of broadcasts")


@pytest.mark.short_form
def test_once_connected(lab, tap, broker):
    """At once on connecting: both broadcasts, whatever their intervals."""
    listener = tap()
    lab.exporter(broker, {"events": {"enable_interval": "10m"}, "state": {"worker_timeout": "30m"}})
    wait_until(lambda: sorted(listener.bodies()) == sorted([ENABLE, HEARTBEAT]), 10, lambda: listener.bodies())


def test_off_is_silence(lab, tap, broker):
    """`enable_events = false`: not one control message, while another exporter sends ten."""
    quiet, loud = tap("quiet"), tap("loud")
    lab.exporter(
        broker,
        {
            "events": {"control_exchange": "quiet", "enable_events": False, "enable_interval": "100ms"},
            "state": {"worker_timeout": "300ms"},
        },
    )
    lab.exporter(broker, {"events": {"control_exchange": "loud", "enable_interval": "100ms"}})
    wait_until(lambda: loud.bodies().count(ENABLE) >= 10, 20, "ten broadcasts")
    assert quiet.bodies() == []


def test_heartbeats(lab, tap, broker):
    """Every third of `worker_timeout`, so that workers without heartbeats are heard; only once when that is 0."""
    often, once = tap("often"), tap("once")
    for name, timeout in (("often", "1500ms"), ("once", 0)):
        lab.exporter(
            broker,
            {"events": {"control_exchange": name, "enable_interval": "250ms"}, "state": {"worker_timeout": timeout}},
        )
    wait_until(lambda: often.bodies().count(HEARTBEAT) >= 6, 20, "six heartbeats")
    assert 2 <= often.bodies().count(ENABLE) <= 40
    wait_until(lambda: once.bodies().count(ENABLE) >= 4, 20, "four times enable_events")
    assert once.bodies().count(HEARTBEAT) == 1


def test_without_heartbeat_workers_stay_online(lab, broker):
    """A live worker that sends no heartbeats of its own answers ours."""
    worker = lab.worker(broker, args=["--without-heartbeat"]).ready()
    exporter = lab.exporter(broker, {"state": {"worker_timeout": "3s"}})
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 10)
    deadline = time.monotonic() + 7
    while time.monotonic() < deadline:
        assert exporter.metrics().one(ONLINE, worker=worker.hostname) == 1
        time.sleep(0.1)
    worker.kill()
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 0, 10)


@pytest.mark.short_form
def test_workers_survive(lab, tap, broker):
    """Twenty broadcasts later, workers of the whole range run, are connected, and send their events."""
    workers = [lab.worker(broker, version, args=["-Q", f"q{version}"]) for version in VERSIONS]
    for worker in workers:
        worker.ready()
    listener = tap()
    exporter = lab.exporter(broker, {"events": {"enable_interval": "200ms"}})
    wait_until(lambda: listener.bodies().count(ENABLE) >= 20, 30, "twenty broadcasts")
    with client(broker) as app:
        for worker in workers:
            app.send_task("add", (1, 2), queue=f"q{worker.version}")
    exporter.wait_for(lambda m: all(m.events("succeeded", worker.hostname, "add") == 1 for worker in workers), 20)
    for worker in workers:
        assert worker.running
        for trouble in ("Traceback", "ERROR", "Connection to broker lost", "CRITICAL"):
            assert trouble not in worker.log(), worker.log()


def test_own_control_exchange(lab, broker):
    """Workers with a `control_exchange` and an `event_exchange` of their own."""
    conf = {"control_exchange": "ctl", "event_exchange": "evt"}
    worker = lab.worker(broker, conf=conf).ready()
    exporter = lab.exporter(
        broker, {"events": {"control_exchange": "ctl", "exchange": "evt", "enable_interval": "300ms"}}
    )
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 10)
    wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
    with client(broker, **conf) as app:
        app.send_task("add", (1, 2))
    exporter.wait_for(lambda m: m.events("succeeded", worker.hostname, "add") == 1)


def test_rabbitmq_deleted_exchange_comes_back(lab, vhost):
    """The control exchange is transient; nobody tells us when it has gone."""
    rig = lab.rig(vhost, {"events": {"enable_interval": "100ms"}})
    with vhost.connection() as connection:
        connection.channel().exchange_delete("celery.pidbox")
    tap = AmqpTap(vhost)
    lab.callback(tap.close)
    wait_until(lambda: tap.bodies().count(ENABLE) >= 3, 30, "broadcasts")
    rig.exporter.ready()
    assert rig.play(ev.received()).events("received") == 1

"""Broadcasts to the workers. A wrong envelope can crash all workers, so it is compared with Celery's own."""

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


class RedisBroadcastCapture:
    """Captures everything that is published to one control channel."""

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


class AmqpBroadcastCapture:
    """Captures everything that is published to one control exchange, which need not exist yet."""

    def __init__(self, broker, exchange="celery"):
        self.connection = broker.connection()
        channel = self.connection.channel()
        # As kombu declares it: RabbitMQ refuses a different declaration by the exporter.
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
def broadcast_capture(services, broker):
    def start(exchange="celery"):
        capture = (RedisBroadcastCapture if broker.name == "redis" else AmqpBroadcastCapture)(broker, exchange)
        services.callback(capture.close)
        return capture

    return start


@pytest.mark.short_form
def test_redis_envelope_equals_celerys(services, redis):
    """Every key and value equals those of Celery 5.7, except that each message has a unique delivery tag."""
    capture = RedisBroadcastCapture(redis)
    services.callback(capture.close)
    with client(redis) as app:
        app.control.broadcast("enable_events")
    [reference_body] = wait_until(capture.bodies, 10, "Celery's own broadcast")
    [reference] = capture.envelopes
    assert json.loads(reference_body).keys() >= json.loads(ENABLE).keys()

    services.exporter(redis, {"events": {"enable_interval": "100ms"}})
    wait_until(lambda: capture.bodies().count(ENABLE) >= 5, 10, "five broadcasts")
    sent = capture.envelopes[1:]
    assert set(capture.bodies()[1:]) == {ENABLE, HEARTBEAT}
    assert {json.dumps(envelope["properties"]["body_encoding"]) for envelope in sent} == {'"base64"'}
    for envelope in sent:
        assert envelope.keys() == reference.keys()
        assert envelope["content-type"] == reference["content-type"] == "application/json"
        assert envelope["content-encoding"] == reference["content-encoding"] == "utf-8"
        assert isinstance(envelope["headers"], dict)
        properties = envelope["properties"]
        assert properties.keys() == reference["properties"].keys() - {"reply_to"}
        for key in ("body_encoding", "delivery_info", "delivery_mode", "priority"):
            assert properties[key] == reference["properties"][key], key
    tags = [envelope["properties"]["delivery_tag"] for envelope in sent]
    assert len(set(tags)) == len(tags)
    assert all(str(uuid.UUID(tag)) == tag and uuid.UUID(tag).version == 4 for tag in tags)


@pytest.mark.short_form
def test_rabbitmq_message_body_and_properties(services, vhost):
    """The exchange is declared as kombu declares it. RabbitMQ would refuse a different declaration."""
    capture = AmqpBroadcastCapture(vhost)
    services.callback(capture.close)
    services.exporter(vhost, {"events": {"enable_interval": "100ms"}})
    wait_until(lambda: capture.bodies().count(ENABLE) >= 5, 10, "five broadcasts")
    assert set(capture.bodies()) == {ENABLE, HEARTBEAT}
    for message in capture.messages:
        assert message.properties["content_type"] == "application/json"
        assert message.properties["content_encoding"] == "utf-8"
        assert "reply_to" not in message.properties
        assert message.delivery_info["routing_key"] == ""
        assert message.delivery_info["exchange"] == "celery.pidbox"


@pytest.mark.short_form
def test_rabbitmq_exchange_is_declared_before_workers_start(services, vhost):
    """Workers may declare both exchanges after the exporter."""
    services.exporter(vhost, {"events": {"enable_interval": "100ms"}})
    with vhost.connection() as connection:
        channel = connection.channel()

        def exists():
            channel.exchange_declare("celery.pidbox", "fanout", durable=False, auto_delete=False)
            channel.exchange_declare("celeryev", "topic", durable=True, auto_delete=False)
            return True

        wait_until(exists, 10, "the control exchange")


@pytest.mark.short_form
def test_broadcasts_are_sent_on_connect(services, broadcast_capture, broker):
    """Both broadcasts are sent immediately, regardless of their intervals."""
    capture = broadcast_capture()
    services.exporter(broker, {"events": {"enable_interval": "10m"}, "state": {"worker_timeout": "30m"}})
    wait_until(lambda: sorted(capture.bodies()) == sorted([ENABLE, HEARTBEAT]), 10, lambda: capture.bodies())


def test_enable_events_false_sends_no_broadcasts(services, broadcast_capture, broker):
    """`enable_events = false` sends no control message, while another exporter sends ten."""
    disabled, enabled =  broadcast_capture("disabled"), broadcast_capture("enabled")
    services.exporter(
        broker,
        {
            "events": {"control_exchange": "disabled", "enable_events": False, "enable_interval": "100ms"},
            "state": {"worker_timeout": "300ms"},
        },
    )
    services.exporter(broker, {"events": {"control_exchange": "enabled", "enable_interval": "100ms"}})
    wait_until(lambda: enabled.bodies().count(ENABLE) >= 10, 20, "ten broadcasts")
    assert disabled.bodies() == []


def test_heartbeat_interval_is_a_third_of_worker_timeout(services, broadcast_capture, broker):
    """Workers without periodic heartbeats respond to these broadcasts. With `worker_timeout = 0` there is only one."""
    often, once = broadcast_capture("often"), broadcast_capture("once")
    for name, timeout in (("often", "1500ms"), ("once", 0)):
        services.exporter(
            broker,
            {"events": {"control_exchange": name, "enable_interval": "250ms"}, "state": {"worker_timeout": timeout}},
        )
    wait_until(lambda: often.bodies().count(HEARTBEAT) >= 6, 20, "six heartbeats")
    assert 2 <= often.bodies().count(ENABLE) <= 40
    wait_until(lambda: once.bodies().count(ENABLE) >= 4, 20, "four times enable_events")
    assert once.bodies().count(HEARTBEAT) == 1


def test_workers_without_heartbeats_stay_online(services, broker):
    """A worker that sends no periodic heartbeats responds to the exporter's heartbeat broadcasts."""
    worker = services.worker(broker, args=["--without-heartbeat"]).ready()
    exporter = services.exporter(broker, {"state": {"worker_timeout": "3s"}})
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 10)
    deadline = time.monotonic() + 7
    while time.monotonic() < deadline:
        assert exporter.metrics().one(ONLINE, worker=worker.hostname) == 1
        time.sleep(0.1)
    worker.kill()
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 0, 10)


@pytest.mark.short_form
def test_workers_of_every_version_survive_broadcasts(services, broadcast_capture, broker):
    """After twenty broadcasts, workers of all versions are running, connected, and send events."""
    workers = [services.worker(broker, version, args=["-Q", f"q{version}"]) for version in VERSIONS]
    for worker in workers:
        worker.ready()
    capture = broadcast_capture()
    exporter = services.exporter(broker, {"events": {"enable_interval": "200ms"}})
    wait_until(lambda: capture.bodies().count(ENABLE) >= 20, 30, "twenty broadcasts")
    with client(broker) as app:
        for worker in workers:
            app.send_task("add", (1, 2), queue=f"q{worker.version}")
    exporter.wait_for(lambda m: all(m.events("succeeded", worker.hostname, "add") == 1 for worker in workers), 20)
    for worker in workers:
        assert worker.running
        for text in ("Traceback", "ERROR", "Connection to broker lost", "CRITICAL"):
            assert text not in worker.log(), worker.log()


def test_custom_control_and_event_exchange(services, broker):
    """Workers with a custom `control_exchange` and `event_exchange` receive broadcasts and are counted."""
    conf = {"control_exchange": "ctl", "event_exchange": "evt"}
    worker = services.worker(broker, conf=conf).ready()
    exporter = services.exporter(
        broker, {"events": {"control_exchange": "ctl", "exchange": "evt", "enable_interval": "300ms"}}
    )
    exporter.wait_for(lambda m: m.one(ONLINE, worker=worker.hostname) == 1, 10)
    wait_until(lambda: "enabled by remote" in worker.log(), 10, worker.log)
    with client(broker, **conf) as app:
        app.send_task("add", (1, 2))
    exporter.wait_for(lambda m: m.events("succeeded", worker.hostname, "add") == 1)


def test_deleted_control_exchange_is_declared_again(services, vhost):
    """The control exchange is transient, and RabbitMQ sends no notification when it is deleted."""
    harness = services.harness(vhost, {"events": {"enable_interval": "100ms"}})
    with vhost.connection() as connection:
        connection.channel().exchange_delete("celery.pidbox")
    capture = AmqpBroadcastCapture(vhost)
    services.callback(capture.close)
    wait_until(lambda: capture.bodies().count(ENABLE) >= 3, 30, "broadcasts")
    harness.exporter.ready()
    assert harness.publish(ev.received()).events("received") == 1


def test_start_of_a_worker_causes_a_burst(services, broker, broadcast_capture):
    """Eight broadcasts in six seconds, and none after that."""
    capture = broadcast_capture()
    harness = services.harness(broker, {"events": {"enable_interval": "1h"}})
    wait_until(lambda: capture.bodies().count(ENABLE) == 1, 10, "the first broadcast")
    harness.publish(ev.online("new@tests"))
    wait_until(lambda: capture.bodies().count(ENABLE) == 9, 10, "the burst")
    harness.publish(ev.heartbeat("new@tests"))
    time.sleep(4)
    assert capture.bodies().count(ENABLE) == 9


def test_burst_ends_with_the_first_task_event_of_each_worker(services, broker, broadcast_capture):
    capture = broadcast_capture()
    harness = services.harness(broker, {"events": {"enable_interval": "1h"}})
    wait_until(lambda: capture.bodies().count(ENABLE) == 1, 10, "the first broadcast")
    harness.publish(ev.online("a@tests"), ev.online("b@tests"), ev.received("1", "a@tests"), ev.received("2", "b@tests"))
    count = capture.bodies().count(ENABLE)
    time.sleep(2)
    assert capture.bodies().count(ENABLE) <= count + 1


def test_many_starts_cause_at_most_ten_broadcasts_per_second(services, broker, broadcast_capture):
    capture = broadcast_capture()
    harness = services.harness(broker, {"events": {"enable_interval": "1h"}})
    wait_until(lambda: capture.bodies().count(ENABLE) == 1, 10, "the first broadcast")
    began = time.monotonic()
    for number in range(200):
        harness.publisher.send(ev.online(f"w{number}@tests"))
        time.sleep(0.01)
    harness.publish()
    elapsed = time.monotonic() - began
    assert 10 <= capture.bodies().count(ENABLE) <= 10 * (elapsed + 1) + 1


def test_starts_cause_no_broadcast_if_enable_events_is_off(services, broker, broadcast_capture):
    capture = broadcast_capture()
    harness = services.harness(broker, {"events": {"enable_events": False}})
    harness.publish(ev.online("new@tests"))
    time.sleep(1)
    assert capture.bodies() == []

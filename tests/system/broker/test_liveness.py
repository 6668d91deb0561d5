"""Whether an event would reach the exporter: worker timeouts depend on the path of the events, and on no other path."""

import time

import pytest
from amqp import Message

from support import events as ev
from support.events import W
from support.exposition import ONLINE
from support.processes import wait_until

pytestmark = pytest.mark.every_release

V = "v@tests"
PAUSED = "worker timeouts paused"


def beat(worker=W):
    """A heartbeat without its interval, which would extend the timeout."""
    return ev.without(ev.heartbeat(worker), "freq")


def assert_online(exporter, seconds, keep_alive=lambda: None):
    """The worker is online all the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert exporter.metrics().one(ONLINE, worker=W) == 1, exporter.log()
        keep_alive()
        time.sleep(0.2)


def warnings(exporter):
    return " ".join(exporter.healthz()[1]["warnings"])


@pytest.fixture
def alarm(services):
    """A RabbitMQ node, and functions that raise and clear its memory alarm."""
    node = services.rabbitmq(vhosts=2).wait()
    yield node, lambda: node.ctl("set_vm_memory_high_watermark", "0.000001"), lambda: node.ctl("set_vm_memory_high_watermark", "0.4")


def test_alarm_pauses_worker_timeouts_without_broadcasts(alarm, services):
    """The exporter sends no control message, and the workers are blocked too."""
    node, raise_alarm, clear_alarm = alarm
    settings = {"state": {"worker_timeout": "3s"}, "events": {"enable_events": False}, "broker": {"amqp": {"heartbeat": "5s"}}}
    harness = services.harness(node.vhost(), settings)
    harness.publish(beat())
    raise_alarm()
    wait_until(lambda: "RabbitMQ alarm: publishers are blocked" in warnings(harness.exporter), 20, harness.exporter.log)
    assert_online(harness.exporter, 8)
    assert harness.exporter.healthz(ready=True)[0] == 200
    clear_alarm()
    wait_until(lambda: PAUSED not in warnings(harness.exporter), 20, harness.exporter.log)
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 15, "the worker times out")
    assert harness.exporter.log().count("subscribed to") == 1


def test_alarm_pauses_worker_timeouts_without_permission_for_broadcasts(alarm, services):
    """The same for a user who may not publish to celery.pidbox."""
    node, raise_alarm, clear_alarm = alarm
    vhost = node.vhost()
    node.ctl("add_user", "reader", "reader")
    node.ctl("set_permissions", "-p", vhost.vhost, "reader", "^celeryev.*$", "^celeryev.*$", "^celeryev.*$")
    url = f"amqp://reader:reader@127.0.0.1:{node.port}/{vhost.vhost}"
    harness = services.harness(vhost, {"state": {"worker_timeout": "3s"}, "broker": {"url": url}})
    harness.publish(beat())
    assert "failed to broadcast" in warnings(harness.exporter)
    raise_alarm()
    wait_until(lambda: PAUSED in warnings(harness.exporter), 20, harness.exporter.log)
    assert_online(harness.exporter, 5)
    clear_alarm()


def test_dead_subscription_pauses_worker_timeouts(services, redis):
    """The path of the subscription alone is dead, while broadcasts reach the server."""
    path = services.proxy(redis)
    harness = services.harness(redis, {"state": {"worker_timeout": "3s"}, "events": {"enable_interval": "300ms"}}, path=path)
    harness.publish(beat())
    wait_until(lambda: path.attempts == 2, 5, "the connection for broadcasts")
    path.stall()
    redis.client().client_kill_filter(_type="normal", skipme=True)
    path.resume_for_new_connections()
    wait_until(lambda: path.attempts == 3, 10, "a new connection for broadcasts")
    assert_online(harness.exporter, 14)


def test_worker_times_out_without_a_connection_for_broadcasts(services, redis):
    """Redis has no free client slot. The failure is a warning, and the clock runs."""
    settings = {"state": {"worker_timeout": "3s"}, "events": {"enable_interval": "300ms"}}
    harness = services.harness(redis, settings)
    harness.publish(beat(), beat(V))
    client = redis.client()
    client.ping()
    client.config_set("maxclients", 2)  # this client and the subscription
    client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: "failed to broadcast" in warnings(harness.exporter), 10, harness.exporter.log)
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 3 + 4, "the worker times out")
    assert harness.exporter.healthz(ready=True)[0] == 200
    client.config_set("maxclients", 1000)
    wait_until(lambda: "failed to broadcast" not in warnings(harness.exporter), 10, harness.exporter.log)


@pytest.mark.short_form
def test_busy_script_does_not_end_the_subscription(services, redis):
    """Redis answers BUSY to a PING while a script runs. No worker times out in that time."""
    harness = services.harness(redis, {"state": {"worker_timeout": "3s"}})
    harness.publish(beat())
    client = redis.client()
    client.config_set("lua-time-limit", 100)
    script = "local start = redis.call('time')[1]; while redis.call('time')[1] - start < 8 do end"
    running = redis.client().pipeline(transaction=False)
    sender = running.connection_pool.get_connection()
    sender.send_command("EVAL", script, 0)
    assert_online(harness.exporter, 7)
    sender.read_response()
    assert harness.publish(beat()).one(ONLINE, worker=W) == 1
    assert harness.exporter.log().count("subscribed to") == 1


@pytest.mark.short_form
def test_redis_that_cannot_write_to_its_disk_keeps_the_subscription(services, redis_release):
    """It refuses PING with MISCONF, and still delivers messages."""
    redis = services.redis(args=["--save", "3600 1", "--enable-protected-configs", "yes"])
    harness = services.harness(redis, {"state": {"worker_timeout": "3s"}})
    client = redis.client()
    client.config_set("dir", "/proc")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", 10, "the save has failed")
    samples = harness.publish(beat())
    assert samples.one(ONLINE, worker=W) == 1
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 10, "the worker times out")
    assert harness.exporter.log().count("subscribed to") == 1


def test_exchange_with_the_name_of_the_witness_is_explained(services, vhost):
    """Another program has declared it with another type."""
    with vhost.connection() as connection:
        connection.channel().exchange_declare("flower-exporter", "topic", durable=True, auto_delete=False)
    exporter = services.exporter(None, {"broker": {"url": vhost.url, "amqp": {"queue": "flower-exporter"}}})
    wait_until(lambda: "no other exchange may have this name" in exporter.log(), 10, exporter.log)
    assert exporter.healthz()[0] == 200 and exporter.healthz(ready=True)[0] == 503


def test_witnesses_of_others_have_no_effect(services, vhost):
    """Messages in the exchange of the witnesses that the exporter did not send are read like others."""
    amqp = {"queue": "flower-exporter"}
    harness = services.harness(vhost, {"broker": {"amqp": amqp}, "state": {"worker_timeout": "3s"}})
    harness.publish(beat())
    with vhost.connection() as connection:
        channel = connection.channel()
        for number in range(1000):
            for body, properties in [("[]", {"message_id": f"{number}"}), ("{", {}), ("[]", {"message_id": "x" * 200})]:
                message = Message(body, content_type="application/json", content_encoding="utf-8", **properties)
                channel.basic_publish(message, exchange="flower-exporter")
    assert harness.publish(ev.received()).events("received", W) == 1
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 10, "the worker times out")
    assert len(harness.exporter.log_lines("skipped invalid message")) == 1

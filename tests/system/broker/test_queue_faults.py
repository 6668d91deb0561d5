"""Random faults on a named queue: every event that the broker kept is counted once, and every loss is reported."""

import json
import random
import signal
import time

import pytest

from support import events as ev
from support.exposition import EVENTS, RUNTIME
from support.flower_reference import Flower, difference
from support.processes import directory, wait_until

pytestmark = [pytest.mark.every_release, pytest.mark.short_form]

QUEUE = "flower-exporter"
MAX_BYTES = 256 << 10


class Faults:
    """One queue with an exporter. Each event has a task name of its own, so that the metrics show which ones are counted."""

    def __init__(self, services, vhost, quorum):
        self.services, self.vhost = services, vhost
        self.path = services.proxy(vhost)
        #: The names of all events, and of those that the broker has lost.
        self.sent, self.lost = [], set()
        vhost.server.ctl("set_policy", "-p", vhost.vhost, "dropped", f"^{QUEUE}$", '{"dead-letter-exchange":"dropped"}', "--apply-to", "queues")
        self.connection = vhost.connection()
        self.channel = self.connection.channel()
        self.channel.exchange_declare("dropped", "fanout", durable=True, auto_delete=False)
        self.channel.queue_declare("dropped", durable=True, auto_delete=False)
        self.channel.queue_bind("dropped", "dropped")
        if quorum:
            arguments = {"x-queue-type": "quorum", "x-expires": 3_600_000, "x-max-length-bytes": MAX_BYTES}
            self.channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
        self.settings = {
            "broker": {
                "amqp": {"queue": QUEUE, "queue_max_bytes": MAX_BYTES, "heartbeat": "1s", "prefetch_count": 100},
                "reconnect_backoff_max": "300ms",
            },
            "state": {"persistent": True, "db": str(directory("state") / "state"), "worker_timeout": 0},
            "metrics": {"self_metrics": True, "max_label_sets": 1_000_000},
            "log": {"level": "debug"},
        }
        self.harness = services.harness(vhost, self.settings, path=self.path)
        self.settings["events"] = {"exchange": self.harness.exchange}
        # What a consumer receives that is always there, as Flower would be.
        self.received = []
        self.channel.queue_declare("flower", durable=True, auto_delete=False)
        self.channel.queue_bind("flower", self.harness.exchange, "#")

    def send(self, count, size=10):
        for _ in range(count):
            number = len(self.sent)
            name, args = f"n{number}", "x" * size
            ended = ev.succeeded(name, name=name, args=args, runtime=number % 128 / 8)
            self.harness.publisher.send(ended if number % 2 else ev.received(name, name=name, args=args))
            self.sent.append(name)

    def stop(self, number=signal.SIGTERM):
        """Stops the exporter, and waits until the broker has noticed."""
        if number == signal.SIGKILL:
            self.harness.exporter.kill()
        else:
            self.harness.exporter.terminate()
        wait_until(lambda: self.stats().consumer_count == 0, 10, "no consumer")

    def start(self):
        self.harness.exporter = self.services.exporter(self.path, self.settings)

    def save(self):
        """A loss that is not saved when the exporter is killed is reported again."""
        saved = self.harness.exporter.log().count(" state saved")
        self.harness.exporter.send(signal.SIGUSR1)
        wait_until(lambda: self.harness.exporter.log().count(" state saved") > saved, 10, self.harness.exporter.log)

    def stats(self):
        return self.channel.queue_declare(QUEUE, passive=True)

    def drain(self, queue):
        """Takes all messages out of a queue that gets no new ones, and returns their events."""
        with self.vhost.connection() as connection:
            channel = connection.channel()
            count = channel.queue_declare(queue, passive=True).message_count
            bodies = []
            channel.basic_consume(queue, no_ack=True, callback=lambda message: bodies.append(message.body))
            while len(bodies) < count:
                connection.drain_events(timeout=10)
        return [event for body in bodies if body != "[]" for event in [json.loads(body)] if event["type"].startswith("task-")]

    def lose(self, queue):
        self.lost.update(event["uuid"] for event in self.drain(queue))

    # -- faults

    def killed(self):
        self.stop(signal.SIGKILL)
        self.send(30)
        self.start()

    def restarted(self):
        self.stop()
        self.send(30)
        self.start()

    def cut(self):
        before = self.subscriptions()
        self.path.cut()
        self.send(30)
        wait_until(lambda: self.subscriptions() > before, 15, self.harness.exporter.log)

    def half_open(self):
        before = self.subscriptions()
        self.path.stall(inward=False)
        self.send(30)
        self.path.stall()
        self.send(30)
        wait_until(lambda: "heartbeat" in self.harness.exporter.log() and self.harness.exporter.healthz(ready=True)[0] == 503, 15, "lost")
        self.path.resume_for_new_connections()
        wait_until(lambda: self.subscriptions() > before, 20, self.harness.exporter.log)

    def purged(self):
        self.stop(random.choice([signal.SIGKILL, signal.SIGTERM]))
        self.send(30)
        wait_until(lambda: self.stats().message_count >= 30, 5, "the messages are queued")
        self.lose(QUEUE)
        self.start()

    def deleted(self):
        self.stop()
        self.send(30)
        wait_until(lambda: self.stats().message_count >= 30, 5, "the messages are queued")
        self.lose(QUEUE)
        self.channel.queue_delete(QUEUE)
        self.start()

    def overflowed(self):
        self.stop(signal.SIGKILL)
        self.send(500, size=1000)
        self.start()

    def subscriptions(self):
        return self.harness.exporter.log().count("subscribed to")

    # -- checks

    def gaps(self):
        labels = {key: value for key, value in self.harness.exporter.metrics().items() if key[0] == "flower_exporter_gaps_total"}
        return {dict(labels)["cause"]: value for (_, labels), value in labels.items() if value}

    def check(self, fault):
        self.send(10)
        samples = self.harness.publish()
        self.lose("dropped")
        counted = {dict(labels)["task"]: value for (name, labels), value in samples.items() if name == EVENTS}
        twice = {name: value for name, value in counted.items() if value > 1}
        missing = {name for name in self.sent if name not in counted}
        assert not twice, f"{fault}: counted twice: {twice}"
        assert missing <= self.lost, f"{fault}: not counted although the broker kept them: {sorted(missing - self.lost)[:10]}"
        self.received += self.drain("flower")
        return missing

    def compare_with_flower(self, missing):
        """Counters and runtimes equal Flower's result for all events that were sent, without those that were lost."""
        kept = [event for event in self.received if event["uuid"] not in missing]
        assert len(kept) == len(self.sent) - len(missing)
        families = (EVENTS, f"{RUNTIME}_bucket", f"{RUNTIME}_count", f"{RUNTIME}_sum")
        actual, expected = ({key: value for key, value in samples.items() if key[0] in families}
                            for samples in (self.harness.metrics(), Flower().feed(kept).metrics()))
        assert actual == expected, difference(actual, expected)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_random_faults(services, vhost, pytestconfig, queue_type):
    """Rounds without a loss report none. The long form has 400 rounds (--queue-faults)."""
    seed = pytestconfig.getoption("--fault-seed") or random.SystemRandom().randrange(10**6)
    print(f"repeat with: tests/run.sh --fault-seed {seed} broker/test_queue_faults.py")
    dice = random.Random(seed)
    faults = Faults(services, vhost, queue_type == "quorum")
    faults.send(20)
    missing = faults.check("start")
    assert not missing and faults.gaps() == {}
    kinds = [faults.killed, faults.restarted, faults.cut, faults.half_open, faults.purged, faults.deleted, faults.overflowed]
    rounds = pytestconfig.getoption("--queue-faults")
    order = [kind for _ in range(-(-rounds // len(kinds))) for kind in dice.sample(kinds, len(kinds))][:rounds]
    for number, fault in enumerate(order):
        name, gaps_before = f"round {number}, {fault.__name__}", 0 if restarts(fault) else sum(faults.gaps().values())
        faults.send(dice.randint(0, 50))
        time.sleep(dice.random())
        fault()
        now = faults.check(name)
        new_gaps = sum(faults.gaps().values()) - gaps_before
        if now - missing:
            assert new_gaps >= 1, f"{name}: {len(now - missing)} events are missing, and no gap is reported\n{faults.harness.exporter.log()}"
        elif fault.__name__ not in ("purged", "deleted", "overflowed"):
            assert new_gaps == 0, f"{name}: a gap is reported, and nothing is missing\n{faults.harness.exporter.log()}"
        missing = now
        faults.save()
    faults.compare_with_flower(missing)


def restarts(fault):
    """The counters of gaps start at 0 with the process."""
    return fault.__name__ in ("killed", "restarted", "purged", "deleted", "overflowed")

"""Random faults under load. Afterwards no task is stuck, and no memory, thread or descriptor has leaked."""

import contextlib
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import amqp
import kombu.exceptions
import pytest
import redis

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, ONLINE, PREFETCH_TIME, PREFETCHED
from support.processes import wait_until
from support.publish import Publisher
from support.resources import descriptors_and_threads

#: The tasks of this fixed set repeat, so that the size of the state is constant.
TASKS, WORKERS, NAMES = 240, 4, 3
#: From this number of faults RabbitMQ is restarted, too, which takes long.
LONG = 50
#: An allocator that prints how many bytes are in use, each time that 1 MiB was allocated.
JEMALLOC = {
    "LD_PRELOAD": "libjemalloc.so.2",
    "MALLOC_CONF": f"tcache:false,narenas:1,stats_interval:{1 << 20},stats_interval_opts:Jgmdablxe",
}
#: Bytes by which that number varies: scrapes in progress, and retained log throttles.
NOISE = 32 << 10


class Soak:
    def __init__(self, services, broker, seed):
        self.services, self.broker, self.path, self.random = services, broker, services.proxy(broker), random.Random(seed)
        settings = {
            "broker": {"reconnect_backoff_max": "1s"},
            "state": {"max_tasks": 2 * TASKS, "worker_timeout": 0},
            "metrics": {"self_metrics": True},
        }
        self.harness = services.harness(broker, settings, path=self.path, env=JEMALLOC)
        self.exporter, self.steps = self.harness.exporter, 0

    # Load: in each step one task is received, an earlier one starts, and a still earlier one ends.

    def event(self, make, step, after=0.0, **fields):
        return make(f"{step % TASKS:032x}", f"w{step % WORKERS}@tests", step + after, **fields)

    def received(self, step):
        return self.event(ev.received, step, name=f"app.t{step % NAMES}")

    def batch(self, steps=8):
        for step in range(self.steps, self.steps + steps):
            yield self.received(step)
            yield self.event(ev.started, step - 20, 0.1)
            yield self.event(ev.succeeded, step - 40, 0.2, runtime=0.1)
        self.steps += steps

    @contextlib.contextmanager
    def load(self):
        """Publishes events directly to the broker, which may be unavailable."""
        over = threading.Event()

        def send():
            while not over.wait(0.1):
                with (
                    contextlib.suppress(OSError, amqp.AMQPError, redis.RedisError, kombu.exceptions.KombuError),
                    Publisher(self.broker, self.harness.exchange) as publisher,
                ):
                    while not over.wait(0.01):
                        publisher.send([*self.batch()])

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            try:
                yield
            finally:
                over.set()
            sending.result()

    # Faults.

    def pause(self):
        time.sleep(self.random.random())

    def cut(self):
        self.path.cut()

    def reset(self):
        self.path.reset()

    def stall(self):
        self.path.stall(*self.random.choice([(True, True), (True, False), (False, True)]))
        self.pause()
        self.path.resume()

    def drop(self):
        self.path.drop()
        self.path.cut()
        self.pause()
        self.path.resume()

    def kill(self):
        """Closes connections as an administrator does."""
        if self.broker.name == "redis":
            kind = self.random.choice(["pubsub", "normal"])
            self.broker.client().execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        else:
            self.broker.server.close_consumers()

    def freeze(self):
        process = self.broker.process if self.broker.name == "redis" else self.broker.server.processes[-1]
        os.killpg(process.pid, signal.SIGSTOP)
        self.pause()
        os.killpg(process.pid, signal.SIGCONT)

    def restart(self):
        self.broker.stop(self.random.choice([signal.SIGTERM, signal.SIGKILL]))
        self.pause()
        self.broker.start()

    def inject(self, kind):
        """Causes a fault. At random, waits until the exporter is ready again."""
        getattr(self, kind)()
        self.pause()
        if self.random.random() < 0.5:
            self.exporter.ready()

    # Without faults.

    def settle(self):
        """Publishes every task once, and returns the exporter's descriptors, threads and bytes.

        It first reconnects, because the buffers of a connection grow with the data that they have read.
        """
        self.exporter.ready()
        self.harness.publisher = self.services.publisher(self.broker, self.harness.exchange)
        self.harness.settle()  # the last fault may not be detected yet
        first = self.steps
        self.steps += TASKS
        tasks = range(first, self.steps)
        before = self.harness.publish().total(EVENTS)  # with the last events of the load, which may still be in flight
        all_ = self.harness.publish([self.received(step) for step in tasks], ev.heartbeat(active=3))
        assert all_.total(PREFETCHED) == TASKS
        assert (all_.one(ONLINE, worker=W), all_.one(EXECUTING, worker=W)) == (1, 3)
        none = self.harness.publish(
            [self.event(ev.started, step, 0.1) for step in tasks],
            [self.event(ev.succeeded, step, 0.2, runtime=0.1) for step in tasks],
        )
        assert none.total(PREFETCHED) == none.total(PREFETCH_TIME) == 0
        assert none.total(EVENTS) == before + 3 * TASKS
        self.path.cut()
        return *self.settled_descriptors_and_threads(), self.allocated()

    def settled_descriptors_and_threads(self):
        """The numbers once they are constant for 1.5 s: the exporter must first detect broken connections and reopen them."""
        seen = []
        wait_until(lambda: seen.append(descriptors_and_threads(self.exporter)) or seen[-75:] == seen[-1:] * 75, 20, lambda: seen)
        return seen[-1]

    def allocated(self, samples=10):
        """The minimum of several numbers of allocated bytes: scrapes make the allocator print them."""

        def printed():
            return [int(number) for number in re.findall(r'"allocated":(\d+)', self.exporter.err.read_text())]

        def scrape():
            for _ in range(10):
                self.exporter.text()
            return len(printed()) >= before + samples

        before = len(printed())
        wait_until(scrape, 30, "the allocator prints its statistics")
        return min(printed()[before:])


@pytest.fixture(params=["redis", "rabbitmq"])
def soaked_broker(request, services):
    if request.param == "redis":
        return services.redis()
    if request.config.getoption("--faults") < LONG:
        return request.getfixturevalue("vhost")
    return services.rabbitmq().wait().vhost()


@pytest.mark.timeout(3600)
def test_random_faults_leak_nothing(services, soaked_broker, request):
    """At the end all events are counted and no task is stuck. Bytes, threads and descriptors are as after the warm-up."""
    faults, seed = request.config.getoption("--faults"), request.config.getoption("--fault-seed")
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    print(f"--faults {faults} --fault-seed {seed}")
    soak = Soak(services, soaked_broker, seed)
    kinds = {"cut": 5, "reset": 5, "stall": 5, "drop": 3, "kill": 3, "freeze": 3, "restart": 3}
    if soaked_broker.name == "rabbitmq":
        kinds |= {"kill": 1, "restart": 0.5 if faults >= LONG else 0}
    drawn = soak.random.choices([*kinds], kinds.values(), k=faults)

    with soak.load():
        for kind in kinds:
            if kinds[kind]:
                soak.inject(kind)
    first = soak.settle()
    started = time.monotonic()
    with soak.load():
        for kind in drawn:
            soak.inject(kind)
    elapsed = time.monotonic() - started
    last = soak.settle()
    reconnects = re.search(r"flower_exporter_broker_reconnects_total (\d+)", soak.exporter.text())[1]
    print(f"{soaked_broker.name}: {faults} faults in {elapsed:.0f} s, {reconnects} reconnects, {soak.steps} tasks")
    print(f"descriptors, threads, bytes: {first} after warm-up, {last} at the end")
    assert int(reconnects) > faults / 3
    assert last[2] <= first[2] + NOISE, (first, last)
    no_more = lambda: all(now <= then for now, then in zip(descriptors_and_threads(soak.exporter), first))  # noqa: E731
    wait_until(no_more, 15, lambda: (first, last))

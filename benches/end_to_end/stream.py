"""The stream that every exporter receives, encoded once into the bytes on the wire.

Tasks rotate over the workers, and the tasks of each worker rotate over the task names. A worker has two prefetched
tasks: one batch of its events reports two tasks as received, the previous two as started, and the two before those as
succeeded. A client's batch has six sent events. Ids are unique and clocks increase until the stream of 480,000 events
repeats. It has more tasks than any exporter holds by default.
"""

import base64
import json
import random
import time
from array import array
from struct import pack

from amqp import Message

BATCH = 6
CLIENTS = [f"gen{1000 + number}@web-{number}" for number in range(4)]

_COMMON = '{"hostname": "%s", "utcoffset": 0.0, "pid": %d, "clock": %d, "uuid": "%s", '
_NAME = '"name": "%s", "args": "(%d, \'someone@example.com\')", "kwargs": "{\'retry\': True}", '
_FAMILY = '"root_id": "%s", "parent_id": null, '
_REST = '"retries": 0, "eta": null, "expires": null, '
SENT = (
    _COMMON + _FAMILY + _NAME + _REST + '"queue": "celery", "exchange": "", "routing_key": "celery", "timestamp": %r,'
    ' "type": "task-sent"}'
)
RECEIVED = _COMMON + _NAME + _FAMILY + _REST + '"timestamp": %r, "type": "task-received"}'
STARTED = _COMMON + '"timestamp": %r, "type": "task-started"}'
SUCCEEDED = _COMMON + '"result": "None", "runtime": %r, "timestamp": %r, "type": "task-succeeded"}'


def worker(number):
    return f"celery@worker-{number}"


class Profile:
    """A number of workers, and a number of task names for each."""

    def __init__(self, workers, names):
        self.workers, self.names = workers, names
        self.pairs = workers * names
        self.title = f"{workers:,} workers, {names} task names each: {self.pairs:,} label sets"

    def task(self, number):
        """The worker and the name of a task. Each visit to a worker has two different names."""
        visit, worker_number = divmod(number // 2, self.workers)
        return worker_number, f"shop.orders.tasks.task_{(2 * visit + number % 2) % self.names}"

    @property
    def first_round(self):
        """Number of events until all label sets exist."""
        return 4 * (self.pairs + 4 * self.workers)


def heartbeat(hostname):
    body = (
        '{"hostname": "%s", "utcoffset": 0.0, "pid": 77, "clock": 1, "freq": 2.0, "active": 2, "processed": 1,'
        ' "loadavg": [0.5, 0.4, 0.3], "sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux",'
        ' "timestamp": %r, "type": "worker-heartbeat"}'
    )
    return (body % (hostname, time.time())).encode()


def heartbeats(profile, protocol):
    """One current heartbeat from each worker, because exporters mark workers without heartbeats as offline."""
    names = [worker(number) for number in range(profile.workers)]
    return b"".join(protocol("worker.heartbeat", name, heartbeat(name), 0) for name in names)


class Stream:
    """Messages of six events each, in one buffer. Message n is `data[ends[n - 1]:ends[n]]`."""

    def __init__(self, profile, protocol, events=480_000, first_task=0):
        self.profile, self.protocol = profile, protocol
        self.data, self.ends = bytearray(), array("Q")
        self.random = random.Random(first_task)
        self.now, self.first = time.time(), first_task
        self.clock = 4 * first_task
        self.prefetched = {}
        for task in range(first_task, first_task + events // 4 // BATCH * BATCH, BATCH):
            self.add_tasks(task)

    @property
    def messages(self):
        return len(self.ends)

    def tick(self):
        self.clock += 1
        return self.clock

    def at(self):
        return self.now + 0.0002 * (self.clock - 4 * self.first)

    def add_tasks(self, first):
        """Adds six tasks: one batch from a client, and one batch from each of three workers."""
        client = CLIENTS[first // BATCH % len(CLIENTS)]
        tasks = []
        for number in range(first, first + BATCH):
            digits = f"{self.random.getrandbits(128):032x}"
            uuid = f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"
            tasks.append((uuid, *self.profile.task(number), number))
        self.add(
            client,
            [
                SENT % (client, 1000, self.tick(), uuid, uuid, name, number, self.at())
                for uuid, _, name, number in tasks
            ],
        )
        for pair in tasks[0:2], tasks[2:4], tasks[4:6]:
            self.add_visit(pair[0][1], pair)

    def add_visit(self, number, pair):
        host, pid = worker(number), 2000 + number
        received, started = self.prefetched.get(number, (None, None))
        events = [
            RECEIVED % (host, pid, self.tick(), uuid, name, task, uuid, self.at()) for uuid, _, name, task in pair
        ]
        events += [STARTED % (host, pid, self.tick(), uuid, self.at()) for uuid, *_ in received or ()]
        for uuid, *_ in started or ():
            events.append(SUCCEEDED % (host, pid, self.tick(), uuid, self.random.expovariate(2), self.at()))
        self.prefetched[number] = pair, received
        while len(events) < BATCH:  # first visits, with nothing prefetched yet: the worker sends tasks itself
            uuid, _, name, task = pair[len(events) % 2]
            events.append(SENT % (host, pid, self.tick(), uuid, uuid, name, task, self.at()))
        self.add(host, events)

    def add(self, hostname, events):
        body = f"[{', '.join(events)}]".encode()
        self.data += self.protocol("task.multi", hostname, body, self.random.getrandbits(128))
        self.ends.append(len(self.data))


class RedisProtocol:
    """PUBLISH commands with kombu's envelope, for one database."""

    def __init__(self, db):
        self.db = db

    def __call__(self, routing_key, hostname, body, tag):
        digits = f"{tag:032x}"
        payload = (
            b'{"body": "%s", "content-encoding": "utf-8", "content-type": "application/json",'
            b' "headers": {"hostname": "%s"}, "properties": {"delivery_mode": 1,'
            b' "delivery_info": {"exchange": "celeryev", "routing_key": "%s"}, "priority": 0,'
            b' "body_encoding": "base64", "delivery_tag": "%s-%s-4%s-a%s-%s"}}'
        ) % (
            base64.b64encode(body),
            *(
                part.encode()
                for part in (hostname, routing_key, digits[:8], digits[8:12], digits[13:16], digits[17:20], digits[20:])
            ),
        )
        channel = f"/{self.db}.celeryev/{routing_key}".encode()
        return b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(channel), channel, len(payload), payload)


class AmqpProtocol:
    """The three frames of a basic.publish on channel 1."""

    def __init__(self):
        self.kept = {}

    def __call__(self, routing_key, hostname, body, tag):
        if (routing_key, hostname) not in self.kept:
            properties = Message(
                "",
                content_type="application/json",
                content_encoding="utf-8",
                delivery_mode=1,
                priority=0,
                application_headers={"hostname": hostname},
            )._serialize_properties()
            arguments = b"\x08celeryev" + bytes([len(routing_key)]) + routing_key.encode() + b"\0"
            self.kept[routing_key, hostname] = frame(1, pack(">HHH", 60, 40, 0) + arguments), properties
        method, properties = self.kept[routing_key, hostname]
        return method + frame(2, pack(">HHQ", 60, 0, len(body)) + properties) + frame(3, body)


def frame(kind, payload):
    return pack(">BHI", kind, 1, len(payload)) + payload + b"\xce"


def check():
    """Checks that every message is valid JSON with six events."""
    stream = Stream(Profile(20, 50), lambda key, host, body, tag: body, 6000)
    start = 0
    for end in stream.ends:
        assert len(json.loads(stream.data[start:end])) == BATCH
        start = end


if __name__ == "__main__":
    check()
    for protocol in RedisProtocol(0), AmqpProtocol():
        began = time.perf_counter()
        stream = Stream(Profile(20, 50), protocol)
        events = BATCH * stream.messages
        print(events, len(stream.data) / events, "bytes per event,", (time.perf_counter() - began) / events * 1e6, "us")

"""Events as Celery writes them, in a form that is short enough for sequences in tests."""

from .exposition import MARKER

#: The time of the first events of a sequence; `at` counts seconds from here.
BASE = 1_750_000_000

#: The worker of a sequence that needs only one.
W = "w@tests"


def event(kind, worker=W, at=0, **fields):
    return {"type": kind, "hostname": worker, "timestamp": BASE + at, "utcoffset": 0, "pid": 7, "clock": 1, **fields}


def task(kind, uuid="a", worker=W, at=0, fields=None, **usual):
    """`fields` of the caller replace the usual fields of this kind."""
    return event(f"task-{kind}", worker, at, **{"uuid": uuid, **usual, **(fields or {})})


def described(kind, uuid, sender, at, name, eta, fields, **usual):
    """A task event that contains the task's message: `sent` and `received`."""
    message = {"name": name, "args": "()", "kwargs": "{}", "retries": 0, "eta": eta, "expires": None}
    return task(kind, uuid, sender, at, fields, **message, root_id=uuid, parent_id=None, **usual)


def sent(uuid="a", client="gen1@client", at=0, name="add", eta=None, **fields):
    routing = {"queue": "celery", "exchange": "", "routing_key": "celery"}
    return described("sent", uuid, client, at, name, eta, fields, **routing)


def received(uuid="a", worker=W, at=0, name="add", eta=None, **fields):
    return described("received", uuid, worker, at, name, eta, fields)


def started(uuid="a", worker=W, at=0, **fields):
    return task("started", uuid, worker, at, fields=fields)


def succeeded(uuid="a", worker=W, at=0, runtime=None, **fields):
    return task("succeeded", uuid, worker, at, result="None", runtime=runtime, fields=fields)


def failed(uuid="a", worker=W, at=0, **fields):
    return task("failed", uuid, worker, at, exception="ValueError()", traceback="Traceback", fields=fields)


def retried(uuid="a", worker=W, at=0, **fields):
    return task("retried", uuid, worker, at, exception="Retry()", traceback="Traceback", fields=fields)


def revoked(uuid="a", worker=W, at=0, terminated=False, **fields):
    return task("revoked", uuid, worker, at, terminated=terminated, signum=None, expired=False, fields=fields)


def rejected(uuid="a", worker=W, at=0, **fields):
    return task("rejected", uuid, worker, at, requeue=False, fields=fields)


def cancelled(uuid="a", worker=W, at=0, **fields):
    return task("cancelled", uuid, worker, at, requeue=False, fields=fields)


def _worker(subject, worker, at, fields):
    software = {"sw_ident": "py-celery", "sw_ver": "5.7.0", "sw_sys": "Linux", "loadavg": [0.1, 0.2, 0.3]}
    return event(f"worker-{subject}", worker, at, **{"freq": 2.0, "active": 0, "processed": 0, **software, **fields})


def online(worker=W, at=0, **fields):
    return _worker("online", worker, at, fields)


def heartbeat(worker=W, at=0, **fields):
    return _worker("heartbeat", worker, at, fields)


def offline(worker=W, at=0, **fields):
    return _worker("offline", worker, at, fields)


def without(event, *keys):
    """The event as a sender that leaves these fields out would write it."""
    return {key: value for key, value in event.items() if key not in keys}


def marker(number):
    """A heartbeat that the tests send last to find out when all earlier events are read.

    The number is its count of executing tasks. Its long interval avoids a timeout.
    """
    return without(heartbeat(MARKER, active=number, freq=1000), "processed")


def good(number):
    return received(f"good{number}", name="good")

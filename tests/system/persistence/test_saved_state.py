"""State that survives restarts, however the exporter ended and whatever happened to its file."""

import re
import resource
import shutil
import signal
import socket
import stat
import threading
import time

import pytest

from support import events as ev
from support.events import W
from support.exposition import EVENTS, EXECUTING, FAMILIES, ONLINE, PREFETCH_TIME, PREFETCHED, RUNTIME
from support.processes import directory, wait_until

pytestmark = pytest.mark.every_release

QUEUE = {"broker": {"amqp": {"queue": "flower-exporter"}}}
LOCKED = "state file is locked by another process; waiting"


@pytest.fixture
def db():
    return directory("state") / "state"


def persistent(db, settings=None):
    state = {"persistent": True, "db": str(db), "worker_timeout": 0}
    return {"state": state, "metrics": {"self_metrics": True}, **(settings or {})}


def flower_families(samples):
    """Only the samples of the six metrics."""
    return type(samples)({key: value for key, value in samples.items() if key[0].startswith(FAMILIES)})


def publish_all_families(harness):
    """Publishes events for all six metrics, with tasks in every stage."""
    published = harness.publish(
        ev.online(),
        ev.heartbeat(active=3),
        [ev.sent("a"), ev.received("a"), ev.received("b", name="räkna"), ev.received("c"), ev.started("c", at=2)],
        [ev.succeeded("d", runtime=0.3), ev.succeeded("e", runtime=1e300), ev.task("progress", "a")],
        ev.offline("gone@tests"),
    )
    return flower_families(published)


def restart(services, harness, broker, db, settings=None, ready=True):
    """Starts the next exporter on the same state."""
    settings = {**persistent(db, settings), "events": {"exchange": harness.exchange}}
    harness.exporter = services.exporter(broker, settings, ready=ready)
    return harness.exporter


def save(exporter):
    """Requests a save and waits until it is done."""
    before = len(exporter.log_lines("state saved"))
    exporter.send(signal.SIGUSR1)
    wait_until(lambda: len(exporter.log_lines("state saved")) > before, 10, lambda: f"the state is saved\n{exporter.log()}")


def kill(exporter):
    exporter.send(signal.SIGKILL)
    exporter.wait(5)


@pytest.mark.short_form
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_restart_restores_all_samples(services, vhost, db, end):
    """All samples are exactly equal, and tasks continue in their stages."""
    harness = services.harness(vhost, persistent(db, QUEUE))
    before = publish_all_families(harness)
    for family in (EVENTS, ONLINE, EXECUTING, PREFETCHED, PREFETCH_TIME, f"{RUNTIME}_sum"):
        assert before.total(family) > 0, family
    if end == "kill":
        save(harness.exporter)
        kill(harness.exporter)
    else:
        harness.exporter.terminate()
    restart(services, harness, vhost, db, QUEUE)
    assert flower_families(harness.metrics()) == before
    after = harness.publish([ev.started("a", at=5), ev.succeeded("c", at=9)])
    assert after.one(EVENTS, worker=W, type="task-started", task="add") == 2, "the name of the task is known"
    assert after.one(PREFETCHED, worker=W, task="add") == 0
    assert after.one(PREFETCH_TIME, worker=W, task="add") == 0, "the run of c, which set it last, has ended"
    assert stat.S_IMODE(db.stat().st_mode) == 0o600


@pytest.mark.short_form
def test_restart_on_redis_clears_prefetched_tasks(services, redis, db):
    """Redis collects no events while the exporter is down. All other samples are restored."""
    harness = services.harness(redis, persistent(db))
    before = publish_all_families(harness)
    save(harness.exporter)
    kill(harness.exporter)
    restart(services, harness, redis, db)
    after = flower_families(harness.metrics())
    assert {key for key in before if before[key] != after.get(key)} == {
        (PREFETCHED, frozenset({"worker": W, "task": task}.items())) for task in ("add", "räkna")
    }
    assert after.total(PREFETCHED) == 0


def test_kill_loses_nothing_before_the_last_save(services, redis, db):
    """On Redis, only events after the last save are lost."""
    harness = services.harness(redis, persistent(db))
    sent, done = [0], threading.Event()

    def send():
        publisher = services.publisher(redis, harness.exchange)
        while not done.wait(0.005):
            publisher.send([ev.received(f"{sent[0]}-{n}") for n in range(10)])
            sent[0] += 10

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(3):
        counted = harness.metrics().events("received")
        seen = harness.exporter.wait_for(lambda m: m.events("received") > counted + 500).events("received")  # noqa: B023
        save(harness.exporter)
        kill(harness.exporter)
        assert restart(services, harness, redis, db).metrics().events("received") >= seen
    done.set()
    sender.join()


def test_state_is_saved_without_a_signal(services, redis, db):
    """The default of state.state_save_interval is 250 ms."""
    harness = services.harness(redis, persistent(db))
    count = publish_all_families(harness).total(EVENTS)
    time.sleep(5)
    kill(harness.exporter)
    assert restart(services, harness, redis, db).metrics().total(EVENTS) == count


def test_sigusr1_saves_the_state(services, redis, db):
    """Without persistence the log contains the reason why nothing is saved."""
    exporter = services.exporter(redis, persistent(db))
    exporter.send(signal.SIGUSR1)
    wait_until(lambda: "state saved" in exporter.log(), 5, exporter.log)
    without = services.exporter(redis)
    without.send(signal.SIGUSR1)
    wait_until(lambda: "state.persistent is off" in without.log(), 5, without.log)


def overwrite(path, start, data):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


DAMAGE = {
    "text": lambda path: path.write_text("not a database but another file"),
    "truncated": lambda path: path.open("r+b").truncate(path.stat().st_size // 2),
    "truncated to a page": lambda path: path.open("r+b").truncate(4096),
    "truncated to a few bytes": lambda path: path.open("r+b").truncate(100),
    "first bytes": lambda path: overwrite(path, 0, b"\0" * 64),
    "first page": lambda path: overwrite(path, 0, b"\xa5" * 4096),
    "all but the first page": lambda path: overwrite(path, 4096, b"\xa5" * (path.stat().st_size - 4096)),
    "zeros": lambda path: overwrite(path, 4096, b"\0" * (path.stat().st_size - 4096)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_moved_aside(services, redis, db, damage):
    """Its new name contains the date, and there is one warning. The exporter starts without state, and saves a valid one."""
    harness = services.harness(redis, persistent(db))
    publish_all_families(harness)
    harness.exporter.terminate()
    DAMAGE[damage](db)
    content = db.read_bytes()

    exporter = restart(services, harness, redis, db)
    [moved] = [path for path in db.parent.iterdir() if path != db]
    assert re.fullmatch(r"state\.unreadable-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", moved.name)
    assert len(moved.read_bytes()) == len(content)
    warnings = [line for line in exporter.log().splitlines() if "WARN" in line or "ERROR" in line]
    assert len(warnings) == 1 and str(moved) in warnings[0], exporter.log()
    assert "state file is unreadable; moved aside" in warnings[0] and "moved_to=" in warnings[0]
    assert exporter.metrics().total(EVENTS) == 0
    before = publish_all_families(harness)
    harness.exporter.terminate()
    restart(services, harness, redis, db)
    assert harness.metrics().total(EVENTS) == before.total(EVENTS)


def test_changed_page_is_detected(services, redis, db):
    """One changed bit in any used page never causes a wrong number without a warning."""
    harness = services.harness(redis, persistent(db))
    before = publish_all_families(harness).total(EVENTS)
    harness.exporter.terminate()
    content = db.read_bytes()
    pages = [start for start in range(0, len(content), 4096) if any(content[start : start + 4096])]
    for start in pages[1::3]:
        overwrite(db, start + 40, bytes([content[start + 40] ^ 1]))
        exporter = restart(services, harness, redis, db)
        moved = [path for path in db.parent.iterdir() if path != db]
        assert exporter.metrics().total(EVENTS) == (0 if moved else before), exporter.log()
        exporter.terminate()
        for path in moved:
            path.unlink()
        db.write_bytes(content)


def test_locked_file_is_an_error(services, redis, db):
    """Exit code 2 after ten seconds with one line. The file is not changed, and no request is answered before."""
    save(services.exporter(redis, persistent(db)))
    content = db.read_bytes()
    second = services.exporter(redis, persistent(db), ready=False, terminate=False)
    wait_until(lambda: LOCKED in second.log(), 5, second.log)
    with socket.create_connection(("127.0.0.1", second.port)) as scrape:
        scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert second.wait(20) == 2
        with pytest.raises(ConnectionResetError):
            scrape.recv(1)
    last = second.log().splitlines()[-1]
    assert str(db) in last and "locked by another process" in last, second.log()
    assert db.read_bytes() == content
    assert [path.name for path in db.parent.iterdir()] == ["state"]


def test_next_exporter_waits_for_the_previous_one(services, redis, db):
    """In a rolling restart, the next exporter takes over the state."""
    harness = services.harness(redis, persistent(db))
    publish_all_families(harness)
    first, count = harness.exporter, harness.metrics().total(EVENTS)
    second = restart(services, harness, redis, db, ready=False)
    wait_until(lambda: LOCKED in second.log(), 5, second.log)
    first.terminate()
    assert second.ready(5).metrics().total(EVENTS) == count


def test_stops_while_waiting_for_the_lock(services, redis, db):
    services.exporter(redis, persistent(db))
    second = services.exporter(redis, persistent(db), ready=False)
    wait_until(lambda: LOCKED in second.log(), 5, second.log)
    second.terminate()


def test_missing_directory_is_a_warning_until_it_exists(services, redis):
    """The exporter runs, with a warning in the log and in /healthz."""
    home = directory("state")
    db = home / "sub" / "state"
    harness = services.harness(redis, persistent(db))
    count = publish_all_families(harness).total(EVENTS)
    [warning] = harness.exporter.healthz()[1]["warnings"]
    assert str(db) in warning and "No such file" in warning
    assert warning in harness.exporter.log()
    harness.exporter.send(signal.SIGUSR1)
    wait_until(lambda: "failed to save state error=" in harness.exporter.log(), 5, harness.exporter.log)
    db.parent.mkdir()
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 15, harness.exporter.log)
    kill(harness.exporter)
    assert restart(services, harness, redis, db).metrics().total(EVENTS) == count


def test_deleted_directory_is_written_again(services, vhost, db):
    """The directory is deleted with the file and created again. The full state is saved, and messages are acknowledged
    in the meantime.
    """
    harness = services.harness(vhost, persistent(db, {"broker": {"amqp": {"queue": "flower-exporter", "prefetch_count": 10}}}))
    publish_all_families(harness)
    save(harness.exporter)
    shutil.rmtree(db.parent)
    count = harness.publish(*[ev.received(f"deleted-{n}") for n in range(100)]).total(EVENTS)
    wait_until(lambda: harness.exporter.healthz()[1]["warnings"], 5, "a warning")
    assert harness.exporter.healthz()[0] == 200
    db.parent.mkdir()
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 15, harness.exporter.log)
    save(harness.exporter)
    kill(harness.exporter)
    restart(services, harness, vhost, db, QUEUE | {"broker": {"amqp": {"queue": "flower-exporter", "prefetch_count": 10}}})
    assert harness.metrics().total(EVENTS) == count


def test_full_disk_is_a_warning_until_there_is_space(services, vhost, db):
    """The file cannot grow. The exporter runs with a warning and retries, and nothing is lost once there is space."""
    without_signal = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]
    harness = services.harness(vhost, persistent(db, QUEUE), prefix=without_signal)
    publish_all_families(harness)
    save(harness.exporter)
    resource.prlimit(harness.exporter.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    count = harness.publish(*[[ev.received(f"{n}-{k}") for k in range(100)] for n in range(100)]).total(EVENTS)
    wait_until(lambda: harness.exporter.healthz()[1]["warnings"], 10, "a warning")
    assert "retrying" in harness.exporter.healthz()[1]["warnings"][0]
    resource.prlimit(harness.exporter.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 20, harness.exporter.log)
    save(harness.exporter)
    kill(harness.exporter)
    restart(services, harness, vhost, db, QUEUE)
    assert harness.metrics().total(EVENTS) == count


def test_another_queue_clears_prefetched_tasks(services, vhost, db):
    """The events in another queue do not continue those of the previous one."""
    harness = services.harness(vhost, persistent(db, QUEUE))
    assert publish_all_families(harness).total(PREFETCHED) > 0
    harness.exporter.terminate()
    other = {"broker": {"amqp": {"queue": "celeryev.other"}}}
    services.exporter(vhost, {**other, "events": {"exchange": harness.exchange}}).terminate()
    restart(services, harness, vhost, db, other)
    assert harness.metrics().total(PREFETCHED) == 0


def test_purged_workers_are_removed_from_the_file(services, redis, db):
    harness = services.harness(redis, persistent(db))
    publish_all_families(harness)
    harness.exporter.terminate()
    settings = persistent(db)
    settings["state"] |= {"worker_timeout": "100ms", "purge_offline_workers": "200ms"}
    harness.exporter = services.exporter(redis, {**settings, "events": {"exchange": harness.exchange}})
    harness.exporter.wait_for(lambda m: not flower_families(m).without_marker())
    save(harness.exporter)
    harness.exporter.terminate()
    restart(services, harness, redis, db)
    assert not flower_families(harness.metrics())


def test_downtime_does_not_time_out_workers(services, redis, db):
    """The timeout of a restored worker starts again."""
    settings = persistent(db)
    settings["state"]["worker_timeout"] = "2s"
    harness = services.harness(redis, settings)
    harness.publish(ev.heartbeat(freq=0.5))
    harness.exporter.terminate()
    time.sleep(2.5)
    harness.exporter = services.exporter(redis, {**settings, "events": {"exchange": harness.exchange}})
    assert harness.metrics().one(ONLINE, worker=W) == 1
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 5)


def test_infinite_sum_is_restored(services, redis, db):
    """A sum that has overflowed does not invalidate the state."""
    harness = services.harness(redis, persistent(db))
    before = harness.publish([ev.succeeded(uuid, runtime=1.7e308) for uuid in "ab"])
    assert before.one(f"{RUNTIME}_sum", worker=W, task="") == float("inf")
    harness.exporter.terminate()
    restart(services, harness, redis, db)
    assert flower_families(harness.metrics()) == flower_families(before)


def test_file_that_cannot_be_opened_is_retried(services, redis, db):
    """The exporter waits for it instead of replacing it."""
    harness = services.harness(redis, persistent(db))
    count = publish_all_families(harness).total(EVENTS)
    harness.exporter.terminate()
    db.rename(db.with_name("moved"))
    db.symlink_to(db)  # a loop that cannot be opened, and that the rename below replaces atomically
    exporter = restart(services, harness, redis, db, ready=False)
    wait_until(lambda: "failed to open state file; retrying" in exporter.log(), 5, exporter.log)
    db.with_name("moved").rename(db)
    assert exporter.ready().metrics().total(EVENTS) == count
    assert [path.name for path in db.parent.iterdir()] == ["state"]

"""State that outlives the process: what was counted is still there, whatever ended the exporter or happened to its file."""

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
AGE = re.compile(r"^flower_exporter_state_save_age_seconds (\S+)$", re.M)


@pytest.fixture
def db():
    return directory("state") / "state"


def persistent(db, settings=None):
    state = {"persistent": True, "db": str(db), "worker_timeout": 0}
    return {"state": state, "metrics": {"self_metrics": True}, **(settings or {})}


def six(samples):
    """The six families alone."""
    return type(samples)({key: value for key, value in samples.items() if key[0].startswith(FAMILIES)})


def everything(harness):
    """All six families, with tasks in every stage."""
    played = harness.publish(
        ev.online(),
        ev.heartbeat(active=3),
        [ev.sent("a"), ev.received("a"), ev.received("b", name="räkna"), ev.received("c"), ev.started("c", at=2)],
        [ev.succeeded("d", runtime=0.3), ev.succeeded("e", runtime=1e300), ev.task("progress", "a")],
        ev.offline("gone@tests"),
    )
    return six(played)


def again(services, harness, broker, db, settings=None, ready=True):
    """The next exporter on the same state."""
    settings = {**persistent(db, settings), "events": {"exchange": harness.exchange}}
    harness.exporter = services.exporter(broker, settings, ready=ready)
    return harness.exporter


def saved(exporter):
    """Waits until nothing is left to save."""
    wait_until(lambda: AGE.search(exporter.text())[1] == "0", 10, lambda: f"saved\n{exporter.log()}")


def kill(exporter):
    exporter.send(signal.SIGKILL)
    exporter.wait(5)


@pytest.mark.short_form
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_everything_is_still_there(services, vhost, db, end):
    """All samples of all families, to the last bit; and tasks go on where they were."""
    harness = services.harness(vhost, persistent(db, QUEUE))
    before = everything(harness)
    for family in (EVENTS, ONLINE, EXECUTING, PREFETCHED, PREFETCH_TIME, f"{RUNTIME}_sum"):
        assert before.total(family) > 0, family
    if end == "kill":
        saved(harness.exporter)
        kill(harness.exporter)
    else:
        harness.exporter.terminate()
    again(services, harness, vhost, db, QUEUE)
    assert six(harness.metrics()) == before
    after = harness.publish([ev.started("a", at=5), ev.succeeded("c", at=9)])
    assert after.one(EVENTS, worker=W, type="task-started", task="add") == 2, "its name is known"
    assert after.one(PREFETCHED, worker=W, task="add") == 0
    assert after.one(PREFETCH_TIME, worker=W, task="add") == 0, "c, which was set last, has ended"
    assert stat.S_IMODE(db.stat().st_mode) == 0o600


@pytest.mark.short_form
def test_on_redis_the_sets_start_empty(services, redis, db):
    """Nothing collects there while we are away: all but the prefetched tasks is as it was."""
    harness = services.harness(redis, persistent(db))
    before = everything(harness)
    saved(harness.exporter)
    kill(harness.exporter)
    again(services, harness, redis, db)
    after = six(harness.metrics())
    assert {key for key in before if before[key] != after.get(key)} == {
        (PREFETCHED, frozenset({"worker": W, "task": task}.items())) for task in ("add", "räkna")
    }
    assert after.total(PREFETCHED) == 0


def test_a_kill_costs_no_more_than_the_last_moment(services, redis, db):
    """On Redis, what came in the last quarter of a second, and while that was written."""
    harness = services.harness(redis, persistent(db))
    sent, over = [0], threading.Event()

    def send():
        publisher = services.publisher(redis, harness.exchange)
        while not over.wait(0.005):
            publisher.send([ev.received(f"{sent[0]}-{n}") for n in range(10)])
            sent[0] += 10

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(3):
        counted = harness.metrics().events("received")
        seen = harness.exporter.wait_for(lambda m: m.events("received") > counted + 500).events("received")  # noqa: B023
        since = time.monotonic()
        wait_until(
            lambda: time.monotonic() - since > float(AGE.search(harness.exporter.text())[1]),  # noqa: B023
            20,
            "what was seen is saved",
        )
        kill(harness.exporter)
        assert again(services, harness, redis, db).metrics().events("received") >= seen
    over.set()
    sender.join()


def test_save_now(services, redis, db):
    """SIGUSR1; without persistence it is answered, too."""
    exporter = services.exporter(redis, persistent(db))
    exporter.send(signal.SIGUSR1)
    wait_until(lambda: "the state is saved" in exporter.log(), 5, exporter.log)
    without = services.exporter(redis)
    without.send(signal.SIGUSR1)
    wait_until(lambda: "state.persistent is off" in without.log(), 5, without.log)


def overwrite(path, start, data):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


DAMAGE = {
    "text": lambda path: path.write_text("not a database, but somebody's own"),
    "truncated": lambda path: path.open("r+b").truncate(path.stat().st_size // 2),
    "cut to a page": lambda path: path.open("r+b").truncate(4096),
    "cut to a few bytes": lambda path: path.open("r+b").truncate(100),
    "first bytes": lambda path: overwrite(path, 0, b"\0" * 64),
    "first page": lambda path: overwrite(path, 0, b"\xa5" * 4096),
    "all but the first page": lambda path: overwrite(path, 4096, b"\xa5" * (path.stat().st_size - 4096)),
    "zeros": lambda path: overwrite(path, 4096, b"\0" * (path.stat().st_size - 4096)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside(services, redis, db, damage):
    """With a date in its name and one warning; we start empty, and the next state is a good one."""
    harness = services.harness(redis, persistent(db))
    everything(harness)
    harness.exporter.terminate()
    DAMAGE[damage](db)
    content = db.read_bytes()

    exporter = again(services, harness, redis, db)
    [aside] = [path for path in db.parent.iterdir() if path != db]
    assert re.fullmatch(r"state\.unreadable-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", aside.name)
    assert len(aside.read_bytes()) == len(content)
    warnings = [line for line in exporter.log().splitlines() if "WARN" in line or "ERROR" in line]
    assert len(warnings) == 1 and str(aside) in warnings[0], exporter.log()
    assert exporter.metrics().total(EVENTS) == 0
    before = everything(harness)
    harness.exporter.terminate()
    again(services, harness, redis, db)
    assert harness.metrics().total(EVENTS) == before.total(EVENTS)


def test_a_page_that_changed_is_noticed(services, redis, db):
    """One bit anywhere in what is in use: never a wrong number in silence."""
    harness = services.harness(redis, persistent(db))
    before = everything(harness).total(EVENTS)
    harness.exporter.terminate()
    whole = db.read_bytes()
    pages = [start for start in range(0, len(whole), 4096) if any(whole[start : start + 4096])]
    for start in pages[1::3]:
        overwrite(db, start + 40, bytes([whole[start + 40] ^ 1]))
        exporter = again(services, harness, redis, db)
        set_aside = [path for path in db.parent.iterdir() if path != db]
        assert exporter.metrics().total(EVENTS) == (0 if set_aside else before), exporter.log()
        exporter.terminate()
        for path in set_aside:
            path.unlink()
        db.write_bytes(whole)


def test_in_use_by_another_exporter(services, redis, db):
    """Left untouched: exit code 2 after ten seconds, with a line that says so; nothing is answered before."""
    saved(services.exporter(redis, persistent(db)))
    content = db.read_bytes()
    second = services.exporter(redis, persistent(db), ready=False, terminate=False)
    wait_until(lambda: "waiting for it" in second.log(), 5, second.log)
    with socket.create_connection(("127.0.0.1", second.port)) as scrape:
        scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert second.wait(20) == 2
        with pytest.raises(ConnectionResetError):
            scrape.recv(1)
    last = second.log().splitlines()[-1]
    assert str(db) in last and "another exporter" in last, second.log()
    assert db.read_bytes() == content
    assert [path.name for path in db.parent.iterdir()] == ["state"]


def test_the_next_one_waits_for_the_last(services, redis, db):
    """A rolling restart: the state goes from one to the other."""
    harness = services.harness(redis, persistent(db))
    everything(harness)
    first, count = harness.exporter, harness.metrics().total(EVENTS)
    second = again(services, harness, redis, db, ready=False)
    wait_until(lambda: "waiting for it" in second.log(), 5, second.log)
    first.terminate()
    assert second.ready(5).metrics().total(EVENTS) == count


def test_told_to_stop_while_it_waits(services, redis, db):
    services.exporter(redis, persistent(db))
    second = services.exporter(redis, persistent(db), ready=False)
    wait_until(lambda: "waiting for it" in second.log(), 5, second.log)
    second.terminate()


def test_no_such_directory(services, redis):
    """It runs on and says so, in the log and in /healthz, until there is one."""
    home = directory("state")
    db = home / "sub" / "state"
    harness = services.harness(redis, persistent(db))
    count = everything(harness).total(EVENTS)
    [warning] = harness.exporter.healthz()[1]["warnings"]
    assert str(db) in warning and "No such file" in warning
    assert warning in harness.exporter.log()
    harness.exporter.send(signal.SIGUSR1)
    wait_until(lambda: "the state is not saved" in harness.exporter.log(), 5, harness.exporter.log)
    db.parent.mkdir()
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 15, harness.exporter.log)
    kill(harness.exporter)
    assert again(services, harness, redis, db).metrics().total(EVENTS) == count


def test_the_directory_goes(services, vhost, db):
    """Its file with it, and comes back empty: everything is written anew. Messages are acknowledged meanwhile."""
    harness = services.harness(vhost, persistent(db, {"broker": {"amqp": {"queue": "flower-exporter", "prefetch": 10}}}))
    everything(harness)
    saved(harness.exporter)
    shutil.rmtree(db.parent)
    count = harness.publish(*[ev.received(f"meanwhile-{n}") for n in range(100)]).total(EVENTS)
    wait_until(lambda: harness.exporter.healthz()[1]["warnings"], 5, "a warning")
    assert harness.exporter.healthz()[0] == 200
    db.parent.mkdir()
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 15, harness.exporter.log)
    saved(harness.exporter)
    kill(harness.exporter)
    again(services, harness, vhost, db, QUEUE | {"broker": {"amqp": {"queue": "flower-exporter", "prefetch": 10}}})
    assert harness.metrics().total(EVENTS) == count


def test_no_room(services, vhost, db):
    """The file cannot grow: it runs on, says so, tries again, and nothing is lost once there is room."""
    without_signal = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]
    harness = services.harness(vhost, persistent(db, QUEUE), prefix=without_signal)
    everything(harness)
    saved(harness.exporter)
    resource.prlimit(harness.exporter.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    count = harness.publish(*[[ev.received(f"{n}-{k}") for k in range(100)] for n in range(100)]).total(EVENTS)
    wait_until(lambda: harness.exporter.healthz()[1]["warnings"], 10, "a warning")
    assert "trying again" in harness.exporter.healthz()[1]["warnings"][0]
    resource.prlimit(harness.exporter.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: not harness.exporter.healthz()[1]["warnings"], 20, harness.exporter.log)
    saved(harness.exporter)
    kill(harness.exporter)
    again(services, harness, vhost, db, QUEUE)
    assert harness.metrics().total(EVENTS) == count


def test_another_queue(services, vhost, db):
    """What it has collected is not what the last one would have: the sets start empty."""
    harness = services.harness(vhost, persistent(db, QUEUE))
    assert everything(harness).total(PREFETCHED) > 0
    harness.exporter.terminate()
    other = {"broker": {"amqp": {"queue": "celeryev.other"}}}
    services.exporter(vhost, {**other, "events": {"exchange": harness.exchange}}).terminate()
    again(services, harness, vhost, db, other)
    assert harness.metrics().total(PREFETCHED) == 0


def test_purged_workers_are_gone_from_the_file(services, redis, db):
    harness = services.harness(redis, persistent(db))
    everything(harness)
    harness.exporter.terminate()
    settings = persistent(db)
    settings["state"] |= {"worker_timeout": "100ms", "purge_offline_workers": "200ms"}
    harness.exporter = services.exporter(redis, {**settings, "events": {"exchange": harness.exchange}})
    harness.exporter.wait_for(lambda m: not six(m).without_marker())
    saved(harness.exporter)
    harness.exporter.terminate()
    again(services, harness, redis, db)
    assert not six(harness.metrics())


def test_time_away_kills_nobody(services, redis, db):
    """A restored worker gets a fresh timeout."""
    settings = persistent(db)
    settings["state"]["worker_timeout"] = "2s"
    harness = services.harness(redis, settings)
    harness.publish(ev.heartbeat(freq=0.5))
    harness.exporter.terminate()
    time.sleep(2.5)
    harness.exporter = services.exporter(redis, {**settings, "events": {"exchange": harness.exchange}})
    assert harness.metrics().one(ONLINE, worker=W) == 1
    harness.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 5)


def test_numbers_beyond_all_bounds(services, redis, db):
    """A sum that has overflowed is no reason to throw the state away."""
    harness = services.harness(redis, persistent(db))
    before = harness.publish([ev.succeeded(uuid, runtime=1.7e308) for uuid in "ab"])
    assert before.one(f"{RUNTIME}_sum", worker=W, task="") == float("inf")
    harness.exporter.terminate()
    again(services, harness, redis, db)
    assert six(harness.metrics()) == six(before)


def test_a_file_that_cannot_be_opened_at_first(services, redis, db):
    """It is waited for, rather than set aside for a new one."""
    harness = services.harness(redis, persistent(db))
    count = everything(harness).total(EVENTS)
    harness.exporter.terminate()
    db.rename(db.with_name("elsewhere"))
    db.symlink_to(db)  # which nothing can open, and which the next line but two replaces in one step
    exporter = again(services, harness, redis, db, ready=False)
    wait_until(lambda: "waiting for it" in exporter.log(), 5, exporter.log)
    db.with_name("elsewhere").rename(db)
    assert exporter.ready().metrics().total(EVENTS) == count
    assert [path.name for path in db.parent.iterdir()] == ["state"]

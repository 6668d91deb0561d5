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


def everything(rig):
    """All six families, with tasks in every stage."""
    played = rig.play(
        ev.online(),
        ev.heartbeat(active=3),
        [ev.sent("a"), ev.received("a"), ev.received("b", name="räkna"), ev.received("c"), ev.started("c", at=2)],
        [ev.succeeded("d", runtime=0.3), ev.succeeded("e", runtime=1e300), ev.task("progress", "a")],
        ev.offline("gone@tests"),
    )
    return six(played)


def again(lab, rig, broker, db, settings=None, ready=True):
    """The next exporter on the same state."""
    settings = {**persistent(db, settings), "events": {"exchange": rig.exchange}}
    rig.exporter = lab.exporter(broker, settings, ready=ready)
    return rig.exporter


def saved(exporter):
    """Waits until nothing is left to save."""
    wait_until(lambda: AGE.search(exporter.text())[1] == "0", 10, lambda: f"saved\n{exporter.log()}")


def kill(exporter):
    exporter.send(signal.SIGKILL)
    exporter.wait(5)


@pytest.mark.short_form
@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_everything_is_still_there(lab, vhost, db, end):
    """All samples of all families, to the last bit; and tasks go on where they were."""
    rig = lab.rig(vhost, persistent(db, QUEUE))
    before = everything(rig)
    for family in (EVENTS, ONLINE, EXECUTING, PREFETCHED, PREFETCH_TIME, f"{RUNTIME}_sum"):
        assert before.total(family) > 0, family
    if end == "kill":
        saved(rig.exporter)
        kill(rig.exporter)
    else:
        rig.exporter.terminate()
    again(lab, rig, vhost, db, QUEUE)
    assert six(rig.metrics()) == before
    after = rig.play([ev.started("a", at=5), ev.succeeded("c", at=9)])
    assert after.one(EVENTS, worker=W, type="task-started", task="add") == 2, "its name is known"
    assert after.one(PREFETCHED, worker=W, task="add") == 0
    assert after.one(PREFETCH_TIME, worker=W, task="add") == 0, "c, which was set last, has ended"
    assert stat.S_IMODE(db.stat().st_mode) == 0o600


@pytest.mark.short_form
def test_on_redis_the_sets_start_empty(lab, redis, db):
    """Nothing collects there while we are away: all but the prefetched tasks is as it was."""
    rig = lab.rig(redis, persistent(db))
    before = everything(rig)
    saved(rig.exporter)
    kill(rig.exporter)
    again(lab, rig, redis, db)
    after = six(rig.metrics())
    assert {key for key in before if before[key] != after.get(key)} == {
        (PREFETCHED, frozenset({"worker": W, "task": task}.items())) for task in ("add", "räkna")
    }
    assert after.total(PREFETCHED) == 0


def test_a_kill_costs_no_more_than_the_last_moment(lab, redis, db):
    """On Redis, what came in the last quarter of a second, and while that was written."""
    rig = lab.rig(redis, persistent(db))
    sent, over = [0], threading.Event()

    def send():
        publisher = lab.publisher(redis, rig.exchange)
        while not over.wait(0.005):
            publisher.send([ev.received(f"{sent[0]}-{n}") for n in range(10)])
            sent[0] += 10

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(3):
        counted = rig.metrics().events("received")
        seen = rig.exporter.wait_for(lambda m: m.events("received") > counted + 500).events("received")  # noqa: B023
        since = time.monotonic()
        wait_until(
            lambda: time.monotonic() - since > float(AGE.search(rig.exporter.text())[1]),  # noqa: B023
            20,
            "what was seen is saved",
        )
        kill(rig.exporter)
        assert again(lab, rig, redis, db).metrics().events("received") >= seen
    over.set()
    sender.join()


def test_save_now(lab, redis, db):
    """SIGUSR1; without persistence it is answered, too."""
    exporter = lab.exporter(redis, persistent(db))
    exporter.send(signal.SIGUSR1)
    wait_until(lambda: "the state is saved" in exporter.log(), 5, exporter.log)
    without = lab.exporter(redis)
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
def test_a_damaged_file_is_set_aside(lab, redis, db, damage):
    """With a date in its name and one warning; we start empty, and the next state is a good one."""
    rig = lab.rig(redis, persistent(db))
    everything(rig)
    rig.exporter.terminate()
    DAMAGE[damage](db)
    content = db.read_bytes()

    exporter = again(lab, rig, redis, db)
    [aside] = [path for path in db.parent.iterdir() if path != db]
    assert re.fullmatch(r"state\.unreadable-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ", aside.name)
    assert len(aside.read_bytes()) == len(content)
    warnings = [line for line in exporter.log().splitlines() if "WARN" in line or "ERROR" in line]
    assert len(warnings) == 1 and str(aside) in warnings[0], exporter.log()
    assert exporter.metrics().total(EVENTS) == 0
    before = everything(rig)
    rig.exporter.terminate()
    again(lab, rig, redis, db)
    assert rig.metrics().total(EVENTS) == before.total(EVENTS)


def test_a_page_that_changed_is_noticed(lab, redis, db):
    """One bit anywhere in what is in use: never a wrong number in silence."""
    rig = lab.rig(redis, persistent(db))
    before = everything(rig).total(EVENTS)
    rig.exporter.terminate()
    whole = db.read_bytes()
    pages = [start for start in range(0, len(whole), 4096) if any(whole[start : start + 4096])]
    for start in pages[1::3]:
        overwrite(db, start + 40, bytes([whole[start + 40] ^ 1]))
        exporter = again(lab, rig, redis, db)
        set_aside = [path for path in db.parent.iterdir() if path != db]
        assert exporter.metrics().total(EVENTS) == (0 if set_aside else before), exporter.log()
        exporter.terminate()
        for path in set_aside:
            path.unlink()
        db.write_bytes(whole)


def test_in_use_by_another_exporter(lab, redis, db):
    """Left untouched: exit code 2 after ten seconds, with a line that says so; nothing is answered before."""
    saved(lab.exporter(redis, persistent(db)))
    content = db.read_bytes()
    second = lab.exporter(redis, persistent(db), ready=False, terminate=False)
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


def test_the_next_one_waits_for_the_last(lab, redis, db):
    """A rolling restart: the state goes from one to the other."""
    rig = lab.rig(redis, persistent(db))
    everything(rig)
    first, count = rig.exporter, rig.metrics().total(EVENTS)
    second = again(lab, rig, redis, db, ready=False)
    wait_until(lambda: "waiting for it" in second.log(), 5, second.log)
    first.terminate()
    assert second.ready(5).metrics().total(EVENTS) == count


def test_told_to_stop_while_it_waits(lab, redis, db):
    lab.exporter(redis, persistent(db))
    second = lab.exporter(redis, persistent(db), ready=False)
    wait_until(lambda: "waiting for it" in second.log(), 5, second.log)
    second.terminate()


def test_no_such_directory(lab, redis):
    """It runs on and says so, in the log and in /healthz, until there is one."""
    home = directory("state")
    db = home / "sub" / "state"
    rig = lab.rig(redis, persistent(db))
    count = everything(rig).total(EVENTS)
    [warning] = rig.exporter.healthz()[1]["warnings"]
    assert str(db) in warning and "No such file" in warning
    assert warning in rig.exporter.log()
    rig.exporter.send(signal.SIGUSR1)
    wait_until(lambda: "the state is not saved" in rig.exporter.log(), 5, rig.exporter.log)
    db.parent.mkdir()
    wait_until(lambda: not rig.exporter.healthz()[1]["warnings"], 15, rig.exporter.log)
    kill(rig.exporter)
    assert again(lab, rig, redis, db).metrics().total(EVENTS) == count


def test_the_directory_goes(lab, vhost, db):
    """Its file with it, and comes back empty: everything is written anew. Messages are acknowledged meanwhile."""
    rig = lab.rig(vhost, persistent(db, {"broker": {"amqp": {"queue": "flower-exporter", "prefetch": 10}}}))
    everything(rig)
    saved(rig.exporter)
    shutil.rmtree(db.parent)
    count = rig.play(*[ev.received(f"meanwhile-{n}") for n in range(100)]).total(EVENTS)
    wait_until(lambda: rig.exporter.healthz()[1]["warnings"], 5, "a warning")
    assert rig.exporter.healthz()[0] == 200
    db.parent.mkdir()
    wait_until(lambda: not rig.exporter.healthz()[1]["warnings"], 15, rig.exporter.log)
    saved(rig.exporter)
    kill(rig.exporter)
    again(lab, rig, vhost, db, QUEUE | {"broker": {"amqp": {"queue": "flower-exporter", "prefetch": 10}}})
    assert rig.metrics().total(EVENTS) == count


def test_no_room(lab, vhost, db):
    """The file cannot grow: it runs on, says so, tries again, and nothing is lost once there is room."""
    without_signal = ["sh", "-c", "trap '' XFSZ; exec \"$@\"", "sh"]
    rig = lab.rig(vhost, persistent(db, QUEUE), prefix=without_signal)
    everything(rig)
    saved(rig.exporter)
    resource.prlimit(rig.exporter.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    count = rig.play(*[[ev.received(f"{n}-{k}") for k in range(100)] for n in range(100)]).total(EVENTS)
    wait_until(lambda: rig.exporter.healthz()[1]["warnings"], 10, "a warning")
    assert "trying again" in rig.exporter.healthz()[1]["warnings"][0]
    resource.prlimit(rig.exporter.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_until(lambda: not rig.exporter.healthz()[1]["warnings"], 20, rig.exporter.log)
    saved(rig.exporter)
    kill(rig.exporter)
    again(lab, rig, vhost, db, QUEUE)
    assert rig.metrics().total(EVENTS) == count


def test_another_queue(lab, vhost, db):
    """What it has collected is not what the last one would have: the sets start empty."""
    rig = lab.rig(vhost, persistent(db, QUEUE))
    assert everything(rig).total(PREFETCHED) > 0
    rig.exporter.terminate()
    other = {"broker": {"amqp": {"queue": "celeryev.other"}}}
    lab.exporter(vhost, {**other, "events": {"exchange": rig.exchange}}).terminate()
    again(lab, rig, vhost, db, other)
    assert rig.metrics().total(PREFETCHED) == 0


def test_purged_workers_are_gone_from_the_file(lab, redis, db):
    rig = lab.rig(redis, persistent(db))
    everything(rig)
    rig.exporter.terminate()
    settings = persistent(db)
    settings["state"] |= {"worker_timeout": "100ms", "purge_offline_workers": "200ms"}
    rig.exporter = lab.exporter(redis, {**settings, "events": {"exchange": rig.exchange}})
    rig.exporter.wait_for(lambda m: not six(m).without_marker())
    saved(rig.exporter)
    rig.exporter.terminate()
    again(lab, rig, redis, db)
    assert not six(rig.metrics())


def test_time_away_kills_nobody(lab, redis, db):
    """A restored worker gets a fresh timeout."""
    settings = persistent(db)
    settings["state"]["worker_timeout"] = "2s"
    rig = lab.rig(redis, settings)
    rig.play(ev.heartbeat(freq=0.5))
    rig.exporter.terminate()
    time.sleep(2.5)
    rig.exporter = lab.exporter(redis, {**settings, "events": {"exchange": rig.exchange}})
    assert rig.metrics().one(ONLINE, worker=W) == 1
    rig.exporter.wait_for(lambda m: m.one(ONLINE, worker=W) == 0, 5)


def test_numbers_beyond_all_bounds(lab, redis, db):
    """A sum that has overflowed is no reason to throw the state away."""
    rig = lab.rig(redis, persistent(db))
    before = rig.play([ev.succeeded(uuid, runtime=1.7e308) for uuid in "ab"])
    assert before.one(f"{RUNTIME}_sum", worker=W, task="") == float("inf")
    rig.exporter.terminate()
    again(lab, rig, redis, db)
    assert six(rig.metrics()) == six(before)


def test_a_file_that_cannot_be_opened_at_first(lab, redis, db):
    """It is waited for, rather than set aside for a new one."""
    rig = lab.rig(redis, persistent(db))
    count = everything(rig).total(EVENTS)
    rig.exporter.terminate()
    db.rename(db.with_name("elsewhere"))
    db.symlink_to(db)  # which nothing can open, and which the next line but two replaces in one step
    exporter = again(lab, rig, redis, db, ready=False)
    wait_until(lambda: "waiting for it" in exporter.log(), 5, exporter.log)
    db.with_name("elsewhere").rename(db)
    assert exporter.ready().metrics().total(EVENTS) == count
    assert [path.name for path in db.parent.iterdir()] == ["state"]

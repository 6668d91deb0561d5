"""Prefetched tasks of a worker are a set, not a sum of events. Prefetch times end with their runs."""

import random

import pytest

from support import events as ev
from support.events import W
from support.exposition import PREFETCH_TIME, PREFETCHED
from support.model import Model

V = "v@tests"
ETA = "2030-01-01T00:00:00"


def prefetched(samples, worker=W, task="add"):
    """The number of prefetched tasks; 0 if there is no series."""
    return samples.one(PREFETCHED, worker=worker, task=task) or 0


def prefetch_time(samples, worker=W, task="add"):
    return samples.one(PREFETCH_TIME, worker=worker, task=task)


def test_redelivery_moves_to_the_new_worker(harness):
    samples = harness.publish(ev.received(worker=V), ev.received(worker=W, at=1))
    assert (prefetched(samples, V), prefetched(samples, W)) == (0, 1)


def test_redelivery_with_an_eta_is_not_prefetched(harness):
    assert prefetched(harness.publish(ev.received(), ev.received(at=1, eta=ETA))) == 0


def test_received_twice_is_prefetched_once(harness):
    samples = harness.publish(ev.received(), ev.received(at=1))
    assert prefetched(samples) == 1
    assert samples.events("received") == 2


def test_redelivery_under_another_name_moves_the_entry(harness):
    samples = harness.publish(ev.received(name="old"), ev.received(at=1, name="new"))
    assert (prefetched(samples, task="old"), prefetched(samples, task="new")) == (0, 1)


@pytest.mark.parametrize("late", [1, 2], ids=["older", "as old"])
@pytest.mark.parametrize("ended", [False, True], ids=["open run", "last run"])
def test_late_received_is_ignored(harness, late, ended):
    """It is not newer than the start of the open or last run on the same worker."""
    samples = harness.publish(ev.started(at=2), *[ev.succeeded(at=3)] * ended, ev.received(at=late))
    assert prefetched(samples) == 0
    assert samples.events("received", task="add") == 1


def test_late_received_of_another_worker_counts(harness):
    assert prefetched(harness.publish(ev.started(worker=V, at=2), ev.received(at=1))) == 1


@pytest.mark.parametrize("ended", [False, True], ids=["open run", "last run"])
def test_newer_received_counts(harness, ended):
    assert prefetched(harness.publish(ev.started(at=2), *[ev.retried(at=2.5)] * ended, ev.received(at=3))) == 1


def test_start_on_another_worker_keeps_the_entry(harness):
    """Only events of its worker remove an entry, and timestamps of two workers are never subtracted."""
    samples = harness.publish(ev.received(), ev.started(worker=V, at=1))
    assert prefetched(samples) == 1
    assert not prefetch_time(samples, V) and not prefetch_time(samples)


def test_immediate_retry_keeps_the_entry_of_the_next_run(harness):
    """The order with a retry countdown of 0: started, received of the next run, retried, started, succeeded."""
    samples = harness.publish(ev.received(), ev.started(at=1), ev.received(at=2), ev.retried(at=3))
    assert (prefetched(samples), prefetch_time(samples)) == (1, 0)
    samples = harness.publish(ev.started(at=4.5))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 2.5)
    samples = harness.publish(ev.succeeded(at=5))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 0)


ENDS = {
    "succeeded": ev.succeeded,
    "failed": ev.failed,
    "retried": ev.retried,
    "rejected": ev.rejected,
    "cancelled": ev.cancelled,
    "terminated": lambda **given: ev.revoked(terminated=True, **given),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_end_closes_the_open_run_first(harness, end):
    samples = harness.publish(ev.received(), ev.started(at=1), ev.received(at=2), end(at=3))
    assert (prefetched(samples), prefetch_time(samples)) == (1, 0)
    assert prefetched(harness.publish(end(at=4))) == 0


def test_revoked_removes_the_entry_before_the_run(harness):
    """Without `terminated`. With it, the run ends first."""
    samples = harness.publish(ev.received(), ev.started(at=1), ev.received(at=2), ev.revoked(at=3))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 1)
    samples = harness.publish(ev.revoked(at=4))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 0)


@pytest.mark.parametrize("end", [*ENDS.values(), ev.revoked], ids=[*ENDS, "revoked"])
def test_end_without_start_removes_the_entry(harness, end):
    """There is no prefetch time, and a second end changes nothing."""
    samples = harness.publish(ev.received(), end(at=1), end(at=1))
    assert (prefetched(samples), prefetch_time(samples)) == (0, None)


@pytest.mark.parametrize("end", [*ENDS.values(), ev.revoked], ids=[*ENDS, "revoked"])
def test_end_on_another_worker_changes_nothing(harness, end):
    samples = harness.publish(
        ev.received("a"),
        end(uuid="a", worker=V, at=1),
        ev.received("b", name="b"),
        ev.started("b", at=2),
        end(uuid="b", worker=V, at=3),
    )
    assert prefetched(samples) == 1
    assert prefetch_time(samples, task="b") == 2


def test_new_run_ends_the_prefetch_time_of_the_previous_run(harness):
    samples = harness.publish(ev.received(worker=V), ev.started(worker=V, at=1), ev.received(at=2), ev.started(at=2.5))
    assert (prefetch_time(samples, V), prefetch_time(samples, W)) == (0, 0.5)


def test_prefetch_time_ends_under_its_first_name(harness):
    samples = harness.publish(ev.received(name="old"), ev.started(at=1), ev.sent(name="new"), ev.succeeded(at=2))
    assert prefetch_time(samples, task="old") == 0
    assert not prefetch_time(samples, task="new")


def test_received_time_survives_clearing_of_the_set(harness):
    samples = harness.publish(ev.received(), ev.online(at=1), ev.started(at=3))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 3)


RESTARTS = {
    "worker-online": [ev.online(at=5)],
    "processed decreased": [ev.heartbeat(at=5, processed=2)],
    "processed decreased, with heartbeats without it in between": [
        ev.without(ev.heartbeat(at=4), "processed", "active"),
        ev.heartbeat(at=5, processed=2),
    ],
    "processed decreased since worker-online": [ev.online(at=4, processed=9), ev.heartbeat(at=5, processed=8)],
}


@pytest.mark.parametrize("restart", RESTARTS.values(), ids=RESTARTS)
def test_restart_clears_the_set(harness, restart):
    """The prefetch times of the worker also end. Those of another worker stay."""
    for_each = [(f"{worker}{n}", worker) for worker in (W, V) for n in range(3)]
    samples = harness.publish(
        ev.heartbeat(processed=3),
        ev.heartbeat(V, processed=3),
        *[ev.received(*task, at=n) for n, task in enumerate(for_each)],
        ev.started("v@tests0", V, at=10),
        ev.started("w@tests0", W, at=10),
    )
    assert (prefetched(samples, V), prefetched(samples, W)) == (2, 2)
    samples = harness.publish(*restart)
    assert (prefetched(samples, V), prefetched(samples, W)) == (2, 0)
    assert (prefetch_time(samples, V), prefetch_time(samples, W)) == (7, 0)


def test_heartbeats_without_a_restart_keep_the_set(harness):
    samples = harness.publish(
        ev.heartbeat(processed=3),
        ev.received(),
        ev.received("b"),
        ev.started("b", at=1),
        ev.heartbeat(at=1, active=1, processed=3),
        ev.heartbeat(at=2, active=1, processed=4),
        ev.without(ev.heartbeat(at=3, active=1), "processed"),
        ev.heartbeat(at=4, active=1, processed=4),
    )
    assert (prefetched(samples), prefetch_time(samples)) == (1, 1)


@pytest.mark.parametrize("processed, left", [(9, 1), (2, 0)], ids=["increased", "decreased"])
def test_processed_of_worker_offline_is_not_compared(harness, processed, left):
    """Only values of worker-online and heartbeats are compared: first 5, then 5 or 2."""
    samples = harness.publish(
        ev.heartbeat(processed=5),
        ev.received(),
        ev.started(at=1),
        ev.offline(at=2, processed=processed),
        ev.heartbeat(at=3, active=1, processed=min(processed, 5)),
    )
    assert prefetch_time(samples) == left


def test_idle_heartbeat_ends_the_runs_that_began_before_it(harness):
    """`raise Ignore()` ends a task without an event. The heartbeat is from the same clock as the start."""
    run = [ev.received("a"), ev.started("a", at=3)]
    assert prefetch_time(harness.publish(*run, ev.heartbeat(at=3), ev.heartbeat(V, at=9), ev.heartbeat(at=9, active=1))) == 3
    assert prefetch_time(harness.publish(ev.heartbeat(at=10))) == 0
    again = [ev.received("b", at=11), ev.started("b", at=13), ev.succeeded("a", at=14), ev.heartbeat(at=12)]
    assert prefetch_time(harness.publish(*again)) == 2, "the end of a does not end the run of b"


@pytest.mark.parametrize("late", [2, 3], ids=["older", "as old"])
def test_late_started_is_ignored(harness, late):
    """It is not newer than the end of the task on the same worker. An end on another worker does not matter."""
    samples = harness.publish(ev.received(), ev.succeeded(at=3), ev.started(at=late), ev.received(at=1))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 0)
    assert samples.events("started") == 1
    samples = harness.publish(ev.received("b", V, name="b"), ev.failed("b", at=9), ev.started("b", V, at=4))
    assert prefetch_time(samples, V, "b") == 4


def test_worker_offline_clears_the_set(harness):
    """A warm shutdown finishes running tasks, so prefetch times stay until their runs end."""
    samples = harness.publish(ev.heartbeat(), ev.received("a"), ev.received("b"), ev.started("b", at=1), ev.offline(at=2))
    assert (prefetched(samples), prefetch_time(samples)) == (0, 1)
    assert prefetch_time(harness.publish(ev.succeeded("b", at=3))) == 0


@pytest.mark.parametrize("back", [ev.online, ev.heartbeat])
def test_nothing_is_added_after_worker_offline(harness, back):
    """Until a worker-online or heartbeat."""
    assert prefetched(harness.publish(ev.heartbeat(), ev.offline(at=1), ev.received("a", at=2))) == 0
    assert prefetched(harness.publish(back(at=3), ev.received("b", at=4))) == 1


def test_eviction_removes_entry_and_prefetch_time(services, shared_redis):
    """Finished tasks are evicted first. Evicting an unfinished task removes its entry and its prefetch time."""
    harness = services.harness(shared_redis, {"state": {"max_tasks": 20}})
    samples = harness.publish(
        ev.received("kept"),
        ev.received("run", name="b"),
        ev.started("run", at=5),
        *[ev.succeeded(f"done{n}", at=1) for n in range(100)],
    )
    assert (prefetched(samples), prefetch_time(samples, task="b")) == (1, 5)
    samples = harness.publish(*[ev.received(f"flood{n}", name="flood") for n in range(100)])
    assert 1 <= prefetched(samples) + prefetched(samples, task="flood") <= 20
    assert prefetch_time(samples, task="b") == 0
    assert samples.events("received") == 102


@pytest.mark.parametrize("disorder", [0, 3, 300])
def test_any_stream_agrees_with_the_model(services, shared_redis, seed, disorder):
    """For events in any order, the model of the documented rules agrees, and no gauge is negative.

    After every task has ended, all gauges are 0.
    """
    print(f"repeat with: tests/run.sh --parity-seed {seed} state/test_task_tracking.py")
    dice = random.Random(seed)
    harness, model = services.harness(shared_redis, {"state": {"worker_timeout": 0}}), Model()
    workers, names, uuids = [V, W, "u@tests"], ["add", "mul"], [f"t{n}" for n in range(20)]
    kinds = [ev.received] * 6 + [ev.started] * 4 + [*ENDS.values(), ev.revoked, ev.sent]
    for part in range(10):
        items = []
        for at in range(200):
            worker, kind = dice.choice(workers), dice.choice(kinds)
            given = {"uuid": dice.choice(uuids), "at": 1000 * part + at + dice.randint(-disorder, disorder)}
            if kind in (ev.received, ev.sent):
                given |= {"name": dice.choice(names), "eta": dice.choice([None] * 9 + [ETA])}
            items.append(kind(**given) if kind is ev.sent else kind(worker=worker, **given))
            if dice.random() < 0.03:
                fields = {"processed": dice.choice([0, 5]), "active": dice.choice([0, 0, 1])}
                items.append(dice.choice([ev.online, ev.offline, ev.heartbeat])(worker, at=given["at"], **fields))
        gauges = {key: value for key, value in harness.publish(*items).short().items() if key[0].startswith("prefetch")}
        assert all(value >= 0 for value in gauges.values())
        assert {key: value for key, value in gauges.items() if value} == model.feed(items).gauges(), f"part {part}"
    samples = harness.publish(
        *[
            end(uuid=uuid, worker=worker, at=99999)
            for uuid in uuids
            for worker in workers
            for end in (ev.succeeded, ev.succeeded)
        ]
    )
    assert samples.total(PREFETCHED) == 0 and samples.total(PREFETCH_TIME) == 0

"""The crate as a library: examples/failed_tasks.rs."""

from support import events as ev
from support.exporter import BINARY
from support.processes import Process, free_port, wait_until


def test_failed_tasks_are_printed(services, redis):
    """An observer prints every failed task once, with the exception, a field that the daemon does not parse."""
    example = BINARY.parent / "examples" / "failed_tasks"
    address = f"127.0.0.1:{free_port()}"
    process = Process("example", ["sh", "-c", f"tail -f /dev/null | exec {example} {redis.url} {address}"])
    services.callback(process.kill)
    wait_until(lambda: redis.client().pubsub_numpat() == 1, 20, process.log)
    publisher = services.publisher(redis)
    failure = ev.failed("some-id", exception="ValueError('\ud800 böse')", traceback="Traceback …")
    publisher.send([ev.received("some-id"), failure, ev.received("other-id")])
    wait_until(lambda: "some-id failed: ValueError('\ufffd böse')" in process.log(), 10, process.log)
    assert process.log().count(" failed: ") == 1

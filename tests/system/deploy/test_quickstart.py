"""The quick start of the README."""

import os
import subprocess

import pytest

from support.exporter import BINARY
from support.exposition import FAMILIES
from support.processes import ROOT, free_port


def test_quickstart_prints_all_metrics():
    """It prints all six metrics of a real worker, and stops all its processes."""
    port = free_port()
    done = subprocess.run(
        [ROOT / "deploy/quickstart.sh", "--once", "--port", str(port)],
        env={**os.environ, "FLOWER_EXPORTER_BIN": str(BINARY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{port}/metrics" in done.stderr
    assert all(name.removesuffix("_total") in done.stdout for name in FAMILIES), done.stdout
    assert "stopping: redis worker exporter tasks" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["--twice"], {}, 2, "unknown option: --twice"),
        (["--port"], {}, 2, "--port: expected a number from 1 to 65535, not ''"),
        (["--port", "65536"], {}, 2, "expected a number from 1 to 65535"),
        (["--once", "--port", "{taken}"], {"FLOWER_EXPORTER_BIN": str(BINARY)}, 1, 'http.listen = "127.0.0.1:{taken}"'),
        ([], {"FLOWER_EXPORTER_BIN": "/nowhere"}, 1, "FLOWER_EXPORTER_BIN=/nowhere is not a program"),
        ([], {"PATH": "/usr/bin:/bin", "HOME": "/nowhere"}, 1, "there is no cargo: install Rust"),
    ],
)
def test_quickstart_reports_errors(arguments, environment, code, message, shared_redis):
    """Invalid options, a missing program, and a port in use."""
    port = shared_redis.port
    arguments, message = [text.format(taken=port) for text in arguments], message.format(taken=port)
    done = subprocess.run(
        [ROOT / "deploy/quickstart.sh", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code and message in done.stderr, done.stderr
    assert done.stdout == ""

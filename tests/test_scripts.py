"""The shell scripts, and the quick start of the README."""

import os
import subprocess

import pytest

from support.exporter import BINARY
from support.exposition import FAMILIES
from support.processes import ROOT

PLACES = [".ci/*", "benches/*.sh", "benches/*/*.sh", "deploy/**/*.sh", "deploy/debian/post*", "fuzz/*.sh", "tests/*.sh"]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for place in PLACES for path in ROOT.glob(place))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_quickstart():
    """It shows all six series of a real worker, and leaves nothing running."""
    done = subprocess.run(
        [ROOT / "deploy/quickstart.sh", "--once"],
        env={**os.environ, "FLOWER_EXPORTER_BIN": str(BINARY)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert all(name.removesuffix("_total") in done.stdout for name in FAMILIES), done.stdout
    assert "stopping: redis worker exporter tasks" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (["--twice"], {}, 2, "unknown option: --twice"),
        ([], {"FLOWER_EXPORTER_BIN": "/nowhere"}, 1, "FLOWER_EXPORTER_BIN=/nowhere is not a program"),
        ([], {"PATH": "/usr/bin:/bin", "HOME": "/nowhere"}, 1, "there is no cargo: install Rust"),
    ],
)
def test_quickstart_says_what_is_missing(arguments, environment, code, said):
    done = subprocess.run(
        [ROOT / "deploy/quickstart.sh", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code and said in done.stderr, done.stderr
    assert done.stdout == ""

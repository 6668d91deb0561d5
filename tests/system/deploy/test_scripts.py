"""The shell scripts."""

import subprocess

import pytest

from support.processes import ROOT

PATTERNS = [".ci/*", "benches/*.sh", "benches/*/*.sh", "deploy/**/*.sh", "deploy/debian/post*", "fuzz/*.sh", "tests/*.sh"]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_accepts_script(name):
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

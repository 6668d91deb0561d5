"""Kills the processes and removes the directories that a test run leaves behind, however the run ended.

Reads `+ PGID`, `- PGID` and `rm DIR` lines from the test run. When the pipe closes (the run is over, or was killed),
every process group that is still registered is killed and every directory removed. Runs in a separate session.
"""

import os
import shutil
import signal
import sys

groups, directories = set(), []
for line in sys.stdin:
    verb, _, rest = line.rstrip("\n").partition(" ")
    if verb == "rm":
        directories.append(rest)
    elif verb == "+":
        groups.add(int(rest))
    else:
        groups.discard(int(rest))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
for directory in directories:
    shutil.rmtree(directory, ignore_errors=True)

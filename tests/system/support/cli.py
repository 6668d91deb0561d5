"""The program run to its end: its exit code and what it prints."""

import os
import subprocess

from .exporter import BINARY, CLEAN

#: A password in the settings of tests, which no output may contain.
SECRET = "hunter2-planted"


class Run:
    """The program run to its end."""

    def __init__(self, *args, env=None, deadline=10):
        environment = {**os.environ, **CLEAN, **(env or {})}
        done = subprocess.run(
            [BINARY, *map(str, args)],
            env={k: v for k, v in environment.items() if v is not None},
            capture_output=True,
            text=True,
            timeout=deadline,
            stdin=subprocess.DEVNULL,
            cwd="/",
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        assert "panicked" not in self.err

    def error_line(self):
        """The only line on stderr, after exit code 2."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert SECRET not in self.out + self.err
        [line] = self.err.splitlines()
        return line

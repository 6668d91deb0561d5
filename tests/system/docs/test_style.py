"""The code, the log and the documents use standard words, so that readers need not learn a private vocabulary."""

import re

import pytest

from support.processes import ROOT

#: Regular expressions of words that the project no longer uses, and what to write instead.
UNUSUAL = {
    "for ever": "indefinitely",
    "anew": "again",
    "nobody|somebody": "name the process, client or user",
    "kept_back|kept back": "suppressed, delayed",
    "set_aside|set aside": "moved_to, moved aside",
    "goodbye|says? goodbye": "shutdown, worker-offline",
    "takes? leave|takes? its leave|take_leave": "disconnect, close",
    "good office|lost its office": "demoted",
    "at the most": "at most",
    "elsewhere than": "in a different place than",
    "our queue|our own": "the exporter's queue, separate",
    "told to|is told|are told|be told": "receives, is notified",
    "is heard|are heard|hears": "receives, is received, last seen",
    "complaints?|complains?": "error, warning",
    "impatient|patience": "timeout",
    "deaf|mute": "stalled, sends no task events",
    "trying again": "retrying",
    "so long as": "while, as long as",
    "label pairs?": "label sets",
    "six series": "six metrics",
    "signs? of life": "response, heartbeat",
    "cut-offs?|cutoffs?": "disconnects",
    "puts? right|put it right": "corrects",
    "mends?|mended": "sanitize, fix",
}
FILES = [
    path
    for root in ("src", "docs", "deploy", "config", "README.md")
    for path in sorted([ROOT / root] if (ROOT / root).is_file() else (ROOT / root).rglob("*"))
    if path.is_file()
]


@pytest.mark.parametrize(("pattern", "instead"), UNUSUAL.items(), ids=UNUSUAL)
def test_no_unusual_words(pattern, instead):
    """Whole words, in any case."""
    words = re.compile(rf"\b(?:{pattern})\b", re.I)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if words.search(line)
    ]
    assert not found, f"use instead: {instead}\n" + "\n".join(found)

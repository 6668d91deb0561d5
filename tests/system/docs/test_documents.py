"""The documents: links and names exist, quoted log lines are in the program, and examples are accepted."""

import os
import re
import tomllib
from pathlib import PurePath

import pytest
import yaml

from support import events as ev
from support.cli import Run
from support.processes import ROOT, directory, free_port, wait_until

BUILT = {"target", ".git", "corpus", "artifacts"}


def documents():
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(set(folders) - BUILT)
        yield from (ROOT / folder / name for name in sorted(files) if name.endswith(".md"))


DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in documents()}
README, TROUBLESHOOTING = DOCUMENTS["README.md"], DOCUMENTS["docs/troubleshooting.md"]
#: The documents of users and contributors, without those of the folders.
PAGES = [name for name in DOCUMENTS if name.startswith("docs/") or "/" not in name]
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text):
    """The texts in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def headings(text, level="#+"):
    return re.findall(rf"^{level} (.+)$", prose(text), re.M)


def anchors(text):
    """The anchors that GitHub derives from headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def links(text):
    """The relative links of a document, without anchors."""
    found = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if "://" not in link)
    return [link for link in found if link]


@every_document
def test_links_lead_to_existing_files_and_headings(name):
    """Anchors must be headings of the target."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_links_to_every_page():
    """And it is short."""
    assert {name for name in PAGES if name != "README.md"} <= set(links(README))
    assert README.count("\n") <= 200


@pytest.mark.parametrize("name", PAGES)
def test_table_cells_are_short(name):
    cells = [cell for row in re.findall(r"^\|(.*)\|$", prose(DOCUMENTS[name]), re.M) for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell.strip()) > 200] == []


def shipped():
    """The paths of the Debian package's documents, relative to their folder, with the files of the repository."""
    folder = "usr/share/doc/flower-exporter/"
    for source, target, _mode in tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["metadata"]["deb"]["assets"]:
        if target.startswith(folder):
            for path in ROOT.glob(source):
                yield target.removeprefix(folder) + path.name, path


def test_links_work_in_the_package():
    files = dict(shipped())
    assert {name for name in PAGES if name != "CONTRIBUTING.md"} <= set(files)
    names = {*files, *(str(parent) for name in files for parent in PurePath(name).parents)}
    broken = [
        (name, link)
        for name, path in files.items()
        if path.suffix == ".md"
        for link in links(path.read_text())
        if os.path.normpath(os.path.join(os.path.dirname(name), link)) not in names
    ]
    assert broken == [], broken


@every_document
def test_named_paths_exist(name):
    """All paths in the folders of the repository, also in commands."""
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name not in BUILT)
    for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]++)(?![<*{{])", DOCUMENTS[name]):
        found = [base / path.rstrip(".") for base in (ROOT, (ROOT / name).parent)]
        assert any(path.exists() for path in found), path


def known_keys():
    """Every `section.key` that --check-config prints."""
    table = None
    for line in Run("--check-config").out.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif key := re.match(r"(?:# )?(\w+) (?:=|is unset)", line):
            yield f"{table}.{key[1]}"


def test_named_settings_exist():
    """Keys, variables and options in the documents are those of the program. `*` matches any suffix."""
    keys = set(known_keys())
    assert len(keys) > 40
    for name, text in DOCUMENTS.items():
        for key in re.findall(r"`((?:broker|events|state|metrics|http|log)\.[a-z_.*]+)(?: = [^`]*)?`", prose(text)):
            exists = any(known.startswith(key[:-1]) for known in keys) if key.endswith("*") else key in keys
            assert exists, (name, key)
        for variable in re.findall(r"\bFLOWER_EXPORTER_[A-Z]+__[A-Z_]+", text):
            assert variable.removeprefix("FLOWER_EXPORTER_").replace("__", ".").lower() in keys, (name, variable)
    usage = re.search(r"^    flower-exporter .*(?:\n .*)*", DOCUMENTS["docs/configuration.md"], re.M)[0]
    options = re.findall(r"^ +(-[\w-]+)", Run("--help").out, re.M)
    assert sorted(re.findall(r"\[(-[\w-]+)", usage)) == sorted(options)


def test_named_metrics_exist(services, shared_redis):
    """The exporter serves every one of its metrics that a document names."""
    text = services.harness(shared_redis, {"metrics": {"self_metrics": True, "created": True}}).exporter.text()
    families = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    for name, text in DOCUMENTS.items():
        for series in set(re.findall(r"(?<![\w:/.-])flower_[a-z_]+[a-z](?![\w:*.])", text)) - {"flower_exporter"}:
            assert {series, re.sub("_(bucket|sum|count)$", "", series)} & families, (name, series)


def test_every_metric_is_described(services, shared_redis):
    """Each family of a scrape has a row or a section with its type and labels."""
    exporter = services.harness(shared_redis, {"metrics": {"self_metrics": True}}).exporter
    page = DOCUMENTS["docs/metrics.md"]
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", exporter.text(), re.M):
        row = re.search(rf"^(?:\| `{name}` \|.*|#+ `{name}`$\n+.*)", page, re.M)
        assert row and kind in row[0].lower(), (name, kind)


def test_sample_of_the_readme_is_served(services, shared_redis):
    """Each line of the sample is in the exposition after the events that it shows."""
    [sample] = blocks(README, "text")
    worker, fields = "celery@web-1", {"name": "shop.pay"}
    ended = [
        event
        for number in range(42)
        for event in [
            ev.received(f"t{number}", worker, at=number, **fields),
            ev.started(f"t{number}", worker, at=number + 0.25),
            ev.succeeded(f"t{number}", worker, at=number + 1, runtime=0.3 if number < 38 else 0.7)
            if number < 40
            else ev.failed(f"t{number}", worker, at=number + 1),
        ]
    ]
    waiting = [ev.received(f"w{number}", worker, at=60, **fields) for number in range(4)]
    harness = services.harness(shared_redis)
    harness.publish([ev.online(worker), *ended, *waiting, ev.started("w0", worker, at=60.25), ev.heartbeat(worker, active=1, at=61)])
    served = set(harness.exporter.text().splitlines())
    assert len(sample.splitlines()) == 8
    assert [line for line in sample.splitlines() if line not in served] == [], "\n".join(sorted(served))


def sources():
    """The source code with each string on one line; … stands for placeholders."""
    for path in sorted((ROOT / "src").rglob("*.rs")):
        text = re.sub(r"\\\n\s*", "", path.read_text()).replace('\\"', '"').replace("{OTHER}", "(other)")
        yield re.sub(r"\{[^{}\n]*\}", "…", text)


def quoted():
    """The quotations of the troubleshooting page: its first column, and sentences in the second one."""
    for first, second in re.findall(r"^\| (.*?) \| (.*) \|$", TROUBLESHOOTING, re.M):
        yield from spans(first)
        yield from (span for span in spans(second) if span.count(" ") > 3 and " -" not in span)


def test_quoted_lines_are_in_the_program():
    """All fixed parts of each line."""
    source, lines = "\n".join(sources()), list(quoted())
    assert len(lines) > 35
    parts = [part.strip() for line in lines for part in line.split("…") if part.strip()]
    assert [part for part in parts if part not in source] == []


@pytest.mark.parametrize("url", ["redis://h", "sqs://", "redis://:a@b@h", "redis://h;x", "rediss://h", "sentinel://h"])
def test_start_errors_are_in_troubleshooting(services, url):
    """A port that is in use, and invalid URLs: exit code 2 and a line that the page contains."""
    blocker = services.exporter(ready=False).listening()
    env = {"FLOWER_EXPORTER_BROKER__TLS__CA_FILE": "/none"}
    line = Run("-b", url, "-l", f"127.0.0.1:{blocker.port}", env=env).error_line()
    patterns = [".*".join(map(re.escape, text.split("…"))) for text in quoted()]
    assert any(re.search(pattern, line) for pattern in patterns) or "No such file or directory" in line, line


def test_broker_errors_are_in_troubleshooting(services):
    """The line in the log contains the error of Redis, which the page has in italics."""
    redis = services.redis(password="right")
    redis.client().execute_command("ACL", "SETUSER", "few", "on", ">few", "+auth", "+ping")
    for userinfo, port, word in [
        ("", free_port(), "Connection refused"),
        ("", redis.port, "NOAUTH"),
        (":wrong@", redis.port, "WRONGPASS"),
        ("few:few@", redis.port, "NOPERM"),
    ]:
        assert f"*{word}*" in TROUBLESHOOTING
        exporter = services.exporter(None, {"broker": {"url": f"redis://{userinfo}127.0.0.1:{port}/0"}})
        line = rf"WARN failed to connect to broker; retrying broker=.* error=.*{word}.* suppressed=0"
        wait_until(lambda: re.search(line, exporter.log()), 10, exporter.log)  # noqa: B023


def test_examples_are_valid():
    """The program accepts the TOML examples, and the YAML examples can be parsed."""
    file = directory("documents") / "block.toml"
    for text in DOCUMENTS.values():
        for block in blocks(text, "toml"):
            file.write_text(block)
            assert Run("-c", file, "--check-config").code == 0, block
        for block in blocks(text, "ya?ml"):
            list(yaml.safe_load_all(block))

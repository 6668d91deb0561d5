"""The documents: what they link to and name is there, what they quote is said, what they show is accepted."""

import os
import re

import pytest
import yaml

from support.cli import Run
from support.processes import ROOT, directory, free_port, wait_until

BUILT = {"target", ".git", "corpus", "artifacts"}


def documents():
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(set(folders) - BUILT)
        yield from (ROOT / folder / name for name in sorted(files) if name.endswith(".md"))


DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in documents()}
README = DOCUMENTS["README.md"]
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text):
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def headings(text, level="#+"):
    return re.findall(rf"^{level} (.+)$", prose(text), re.M)


def anchors(text):
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def section(heading):
    """A section of the README with those below it."""
    level = re.search(rf"^(#+) {re.escape(heading)}$", README, re.M)
    return re.split(rf"^#{{1,{len(level[1])}}} ", README[level.end() :], maxsplit=1, flags=re.M)[0]


@every_document
def test_links(name):
    """Each leads to a file that is there, and to a heading in it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_table_of_contents():
    """It has every section, in the order of the page."""
    links = re.findall(r"\[([^\]]+)\]\(#[^)]+\)", README.split("\n## ")[0])
    assert links == headings(README, "##")


@every_document
def test_paths(name):
    """What is named in a folder of ours is there, in commands too."""
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name not in BUILT)
    for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]++)(?![<*{{])", DOCUMENTS[name]):
        found = [base / path.rstrip(".") for base in (ROOT, (ROOT / name).parent)]
        assert any(path.exists() for path in found), path


def known_keys():
    """Every `section.key` that --check-config shows."""
    table = None
    for line in Run("--check-config").out.splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif key := re.match(r"(?:# )?(\w+) (?:=|is unset)", line):
            yield f"{table}.{key[1]}"


def test_settings():
    """Keys, variables and options that are named are those of the program; `*` stands for any end."""
    keys = set(known_keys())
    assert len(keys) > 40
    for name, text in DOCUMENTS.items():
        for key in re.findall(r"`((?:broker|events|state|metrics|http|log)\.[a-z_.*]+)(?: = [^`]*)?`", prose(text)):
            ours = any(known.startswith(key[:-1]) for known in keys) if key.endswith("*") else key in keys
            assert ours, (name, key)
        for variable in re.findall(r"\bFLOWER_EXPORTER_[A-Z]+__[A-Z_]+", text):
            assert variable.removeprefix("FLOWER_EXPORTER_").replace("__", ".").lower() in keys, (name, variable)
    for row in re.findall(r"^\| (`.*?) \|", section("Settings"), re.M):
        first, *others = spans(row)
        assert all(f"{first.rpartition('.')[0]}.{other}" in keys or other in keys for other in others), row
    usage = re.search(r"^    flower-exporter .*(?:\n .*)*", README, re.M)[0]
    options = re.findall(r"^ +(-[\w-]+)", Run("--help").out, re.M)
    assert sorted(re.findall(r"\[(-[\w-]+)", usage)) == sorted(options)


def test_metrics(services):
    """Every series of ours that a document names is served."""
    told = services.exporter(None, {"metrics": {"self_metrics": True}, "broker": {"url": "redis://127.0.0.1:1/0"}}).text()
    families = set(re.findall(r"^# TYPE (\S+)", told, re.M))
    for name, text in DOCUMENTS.items():
        for series in set(re.findall(r"(?<![\w:/.-])flower_[a-z_]+[a-z](?![\w:*.])", text)) - {"flower_exporter"}:
            assert {series, re.sub("_(bucket|sum|count)$", "", series)} & families, (name, series)


def sources():
    """The texts of the program, on one line each; … is what it fills in."""
    for path in sorted((ROOT / "src").rglob("*.rs")):
        text = re.sub(r"\\\n\s*", "", path.read_text()).replace('\\"', '"').replace("{OTHER}", "(other)")
        yield re.sub(r"\{[^{}\n]*\}", "…", text)


def quoted():
    """What the section on troubleshooting quotes: the first column, and sentences in the second one."""
    for first, second in re.findall(r"^\| (.*?) \| (.*) \|$", section("Troubleshooting"), re.M):
        yield from spans(first)
        yield from (span for span in spans(second) if span.count(" ") > 3 and " -" not in span)


def test_quoted_lines():
    """Every part of them is in the program."""
    said, lines = "\n".join(sources()), list(quoted())
    assert len(lines) > 35
    parts = [part.strip() for line in lines for part in line.split("…") if part.strip()]
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("url", ["redis://h", "sqs://", "redis://:a@b@h", "redis://h;x", "rediss://h", "sentinel://h"])
def test_told_at_the_start(services, url):
    """Ends with code 2 and a line that stands there: a port that is taken, and URLs that cannot be."""
    taken = services.exporter(ready=False).listening()
    env = {"FLOWER_EXPORTER_BROKER__TLS__CA_FILE": "/none"}
    line = Run("-b", url, "-l", f"127.0.0.1:{taken.port}", env=env).error_line()
    patterns = [".*".join(map(re.escape, text.split("…"))) for text in quoted()]
    assert any(re.search(pattern, line) for pattern in patterns) or "No such file or directory" in line, line


def test_told_of_the_broker(services):
    """Redis' own words, in italics, come in the line that stands there."""
    redis = services.redis(password="right")
    redis.client().execute_command("ACL", "SETUSER", "few", "on", ">few", "+auth", "+ping")
    for userinfo, port, word in [
        ("", free_port(), "Connection refused"),
        ("", redis.port, "NOAUTH"),
        (":wrong@", redis.port, "WRONGPASS"),
        ("few:few@", redis.port, "NOPERM"),
    ]:
        assert f"*{word}*" in section("Troubleshooting")
        exporter = services.exporter(None, {"broker": {"url": f"redis://{userinfo}127.0.0.1:{port}/0"}})
        line = rf"WARN cannot connect to the broker, trying again broker=.* error=.*{word}.* held_bytes=0"
        wait_until(lambda: re.search(line, exporter.log()), 10, exporter.log)  # noqa: B023


def test_examples():
    """TOML is accepted by the program, YAML is YAML."""
    file = directory("documents") / "block.toml"
    for text in DOCUMENTS.values():
        for block in blocks(text, "toml"):
            file.write_text(block)
            assert Run("-c", file, "--check-config").code == 0, block
        for block in blocks(text, "ya?ml"):
            list(yaml.safe_load_all(block))

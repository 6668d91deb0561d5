"""The structure that src/lib.rs promises: imports in one direction, short files, Linux-only code behind `cfg`, features."""

import json
import re
import subprocess

import pytest

from support.processes import ROOT

SRC = ROOT / "src"
#: From the bottom to the top. A directory imports from those below it and from its own layer.
LAYERS = [
    ["config", "celery", "tls", "observability", "inbox"],
    ["metrics", "state", "broker"],
    ["store", "ingest", "session", "http"],
    ["exporter"],
    ["cli"],
    ["lib", "main"],
]
MAX_LINES = 450


def sources():
    """{module path: text without its unit tests}, for example ("session", "reader")."""
    found = {}
    for path in SRC.rglob("*.rs"):
        module = path.relative_to(SRC).with_suffix("").parts
        if module[-1] == "tests":
            continue
        found[module[:-1] if module[-1] == "mod" else module] = re.split(r"^#\[cfg\(test\)\]\nmod tests", path.read_text(), flags=re.M)[0]
    return found


def uses(text):
    """The paths that `use` declarations and inline paths name, braces expanded."""
    text = re.sub(r"//.*", "", text)

    def expand(prefix, rest):
        rest = rest.strip()
        if "{" not in rest:
            yield prefix + re.sub(r"\s+as\s+\w+", "", rest)
            return
        head, _, inner = rest.partition("{")
        inner, depth, start = inner.rpartition("}")[0], 0, 0
        for at, character in enumerate(inner + ","):
            depth += (character == "{") - (character == "}")
            if character == "," and depth == 0:
                if inner[start:at].strip():
                    yield from expand(prefix + head.strip(), inner[start:at])
                start = at + 1

    for declared in re.findall(r"\buse\s+((?:crate|super|self)\b[^;]*);", text):
        yield from expand("", declared)
    yield from re.findall(r"\b(?:crate|super)(?:::\w+)+", re.sub(r"\buse\s[^;]*;", "", text))


def imports(modules):
    """{module: the modules that it imports}"""
    graph = {}
    for module, text in modules.items():
        graph[module] = set()
        for path in uses(text):
            parts = [part for part in path.replace(" ", "").split("::") if part]
            base = [] if parts[0] == "crate" else list(module)
            while parts and parts[0] in ("crate", "super", "self"):
                if parts[0] == "super":
                    base = base[:-1]
                parts = parts[1:]
            target = tuple(base + parts)
            while target and target not in modules:
                target = target[:-1]
            if target and target != module:
                graph[module].add(target)
    return graph


def cycles(graph):
    """The groups of nodes that import each other (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


@pytest.fixture(scope="module")
def graph():
    return imports(sources())


def test_directories_import_in_one_direction(graph):
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    assert {module[0] for module in graph} == set(layer), "every directory has a layer"
    upward = {
        (module[0], target[0])
        for module, targets in graph.items()
        for target in targets
        if layer[target[0]] > layer[module[0]]
    }
    assert upward == set()


def test_no_directory_or_file_imports_itself_through_others(graph):
    directories = {}
    for module, targets in graph.items():
        directories.setdefault(module[0], set()).update(target[0] for target in targets if target[0] != module[0])
    assert cycles(directories) == []
    # A mod.rs re-exports its children, and they may use what it defines: that is one module in several files.
    files = {
        module: {target for target in targets if module[: len(target)] != target} for module, targets in graph.items()
    }
    assert cycles(files) == []


def test_a_cycle_would_be_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert set(uses("use crate::a::{b, c::{D, e as f}};\nfn x() { crate::g::h(); }")) == {
        "crate::a::b",
        "crate::a::c::D",
        "crate::a::c::e",
        "crate::g::h",
    }


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in SRC.rglob("*.rs")
        if path.name != "tests.rs" and (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


LINUX_ONLY = re.compile(r"std::os::linux|/proc/|process_collector::ProcessCollector")


def test_linux_only_code_is_behind_cfg():
    """The attribute is on the statement, or a few lines above in the function that it guards."""
    unguarded = []
    for path in SRC.rglob("*.rs"):
        lines = [line.partition("//")[0] for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):
            if LINUX_ONLY.search(line) and not any('cfg(target_os = "linux")' in above for above in lines[max(0, number - 8) : number]):
                unguarded.append(f"{path.relative_to(ROOT)}:{number + 1}: {line.strip()}")
    assert unguarded == []


def cargo(*arguments):
    return subprocess.run(["cargo", *arguments, "--locked"], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def dependencies(*features):
    tree = cargo("tree", "--edges", "normal", "--prefix", "none", "--format", "{p}", *features)
    return {line.split()[0] for line in tree.splitlines() if line}


def test_the_library_without_cli_needs_no_crates_of_the_daemon():
    of_the_daemon = {"anyhow", "clap", "sd-notify", "signal-hook", "signal-hook-tokio", "tracing-subscriber"}
    assert of_the_daemon <= dependencies()
    assert of_the_daemon & dependencies("--no-default-features") == set()


def test_rust_version_is_not_below_that_of_a_dependency():
    def version(package):
        return [int(part) for part in (package["rust_version"] or "0").split(".")]

    packages = json.loads(cargo("metadata", "--format-version", "1"))["packages"]
    [own] = [package for package in packages if package["name"] == "flower-exporter"]
    above = {package["name"]: package["rust_version"] for package in packages if version(package) > version(own) + [0]}
    assert above == {}

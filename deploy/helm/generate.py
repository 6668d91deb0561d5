#!/usr/bin/env python3
"""Writes the generated parts of the chart: the table of values in its README, the schema of `config`, and the copies of the
rules and of the sidecar.

deploy/helm/generate.py           exits with 1 and names the files that are out of date
deploy/helm/generate.py --write   updates them

It needs PyYAML: run it with target/test-env/flower/bin/python.
"""

import json
import re
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHART = HERE / "flower-exporter"
BEGIN = "<!-- Generated from values.yaml: deploy/helm/generate.py --write -->\n"
END = "<!-- End of the generated part. -->\n"

#: The types in docs/configuration.md, which comes from the exporter's own schema.
TEXT, NUMBER = {"type": "string"}, {"type": "number"}
TYPES = {
    "URL": {"type": ["string", "array"], "items": TEXT},
    "address": {"type": "string", "pattern": ":[0-9]+$"},
    "boolean": {"type": "boolean"},
    "boolean or string": {"type": ["boolean", "string"]},
    "duration": {"type": ["string", "number"]},
    "integer": {"type": "integer"},
    "list of numbers": {"type": "array", "items": NUMBER},
    "list of strings": {"type": "array", "items": TEXT},
    "number": NUMBER,
    "path": TEXT,
    "size": {"type": ["string", "integer"]},
    "string": TEXT,
}


def table(properties):
    return {"type": ["object", "null"], "additionalProperties": False, "properties": properties}


def settings_schema():
    """The schema of `config`: every section and key of the exporter. `null` removes a default of the chart."""
    root = table({})
    page = (ROOT / "docs/configuration.md").read_text()
    for path, kind, meaning in re.findall(r"^\| `([\w.]+)`<br>\S+ \| (.*?) \| .* \| .*? \| (.*) \|$", page, re.M):
        *sections, key = path.split(".")
        at = root
        for section in sections:
            at = at["properties"].setdefault(section, table({}))
        accepted = TYPES[kind]
        types = accepted["type"] if isinstance(accepted["type"], list) else [accepted["type"]]
        at["properties"][key] = accepted | {"type": [*types, "null"], "description": meaning}
    return root | {"type": "object"}


def schema():
    text = (CHART / "values.schema.json").read_text()
    values = json.loads(text)
    values["properties"]["config"] = settings_schema()
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def rows(values, path, comments):
    """(path, default, description) of each value that has a description. It covers everything below the value."""
    for key, value in values.items():
        name = f"{path}{key}"
        if name in comments:
            nested = isinstance(value, dict) and any(other.startswith(f"{name}.") for other in comments)
            yield name, "" if nested else f"`{json.dumps(value, ensure_ascii=False)}`", comments[name]
        if isinstance(value, dict):
            yield from rows(value, f"{name}.", comments)


def descriptions(text):
    """{path: text} of the comments that begin with `# --`."""
    found, parents, comment = {}, [], None
    for line in text.splitlines():
        if match := re.match(r" *# -- (.*)", line):
            comment = match[1]
        elif match := re.match(r"( *)([\w-]+):", line):
            parents = [*parents[: len(match[1]) // 2], match[2]]
            if comment:
                found[".".join(parents)], comment = comment, None
    return found


def readme():
    text = (CHART / "README.md").read_text()
    values = (CHART / "values.yaml").read_text()
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for name, default, meaning in rows(yaml.safe_load(values), "", descriptions(values)):
        lines.append(f"| `{name}` | {default} | {meaning} |")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after


SIDECAR = """\
# Values for the chart of your workers, if it has values of these names: an exporter in every worker's pod, for that worker
# only. Start the workers with -E. Generated from deploy/kubernetes/sidecar/sidecar.yaml, whose comments explain each part.
"""


def sidecar():
    pod = yaml.safe_load((ROOT / "deploy/kubernetes/sidecar/sidecar.yaml").read_text())["spec"]["template"]
    containers = [one | {"image": "registry.example.com/flower-exporter:0.1.0"} for one in pod["spec"]["initContainers"]]
    values = {"podLabels": pod["metadata"]["labels"], "initContainers": containers, "extraVolumes": pod["spec"]["volumes"]}
    return SIDECAR + yaml.safe_dump(values, sort_keys=False)


def outputs():
    """{path: text} of everything that is generated. `None` for a file that must not exist."""
    sources = sorted((ROOT / "deploy/prometheus").glob("flower*.*.yml"))
    rules = {CHART / "rules" / path.name: path.read_text() for path in sources}
    return {
        CHART / "README.md": readme(),
        CHART / "values.schema.json": schema(),
        CHART / "examples/sidecar.yaml": sidecar(),
        **dict.fromkeys((CHART / "rules").glob("*")),
        **rules,
    }


def main(arguments):
    if arguments not in ([], ["--write"]):
        sys.exit(__doc__)
    outdated = {path: text for path, text in outputs().items() if (path.read_text() if path.exists() else None) != text}
    for path, text in outdated.items():
        if not arguments:
            print(f"{path.relative_to(ROOT)} is out of date: run deploy/helm/generate.py --write", file=sys.stderr)
        elif text is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    sys.exit(1 if outdated and not arguments else 0)


if __name__ == "__main__":
    main(sys.argv[1:])

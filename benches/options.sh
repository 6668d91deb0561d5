#!/usr/bin/env bash
# Measures what the options cost that are off by default: instructions with valgrind, and resident memory. Prints a table.
# `--write` also saves it in benches/RESULTS.md. It takes five minutes, plus the build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
. benches/count.sh

# Memory per label set: with 20,000 of them, and with 50.
per_label_set() { echo $((($("$binary" --memory "$1" 20000) - $("$binary" --memory "$1" 50)) / 19950)); }

default=$(per_item ingest-default) all=$(per_item ingest-all)
text=$(per_item scrape-text) protobuf=$(per_item scrape-protobuf)
table=$(cat <<END
# Options

- $(date -u '+%Y-%m-%d %H:%M UTC'), \`benches/options.sh${*:+ $*}\`
- $(git rev-parse --short=12 HEAD)

All options: \`metrics.native_histogram_bucket_factor = 1.1\`, \`metrics.exemplars\` and \`metrics.zero_first\`. Worker groups cost
nothing for an event. Each label set has 80 tasks, with runtimes from 10 ms to 1 s.

| | default | all options | ratio |
| --- | ---: | ---: | ---: |
| ingest, instructions per event | $default | $all | $(ratio "$all" "$default") |
| memory of a label set, bytes | $(per_label_set default) | $(per_label_set all) | |

| scrape of 20,000 label sets with all options | text | protobuf | ratio |
| --- | ---: | ---: | ---: |
| instructions per label set | $text | $protobuf | $(ratio "$protobuf" "$text") |
END
)
echo "$table"
[ "${1-}" != --write ] || PYTHONPATH=benches/end_to_end python3 -B -c 'import sys, report; report.save(sys.argv[1])' "$table"

#!/usr/bin/env bash
# Measures what the options cost that are off by default: instructions with valgrind, resident memory, and the time of scrapes.
# Prints tables. `--write` also saves them in benches/RESULTS.md. It takes three minutes, plus the build.
# `--write` needs tests/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
. benches/count.sh

per_label_set() { echo $((($("$binary" --memory "$1" 30000) - $("$binary" --memory "$1" 10000)) / 20000)); }

default=$(per_item ingest-default) all=$(per_item ingest-all)
read -r text protobuf < <("$binary" --scrapes default)
read -r text_all protobuf_all < <("$binary" --scrapes all)
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

| CPU of a scrape of 20,000 label sets, ms | text | protobuf | ratio |
| --- | ---: | ---: | ---: |
| default | $text | $protobuf | $(ratio "$protobuf" "$text") |
| all options | $text_all | $protobuf_all | $(ratio "$protobuf_all" "$text_all") |
END
)
echo "$table"
[ "${1-}" != --write ] || PYTHONPATH=benches/end_to_end:tests/system target/test-env/flower/bin/python -B -c 'import sys, report; report.save(sys.argv[1])' "$table"

#!/usr/bin/env bash
# Measures what the options cost that are off by default: instructions with valgrind, the time of scrapes, and the memory of a
# running exporter. Prints tables. `--write` also saves them in benches/RESULTS.md. It takes four minutes, plus the builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
. benches/count.sh

. benches/end_to_end/prepare.sh

default=$(per_item ingest-default) all=$(per_item ingest-all)
read -r text protobuf < <("$binary" --scrapes default)
memory=$("$python" -B benches/end_to_end/options.py)
read -r text_all protobuf_all < <("$binary" --scrapes all)
table=$(cat <<END
# Options

- $(date -u '+%Y-%m-%d %H:%M UTC'), \`benches/options.sh${*:+ $*}\`
- $(git rev-parse --short=12 HEAD)

All options: \`metrics.native_histogram_bucket_factor = 1.1\`, \`metrics.exemplars\` and \`metrics.zero_first\`. Worker groups cost
nothing for an event. Each label set has 80 tasks, with runtimes from 10 ms to 1 s.

$memory

| | default | all options | ratio |
| --- | ---: | ---: | ---: |
| ingest, instructions per event | $default | $all | $(ratio "$all" "$default") |

| CPU of a scrape of 20,000 label sets, ms | text | protobuf | ratio |
| --- | ---: | ---: | ---: |
| default | $text | $protobuf | $(ratio "$protobuf" "$text") |
| all options | $text_all | $protobuf_all | $(ratio "$protobuf_all" "$text_all") |
END
)
echo "$table"
[ "${1-}" != --write ] || PYTHONPATH=benches/end_to_end:tests/system "$python" -B -c 'import sys, report; report.save(sys.argv[1])' "$table"

#!/usr/bin/env bash
# Counts instructions per event (decode, ingest) and per line of a scrape (render) with valgrind, and compares them with
# benches/instructions.txt. An increase of more than 3% fails. `--write` saves the figures of this run instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
committed=benches/instructions.txt

. benches/count.sh

figures=$(for stage in decode ingest render; do echo "$stage $(per_item $stage)"; done)
if [ "${1-}" = --write ]; then
    { sed -n '/^#/p' "$committed"; echo "$figures"; } >"$committed.new"
    mv "$committed.new" "$committed"
    cat "$committed"
    exit
fi
failed=0
while read -r stage now; do
    before=$(awk -v stage="$stage" '$1 == stage { print $2 }' "$committed")
    verdict=ok
    if [ -z "$before" ] || [ $((now * 100)) -gt $((before * 103)) ]; then verdict="INCREASED by more than 3%" failed=1; fi
    printf '%-8s %6s instructions, committed %6s: %s\n' "$stage" "$now" "${before:-none}" "$verdict"
done <<<"$figures"
if [ $failed = 1 ]; then
    echo "If the increase is justified, save the new figures: benches/instructions.sh --write" >&2
fi
exit $failed

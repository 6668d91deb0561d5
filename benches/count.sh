# shellcheck shell=bash
# Sourced by the scripts that count instructions: builds the benchmark of the stages, and defines per_item and ratio.

command -v valgrind >/dev/null || { echo "valgrind not found: run apt-get install valgrind as root" >&2; exit 1; }
built=$(cargo bench --locked --bench stages --no-run --message-format=json-render-diagnostics)
binary=$(grep -o '"executable":"[^"]*stages[^"]*"' <<<"$built" | tail -n 1 | cut -d'"' -f4)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Prints the number of items in a round, then the instructions of the whole run.
run() {
    valgrind --tool=cachegrind --cachegrind-out-file=/dev/null --log-file="$log" "$binary" --count "$1" "$2" | tr '\n' ' '
    grep -oP 'I +refs: +\K[0-9,]+' "$log" | tr -d ,
}

# Instructions for each item of a stage, from the difference between three rounds and one.
per_item() {
    local size few many
    read -r size few < <(run "$1" 1)
    read -r _ many < <(run "$1" 3)
    echo $(((many - few) / 2 / size))
}

ratio() { awk -v this="$1" -v that="$2" 'BEGIN { printf "%.2f", this / that }'; }

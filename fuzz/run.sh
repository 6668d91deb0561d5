#!/usr/bin/env bash
# Runs the fuzz targets: fuzz/run.sh [SECONDS] [TARGET...]
# The default is 20 seconds per target and all targets; 0 runs only the seeds and the corpus. Starts from the seeds and
# from the corpus that earlier runs left in fuzz/corpus. Fails on any finding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec </dev/null

cargo_fuzz=0.13.2
# cargo-fuzz needs rustc options that only nightly accepts. This makes stable accept them.
export RUSTC_BOOTSTRAP=1
# A backtrace takes ten seconds with AddressSanitizer. To get one, run the finding again by hand.
export RUST_BACKTRACE=0

say() { printf '[fuzz %4ss] %s\n' "$SECONDS" "$*"; }
die() { say "$*" >&2; exit 1; }

seconds=20
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    seconds=$1
    shift
fi
targets=("$@")
if [ $# = 0 ]; then
    for source in fuzz_targets/*.rs; do targets+=("$(basename "$source" .rs)"); done
fi
for target in "${targets[@]}"; do
    [ -f "fuzz_targets/$target.rs" ] || die "unknown target $target: expected one of $(cd fuzz_targets && echo *.rs | sed 's/\.rs//g')"
done

command -v cargo >/dev/null || die "cargo not found: install a Rust toolchain, for example from https://rustup.rs"
command -v c++ >/dev/null || die "C++ compiler not found (libFuzzer needs it): run apt-get install g++ as root"
if ! cargo fuzz --version >/dev/null 2>&1; then
    say "cargo install cargo-fuzz (a minute or two)"
    cargo install cargo-fuzz --version "$cargo_fuzz" --locked --quiet
fi

logs=target/logs
mkdir -p "$logs"
say "building (several minutes the first time)"
cargo fuzz build -O 2>"$logs/build.log" || { cat "$logs/build.log" >&2; die "failed to build the targets"; }

# A small stack makes recursion that grows with the input overflow.
ulimit -s 1024

# Prints the last value of a field in a target's log.
last_value() { grep -oP "$2\K[0-9]+" "$logs/$1.log" | tail -n 1 || true; }

rows=() failed=()
for target in "${targets[@]}"; do
    say "$target"
    options=(-timeout=20 -max_len=20000 -malloc_limit_mb=32 -rss_limit_mb=1024 -print_final_stats=1)
    if [ "$seconds" = 0 ]; then options+=(-runs=0); else options+=("-max_total_time=$seconds"); fi
    if [ -f "dictionaries/$target.dict" ]; then options+=("-dict=$PWD/dictionaries/$target.dict"); fi
    mkdir -p "corpus/$target"
    result=ok
    if ! cargo fuzz run -O "$target" "$PWD/corpus/$target" "$PWD/seeds/$target" -- "${options[@]}" >"$logs/$target.log" 2>&1; then
        result=FOUND
        failed+=("$target")
        grep -a -A 20 -m 1 -E "panicked at|ERROR: |memory allocation of" "$logs/$target.log" >&2 || true
        tail -n 30 "$logs/$target.log" >&2
    fi
    executions=$(last_value "$target" 'stat::number_of_executed_units: +')
    rows+=("$(printf '%-12s %12s %8s %9s %9s %7s  %s' "$target" "${executions:-?}" \
        "$(last_value "$target" 'stat::average_exec_per_sec: +')" "$(last_value "$target" 'cov: ')" "$(last_value "$target" 'ft: ')" \
        "$(last_value "$target" 'corp: ')" "$result")")
done

printf '\n%-12s %12s %8s %9s %9s %7s\n' target executions per_sec edges features corpus
printf '%s\n' "${rows[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    die "findings in ${failed[*]}: see fuzz/target/logs and fuzz/artifacts"
fi

#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: deploy/quickstart.sh [--once] [--port PORT] [--help]

Demonstrates flower-exporter on this machine. Starts a private Redis, a sample
Celery worker without -E, the exporter and a stream of tasks. Shows the six metrics
and their URL until Ctrl-C. Then stops and removes everything it started.

  --once   print the six metrics as soon as all of them have samples, then exit
           with 0; exit with 1 if that takes more than 60 seconds
  --port   port of the exporter, for example 9555, which the example Prometheus
           configuration scrapes; default: a free port
  --help   print this text

Environment: FLOWER_EXPORTER_BIN=PATH uses that binary instead of building one.
Missing packages are installed with apt (as root, or through sudo). Python packages
and the build go to target/. A Redis already running on this machine is not touched.
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
app=$root/deploy/quickstart
venv=$root/target/quickstart/venv
python=$venv/bin/python
bin=${FLOWER_EXPORTER_BIN:-}
PATH=$PATH:${HOME:-/root}/.cargo/bin
deadline=60
tmp=
pids=() names=() # running processes, in start order

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'quickstart.sh: %s\n' "$@" >&2
    exit 1
}

logs() { # [NAME]: prints the end of its log, or of every log
    local log
    for log in "$tmp/"${1:-*}.log; do
        if [[ -s $log ]]; then printf -- '--- %s\n' "${log##*/}" && tail -n 15 -- "$log"; fi
    done >&2
}

# --- processes ---------------------------------------------------------------------

# Each process runs in its own process group, so that the terminal's Ctrl-C does not reach
# it and cleanup controls the order of shutdown. If this script gets SIGKILL, they get SIGTERM.
spawn() { # NAME COMMAND...
    setsid setpriv --pdeathsig TERM -- "${@:2}" </dev/null 9>&- &
    pids+=($!) names+=("$1")
}

start() { spawn "$@" >"$tmp/$1.log" 2>&1; }

running() { kill -0 "$1" 2>/dev/null; }

stop() { # PID: sends SIGTERM, then kills what remains of its process group
    local deadline_at=$((SECONDS + 5))
    kill -TERM "$1" 2>/dev/null
    while running "$1" && ((SECONDS < deadline_at)); do sleep 0.05; done
    kill -KILL -- "-$1" 2>/dev/null
    running "$1" && kill -KILL "$1"
    wait "$1" 2>/dev/null
}

forget_last() { unset 'pids[-1]' 'names[-1]'; }

cleanup() {
    local status=$? i
    set +e
    trap '' INT TERM HUP PIPE
    ((${#pids[@]} == 0)) || say "stopping: ${names[*]}"
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do stop "${pids[i]}"; done
    [[ -z $tmp ]] || rm -rf -- "$tmp"
    exit "$status"
}

# Long-running commands run in the background, because bash handles a signal only between
# two commands, but immediately while it is in wait.
run() { # NAME COMMAND...
    local status=0
    spawn "$@"
    wait "${pids[-1]}" || status=$?
    forget_last
    return "$status"
}

# Starts a server on a port that the kernel chose, and sets $port. Retries with another port if another process takes
# the first one, but never replaces a requested port ($wanted_port). @PORT in COMMAND is replaced by the port.
# READY is a function that takes the process id.
serve() { # NAME READY COMMAND...
    local name=$1 ready=$2 deadline_at try
    shift 2
    for try in 1 2 3 4 5; do
        port=${wanted_port:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
        start "$name" "${@//@PORT/$port}"
        deadline_at=$((SECONDS + 20))
        while running "${pids[-1]}" && ((SECONDS < deadline_at)); do
            if "$ready" "${pids[-1]}" && running "${pids[-1]}"; then return; fi
            sleep 0.05
        done
        if [[ -n $wanted_port ]] || running "${pids[-1]}" || ! grep -qi 'in use' "$tmp/$name.log"; then break; fi
        say "another process took port $port; trying another port ($try of 5)"
        forget_last
    done
    logs "$name"
    fail "$name did not start; see its log above"
}

redis_ready() { [[ $(redis-cli -p "$port" info server 2>/dev/null) == *process_id:$1[^0-9]* ]]; }

exporter_ready() { (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

await_line() { # NAME PATTERN SECONDS: waits until a line in NAME's log matches
    local deadline_at=$((SECONDS + $3))
    until grep -q -- "$2" "$tmp/$1.log"; do
        check_running
        ((SECONDS < deadline_at)) || return 1
        sleep 0.1
    done
}

check_running() {
    local i
    for i in "${!pids[@]}"; do
        if ! running "${pids[i]}"; then
            logs "${names[i]}"
            fail "${names[i]} exited; see its log above"
        fi
    done
}

# --- dependencies ------------------------------------------------------------------

# Celery needs Python 3.10 or later. Debian ships ensurepip in python3-venv.
find_python() {
    local candidate
    for candidate in python3 /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# Debian ships the server binary in redis-tools and the service in redis-server.
# Installing only redis-tools starts no service, neither now nor at the next boot.
find_redis() { command -v redis-cli && { command -v redis-server || command -v redis-check-rdb; }; } >/dev/null

install_packages() {
    local packages=() sudo=() get=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
    find_redis || { packages+=(redis-tools) && say "missing: Redis, the broker for this demonstration (package redis-tools)"; }
    find_python >/dev/null || { packages+=(python3-venv) && say "missing: Python with venv, needed to install Celery (package python3-venv)"; }
    [[ -n $bin ]] || command -v cc >/dev/null ||
        { packages+=(gcc libc6-dev) && say "missing: a C compiler, needed to link the exporter (packages gcc, libc6-dev)"; }
    ((${#packages[@]})) || return 0
    command -v apt-get >/dev/null ||
        fail "apt-get not found: install ${packages[*]}, or their equivalents on this system, and run this script again"
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "not root, and sudo not found: run 'apt-get install ${packages[*]}' as root"
        sudo=(sudo)
    fi
    say "installing ${packages[*]} with ${sudo[*]:+sudo }apt-get (about a minute)"
    # Runs in the foreground: sudo may prompt on the terminal, and apt must not be interrupted.
    "${sudo[@]}" "${get[@]}" update >"$tmp/apt.log" 2>&1 9>&- || say "apt-get update failed; using the existing package lists"
    "${sudo[@]}" "${get[@]}" install -y --no-install-recommends "${packages[@]}" >>"$tmp/apt.log" 2>&1 9>&- ||
        { logs apt; fail "apt-get failed to install ${packages[*]}: see above; without network or sudo, install them another way"; }
    find_redis || fail "redis-tools does not contain redis-cli and redis-check-rdb: install redis-server"
    find_python >/dev/null || fail "Python is older than 3.10 or has no venv: put a newer python3 on PATH"
}

install_celery() {
    [[ -x $python ]] && cmp -s "$app/requirements.txt" "$venv/installed" && "$python" -c 'import celery, redis' 2>/dev/null && return
    say "installing Celery into target/quickstart/venv with pip (about half a minute)"
    if ! { run venv "$(find_python)" -m venv --clear "$venv" && run pip "$python" -m pip install -r "$app/requirements.txt"; } \
        >"$tmp/pip.log" 2>&1; then
        logs pip
        fail "pip failed to install Celery: see above; it needs PyPI, or a mirror set with PIP_INDEX_URL"
    fi
    cp "$app/requirements.txt" "$venv/installed"
}

build() {
    local target=${CARGO_TARGET_DIR:-$root/target}
    if [[ -n $bin ]]; then return; fi
    say "building the exporter: cargo build --release --locked (several minutes the first time, then seconds)"
    cd -- "$root" # for rust-toolchain.toml and .cargo/config.toml
    run cargo cargo build --release --locked --target-dir "$target" >&2 ||
        fail "the build failed: see above; it needs Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or later ('rustup update stable') and access to crates.io"
    bin=$target/release/flower-exporter
}

prepare() {
    mkdir -p "$root/target/quickstart" || fail "cannot write to $root/target: run this script as its owner"
    exec 9>"$root/target/quickstart/lock" || fail "cannot write to $root/target/quickstart: run this script as its owner"
    flock --nonblock 9 || say "another quickstart is installing or building here; waiting for it"
    until flock --nonblock 9; do sleep 0.5; done # a polling loop instead of a blocking call, so that signals are handled
    install_packages
    install_celery
    build
    rm -f -- "$tmp"/*.log
    exec 9>&-
}

# --- the demonstration -------------------------------------------------------------

demonstrate() {
    local url broker name
    export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TMPDIR=$tmp
    say "starting Redis, a Celery worker with 2 processes and without -E, the exporter and tasks"
    ln -s "$(command -v redis-server || command -v redis-check-rdb)" "$tmp/redis-server"
    serve redis redis_ready "$tmp/redis-server" --port @PORT --bind 127.0.0.1 --save '' --appendonly no --dir "$tmp"
    broker=redis://127.0.0.1:$port/0
    export CELERY_BROKER_URL=$broker
    start worker "$python" -m celery --workdir "$app" -A tasks worker --concurrency 2 --hostname quickstart@%h --loglevel INFO
    await_line worker ' ready\.' 30 || { logs worker; fail "the worker was not ready within 30 seconds; see its log above"; }
    : >"$tmp/exporter.toml" # ignore the configuration in /etc and the environment
    for name in "${!FLOWER_EXPORTER_@}"; do unset "$name"; done
    wanted_port=$exporter_port
    serve exporter exporter_ready "$bin" -c "$tmp/exporter.toml" -b "$broker" -l 127.0.0.1:@PORT
    url=http://127.0.0.1:$port/metrics
    # The exporter's broadcast turns on the worker's events. If it never arrives, metrics will be missing below.
    await_line worker 'enabled by remote' 10 || say "the worker has not received enable_events yet; continuing anyway"
    start tasks "$python" "$app/traffic.py"
    say "running: broker $broker, metrics at $url"

    if [[ -z $once ]]; then
        while check_running; do
            "$python" "$app/show.py" "$url" || (($? < 128)) || exit 1 # killed by a signal: its output has no reader
            sleep 2
        done
    fi
    say "waiting until all six metrics have samples (at most $deadline seconds)"
    deadline=$((SECONDS + deadline))
    until "$python" "$app/show.py" "$url" --once 2>"$tmp/missing"; do
        check_running
        if ((SECONDS >= deadline)); then
            logs
            fail "not all six metrics appeared in time; $(<"$tmp/missing")"
        fi
        sleep 0.3
    done
}

once='' exporter_port='' wanted_port=''
wrong() { printf 'quickstart.sh: %s\n\n' "$1" >&2 && usage >&2 && exit 2; }
while (($#)); do
    case $1 in
    --once) once=yes ;;
    --port)
        if ! [[ ${2-} =~ ^[1-9][0-9]{0,4}$ ]] || (($2 > 65535)); then
            wrong "--port: expected a number from 1 to 65535, not '${2-}'"
        fi
        exporter_port=$2
        shift
        ;;
    -h | --help) usage && exit ;;
    *) wrong "unknown option: $1" ;;
    esac
    shift
done
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
if [[ -n $bin ]]; then
    [[ -x $bin && -f $bin ]] || fail "FLOWER_EXPORTER_BIN=$bin is not a program"
    bin=$(realpath -- "$bin")
elif ! command -v cargo >/dev/null; then
    fail "there is no cargo: install Rust (https://rustup.rs), or set FLOWER_EXPORTER_BIN to a built exporter" \
        "if cargo is installed for your own account only, run this script without sudo; it calls sudo where apt needs it"
fi
tmp=$(mktemp -d "${TMPDIR:-/tmp}/flower-quickstart.XXXXXX") || fail "cannot create a temporary directory in ${TMPDIR:-/tmp}"
prepare
demonstrate

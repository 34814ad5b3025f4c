#!/usr/bin/env bash
# Starts an origin and the gate, calls it as an agent would, and shows the receipt verified. Everything it makes is in
# a directory of its own, and everything that it starts is ended.
set -euo pipefail
cd "$(dirname "$0")/.."
gate=$1
python=$2

address=127.0.71.76
work=$(mktemp -d /tmp/latchgate-demo.XXXXXX)
# The confined agent runs as nobody in particular and has to get there.
agent=$(mktemp -d /tmp/latchgate-agent.XXXXXX)
chmod 0755 "$agent"
pids=()
finish() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$work" "$agent"
}
trap finish EXIT

wait_for() { # a test, what it is, a log to show when it does not come
    for _ in $(seq 100); do
        if eval "$1"; then return; fi
        sleep 0.1
    done
    echo "demo: $2 did not start:" >&2
    cat "$3" >&2
    exit 1
}

"$python" demo/origin.py "$work" "$address" >"$work/origin.log" 2>&1 &
pids+=($!)
wait_for "test -e $work/origin.ready" "the origin" "$work/origin.log"

cat >"$work/latchgate.toml" <<TOML
instance = "demo"
state_dir = "$work/state"

# The built-in actions, one that goes round the proxy, and a name that http_fetch may reach.
[definitions]
builtin = true
manifests = "$PWD/demo/manifests"

[definitions.allowed_domains]
http_fetch = ["origin.demo.test"]

[egress]
ca_file = "$work/ca.pem"
allow_addresses = ["$address/32"]

[egress.hosts]
"origin.demo.test" = ["$address"]
TOML

# The sockets of the demo are its own: a gate that runs on this machine is left alone.
export XDG_RUNTIME_DIR="$work/run"
mkdir -m 0700 "$XDG_RUNTIME_DIR"
cat >>"$work/latchgate.toml" <<TOML

[operators]
socket = "$work/operator/operator.sock"

[[listeners]]
name = "agent"
path = "$XDG_RUNTIME_DIR/latchgate/gate.sock"
principal = "uid-$(id -u)"
peers = { "$(id -u)" = "uid-$(id -u)" }

# What the agent itself is held to: nothing but the gate. It sees the client's packages and this demo.
[profiles.agent]
read_only = ["$agent/packages"]
TOML

"$gate" up --config "$work/latchgate.toml" 2>"$work/gate.log" &
pids+=($!)
wait_for "test -S $XDG_RUNTIME_DIR/latchgate/gate.sock" "the gate" "$work/gate.log"

"$python" demo/agent.py "$work/receipt" || { cat "$work/gate.log" >&2; exit 1; }

printf '\n== The receipt of that last call: what the kernel counted, and what it refused\n'
"$gate" receipts show --ledger "$work/state/ledger" "$(cat "$work/receipt")" --evidence
# With the agent's own process held too, there is no way around the gate: it reaches the gate's socket and nothing else.
cp -r "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" "$agent/packages"
cp demo/confined.py "$agent/"
minor='import sys; print(sys.version_info[:2])'
if [ "$("$python" -c "$minor")" = "$(/usr/bin/python3 -c "$minor" 2>/dev/null)" ]; then
    (cd "$agent" && PYTHONPATH="$agent/packages" "$gate" confine --socket "$work/operator/operator.sock" \
        --key "$work/state/operator.json" --profile agent -- /usr/bin/python3 confined.py "$address" </dev/null)
else
    printf '\n== The confined agent is left out: the client was installed for another Python than /usr/bin/python3\n'
fi
printf '\n== The whole ledger, verified offline with nothing but the public keys\n'
"$gate" receipts verify --ledger "$work/state/ledger" --keys "$work/state/ledger/receipt-keys.json"

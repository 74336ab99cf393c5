#!/usr/bin/env bash
# The switch of the zeroizing allocator: the program as it is built by default says nothing of it, and one that was built
# without says at its start that freed memory is not wiped. Usage: allocator.sh PROGRAM
# PROGRAM is built anew, without; the next build puts it back.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/scripts/lib.sh

readonly PROGRAM=$PWD/$1 WARNING='freed memory is not wiped'
folder=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap cleanup EXIT

# What a start and a clean end say.
log_of() {
    "$PROGRAM" serve --dev --listen 127.0.0.1:0 --data-dir "$folder/$1" >"$folder/log" 2>&1 &
    server=$!
    await_ready "$server" "$folder/log"
    kill "$server"
    wait "$server"
    server=
}

log_of with
if grep -q "$WARNING" "$folder/log"; then
    echo "the default build warns of the allocator" >&2
    exit 1
fi
# With an example, and for the whole workspace: so the dependencies are those that the tests were built with.
cargo build --locked --workspace --no-default-features --bin keyfold --example client_reqwest
log_of without
if ! grep -q "$WARNING" "$folder/log"; then
    cat "$folder/log" >&2
    echo "no warning of the allocator" >&2
    exit 1
fi

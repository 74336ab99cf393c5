#!/usr/bin/env bash
# scripts/run, as somebody meets it who has just cloned the project, but for the wait: it starts the service with the
# flags it was given, and the command that it shows encrypts. Usage: run.sh PROGRAM
# Not shown: that the release profile builds. A cargo of this script's own gives the program that is built already.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/scripts/lib.sh

readonly PROGRAM=$PWD/$1 FOLDER=$PWD/target/scripts-run
rm -rf "$FOLDER"
mkdir -p "$FOLDER/bin"
cat >"$FOLDER/bin/cargo" <<EOF
#!/bin/sh
[ "\$1" = --version ] && exec "$(command -v cargo)" --version
[ "\$*" = "run --release --locked --quiet -- serve --dev --listen 127.0.0.1:0 --data-dir target/scripts-run/data" ] || exit 2
shift 5
exec "$PROGRAM" "\$@"
EOF
chmod +x "$FOLDER/bin/cargo"
: >"$FOLDER/log"
server=
cleanup() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; }
trap cleanup EXIT

# What rustup installs is in the PATH already, and is not put in front of this.
PATH=$FOLDER/bin:$PATH:${HOME:-}/.cargo/bin scripts/run --listen 127.0.0.1:0 --data-dir target/scripts-run/data 2>"$FOLDER/log" &
server=$!
await_ready "$server" "$FOLDER/log"
shown=$(sed -n 's/^ *\(curl .*\)$/\1/p' "$FOLDER/log")
answer=$(sh -c "$shown")
case $answer in
    '{"ciphertext":"kf1.'*) ;;
    *) echo "not an envelope: $answer" >&2; exit 1 ;;
esac
kill "$server"
wait "$server"
server=
echo "scripts/run starts, and shows a command that encrypts" >&2

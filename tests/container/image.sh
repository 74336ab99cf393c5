#!/usr/bin/env bash
# What the last stage of the Dockerfile holds, without a container engine: the program, its C library, an empty data
# folder and nothing else, with a read-only root, as user 65532 without capabilities in effect: it gets ready, its health check
# succeeds, its API answers, and it ends at SIGTERM. Needs root: chroot and mounts.
# Not shown: that the image builds, and that the base image has the same libraries.
set -euo pipefail

readonly PROGRAM=$1 PORT=${2:-18600} USER_ID=65532
if [ -z "${IN_NAMESPACE:-}" ]; then
    # Mounts of its own: whatever happens here, nothing remains mounted.
    IN_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

root=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    umount "$root/var/lib/keyfold" "$root" 2>/dev/null || true
    rmdir "$root"
}
trap cleanup EXIT

mount -t tmpfs -o mode=0755 none "$root"
install -D "$PROGRAM" "$root/usr/bin/keyfold"
ldd "$PROGRAM" | grep -o '/[^ ]*' | while read -r library; do install -D "$library" "$root$library"; done
install -d "$root/var/lib/keyfold"
mount -o remount,ro "$root"
mount -t tmpfs -o "mode=0700,uid=$USER_ID,gid=$USER_ID" none "$root/var/lib/keyfold"

inside() {
    exec env -i KEYFOLD_DATA_DIR=/var/lib/keyfold "KEYFOLD_LISTEN=127.0.0.1:$PORT" \
        /usr/bin/setpriv --no-new-privs \
        /usr/sbin/chroot --userspec="$USER_ID:$USER_ID" "$root" /usr/bin/keyfold "$@"
}

(inside serve --dev) &
server=$!
for _ in $(seq 100); do
    (inside health) 2>/dev/null && break
    kill -0 "$server" || { echo "it has ended" >&2; exit 1; }
    sleep 0.1
done
(inside health)
grep -qE "^Uid:\s+$USER_ID\s" "/proc/$server/status"
grep -qE "^CapEff:\s+0+$" "/proc/$server/status"
key=$(cat "$root/var/lib/keyfold/dev-api-key")
curl -sf "http://127.0.0.1:$PORT/v1/encrypt" -H "Authorization: Bearer $key" --json '{"plaintext": "aGVsbG8="}' | grep -q '"kf1\.'
kill "$server"
wait "$server"
server=
if (inside health) 2>/dev/null; then echo "it still answers after SIGTERM" >&2; exit 1; fi
echo "the image's files are enough: ready, healthy, answering, and ended at SIGTERM" >&2

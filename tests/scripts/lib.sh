# shellcheck shell=bash
# What the scripts here share.

readonly SECS_MAX=60

# await_ready PID LOG: until the server says that it is ready; with what it has said, where it ends before or takes longer.
await_ready() {
    local until=$((SECONDS + SECS_MAX))
    until grep -q ' ready ' "$2"; do
        if ! kill -0 "$1" 2>/dev/null || [ "$SECONDS" -ge "$until" ]; then
            cat "$2" >&2
            exit 1
        fi
        sleep 0.2
    done
}

#!/usr/bin/env bash
# A field, a file and a batch with curl. Usage: curl.sh FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.
set -euo pipefail
file=$1

# The credential goes through a file descriptor: arguments are visible to every user of the machine.
call() {
    curl --silent --show-error --fail-with-body \
        --config <(printf 'header = "Authorization: Bearer %s"\n' "$KEYFOLD_API_KEY") "$@"
}
member() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# A field of a database row. The context binds the ciphertext to its row: it opens nowhere else.
context='{"table": "people", "column": "name", "row": "42"}'
plaintext=$(printf 'Ada Lovelace' | base64)
ciphertext=$(call "$KEYFOLD_URL/v1/encrypt" --json "{\"plaintext\": \"$plaintext\", \"context\": $context}" |
    member ciphertext)
field=$(call "$KEYFOLD_URL/v1/decrypt" --json "{\"ciphertext\": \"$ciphertext\", \"context\": $context}" |
    member plaintext | base64 --decode)
[ "$field" = "Ada Lovelace" ]

# A file of any size: --upload-file streams it, where --data-binary would read it into memory. The answer becomes the
# file only after its clean end: on a broken transfer curl fails, and the script ends before mv.
stream() {
    call --upload-file "$2" --request POST "$KEYFOLD_URL$1" --header 'Content-Type: application/octet-stream' \
        --header 'Keyfold-Context: name="report"' --header 'Expect:' --output "$3.part"
    mv "$3.part" "$3"
}
stream /v1/encrypt "$file" "$file.kf"
stream /v1/decrypt "$file.kf" "$file.out"
cmp "$file" "$file.out"

# A batch: each item has its own outcome, in order.
call "$KEYFOLD_URL/v1/encrypt/batch" --json '{"items": [
    {"ref": "row-1", "plaintext": "b25l", "context": {"row": "1"}},
    {"ref": "row-2", "plaintext": "no base64!"}]}' |
    python3 -c '
import json, sys
answer = json.load(sys.stdin)
assert answer["failed"] == 1, answer
assert answer["items"][0]["ciphertext"].startswith("kf1.")
assert answer["items"][1]["error"]["code"] == "malformed_request"'
echo "field, file and batch: done"

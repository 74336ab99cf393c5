"""A field, a file and a batch with requests. Usage: python_requests.py FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.

requests sends the whole body before it reads the answer. The service holds back an answer of up to 1 MiB, so that
files below that size go through like this; larger ones need a client that does both at once: python_aiohttp.py.
"""

import base64
import os
import sqlite3
import sys
import uuid
from contextlib import closing

import requests

FILE_BYTES_MAX = 1_000_000

url = os.environ["KEYFOLD_URL"]
session = requests.Session()
session.headers["Authorization"] = f"Bearer {os.environ['KEYFOLD_API_KEY']}"


def call(path, **body):
    response = session.post(url + path, json=body, timeout=60)
    if not response.ok:
        # application/problem+json: `code` is for programs, `retryable` says whether to try again.
        raise RuntimeError(response.json()["code"], response.json()["detail"])
    return response.json()


def field(database):
    database.execute("create table if not exists people (id text primary key, name text not null)")
    # The context binds the ciphertext to its place: it opens in no other row, and in no other column. The row's id is
    # made here, since a number that the database gives is not known yet when the field is encrypted.
    row = str(uuid.uuid4())
    context = {"table": "people", "column": "name", "row": row}
    sealed = call("/v1/encrypt", plaintext=base64.b64encode(b"Ada Lovelace").decode(), context=context)
    with database:
        database.execute("insert into people (id, name) values (?, ?)", (row, sealed["ciphertext"]))
    (stored,) = database.execute("select name from people where id = ?", (row,)).fetchone()
    opened = call("/v1/decrypt", ciphertext=stored, context=context)
    assert base64.b64decode(opened["plaintext"]) == b"Ada Lovelace"
    try:
        call("/v1/decrypt", ciphertext=stored, context={**context, "row": str(uuid.uuid4())})
    except RuntimeError as error:
        assert error.args[0] == "context_mismatch"
    else:
        raise AssertionError("a field opens in another row")


def stream(path, source, target):
    headers = {"Content-Type": "application/octet-stream", "Keyfold-Context": 'name="report"'}
    with open(source, "rb") as body, open(target + ".part", "wb") as part:
        with session.post(url + path, data=body, headers=headers, stream=True, timeout=60) as response:
            response.raise_for_status()
            # A broken transfer raises here, and the file never gets its name.
            for piece in response.iter_content(65536):
                part.write(piece)
    os.replace(target + ".part", target)


def batch():
    items = [
        {"ref": f"row-{n}", "plaintext": base64.b64encode(b"%d" % n).decode(), "context": {"row": str(n)}}
        for n in range(1000)
    ]
    answer = call("/v1/encrypt/batch", items=items)
    # Each item has its own outcome: "ciphertext", or "error" with a code.
    assert answer["failed"] == 0
    assert [item["ref"] for item in answer["items"]] == [item["ref"] for item in items]


def main(file):
    with closing(sqlite3.connect(file + ".db")) as database:
        field(database)
    batch()
    if os.path.getsize(file) > FILE_BYTES_MAX:
        sys.exit(f"{file} is larger than {FILE_BYTES_MAX} bytes: use python_aiohttp.py")
    stream("/v1/encrypt", file, file + ".kf")
    stream("/v1/decrypt", file + ".kf", file + ".out")
    print("field, file and batch: done")


main(sys.argv[1])

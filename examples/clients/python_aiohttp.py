"""A field, a file of any size, a batch and lines with aiohttp, which sends and receives at once.

Usage: python_aiohttp.py FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.
"""

import asyncio
import base64
import json
import os
import sqlite3
import sys
import uuid
from contextlib import closing

import aiohttp

URL = os.environ["KEYFOLD_URL"]
HEADERS = {"Authorization": f"Bearer {os.environ['KEYFOLD_API_KEY']}"}


async def call(session, path, **body):
    async with session.post(URL + path, json=body) as response:
        answer = await response.json(content_type=None)
        if not response.ok:
            raise RuntimeError(answer["code"], answer["detail"])
        return answer


async def field(session, database):
    database.execute("create table if not exists people (id text primary key, name text not null)")
    # The context binds the ciphertext to its place: it opens in no other row, and in no other column. The row's id is
    # made here, since a number that the database gives is not known yet when the field is encrypted.
    row = str(uuid.uuid4())
    context = {"table": "people", "column": "name", "row": row}
    sealed = await call(session, "/v1/encrypt", plaintext=base64.b64encode(b"Ada Lovelace").decode(), context=context)
    with database:
        database.execute("insert into people (id, name) values (?, ?)", (row, sealed["ciphertext"]))
    (stored,) = database.execute("select name from people where id = ?", (row,)).fetchone()
    opened = await call(session, "/v1/decrypt", ciphertext=stored, context=context)
    assert base64.b64decode(opened["plaintext"]) == b"Ada Lovelace"
    try:
        await call(session, "/v1/decrypt", ciphertext=stored, context={**context, "row": str(uuid.uuid4())})
    except RuntimeError as error:
        assert error.args[0] == "context_mismatch"
    else:
        raise AssertionError("a field opens in another row")


async def pieces(file):
    while piece := await asyncio.to_thread(file.read, 1 << 18):
        yield piece


async def stream(session, path, source, target):
    headers = {"Content-Type": "application/octet-stream", "Keyfold-Context": 'name="report"'}
    with open(source, "rb") as body, open(target + ".part", "wb") as part:
        async with session.post(URL + path, data=pieces(body), headers=headers) as response:
            response.raise_for_status()
            # A broken transfer raises here, and the file never gets its name.
            async for piece in response.content.iter_any():
                part.write(piece)
    os.replace(target + ".part", target)


async def lines(session):
    """Any number of items: each line is answered by a line, in order, while more are sent."""

    async def items():
        for n in range(10_000):
            yield json.dumps({"ref": str(n), "plaintext": base64.b64encode(b"%d" % n).decode()}).encode() + b"\n"

    headers = {"Content-Type": "application/x-ndjson"}
    expected = 0
    async with session.post(URL + "/v1/encrypt/batch", data=items(), headers=headers) as response:
        response.raise_for_status()
        async for line in response.content:
            answer = json.loads(line)
            assert answer["ref"] == str(expected) and "error" not in answer
            expected += 1
    assert expected == 10_000


async def batch(session):
    items = [{"ref": str(n), "plaintext": base64.b64encode(b"%d" % n).decode()} for n in range(1000)]
    answer = await call(session, "/v1/encrypt/batch", items=items)
    # Each item has its own outcome: "ciphertext", or "error" with a code.
    assert answer["failed"] == 0


async def main(file):
    # No total limit: a large file takes its time. Nothing for a minute is too long.
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(headers=HEADERS, timeout=timeout) as session:
        with closing(sqlite3.connect(file + ".db")) as database:
            await field(session, database)
        await batch(session)
        await lines(session)
        await stream(session, "/v1/encrypt", file, file + ".kf")
        await stream(session, "/v1/decrypt", file + ".kf", file + ".out")
    print("field, file and batch: done")


asyncio.run(main(sys.argv[1]))

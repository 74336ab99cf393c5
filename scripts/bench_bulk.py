"""Measures bulk work against a release build. Usage: bench_bulk.py KEYFOLD [--gib N] [--lines N]

The server's data segment is limited with setrlimit, so that a server that buffers dies instead of passing. curl streams
both ways, so that the client is not what is measured. Exits with 1 where a goal is missed.
"""

import argparse
import base64
import hashlib
import http.client
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

DATA_BYTES_MAX = 128 << 20
GROWTH_MB_MAX = 64
PIECE = 1 << 20


def main():
    options = argparse.ArgumentParser()
    options.add_argument("keyfold", type=Path)
    options.add_argument("--gib", type=float, default=4)
    options.add_argument("--lines", type=int, default=1_000_000)
    options = options.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.keyfold.resolve(), Path(folder))
        try:
            idle = server.memory_mb("VmRSS")
            print(f"memory when idle: {idle:.0f} MB; the server's data is limited to {DATA_BYTES_MAX >> 20} MiB")
            missed += large_object(server, int(options.gib * (1 << 30)))
            missed += slow_reader(server)
            missed += lines(server, options.lines)
            peak = server.memory_mb("VmHWM")
            print(f"peak memory of all this: {peak:.0f} MB, {peak - idle:.0f} MB above idle")
            if peak - idle > GROWTH_MB_MAX:
                missed.append(f"less than {GROWTH_MB_MAX} MB above idle")
        finally:
            server.stop()
        server = Server(options.keyfold.resolve(), Path(folder), limited=False)
        try:
            batches(server)
            beside_a_batch(server)
        finally:
            server.stop()
    for goal in missed:
        print(f"missed: {goal}")
    sys.exit(1 if missed else 0)


class Server:
    def __init__(self, binary, folder, limited=True):
        def limit():
            if limited:
                resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES_MAX, DATA_BYTES_MAX))

        command = [binary, "serve", "--dev", "--listen", "127.0.0.1:0", "--data-dir", folder / "data"]
        self.log = open(folder / "log", "w+", encoding="utf-8")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, preexec_fn=limit)
        for _ in range(500):
            text = (folder / "log").read_text(encoding="utf-8")
            if found := re.search(r"ready.*?(127\.0\.0\.1:\d+)|(127\.0\.0\.1:\d+)\S* ready", re.sub("\x1b\\[\\d*m", "", text)):
                break
            if self.process.poll() is not None:
                sys.exit(text)
            time.sleep(0.02)
        else:
            sys.exit(f"the server does not start: {text}")
        self.address = found[1] or found[2]
        self.key = (folder / "data/dev-api-key").read_text(encoding="utf-8").strip()

    def memory_mb(self, field):
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(field + r":\s+(\d+) kB", status)[1]) / 1000

    def cpu_secs(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def curl(self, path, kind, *more, **popen):
        command = ["curl", "-sS", "--fail", "-X", "POST", "-T", "-", "-H", f"Authorization: Bearer {self.key}",
                   "-H", f"Content-Type: {kind}", "-H", "Expect:", f"http://{self.address}{path}", *more]
        return subprocess.Popen(command, **popen)


def large_object(server, size):
    """There and back in one pipe: what is encrypted is decrypted while it comes."""
    octets = "application/octet-stream"
    sent, got, piece = hashlib.sha256(), hashlib.sha256(), os.urandom(PIECE)
    began, cpu = time.monotonic(), server.cpu_secs()
    sealing = server.curl("/v1/encrypt", octets, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    opening = server.curl("/v1/decrypt", octets, stdin=sealing.stdout, stdout=subprocess.PIPE)
    sealing.stdout.close()

    def send():
        left, number = size, 0
        while left > 0:
            part = (number.to_bytes(8, "big") + piece[8:])[: min(left, PIECE)]
            sent.update(part)
            sealing.stdin.write(part)
            left -= len(part)
            number += 1
        sealing.stdin.close()

    sender = threading.Thread(target=send)
    sender.start()
    while part := opening.stdout.read(PIECE):
        got.update(part)
    sender.join()
    ended = (sealing.wait(), opening.wait())
    secs, cpu = time.monotonic() - began, server.cpu_secs() - cpu
    print(f"{size / (1 << 30):g} GiB encrypted and decrypted at once: {secs:.0f} s, {size / secs / 1e6:.0f} MB/s each "
          f"way; {cpu / size * 1e9:.2f} CPU ns a byte for both; peak {server.memory_mb('VmHWM'):.0f} MB")
    same = ended == (0, 0) and sent.digest() == got.digest()
    return [] if same else ["the same SHA-256 after encryption and decryption"]


def slow_reader(server):
    """Many that send what they can and read nothing."""
    before, clients = server.memory_mb("VmRSS"), []
    for _ in range(16):
        with open("/dev/zero", "rb") as zeros:
            reader, writer = os.pipe()
            clients.append((server.curl("/v1/encrypt", "application/octet-stream", stdin=zeros, stdout=writer), reader))
            os.close(writer)
    time.sleep(5)
    grown = server.memory_mb("VmRSS") - before
    for client, reader in clients:
        client.kill()
        client.wait()
        os.close(reader)
    print(f"16 clients that send and do not read: {grown:.0f} MB more")
    return [] if grown < GROWTH_MB_MAX else ["constant memory for clients that do not read"]


def lines(server, count):
    began = time.monotonic()
    client = server.curl("/v1/encrypt/batch", "application/x-ndjson", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    plaintext = base64.b64encode(bytes(64)).decode()

    def send():
        for n in range(count):
            line = "{" if n % 100 == 99 else f'{{"ref":"{n}","plaintext":"{plaintext}"}}'
            client.stdin.write((line + "\n").encode())
        client.stdin.close()

    sender = threading.Thread(target=send)
    sender.start()
    wrong = answered = 0
    for n, line in enumerate(client.stdout):
        answered += 1
        expected = b'{"error"' if n % 100 == 99 else b'{"ref":"%d","ciphertext"' % n
        wrong += not line.startswith(expected)
    sender.join()
    secs = time.monotonic() - began
    print(f"{count} lines, 1 % of them bad: {secs:.0f} s, {count / secs:.0f} a second, {wrong} wrong or out of order; "
          f"peak {server.memory_mb('VmHWM'):.0f} MB")
    clean = client.wait() == 0 and answered == count and wrong == 0
    return [] if clean else ["every line answered, in order"]


def connection(server):
    return http.client.HTTPConnection(server.address, timeout=60)


def post(link, server, path, body):
    link.request("POST", path, body, {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"})
    answer = link.getresponse()
    text = answer.read()
    assert answer.status == 200, text[:300]
    return text


def batch_of(items):
    plaintext = base64.b64encode(bytes(64)).decode()
    return json.dumps({"items": [{"plaintext": plaintext}] * items})


def batches(server):
    link = connection(server)
    # Enough of each that the system's clock ticks (10 ms) tell the CPU time.
    for items, rounds in [(1, 2_000), (100, 500), (10_000, 20)]:
        body = batch_of(items)
        rates, cpus = [], []
        for _ in range(5):
            began, cpu = time.monotonic(), server.cpu_secs()
            for _ in range(rounds):
                post(link, server, "/v1/encrypt/batch", body)
            rates.append(rounds * items / (time.monotonic() - began))
            cpus.append((server.cpu_secs() - cpu) / (rounds * items) * 1e6)
        print(f"batches of {items} x 64 bytes, one client: {statistics.median(rates):.0f} items a second, "
              f"{statistics.median(cpus):.1f} CPU us an item")


def beside_a_batch(server):
    """The latency of single requests with and without a client that sends one batch of 10,000 after the other."""
    single = json.dumps({"plaintext": base64.b64encode(bytes(64)).decode()})

    def latencies(secs):
        link, times, end = connection(server), [], time.monotonic() + secs
        while time.monotonic() < end:
            began = time.monotonic()
            post(link, server, "/v1/encrypt", single)
            times.append((time.monotonic() - began) * 1e3)
            time.sleep(0.002)
        return times

    def p(times, share):
        return sorted(times)[int(len(times) * share)]

    alone = latencies(5)
    done, count = threading.Event(), [0]

    def flood():
        # curl and not a thread of this interpreter, which would share its lock with the clock.
        while not done.is_set():
            client = server.curl("/v1/encrypt/batch", "application/json", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            client.communicate(body)
            count[0] += 1

    body = batch_of(10_000).encode()
    flooder = threading.Thread(target=flood)
    flooder.start()
    beside = latencies(10)
    done.set()
    flooder.join()
    print(f"single requests alone: p50 {p(alone, 0.5):.2f} ms, p99 {p(alone, 0.99):.2f} ms; beside {count[0] / 10:.0f} "
          f"batches of 10,000 a second: p50 {p(beside, 0.5):.2f} ms, p99 {p(beside, 0.99):.2f} ms "
          f"(ratio of the p99: {p(beside, 0.99) / p(alone, 0.99):.1f})")


if __name__ == "__main__":
    main()

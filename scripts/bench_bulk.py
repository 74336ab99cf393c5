"""Measures bulk work. Usage: bench_bulk.py KEYFOLD [--gib N] [--lines N] [--bare PROGRAM] [--echo PROGRAM] [--only-goals]

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
# What clients that stand still may add in 5 s: the allocator's own.
STANDING_MB_MAX = 4
TAKEN_BYTES_MIN = 1_000_000
# How much a flood of batches may cost small requests, beside what as many busy threads of the same priority and the same
# traffic elsewhere cost them.
P99_RATIO_MAX = 1.25
# As src/http/bulk/threads.rs has it.
BULK_NICE = 10
PIECE = 1 << 20


def main():
    options = argparse.ArgumentParser()
    options.add_argument("keyfold", type=Path)
    options.add_argument("--gib", type=float, default=4)
    options.add_argument("--lines", type=int, default=1_000_000)
    options.add_argument("--bare", type=Path, help="the example bare of crates/envelope, to compare streams with")
    options.add_argument("--echo", type=Path, help="the example echo, to compare what is beside single requests with")
    options.add_argument("--only-goals", action="store_true", help="no speeds: what can be missed on any build")
    options = options.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.keyfold.resolve(), Path(folder))
        try:
            idle = server.memory_mb("VmRSS")
            print(f"memory when idle: {idle:.0f} MB; the server's data is limited to {DATA_BYTES_MAX >> 20} MiB")
            missed += large_object(server, int(options.gib * (1 << 30)))
            missed += slow_reader(server)
            missed += slow_writer(server)
            missed += lines(server, options.lines)
            peak = server.memory_mb("VmHWM")
            print(f"peak memory of all this: {peak:.0f} MB, {peak - idle:.0f} MB above idle")
            if peak - idle > GROWTH_MB_MAX:
                missed.append(f"less than {GROWTH_MB_MAX} MB above idle")
        finally:
            server.stop()
        if options.only_goals:
            report(missed)
        server = Server(options.keyfold.resolve(), Path(folder), limited=False)
        try:
            if options.bare:
                share_of_bare(server, options.bare.resolve(), Path(folder))
            batches(server)
            if options.echo:
                echo, address = start_echo(options.echo.resolve())
                try:
                    missed += beside_a_batch(server, address)
                finally:
                    echo.kill()
        finally:
            server.stop()
    report(missed)


def report(missed):
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
    before, clients, missed = server.memory_mb("VmRSS"), [], []
    with tempfile.TemporaryFile() as endless:
        # Nothing but a hole: how far a client has come in it is how much was taken from him.
        endless.truncate(1 << 40)
        for _ in range(16):
            source = os.open(f"/proc/self/fd/{endless.fileno()}", os.O_RDONLY)
            reader, writer = os.pipe()
            clients.append((server.curl("/v1/encrypt", "application/octet-stream", stdin=source, stdout=writer), source, reader))
            os.close(writer)
        grown = []
        for _ in range(2):
            time.sleep(5)
            grown.append(server.memory_mb("VmRSS") - before)
        if any(client.poll() is not None for client, _, _ in clients):
            missed.append("clients that do not read are waited for")
        taken = min(os.lseek(source, 0, os.SEEK_CUR) for _, source, _ in clients)
        for client, source, reader in clients:
            client.kill()
            client.wait()
            os.close(source)
            os.close(reader)
    print(f"16 clients that send and do not read, at least {taken / 1e6:.1f} MB taken from each: {grown[0]:.0f} MB more, "
          f"{grown[1]:.0f} MB 5 s later")
    if taken < TAKEN_BYTES_MIN:
        missed.append("something is taken from clients that do not read")
    if max(grown) > GROWTH_MB_MAX or grown[1] - grown[0] > STANDING_MB_MAX:
        missed.append("constant memory for clients that do not read")
    return missed


def slow_writer(server):
    """Many that send a little and then wait, and read all."""
    before, clients = server.memory_mb("VmRSS"), []
    for _ in range(16):
        clients.append(server.curl("/v1/encrypt", "application/octet-stream", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for _ in range(20):
        for client in clients:
            client.stdin.write(bytes(100_000))
            client.stdin.flush()
        time.sleep(0.1)
    grown = server.memory_mb("VmRSS") - before
    for client in clients:
        client.stdin.close()
    ended = all([client.wait() == 0 for client in clients])
    print(f"16 clients that send 1 MB a second each: {grown:.0f} MB more")
    return [] if ended and grown < GROWTH_MB_MAX else ["constant memory for clients that send slowly"]


def share_of_bare(server, bare, folder):
    """The server's CPU time for a stream, beside that of AES-256-GCM alone by the same crate, in turns."""
    sealed = folder / "sealed"
    with open("/dev/zero", "rb") as zeros:
        head = subprocess.Popen(["head", "-c", str(1 << 30)], stdin=zeros, stdout=subprocess.PIPE)
        with open(sealed, "wb") as out:
            server.curl("/v1/encrypt", "application/octet-stream", stdin=head.stdout, stdout=out).wait()
    for verb in ["encrypt", "decrypt"]:
        shares = []
        for _ in range(3):
            before = os.times()
            subprocess.run([bare, verb, "2"], check=True)
            after = os.times()
            bare_ns = (after.children_user + after.children_system - before.children_user - before.children_system) / 2
            cpu = server.cpu_secs()
            if verb == "encrypt":
                source = subprocess.Popen(["head", "-c", str(1 << 30), "/dev/zero"], stdout=subprocess.PIPE).stdout
            else:
                source = open(sealed, "rb")
            with source:
                server.curl(f"/v1/{verb}", "application/octet-stream", stdin=source, stdout=subprocess.DEVNULL).wait()
            stream_ns = server.cpu_secs() - cpu
            shares.append((bare_ns / stream_ns, bare_ns / (1 << 30) * 1e9, stream_ns / (1 << 30) * 1e9))
        share, bare_ns, stream_ns = sorted(shares)[1]
        print(f"raw stream, {verb}: {share:.0%} of bare AES-256-GCM ({bare_ns:.2f} CPU ns a byte bare, {stream_ns:.2f} "
              f"through the server, HTTP and the system's work for its sockets included)")


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


# Sends one body after the other on one connection, no more than one each so many seconds, and writes a dot for each. A
# process of its own, of the lowest priority: it is not what is measured.
FLOOD = """
import http.client, sys, time
address, key, body, path, secs = sys.argv[1:]
body = open(body, "rb").read()
link = http.client.HTTPConnection(address, timeout=60)
while True:
    began = time.monotonic()
    link.request("POST", path, body, {"Authorization": "Bearer " + key, "Content-Type": "application/json"})
    answer = link.getresponse()
    answer.read()
    assert answer.status == 200
    print(".", flush=True)
    time.sleep(max(0, float(secs) - (time.monotonic() - began)))
"""


def beside_a_batch(server, echo):
    """The latency of single requests beside a client that sends one batch of 10,000 after the other, and, in turns with
    it, beside what that takes from the machine by itself: as many busy loops as there are cores, of the priority that the
    threads of batches have, and as many bytes each way through a server that does nothing with them. What the system's
    scheduler and its sockets cost whoever is not alone is in both; what is left is keyfold's own."""
    single = json.dumps({"plaintext": base64.b64encode(bytes(64)).decode()})
    python = [sys.executable, "-c"]
    secs = 6

    def latencies(secs):
        link, times, end = connection(server), [], time.monotonic() + secs
        while time.monotonic() < end:
            began = time.monotonic()
            post(link, server, "/v1/encrypt", single)
            times.append((time.monotonic() - began) * 1e3)
            time.sleep(0.002)
        return times

    def beside(*commands):
        others = [
            subprocess.Popen(["nice", "-n", str(nice), *python, program, *arguments], stdout=subprocess.PIPE)
            for nice, program, *arguments in commands
        ]
        time.sleep(0.5)
        times = latencies(secs)
        gone = any(other.poll() is not None for other in others)
        for other in others:
            other.kill()
        done = sum(len(other.communicate()[0].split()) for other in others)
        if gone:
            sys.exit("what small requests were measured beside has ended early")
        return times, done

    def p(times, share):
        return sorted(times)[int(len(times) * share)]

    alone, rounds = latencies(5), []
    loops = [(BULK_NICE, "while True: pass")] * os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        batch, traffic = Path(folder) / "batch", Path(folder) / "traffic"
        batch.write_text(batch_of(10_000), encoding="utf-8")
        answer = post(connection(server), server, "/v1/encrypt/batch", batch.read_bytes())
        traffic.write_bytes(bytes((batch.stat().st_size + len(answer)) // 2))
        for _ in range(5):
            flood, done = beside((19, FLOOD, server.address, server.key, batch, "/v1/encrypt/batch", "0"))
            if done == 0:
                sys.exit("no batch got through: this is no flood")
            alike, _ = beside(*loops, (19, FLOOD, echo, "-", traffic, "/echo", str(secs / done)))
            rounds.append((p(flood, 0.99) / p(alike, 0.99), p(alike, 0.5), p(alike, 0.99), p(flood, 0.5), p(flood, 0.99), done))
    ratios = sorted(each[0] for each in rounds)
    ratio = statistics.median(ratios)
    alike_50, alike_99, flood_50, flood_99, done = [statistics.median(each[n] for each in rounds) for n in range(1, 6)]
    print(f"single requests, p50 and p99: alone {p(alone, 0.5):.2f} and {p(alone, 0.99):.2f} ms; beside busy loops and "
          f"the same traffic elsewhere {alike_50:.2f} and {alike_99:.2f} ms; beside {done / secs:.0f} batches of 10,000 a "
          f"second {flood_50:.2f} and {flood_99:.2f} ms; p99 beside batches to that beside the others, in {len(ratios)} "
          f"rounds: {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return [] if ratio <= P99_RATIO_MAX else [f"single requests' p99 beside batches at most {P99_RATIO_MAX} times that beside busy loops and the same traffic"]


def start_echo(program):
    process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
    return process, re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())[0]


if __name__ == "__main__":
    main()

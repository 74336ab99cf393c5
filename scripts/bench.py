"""Drives keyfold and the echo server in turn with wrk, and tells what a request costs the server; then keyfold with an
audit file beside keyfold without, and tells what the audit costs in throughput: in many short turns, because a virtual
machine's speed drifts by more within seconds.

Usage: bench.py KEYFOLD ECHO [--rounds N] [--secs N]

CPU time is the server's own (user and system, from /proc), divided by the requests answered: on a machine that is busy
with other things it is steadier than time on the clock. Both servers of a round are driven in turn, so that they see the
same disturbances, and are started anew for each round: where a process happens to lie in memory makes up to a fifth of
what it costs, for as long as it runs. The median round counts. Exits with 1 where a goal is missed.
"""

import argparse
import base64
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

CONNECTIONS = 16
SIZES = [256, 4096]
RATIO_MAX = 1.8
IDLE_MB_MAX = 25
READY_MS_MAX = 200
# Of the requests a second without the audit, how many there are at least with it.
AUDITED_MIN = 0.90
# How often both are driven, for each kind of request of one start.
AUDIT_TURNS = 4
STARTS = 5
SERVE = ["serve", "--dev", "--listen", "127.0.0.1:0"]
TICK_SECS = 1 / os.sysconf("SC_CLK_TCK")


def main():
    options = argparse.ArgumentParser()
    options.add_argument("keyfold", type=Path)
    options.add_argument("echo", type=Path)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--secs", type=int, default=2)
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        missed = starts(options.keyfold, Path(folder) / "starts") + costs(options, Path(folder))
        missed += audit_costs(options, Path(folder))
    for goal in missed:
        print(f"missed: {goal}")
    sys.exit(1 if missed else 0)


def starts(binary, folder):
    """How long from the start of the process to its first 'ready', on a data folder that is there."""
    folder.mkdir()
    times = []
    for start in range(STARTS + 1):
        began = time.monotonic()
        server = Server([binary, *SERVE], folder)
        assert json.load(urllib.request.urlopen(f"{server.origin}/ready"))["status"] == "ready"
        times.append((time.monotonic() - began) * 1e3)
        server.stop()
    first, again = times[0], statistics.median(times[1:])
    print(f"time to ready: {first:.0f} ms on an empty folder, then {again:.0f} ms")
    return [f"ready within {READY_MS_MAX} ms"] if max(first, again) > READY_MS_MAX else []


def costs(options, folder):
    """What a request costs, beside the echo, and what an idle process takes of memory."""
    rounds, idle, loaded = {}, [], []
    for number in range(options.rounds):
        here = folder / f"costs-{number}"
        here.mkdir()
        keyfold, echo = Server([options.keyfold, *SERVE], here), Server([options.echo], here)
        try:
            time.sleep(1)
            idle.append((keyfold.resident_mb(), echo.resident_mb()))
            for verb, size, script in scripts(keyfold):
                both = turn((keyfold, f"/v1/{verb}", script), (echo, "/echo", script), options.secs)
                rounds.setdefault((verb, size), []).append(both)
            loaded.append(keyfold.resident_mb())
        finally:
            keyfold.stop()
            echo.stop()
    ours, theirs = (statistics.median(mb) for mb in zip(*idle))
    print(f"idle memory: {ours:.1f} MB (echo {theirs:.1f} MB); after the load {statistics.median(loaded):.1f} MB")
    missed = [f"idle memory under {IDLE_MB_MAX} MB"] if ours > IDLE_MB_MAX else []
    print(f"{'':18}{'keyfold':>12}{'echo':>12}{'ratio':>8}{'least to most':>16}{'keyfold requests/s':>22}")
    for (verb, size), both in rounds.items():
        cost, rate = (statistics.median(figures) for figures in zip(*(ours for ours, _ in both)))
        echo = statistics.median(cost for _, (cost, _) in both)
        ratio, spread = middle(ours / theirs for (ours, _), (theirs, _) in both)
        name = f"{verb} {size} B"
        print(f"{name:18}{cost * 1e6:9.1f} us{echo * 1e6:9.1f} us{ratio:8.2f}{spread:>16}{rate:22,.0f}", flush=True)
        if ratio > RATIO_MAX:
            missed.append(f"{name}: at most {RATIO_MAX} times the echo")
    return missed


def audit_costs(options, folder):
    """Requests a second with an audit file, beside those without."""
    configuration = folder / "audit.toml"
    configuration.write_text("[audit.file]\n")
    rounds = {}
    for number in range(options.rounds):
        servers = []
        try:
            for name, more in [("without", []), ("with", ["--config", configuration])]:
                here = folder / f"audit-{number}-{name}"
                here.mkdir()
                servers.append(Server([options.keyfold, *SERVE, *more], here))
            without, audited = servers
            for (verb, size, plain), (_, _, recorded) in zip(scripts(without), scripts(audited)):
                calls = [(without, f"/v1/{verb}", plain), (audited, f"/v1/{verb}", recorded)]
                rounds.setdefault((verb, size), []).extend(rates_in_turn(calls, options.secs))
        finally:
            for server in servers:
                server.stop()
    print(f"{'':18}{'with audit':>16}{'without':>12}{'ratio':>8}{'least to most':>16}")
    missed = []
    for (verb, size), rates in rounds.items():
        without, audited = (statistics.median(figures) for figures in zip(*rates))
        ratio, spread = middle(audited / without for without, audited in rates)
        name = f"{verb} {size} B"
        print(f"{name:18}{audited:14,.0f}/s{without:10,.0f}/s{ratio:8.2f}{spread:>16}", flush=True)
        if ratio < AUDITED_MIN:
            missed.append(f"{name}: with the audit at least {AUDITED_MIN:.0%} of the requests a second without")
    return missed


def rates_in_turn(calls, secs):
    """Requests a second of each call, in turns, now one before and now the other."""
    warm_up(*calls)
    for number in range(AUDIT_TURNS):
        order = [0, 1] if number % 2 == 0 else [1, 0]
        rates = {at: drive(*calls[at], secs)[1] for at in order}
        yield [rates[0], rates[1]]


def scripts(keyfold):
    """Verb, size of the plaintext, and wrk's script, for each kind of request."""
    credential = f"Bearer {(keyfold.folder / 'keyfold-data/dev-api-key').read_text().strip()}"
    for size in SIZES:
        for verb, body in bodies(keyfold, credential, size):
            script = keyfold.folder / f"{verb}-{size}.lua"
            write_script(script, body, credential)
            yield verb, size, script


def turn(first, second, secs):
    """Drives two servers one after the other: each one's CPU seconds for a request, and its requests a second."""
    warm_up(first, second)
    return drive(*first, secs), drive(*second, secs)


def warm_up(*calls):
    """What is compiled, cached or connected at first use is not what a request costs."""
    for call in calls:
        drive(*call, 1)


def middle(ratios):
    """The median, and from where to where they go."""
    ratios = sorted(ratios)
    return statistics.median(ratios), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"


def bodies(keyfold, credential, size):
    context = {"record": "42", "table": "people"}
    plaintext = base64.b64encode(os.urandom(size)).decode()
    encrypt = json.dumps({"plaintext": plaintext, "context": context})
    request = urllib.request.Request(f"{keyfold.origin}/v1/encrypt", encrypt.encode(), headers(credential))
    ciphertext = json.load(urllib.request.urlopen(request))["ciphertext"]
    return [("encrypt", encrypt), ("decrypt", json.dumps({"ciphertext": ciphertext, "context": context}))]


def headers(credential):
    return {"Authorization": credential, "Content-Type": "application/json"}


def write_script(script, body, credential):
    lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers(credential).items()]
    # A long string of Lua: base64 and JSON hold no brackets of that kind.
    script.write_text("\n".join(['wrk.method = "POST"', *lines, f"wrk.body = [==[{body}]==]"]))


def drive(server, path, script, secs):
    """CPU seconds for each request, and requests a second."""
    before = server.cpu_secs()
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{secs}s", "-s", script, f"{server.origin}{path}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        sys.exit(out)
    requests = int(re.search(r"(\d+) requests in", out)[1])
    return (server.cpu_secs() - before) / requests, requests / secs


class Server:
    def __init__(self, command, folder):
        # Into a file: a pipe that nobody reads is full after a while, and whoever writes to it waits.
        self.folder = Path(folder)
        log = self.folder / "log"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(Path(command[0]).absolute()), *command[1:]], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )
        while self.process.poll() is None:
            if found := re.search(r" on (http://127\.0\.0\.1:\d+).*\n", log.read_text()):
                self.origin = found[1]
                return
            time.sleep(0.001)
        sys.exit(f"{command[0]} did not start: {log.read_text()}")

    def cpu_secs(self):
        # After the name, which may hold anything: fields 14 and 15 of proc(5) are user and system time.
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * TICK_SECS

    def resident_mb(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000

    def stop(self):
        self.process.terminate()
        self.process.wait()


main()

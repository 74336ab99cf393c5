"""Drives keyfold and the echo server in turn with wrk, and tells what a request costs the server; then keyfold with an
audit file beside keyfold without, and tells what the audit costs in throughput.

Usage: bench.py KEYFOLD ECHO [--rounds N] [--secs N]

CPU time is the server's own (user and system, from /proc), divided by the requests answered: on a machine that is busy
with other things it is steadier than time on the clock. Rounds are interleaved, so that both servers see the same
disturbances; the median round counts. Exits with 1 where a goal is missed.
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
STARTS = 5
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
        missed += audit_costs(options, Path(folder) / "audit")
    for goal in missed:
        print(f"missed: {goal}")
    sys.exit(1 if missed else 0)


def starts(binary, folder):
    """How long from the start of the process to its first 'ready', on a data folder that is there."""
    folder.mkdir()
    times = []
    for start in range(STARTS + 1):
        began = time.monotonic()
        server = Server([binary, "serve", "--dev", "--listen", "127.0.0.1:0"], folder)
        assert json.load(urllib.request.urlopen(f"{server.origin}/ready"))["status"] == "ready"
        times.append((time.monotonic() - began) * 1e3)
        server.stop()
    first, again = times[0], statistics.median(times[1:])
    print(f"time to ready: {first:.0f} ms on an empty folder, then {again:.0f} ms")
    return [f"ready within {READY_MS_MAX} ms"] if max(first, again) > READY_MS_MAX else []


def costs(options, folder):
    keyfold = Server([options.keyfold, "serve", "--dev", "--listen", "127.0.0.1:0"], folder)
    echo = Server([options.echo], folder)
    try:
        time.sleep(1)
        idle = keyfold.resident_mb()
        print(f"idle memory: {idle:.1f} MB (echo {echo.resident_mb():.1f} MB)")
        missed = [f"idle memory under {IDLE_MB_MAX} MB"] if idle > IDLE_MB_MAX else []
        credential = f"Bearer {(folder / 'keyfold-data/dev-api-key').read_text().strip()}"
        print(f"{'':18}{'keyfold':>12}{'echo':>12}{'ratio':>8}{'keyfold requests/s':>22}")
        for size in SIZES:
            for verb, body in bodies(keyfold, credential, size):
                missed += compare(options, folder, keyfold, echo, verb, size, body, credential)
        print(f"memory after the load: {keyfold.resident_mb():.1f} MB")
        return missed
    finally:
        keyfold.stop()
        echo.stop()


def audit_costs(options, folder):
    """Requests a second with an audit file, beside those without, in turn."""
    configuration = folder / "audit.toml"
    folder.mkdir()
    configuration.write_text("[audit.file]\n")
    serve = [options.keyfold, "serve", "--dev", "--listen", "127.0.0.1:0"]
    servers = []
    try:
        for name, more in [("without", []), ("with", ["--config", configuration])]:
            (folder / name).mkdir()
            servers.append(Server([*serve, *more], folder / name))
        print(f"{'':18}{'with audit':>16}{'without':>12}{'ratio':>8}")
        return [goal for size in SIZES for goal in compare_audit(options, folder, servers, size)]
    finally:
        for server in servers:
            server.stop()


def compare_audit(options, folder, servers, size):
    missed = []
    for verb in ["encrypt", "decrypt"]:
        scripts = []
        for server, name in zip(servers, ["without", "with"]):
            credential = f"Bearer {(folder / name / 'keyfold-data/dev-api-key').read_text().strip()}"
            script = folder / f"{name}.lua"
            write_script(script, dict(bodies(server, credential, size))[verb], credential)
            drive(server, f"/v1/{verb}", script, 1)
            scripts.append(script)
        rounds = []
        for _ in range(options.rounds):
            rates = [drive(server, f"/v1/{verb}", script, options.secs)[1] for server, script in zip(servers, scripts)]
            rounds.append((rates[1] / rates[0], rates))
        ratio, (without, audited) = sorted(rounds)[len(rounds) // 2]
        name = f"{verb} {size} B"
        print(f"{name:18}{audited:14,.0f}/s{without:10,.0f}/s{ratio:8.2f}", flush=True)
        if ratio < AUDITED_MIN:
            missed.append(f"{name}: with the audit at least {AUDITED_MIN:.0%} of the requests a second without")
    return missed


def bodies(keyfold, credential, size):
    context = {"record": "42", "table": "people"}
    plaintext = base64.b64encode(os.urandom(size)).decode()
    encrypt = json.dumps({"plaintext": plaintext, "context": context})
    request = urllib.request.Request(f"{keyfold.origin}/v1/encrypt", encrypt.encode(), headers(credential))
    ciphertext = json.load(urllib.request.urlopen(request))["ciphertext"]
    return [("encrypt", encrypt), ("decrypt", json.dumps({"ciphertext": ciphertext, "context": context}))]


def headers(credential):
    return {"Authorization": credential, "Content-Type": "application/json"}


def compare(options, folder, keyfold, echo, verb, size, body, credential):
    script = folder / "request.lua"
    write_script(script, body, credential)
    # What is compiled, cached or connected at first use is not what a request costs.
    drive(keyfold, f"/v1/{verb}", script, 1)
    drive(echo, "/echo", script, 1)
    rounds = [
        (drive(keyfold, f"/v1/{verb}", script, options.secs), drive(echo, "/echo", script, options.secs))
        for _ in range(options.rounds)
    ]
    ours = statistics.median(cost for (cost, _), _ in rounds)
    theirs = statistics.median(cost for _, (cost, _) in rounds)
    rate = statistics.median(rate for (_, rate), _ in rounds)
    ratio = statistics.median(ours / theirs for (ours, _), (theirs, _) in rounds)
    name = f"{verb} {size} B"
    print(f"{name:18}{ours * 1e6:9.1f} us{theirs * 1e6:9.1f} us{ratio:8.2f}{rate:22,.0f}", flush=True)
    return [f"{name}: at most {RATIO_MAX} times the echo"] if ratio > RATIO_MAX else []


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
        log = Path(folder) / "log"
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

"""Runs schemathesis against a live keyfold: every operation of its OpenAPI document, every check.

Usage: python run.py KEYFOLD_BINARY REPORT_FOLDER [SECS_MAX]

Fails where the service answers what its document does not say, accepts what the document forbids, refuses what it
promises, answers without a credential, or breaks. The seed is fixed (schemathesis.toml), so that two runs try the same.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
START_SECS_MAX = 60
# How long new cases are made. A run that takes much longer hangs.
SECS_MAX = 75


def main():
    binary, report = sys.argv[1], Path(sys.argv[2])
    secs_max = int(sys.argv[3]) if len(sys.argv) > 3 else SECS_MAX
    report.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server, origin = start_keyfold(binary, Path(folder))
        try:
            token = (Path(folder) / "data/dev-api-key").read_text().strip()
            make_spare_tenant(origin, token)
            status = run_schemathesis(origin, token, report, secs_max)
            if server.poll() is not None:
                sys.exit("keyfold has ended")
        finally:
            server.terminate()
            server.wait(START_SECS_MAX)
    sys.exit(status)


def start_keyfold(binary, folder):
    command = [str(Path(binary).absolute()), "serve", "--dev", "--listen", "127.0.0.1:0"]
    log = (folder / "log").open("w+b")
    environment = {"KEYFOLD_DATA_DIR": str(folder / "data"), "AWS_EC2_METADATA_DISABLED": "true"}
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.PIPE, env=environment, text=True)
    for line in server.stderr:
        if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
            # The rest is read by nobody here, and must not fill the pipe.
            subprocess.Popen(["cat"], stdin=server.stderr, stdout=log, stderr=log)
            return server, found[1]
    sys.exit("keyfold did not start")


def make_spare_tenant(origin, token):
    body = json.dumps({"tenant": "acme", "keks": [{"kek": "local:dev"}]}).encode()
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{origin}/v1/tenants", body, headers))


def run_schemathesis(origin, token, report, secs_max):
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", HERE / "schemathesis.toml", "run"]
    command += [f"{origin}/openapi.json", "--header", f"Authorization: Bearer {token}"]
    command += ["--checks", "all", "--mode", "all", "--phases", "examples,coverage,fuzzing,stateful"]
    command += ["--max-time", str(secs_max), "--request-timeout", "30", "--no-color"]
    command += ["--report", "junit,ndjson", "--report-dir", report]
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": str(HERE / "hooks.py"),
        "KEYFOLD_OWN_API_KEY": token[3:19],
    }
    return subprocess.run(command, env=environment, cwd=report, timeout=8 * secs_max).returncode


if __name__ == "__main__":
    main()

"""Opens /docs of a real keyfold in a headless Chromium, and looks at what a person would see.

Usage: python docs_page.py KEYFOLD_BINARY SCREENSHOT.png

Fails where an operation is missing from the page, where the browser reports a violated Content-Security-Policy or an
error, or where the page asks anything of anyone but the server that it came from.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

SECS_MAX = 60
OPERATIONS_SECS_MAX = 20
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1600",
    "--remote-debugging-port=0",
    # The page and this script are local; anything else is not there.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def main():
    binary, screenshot = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        server, origin = start_keyfold(binary, Path(folder))
        browser = None
        try:
            browser, debugger = start_chromium(Path(folder) / "browser")
            page = Page(debugger)
            page.open(f"{origin}/docs/")
            judge(page, origin, documented_operations(origin))
            Path(screenshot).write_bytes(page.screenshot())
            print(f"the page shows every operation; a picture of it is in {screenshot}")
        finally:
            for process in (browser, server):
                if process:
                    process.terminate()
                    process.wait(SECS_MAX)


def start_keyfold(binary, folder):
    command = [str(Path(binary).absolute()), "serve", "--dev", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
            return process, found[1]
    sys.exit("keyfold did not start")


def start_chromium(profile):
    chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not chromium:
        sys.exit("there is no Chromium: apt-get install chromium")
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"DevTools listening on ws://(127\.0\.0\.1:\d+)/", line):
            pages = json.load(urllib.request.urlopen(f"http://{found[1]}/json/list"))
            return process, next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
    sys.exit("Chromium did not start")


def documented_operations(origin):
    document = json.load(urllib.request.urlopen(f"{origin}/openapi.json"))
    return [(method.upper(), path) for path, item in document["paths"].items() for method in item if method in METHODS]


METHODS = {"get", "put", "post", "delete", "patch"}


class Page:
    """A page of the browser, and all that it has asked for and complained of."""

    def __init__(self, debugger):
        self.socket = websocket.create_connection(debugger, timeout=SECS_MAX, suppress_origin=True)
        self.number = 0
        self.requests, self.complaints = [], []
        for domain in ("Network", "Log", "Runtime", "Page", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                if "error" in message:
                    sys.exit(f"{method}: {message['error']}")
                return message["result"]
            self.notice(message)

    def notice(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Audits.issueAdded" and "ContentSecurityPolicy" in params["issue"]["code"]:
            self.complaints.append(json.dumps(params["issue"]["details"]))

    def open(self, url):
        self.call("Page.navigate", url=url)

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


SHOWN = """[...document.querySelectorAll('.opblock')].map(block => [
    block.querySelector('.opblock-summary-method').textContent,
    block.querySelector('.opblock-summary-path').textContent.replace(/\\u200b/g, '')])"""


def judge(page, origin, operations):
    ends = time.monotonic() + OPERATIONS_SECS_MAX
    shown = []
    while len(shown) < len(operations) and time.monotonic() < ends:
        time.sleep(0.2)
        shown = [tuple(pair) for pair in page.evaluate(SHOWN) or []]
    missing = sorted(set(operations) - set(shown))
    if missing or not operations:
        sys.exit(f"the page does not show {missing}; it shows {shown}; the browser says {page.complaints}")
    try_out(page)
    foreign = [url for url in page.requests if not url.startswith((f"{origin}/", "data:"))]
    if foreign:
        sys.exit(f"the page asks others: {foreign}")
    if page.complaints:
        sys.exit(f"the browser complains: {page.complaints}")
    if not page.evaluate("document.querySelector('.swagger-ui h1, .swagger-ui h2') !== null"):
        sys.exit("the page has no heading")


TRY = """(selector => { const found = document.querySelector('#operations-health-live ' + selector);
    if (found) found.click(); return found !== null; })(%r)"""
STATUS = "document.querySelector('#operations-health-live .live-responses-table tbody .response-col_status')?.textContent"


def try_out(page):
    """What the page is for: unfold an operation, send it, and see the answer."""
    for selector in (".opblock-summary-control", ".try-out__btn", ".execute"):
        wait_for(lambda: page.evaluate(TRY % selector), f"{selector} of /live")
    wait_for(lambda: (page.evaluate(STATUS) or "").startswith("200"), "an answer of /live")


def wait_for(condition, what):
    ends = time.monotonic() + OPERATIONS_SECS_MAX
    while not condition():
        if time.monotonic() > ends:
            sys.exit(f"the page does not come to show {what}")
        time.sleep(0.1)


main()

"""A page in headless Chromium, spoken to over a pipe in its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """The one tab of a browser. `problems` gathers errors and warnings of its console, and requests to a network."""

    def __init__(self, read, write, deadline):
        self.read, self.write, self.deadline = read, write, deadline
        self.number, self.session, self.rest, self.problems = 0, None, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self.rest:
            left = self.deadline - time.monotonic()
            assert left > 0 and select.select([self.read], [], [], left)[0], "the browser does not answer"
            self.rest += os.read(self.read, 1 << 20)
        text, _, self.rest = self.rest.partition(b"\0")
        said = json.loads(text)
        about = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(about["exceptionDetails"])
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.problems.append(about["args"])
            case "Log.entryAdded":
                self.problems.append(about["entry"])
            case "Network.requestWillBeSent" if not about["request"]["url"].startswith(("file:", "data:", "blob:")):
                self.problems.append(about["request"]["url"])
        return said

    def value(self, expression):
        """What JavaScript says of an expression, or of what its promise brings."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def show(self, width, dark):
        """As a screen of this width shows it, in a light or dark scheme."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, file, until):
        """Load a file and wait until an expression is true."""
        self.ask("Page.navigate", url=file.absolute().as_uri())
        while not self.value(f"document.readyState === 'complete' && ({until})"):
            time.sleep(0.05)

    def screenshot(self, file):
        """The whole page as PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser(seconds=60):
    """A `Page` of a browser of its own, which gets so much time in all."""
    its_read, our_write = os.pipe()
    our_read, its_write = os.pipe()

    def as_3_and_4():
        os.dup2(its_read, 60), os.dup2(its_write, 61)
        os.dup2(60, 3), os.dup2(61, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        process = subprocess.Popen(
            [PROGRAM, *arguments, f"--user-data-dir={profile}"],
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read), os.close(its_write)
        try:
            yield Page(our_read, our_write, time.monotonic() + seconds)
        finally:
            process.kill()
            process.wait()
            os.close(our_read), os.close(our_write)

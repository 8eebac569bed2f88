"""Drive Chromium by WebDriver (https://www.w3.org/TR/webdriver2/), with the standard library."""

import base64
import json
import re
import shutil
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.errors import RunError, UserError

DRIVER = "chromedriver"
ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # Chromium has no sandbox for root
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def can_browse() -> bool:
    """Return whether Chromium and its driver are installed (Debian: chromium-driver)."""
    return shutil.which(DRIVER) is not None and shutil.which("chromium") is not None


class Browser:
    """A headless Chromium with a temporary profile: `with Browser() as browser: ...`.

    Raises UserError if Chromium is not installed, and RunError if the driver reports an error.
    """

    def __enter__(self) -> "Browser":
        if not can_browse():
            raise UserError("needs chromium and chromedriver (Debian: apt install chromium-driver)")
        self.session = ""
        self.profile = TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self.port = self._driver_port()
            arguments = [*ARGUMENTS, f"--user-data-dir={self.profile.name}"]
            options = {"args": arguments, "binary": shutil.which("chromium")}
            wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
            made = self._ask("POST", "/session", {"capabilities": wanted})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.session:
                self._ask("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.communicate()
            self.profile.cleanup()

    def _driver_port(self) -> int:
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            started = re.search(r"started successfully on port (\d+)", line)
            if started:
                return int(started[1])
        raise RunError(f"{DRIVER} did not start")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = json.dumps(body) if body is not None else None
        connection.request(method, self.session + path, sent)
        value = json.load(connection.getresponse())["value"]
        connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RunError(f"{value['error']}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page. Return its result. If the result is a promise, wait for it."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true. Raises RunError after 25 seconds."""
        script = f"""
            const end = performance.now() + 25000;
            while (!({condition}) && performance.now() < end) {{
                await new Promise((later) => setTimeout(later, 20));
            }}
            return Boolean({condition});
        """
        if not self.run(script):
            raise RunError(f"after 25 s, {condition} is still false")

    def find(self, selector: str) -> dict[str, str]:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})

    def type(self, selector: str, keys: str) -> None:
        """Type keys into an element. WebDriver defines codes for special keys, such as arrows."""
        [reference] = self.find(selector).values()
        self._ask("POST", f"/element/{reference}/value", {"text": keys})

    def point(self, selector: str) -> None:
        """Move the mouse over an element."""
        move = {"type": "pointerMove", "origin": self.find(selector), "x": 0, "y": 0}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._ask("POST", "/actions", {"actions": [mouse]})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Set the preferred colour scheme, "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._devtools("Emulation.setEmulatedMedia", features=[feature])

    def _devtools(self, command: str, **parameters: Any) -> None:
        self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

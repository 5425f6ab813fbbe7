"""A headless Chromium, driven over its DevTools socket; with what the page itself is served by."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-port=0",
)


def find() -> str | None:
    """The program, if one is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. folder: for its profile."""

    def __init__(self, folder: Path, width: int = 1120, height: int = 980) -> None:
        flags = (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={folder}")
        self.process = subprocess.Popen(
            [find(), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        said = folder / "DevToolsActivePort"
        self.wait(lambda: said.exists() and said.read_text().count("\n") == 1, 30)
        port, path = said.read_text().split("\n")
        self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=1 << 26)
        self.count, self.at = 0, {}
        self.errors: list[dict] = []  # of scripts, and what the page's policy has kept out
        (tab,) = (t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attach = {"targetId": tab["targetId"], "flatten": True}
        self.at = {"sessionId": self.ask("Target.attachToTarget", **attach)["sessionId"]}

    def open(self, url: str) -> None:
        """Go to a page."""
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)

    def ask(self, method: str, **params: object) -> dict:
        """One command of the DevTools protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.socket.send(json.dumps(message | self.at))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            self._note(answer)
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _note(self, event: dict) -> None:
        entry = event.get("params", {}).get("entry", {})
        if event.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            self.errors.append(event["params"])

    def do(self, script: str) -> object:
        """The value of a JavaScript expression in the page."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, (script, done)
        return done["result"].get("value")

    def key(self, code: str, kind: str = "keyDown") -> None:
        """Press a key; kind keyUp: let it go."""
        key = code.removeprefix("Key").lower()
        self.ask("Input.dispatchKeyEvent", type=kind, code=code, key=key)

    def wait(self, ready, seconds: float = 20.0) -> None:
        """Until `ready` holds, a function or an expression in the page."""
        end = time.monotonic() + seconds
        while not (self.do(ready) if isinstance(ready, str) else ready()):
            assert time.monotonic() < end, f"not within {seconds} s: {ready}"
            time.sleep(0.02)

    def picture(self, path: Path, dark: bool = False) -> None:
        """The page as a PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.2)
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

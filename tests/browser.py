"""A headless Chromium for tests, driven over the WebDriver protocol by chromedriver; it reaches loopback only."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1600",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--disable-extensions", "--force-device-scale-factor=1",
    # Nothing but loopback: no name resolves, and other addresses go to a proxy that is not there. Chromium never
    # sends 127.0.0.1 through a proxy.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--proxy-server=http://127.0.0.1:9",
]  # fmt: skip

# The page's text, and pictures, through every shadow root and frame; only what is shown.
DEEP = """
const seen = {text: [], images: []};
(function walk(node) {
  if (node.nodeType === Node.TEXT_NODE) {
    const text = node.nodeValue.trim();
    if (text) seen.text.push(text);
    return;
  }
  if (node.nodeType === Node.ELEMENT_NODE) {
    if (["SCRIPT", "STYLE", "TEMPLATE", "NOSCRIPT"].includes(node.tagName)) return;
    const style = getComputedStyle(node);
    if (style.display === "none" || style.visibility === "hidden") return;
    if (node.tagName === "IMG" && node.naturalWidth > 0)
      seen.images.push({src: node.src, width: node.naturalWidth, height: node.naturalHeight});
    if (node.tagName === "SLOT") { node.assignedNodes().forEach(walk); return; }
    if (node.tagName === "IFRAME") { if (node.contentDocument) walk(node.contentDocument.body); return; }
  }
  (node.shadowRoot || node).childNodes.forEach(walk);
})(document.body);
return seen;
"""


class Browser:
    """`with Browser() as page: page.open(url); page.wait_for("train/loss")`."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        assert CHROMEDRIVER is not None
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        self._driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._driver.stdout is not None
        port = next(m[1] for line in self._driver.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        self._url = f"http://127.0.0.1:{port}/session"
        try:
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={self._profile}"]}
            wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            self._url += "/" + self._call("POST", "", wanted)["sessionId"]
        except BaseException:
            self._stop()
            raise

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the environment's proxy is not for us
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Load a page. A change of the part after # alone does not load again, so pass by an empty page."""
        self._call("POST", "/url", {"url": "about:blank"})
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def content(self) -> dict[str, Any]:
        """What is on the page: text (one string, pieces separated by newlines) and loaded images."""
        seen = self.run(DEEP)
        return {"text": "\n".join(seen["text"]), "images": seen["images"]}

    def wait_for(self, *texts: str, images: int = 0, seconds: float = 30.0) -> dict[str, Any]:
        """The page's content once it holds all texts and as many images.

        Raises:
            TimeoutError: With what is missing and what there is.
        """
        deadline = time.monotonic() + seconds
        while True:
            content = self.content()
            missing: list[Any] = [text for text in texts if text not in content["text"]]
            if not missing and len(content["images"]) >= images:
                return content
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {missing or f'{images} images'} among: {content}")
            time.sleep(0.25)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(10)
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

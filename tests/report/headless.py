"""A headless Chromium that says what a page did: console errors, requests, sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Browser]:
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the dev extra)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(session)
    finally:
        session.quit()


class Browser:
    def __init__(self, session: Any) -> None:
        self.session = session

    def open(self, path: Path, width: int, scheme: str) -> None:
        self.visit(path.resolve().as_uri(), width, scheme)

    def visit(self, url: str, width: int, scheme: str) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.session.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.session.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.session.get(url)

    def script(self, code: str) -> Any:
        return self.session.execute_script(code)

    def errors(self) -> list[str]:
        return [
            entry["message"] for entry in self.session.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, but the page's own data URIs."""
        events = [json.loads(entry["message"])["message"] for entry in self.session.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def screenshot(self, path: Path) -> Path:
        """The whole page, not the window alone."""
        import base64

        shot = self.session.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

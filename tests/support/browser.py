"""A real browser for tests of pages: Debian's Chromium, driven by Selenium, without a window."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.explore.serve.server import Server, make_server
from pipeline.explore.serve.site import Site

DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def serving(output: str, column: str | None = None) -> Iterator[Server]:
    """The server of an output, on a thread. A fault of the server fails the test."""
    faults: list[str] = []
    with make_server(Site(output, column), 0, faults.append) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
    assert faults == []


@contextmanager
def chromium(downloads: Path) -> Iterator["Browser"]:
    """Chromium with an empty profile. Skips the test if it is not installed."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    try:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """Selenium's driver with what these tests need."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, size: tuple[int, int] = DESKTOP) -> None:
        """Open a page, in a window of a size in pixels."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.requests()
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript; the value of its `return`."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", selector))

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def double_click(self, selector: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).double_click(self.find(selector)).perform()

    def drag(self, selector: str) -> None:
        """Drag the mouse over an element, from near its first corner to near its last one."""
        from selenium.webdriver import ActionChains

        element = self.find(selector)
        right, down = element.size["width"] // 2 - 3, element.size["height"] // 2 - 3
        actions = ActionChains(self.driver).move_to_element_with_offset(element, -right, -down).click_and_hold()
        actions.move_to_element_with_offset(element, right, down).release().perform()

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait until a condition is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"after {seconds} s: {self.text('body')[:500]}"
            time.sleep(0.05)
        return value

    def offline(self, is_offline: bool) -> None:
        """Cut the network of the page off, or connect it again."""
        conditions = {"offline": is_offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def requests(self) -> list[str]:
        """URLs that the page asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def console(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

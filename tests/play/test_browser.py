"""The playground in a real browser, wide and narrow: choose, ask, look at pictures and numbers, copy.

Needs gradio, selenium, Chromium and its driver (Debian: ``apt-get install chromium chromium-driver``). With
``VTR_SCREENSHOTS=FOLDER`` what was seen is written there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtr.play.ask import Player

MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
WIDTHS = {"wide": 1400, "narrow": 420}
PATIENCE = 60
"""Seconds until something that is waited for is said not to come."""


@pytest.fixture(scope="module")
def address(player: Player) -> Iterator[str]:
    from vtr.play.page import build, launch

    page = build(player)
    launch(page, "127.0.0.1", None, block=False)
    yield page.local_url
    page.close()


class Seen:
    """A page in Chromium, and what a reader of it does."""

    def __init__(self, address: str, width: int) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(one)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        service = Service(shutil.which("chromedriver"))
        self.width, self.driver = width, webdriver.Chrome(options=options, service=service)
        self.size(1000)
        self.driver.get(address)
        self.wait(lambda: self.all("#ask"))
        self.wait(lambda: self.all("#policy-3 input"))

    def size(self, height: int) -> None:
        how = {"width": self.width, "height": height, "deviceScaleFactor": 1, "mobile": self.width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)

    def all(self, css: str) -> list[Any]:
        from selenium.webdriver.common.by import By

        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, css) if one.is_displayed()]

    def text(self, css: str) -> str:
        return "\n".join(one.text for one in self.all(css))

    def wait(self, ready: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, PATIENCE, 0.2, [StaleElementReferenceException]).until(lambda _: ready())

    def look(self, css: str) -> Any:
        """Scroll there."""
        return self.driver.execute_script(
            "const one = document.querySelector(arguments[0]); one.scrollIntoView({block: 'center'}); return one", css
        )

    def click(self, element: Any) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, css: str, text: str, end: str = "") -> None:
        from selenium.webdriver.common.keys import Keys

        (box,) = self.all(css)
        self.click(box)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, end)

    def ask(self) -> None:
        self.click(self.all("#ask")[0])

    def picture(self, n: int) -> str:
        self.look(f"#kept-{n}")
        return str(self.wait(lambda: self.all(f"#kept-{n} img"))[0].get_attribute("src"))

    def shoot(self, name: str) -> None:
        """The whole page, where screenshots are asked for."""
        if folder := os.environ.get("VTR_SCREENSHOTS"):
            self.size(self.driver.execute_script("return document.documentElement.scrollHeight"))
            time.sleep(1)  # pictures are laid out anew
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))
            self.size(1000)

    def called(self) -> set[str]:
        """Addresses that the page has asked."""
        found = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {one["params"]["request"]["url"] for one in found if one["method"] == "Network.requestWillBeSent"}


@pytest.fixture(params=WIDTHS)
def seen(request: pytest.FixtureRequest, address: str) -> Iterator[Seen]:
    page = Seen(address, WIDTHS[request.param])
    yield page
    page.driver.quit()


def test_a_reader_asks_looks_and_copies(seen: Seen, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    seen.write("#policy-3 input", "pyramid", Keys.ENTER)
    seen.wait(lambda: seen.all("#spec-3 textarea, #spec-3 input")[0].get_attribute("value").startswith("pyramid:"))
    seen.write("#spec-2 textarea, #spec-2 input", "m3:tokens=9")
    seen.ask()
    for n in (1, 2, 3):
        seen.wait(lambda n=n: "orange" in seen.text(f"#said-{n}"))
        seen.wait(lambda n=n: "GFLOPs" in seen.text(f"#line-{n}"))
    assert "2 · m3:tokens=9" in seen.text("#said-2")
    assert "into layer 2: 744 of 744" in seen.text("#line-1") and "into layer 2: 51 of 744" in seen.text("#line-2")
    seen.look("#stairs")  # pictures are loaded when they come into view
    assert seen.wait(lambda: seen.all("#stairs img"))
    seen.shoot(f"asked-{seen.width}")
    whole = seen.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert whole[0] <= whole[1]  # nothing sticks out to the side

    before = [seen.picture(n) for n in (1, 2, 3)]
    seen.write("#layer input[type=number]", "9", Keys.ENTER)
    seen.wait(lambda: "into layer 9:" in seen.text("#line-3"))
    assert seen.wait(lambda: seen.picture(3) != before[2])
    seen.click(next(one for one in seen.all("#view label") if "attention" in one.text))
    seen.wait(lambda: "attention of the last word in layer 8" in seen.text("#line-3"))
    seen.shoot(f"ranked-{seen.width}")

    seen.click(seen.all("#copy button")[0])
    seen.wait(lambda: "none" in seen.text("#copy-spec"))
    seen.write("#copy-which input", "policy 2", Keys.ENTER)
    seen.wait(lambda: "m3:tokens=9" in seen.text("#copy-spec"))
    assert "vtr.pocket.load" in seen.text("#copy-python") and "vtr serve pocket" in seen.text("#copy-curl")
    seen.shoot(f"copied-{seen.width}")

    own = {"http", "https", "ws", "wss"}
    assert not {url for url in seen.called() if url.split(":")[0] in own and "//127.0.0.1:" not in url}
    severe = [entry for entry in seen.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_errors_are_messages(seen: Seen) -> None:
    seen.write("#spec-2 textarea, #spec-2 input", "fastvv:keep=0.1")
    seen.ask()
    seen.wait(lambda: "did you mean fastv?" in seen.text("#said-2"))
    seen.wait(lambda: "orange" in seen.text("#said-3"))  # the others answer all the same
    seen.write("#question textarea, #question input", " ")
    seen.wait(lambda: seen.ask() or "write a question" in seen.text("body"))  # not before the last one is done
    assert "Traceback" not in seen.text("body")
    seen.shoot(f"refused-{seen.width}")


def test_policies_come_and_go(seen: Seen) -> None:
    assert len(seen.all("[id^=policy-]")) == 3
    seen.write("#number input[type=number]", "6", "\t")
    seen.wait(lambda: len(seen.all("[id^=policy-]")) == 6)
    seen.ask()
    seen.wait(lambda: "orange" in seen.text("#said-6"))
    seen.wait(lambda: "GFLOPs" in seen.text("#line-6"))
    seen.shoot(f"six-{seen.width}")
    seen.write("#number input[type=number]", "2", "\t")
    seen.wait(lambda: len(seen.all("[id^=policy-]")) == 2)
    assert not seen.all("#said-3")

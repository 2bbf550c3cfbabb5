"""Opens report pages in Chromium and checks them: no console message, no request, no serious finding of axe-core, nothing cut
off on a phone, the slider by keyboard; and takes pictures of them.

    pip install selenium && npm pack axe-core && tar xzf axe-core-*.tgz
    python benchmarks/report_in_browser.py PAGE... --axe package/axe.min.js --pictures FOLDER

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver). docs/report.md says what it found.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

VIEWS = {
    "desktop": (1280, 900, "light"),
    "dark": (1280, 900, "dark"),
    "phone": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
"""Width and height in CSS pixels, and the colour scheme that is preferred."""
SERIOUS = ("serious", "critical")


def open_browser() -> Any:
    """Chromium without a window, which keeps its console and its network log."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        raise SystemExit("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def show(browser: Any, page: Path, view: str) -> None:
    """Open `page` as in one of VIEWS."""
    width, height, scheme = VIEWS[view]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.resolve().as_uri())


def findings(browser: Any, page: Path, view: str, axe: str | None) -> list[str]:
    """What is wrong with the page as in `view`."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    show(browser, page, view)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    found = [f"console: {entry['message']}" for entry in browser.get_log("browser")]
    found += [f"request: {url}" for url in requests(browser.get_log("performance")) if url != page.resolve().as_uri()]
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    if wide > 0:
        found.append(f"the page is {wide} pixels wider than the window")
    if axe:
        browser.execute_script(axe)
        result = browser.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
        for violation in result["violations"]:
            where = violation["nodes"][0]["target"]
            line = f"axe {violation['impact']}: {violation['id']} ({len(violation['nodes'])} places, first {where})"
            found.append(line if violation["impact"] in SERIOUS else f"({line})")
    return [*found, *keyboard(browser)]


def requests(log: list[dict[str, Any]]) -> list[str]:
    """The addresses that were asked for, images in the page itself left out."""
    messages = [json.loads(entry["message"])["message"] for entry in log]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def keyboard(browser: Any) -> list[str]:
    """The slider moves by the arrow keys, and every link of the page leads somewhere."""
    from selenium.webdriver.common.keys import Keys

    found = browser.execute_script(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
        ".filter(id => !document.getElementById(id)).map(id => 'no such place: #' + id)"
    )
    sliders = browser.find_elements("css selector", "#compare-range")
    stages = browser.find_elements("css selector", ".stage")
    if sliders and stages and sliders[0].is_displayed():
        before = browser.execute_script("return document.querySelector('.stage').style.getPropertyValue('--cut')")
        sliders[0].send_keys(Keys.ARROW_RIGHT * 5)
        after = browser.execute_script("return document.querySelector('.stage').style.getPropertyValue('--cut')")
        if before == after:
            found.append("the slider does not move by keyboard")
    return list(found)


def picture(browser: Any, page: Path, view: str, folder: Path, whole: bool) -> Path:
    """A PNG of the page as in `view`, of all of it or of what is seen first."""
    show(browser, page, view)
    asked: dict[str, Any] = {"format": "png"}
    if whole:
        height = browser.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": VIEWS[view][0], "height": height, "scale": 1}
        asked |= {"captureBeyondViewport": True, "clip": clip}
    data = browser.execute_cdp_cmd("Page.captureScreenshot", asked)["data"]
    name = page.parent.parent.name if page.name == "index.html" else page.stem
    path = folder / f"{name}-{view}{'-whole' if whole else ''}.png"
    path.write_bytes(base64.b64decode(data))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, help="report pages (report/index.html of a bundle)")
    parser.add_argument("--axe", type=Path, help="axe.min.js, for accessibility")
    parser.add_argument("--pictures", type=Path, help="the folder for PNGs of every page in every view")
    arguments = parser.parse_args()
    axe = arguments.axe.read_text() if arguments.axe else None
    wrong = 0
    browser = open_browser()
    try:
        for page in arguments.pages:
            for view in VIEWS:
                found = findings(browser, page, view, axe)
                wrong += sum(not line.startswith("(") for line in found)
                print(f"{page}, {view}: {'; '.join(found) or 'nothing found'}")
                if arguments.pictures:
                    arguments.pictures.mkdir(parents=True, exist_ok=True)
                    for whole in (False, True):
                        print(picture(browser, page, view, arguments.pictures, whole))
    finally:
        browser.quit()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The report's page in Chromium, where it is installed: console, requests, width, keyboard (docs/report.md)."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import ROOT
from fluxc.report.structs import PAGE

pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="Chromium and its driver are not installed"
)


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("in_browser", ROOT / "benchmarks" / "report_in_browser.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser(checks: ModuleType) -> Iterator[Any]:
    opened = checks.open_browser()
    yield opened
    opened.quit()


@pytest.mark.parametrize("view", ["desktop", "phone-dark"])
def test_nothing_is_wrong_with_the_page(quick_bundle: Path, checks: ModuleType, browser: Any, view: str) -> None:
    assert checks.findings(browser, quick_bundle / PAGE, view, None) == []


def test_what_is_wrong_with_a_page_is_found(checks: ModuleType, browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://127.0.0.1:9/a.png"><a href="#nowhere">x</a><script>console.error("oh")</script>'
        '<div style="width: 3000px">wide</div>'
    )
    found = "; ".join(checks.findings(browser, page, "phone", None))
    for words in ("console: ", "request: http://127.0.0.1:9/a.png", "pixels wider", "no such place: #nowhere"):
        assert words in found

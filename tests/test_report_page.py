"""The report page in a real browser, on a phone and on a desk."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from sb3_softvalue import SACV
from sb3_softvalue.diagnostics import SoftValueDiagnostics
from sb3_softvalue.figures import report

webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium, which drives the browser, is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)"
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The page of a short run on a task that has a landscape."""
    folder = tmp_path_factory.mktemp("run")
    model = SACV("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), seed=0)
    model.learn(600, callback=SoftValueDiagnostics(folder))
    return report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_page(width: int, page: pathlib.Path, browser: Any) -> None:
    size = dict(width=width, height=844, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    images = browser.execute_script(
        "return Array.from(document.images,"
        " image => ({width: image.naturalWidth, shown: image.clientWidth, alt: image.alt, done: image.complete}))"
    )
    assert len(images) == len(list(page.parent.glob("*.png"))) == 7
    for image in images:
        assert image["done"] and image["width"] > 300 and image["alt"].strip(), image
        assert 300 <= image["shown"] <= width, image
    root = browser.execute_script(
        "const r = document.documentElement; return {content: r.scrollWidth, page: r.clientWidth, title: document.title}"
    )
    assert root["content"] <= root["page"] <= width, root
    assert "SACV on Pendulum-v1" in root["title"]
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, json.dumps(errors, indent=1)

"""report.html in a headless Chromium: rendered, sorted, clicked, narrow, large, live; and what a model wrote is text there."""

import json
import shutil
import threading
import time
from contextlib import contextmanager

import pytest

from grpo_jax.files import read_jsonl, write_jsonl, write_text
from grpo_jax.report.html_page import inert, page
from grpo_jax.report.run_story import read_run
from grpo_jax.report.server import make_server
from tests.report.story import HOSTILE, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: tests/requirements.txt has it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: Debian's chromium and chromium-driver, or Google's"
)
LARGE = 50 << 20  # bytes of samples


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens a page of runs, at a width and with an address behind its #; afterwards nothing may be in the console."""
    folder = tmp_path_factory.mktemp("pages")

    @contextmanager
    def open_page(text: str | None = None, *, url: str | None = None, at: str = "", width: int = 1200):
        if url is None:
            write_text(folder / "report.html", text)
            url = (folder / "report.html").as_uri()
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get("about:blank")
        browser.get(url + at)
        yield browser
        assert browser.get_log("browser") == []

    return open_page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "finished"))


@pytest.fixture(scope="module")
def report(finished):
    return page([finished])


def found(browser, selector: str) -> list[str]:
    """The text of every element that is there."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(x => x.textContent)", selector
    )


def click(browser, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def wait_for(browser, condition: str, seconds: float = 20) -> None:
    """Until JavaScript says so."""
    until = time.monotonic() + seconds
    while not browser.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < until, condition
        time.sleep(0.02)


def numbers(browser, column: int) -> list[float]:
    texts = found(browser, f"#table tbody td:nth-child({column})")
    return [float(text.replace("−", "-")) for text in texts]


def test_it_shows_a_run_and_its_table_is_sorted_and_searched(opened, report):
    with opened(report) as browser:
        assert browser.title == "finished · GRPO at β = 1, seed 0"
        assert found(browser, "#title") == ["GRPO at β = 1, seed 0"]
        assert {"predicted p*", "measured p̂"} <= set(found(browser, "#success .legend span"))
        assert len(browser.find_elements("css selector", "#success polyline")) >= 4
        assert len(browser.find_elements("css selector", "#moved circle")) == 120
        assert "… useful, kl(p̂‖p_ref)" in found(browser, "#lines th") or "predicted p*" in found(browser, "#lines th")
        assert len(found(browser, "#table tbody tr")) == 50 and found(browser, "#at") == ["Page 1 of 3"]

        click(browser, "[data-sort=p_star]")
        up = numbers(browser, 5)
        assert up == sorted(up) and up[0] < 0.5
        click(browser, "[data-sort=p_star]")
        down = numbers(browser, 5)
        assert down == sorted(down, reverse=True) and down[0] > up[-1]
        assert browser.current_url.endswith("#sort=p_star&order=down")
        click(browser, "#next")
        assert numbers(browser, 5)[0] <= down[-1] and found(browser, "#at") == ["Page 2 of 3"]

        browser.find_element("css selector", "#search").send_keys("17+1")
        assert found(browser, "#table tbody td:first-child") == ["117", "17"]
        assert found(browser, "#count") == ["2 of 120 prompts"]
        move = "new PointerEvent('pointermove', {clientX: 600, clientY: 300})"
        browser.execute_script(f"document.querySelector('#success svg').dispatchEvent({move})")
        assert "iteration 20" in found(browser, "#success .tip b")


def test_a_prompt_shows_its_completions_with_verdicts_and_log_ratios(opened, report):
    with opened(report, at="#prompt=3") as browser:  # a link into the page
        assert found(browser, "#which") == ["Prompt 3"]
        assert found(browser, "#sheet h3")[2:4] == ["Before", "After"]
        assert found(browser, "#sheet .verdict")[:2] == ["✗ wrong", "✓ correct"]
        last = "#sheet .sides section:first-child .card:last-child"
        assert found(browser, f"{last} .token")[:3] == list("jav")
        assert found(browser, f"{last} header span")[2].endswith(" nats")
        colours = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].slice(0, 2).map(x => getComputedStyle(x).backgroundColor)",
            f"{last} .token",
        )
        assert len(set(colours)) == 2 and all(
            "0.75" in colour for colour in colours
        )  # as far as colours go, either way
        token = browser.find_element("css selector", f"{last} .token:nth-child(2)")
        webdriver.ActionChains(browser).move_to_element(token).perform()
        assert found(browser, "#token") == ["“a” log π/π_ref −2.000 nats"]
        click(browser, "#following")
        assert found(browser, "#which") == ["Prompt 4"] and browser.current_url.endswith("#prompt=4")
        webdriver.ActionChains(browser).send_keys(webdriver.Keys.ESCAPE).perform()
        assert not browser.find_element("css selector", "#sheet").is_displayed()
        click(browser, "tr[data-index='7'] .number")
        assert found(browser, "#which") == ["Prompt 7"]
        browser.back()
        wait_for(browser, "!document.querySelector('#sheet').open")


def test_what_a_model_wrote_is_text(opened, report):
    with opened(report) as browser:
        browser.execute_script(
            "window.count = () => document.querySelectorAll('script, iframe, img, object, embed').length"
        )
        assert browser.execute_script("return count()") == 1  # page.js
        for i, hostile in enumerate(HOSTILE):
            browser.execute_script("location.hash = arguments[0]", f"prompt={i}")
            wait_for(browser, f"document.querySelector('#which').textContent === 'Prompt {i}'")
            shown = found(browser, "#sheet .card.model")[0]
            assert shown.startswith(f"{i}+1= ")
            if i < 4:
                assert shown == f"{i}+1= {hostile}"
        for spelled in ("202e", "2066", "2028", "2029", "200b", "001b", "d800"):
            assert f"\\u{{{spelled}}}" in shown
        assert "[[script]] \\u003c &lt;" in shown and not set(shown) & set("\u202e\u2066\u2028\u200b\x1b")
        assert browser.execute_script("return count()") == 1
        assert browser.execute_script("return window.hacked") is None
        # The policy of the page lets no other script run, however it gets in.
        browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE[2])
        wait_for(browser, "document.querySelector('img')")
        assert browser.execute_script("return window.hacked") is None
        refused = [entry["message"] for entry in browser.get_log("browser")]
        assert refused and all("Content Security Policy" in message for message in refused)


def test_it_is_usable_at_360_pixels(opened, report):
    with opened(report, width=360) as browser:
        fits = "return document.documentElement.scrollWidth <= 360"
        assert browser.execute_script(fits)
        click(browser, "[data-sort=p_final]")
        browser.find_element("css selector", "#search").send_keys("11+1")
        assert browser.find_element("css selector", "#table tbody .number:nth-last-child(4)").is_displayed()
        click(browser, "#table tbody tr .number")
        assert browser.execute_script(fits)
        box = browser.execute_script(
            "const r = document.querySelector('#sheet').getBoundingClientRect(); return [r.left, r.right]"
        )
        assert box == [0, 360]
        inside = (
            "return [...document.querySelectorAll('#sheet .card')].every(x => x.getBoundingClientRect().right <= 360)"
        )
        assert browser.execute_script(inside)
        click(browser, "#close")
        assert not browser.find_element("css selector", "#sheet").is_displayed()


def test_without_javascript_it_says_so(browser, opened, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        with opened(report):
            assert "does not run" in browser.find_element("css selector", "#without").text
            assert not browser.find_element("css selector", "#report").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_two_runs_stand_side_by_side(opened, finished, tmp_path):
    other = read_run(write_run(tmp_path / "other", gain=-0.1))
    with opened(page([finished, other]), at="#prompt=2&sort=change") as browser:
        assert found(browser, "#names b") == ["finished", "other"]
        change = numbers(browser, 9)
        assert change == sorted(change) and change[0] == pytest.approx(-0.1, abs=0.011)
        assert found(browser, "#sheet .sides h3") == ["Before", "After A", "After B"]
        assert {"measured p̂ A", "measured p̂ B"} <= set(found(browser, "#success .legend span"))
        assert found(browser, "#settings summary") == ["0 settings differ"]


def test_fifty_megabytes_of_samples_open_in_three_seconds(browser, opened, finished):
    """Three seconds of the page's own work; on a machine that does nothing else, that is what one waits."""
    samples = [dict(sample) for sample in finished["samples"]]
    size = len(inert(samples[5]))
    words = [
        {
            "pieces": [" lorem ipsum dolor sit" * 4] * 500,
            "log_ratios": [0.125] * 500,
            "reward": 1.0,
            "verdict": None,
            "truncated": True,
        }
    ]
    copies = LARGE // (len(inert(words)) * len(samples)) + 1
    large = page([finished | {"samples": [sample | {"after": words * copies} for sample in samples]}])
    assert len(large) > LARGE > 1000 * size
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    with opened(large) as browser:
        wait_for(browser, "document.querySelectorAll('#table tbody tr').length === 50")
        metrics = {x["name"]: x["value"] for x in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
        waited = (
            browser.execute_script("return performance.timing.loadEventEnd - performance.timing.navigationStart") / 1000
        )
        print(f"\n{len(large) / 2**20:.0f} MB: {metrics['TaskDuration']:.2f} s of work, {waited:.2f} s waited")
        assert metrics["TaskDuration"] < 3
        click(browser, "tr[data-index='1'] .number")
        assert len(found(browser, "#sheet .sides section:last-of-type .card")) == copies


def test_it_follows_a_run(opened, tmp_path):
    run = write_run(tmp_path / "run", prompts=5, finished=False)
    (run / "reference.json").rename(tmp_path / "reference.json")  # not measured yet
    with make_server([run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(url=f"http://127.0.0.1:{server.server_port}/") as browser:
            assert found(browser, "#status") == [
                "The reference is being made and measured; what is found will show here."
            ]
            (tmp_path / "reference.json").rename(run / "reference.json")
            wait_for(browser, "document.querySelector('#latest h2')")
            assert found(browser, "#latest h2") == ["Samples at iteration 20"]
            assert found(browser, "#table tbody td:first-child") == list("01234")
            rows = read_jsonl(run / "probes.jsonl")
            more = rows[-1] | {"iteration": 30}
            more["completions"] = json.loads(json.dumps(more["completions"]).replace('"w"', '"W"'))
            write_jsonl(run / "probes.jsonl", [*rows, more])
            wait_for(browser, "document.querySelector('#latest h2').textContent.endsWith('30')")
            assert "<script>WindoW.hacked" in found(browser, "#latest .card .model")[1]
        server.shutdown()

"""The run's page, in a browser: 20,000 rollouts, filters, colours, two runs, a phone, dark mode."""
from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import report
from polaris_mini import Config, UserError

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
                None)
STEPS, PROBLEMS, GROUP = 50, 50, 8


def made_up_run(folder: Path, steps: int = STEPS) -> Path:
    """Write logs with every kind of line; a problem's text tries to break the page."""
    metrics = [{"step": step, "stage": 1 + (step > steps // 2), "reward/mean": step / steps, "time/step": 2.0,
                "tokens/rollout": 1000, "policy/entropy": None if step == 3 else 0.5, "time/rollout": 1.0,
                "time/reward": 0.1, "time/update": 0.8, "time/sync": 0.1, "time/save": 0.1}
               for step in range(1, steps + 1)]
    evaluations = [{"step": step, "avg_at_k": 0.2 + step / 100, "interval": 0.05, "pass_at_k": [0.2, 0.4]}
                   for step in (0, steps)]
    probe = {"step": 1, "stage": 1, "chosen": 0.8, "accuracy": {"0.4": 0.5, "0.8": 0.5, "1.2": 0.1},
             "noise": {"0.4": 0.01, "0.8": 0.01, "1.2": 0.01}, "distinct_4": {"0.4": 0.3, "0.8": 0.5, "1.2": 0.9}}
    rollouts = [{"step": step, "id": f"p{p}", "problem": f"</script><b>1 < {p}</b>", "response": f"so \\boxed{{{g}}}",
                 "answer": ["1"], "reward": [0.0, 1.0, 0.5][g % 3] if p else 0.0,
                 "reason": "correct" if g % 3 == 1 and p else "wrong", "tokens": 3, "truncated": g == 7,
                 "advantage": 0.5 * (g % 3), "weight": p % 3,
                 "rescued": g == 2} for step in range(1, steps + 1) for p in range(PROBLEMS) for g in range(GROUP)]
    rollouts[0]["pieces"] = [["so", -0.01], [" \\boxed{", -3.0], ["0}", -0.5]]
    scores = [{"step": step, "id": f"p{p}", "score": p / PROBLEMS}
              for step in range(steps + 1) for p in range(PROBLEMS)]
    folder.mkdir()
    for name, lines in (("metrics", metrics), ("evaluations", evaluations), ("probes", [probe]), ("rollouts", rollouts),
                        ("scores", scores)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(asdict(Config())))
    return folder


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return report.write_report([made_up_run(folder / "one"), made_up_run(folder / "two", steps=10)])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu",
                                                                           "--disable-background-networking"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, page_file):
    """Open the page, without a network; an error in it fails the test."""
    contexts, errors = [], []

    def opened(width: int = 1400, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:"))
                else errors.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("body[data-ready=yes]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def shown(page) -> str:
    return page.locator("#shown").inner_text()


def test_rollouts_are_browsed_and_filtered(open_page):
    page = open_page()
    assert shown(page) == "1 to 40 of 20000"
    page.click("#next")
    assert shown(page) == "41 to 80 of 20000"
    page.click("#back")
    page.fill("[name=first]", "7")
    page.fill("[name=last]", "8")
    assert shown(page) == "1 to 40 of 800"
    page.select_option("[name=reward]", "1")
    assert shown(page) == "1 to 40 of 294"  # 3 of 8 in each of 49 groups, twice
    page.select_option("[name=reward]", "part")
    assert shown(page) == "1 to 40 of 196"
    page.select_option("[name=reward]", "")
    page.select_option("[name=batch]", "rescued")
    assert shown(page) == "1 to 40 of 100"
    page.select_option("[name=reason]", "correct")
    assert shown(page) == "none"
    page.click("#next")
    page.select_option("[name=reason]", "wrong")
    page.fill("[name=text]", "p17")
    assert shown(page) == "1 to 2 of 2"
    page.select_option("[name=run]", "1")
    assert shown(page) == "1 to 2 of 2"
    page.fill("[name=first]", "11")
    assert shown(page) == "none"


def test_a_rollout_is_opened_and_its_tokens_are_coloured(open_page):
    page = open_page()
    page.locator("summary").first.click()
    page.locator("details pre").first.wait_for()  # the page fills a rollout in once it is open
    texts = page.locator("details").first.locator("pre").all_inner_texts()
    assert texts == ["</script><b>1 < 0</b>", "so \\boxed{0}"]
    tokens = page.locator("details pre span")
    colours = tokens.evaluate_all("spans => spans.map(s => getComputedStyle(s).backgroundColor)")
    assert len(set(colours)) == 3
    brightness = [sum(map(int, colour.strip("rgb()").split(","))) for colour in colours]
    assert brightness[0] > brightness[2] > brightness[1]
    assert tokens.nth(1).get_attribute("title") == "log-prob -3"
    page.locator("summary").nth(1).click()
    assert page.locator("details").nth(1).locator("pre").nth(1).inner_text() == "so \\boxed{1}"


def test_curves_of_both_runs_lie_over_each_other(open_page):
    page = open_page()
    traces = page.locator(".chart").first.evaluate("chart => chart.data.map(t => [t.name, t.x.length])")
    assert traces == [["one: training rollouts", 50], ["two: training rollouts", 10], ["one: held-out, 95 %", 2],
                      ["two: held-out, 95 %", 2]]
    titles = page.locator(".chart").evaluate_all("charts => charts.map(c => c.layout.title.text)")
    assert "two: temperature of stage 1: 0.8" in titles
    assert "one: problems by pass rate, stage 2" in titles
    borders = page.locator(".chart").first.evaluate("chart => chart.layout.shapes.map(s => s.x0)")
    assert borders == [25.5, 5.5]
    boxes = [page.locator(".chart").nth(i).bounding_box() for i in range(3)]
    for one, other in ((boxes[0], boxes[1]), (boxes[1], boxes[2])):
        assert one["x"] + one["width"] <= other["x"]
        svg = page.locator(".chart").first.locator("svg").first.bounding_box()
        assert svg["width"] <= boxes[0]["width"] + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark_mode(open_page, scheme):
    page = open_page(width=390, scheme=scheme)
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    red, *_ = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(red) < 60) == (scheme == "dark")


def test_page_of_a_long_run_has_every_nth_step(page_file, monkeypatch):
    folder = page_file.parent
    assert len(report.report_of(folder)["rollouts"]) == STEPS * PROBLEMS * GROUP
    monkeypatch.setattr(report, "PAGE_BYTES", (folder / "rollouts.jsonl").stat().st_size // 2 - 1)
    assert {line["step"] for line in report.report_of(folder)["rollouts"]} == set(range(STEPS, 0, -3))


def test_without_an_argument_the_page_is_the_newest_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/ has none"):
        report.main([])
    (tmp_path / "runs").mkdir()
    for name, changed in (("a", 1000), ("b", 3000), ("c", 2000)):
        made_up_run(tmp_path / "runs" / name, steps=2)
        os.utime(tmp_path / "runs" / name / "metrics.jsonl", (changed, changed))
    report.main([])
    assert [path.parent.name for path in tmp_path.glob("runs/*/report.html")] == ["b"]
    report.main(["runs/a", "runs/c", "--out", "both.html"])
    assert (tmp_path / "both.html").is_file()


def test_report_of_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a step in it"):
        report.write_report([tmp_path])

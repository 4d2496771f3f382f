"""The report of an evaluation in a real browser, on a desk and on a telephone: whole, quiet, and deaf to model text.

It stands here because the browser does; `tests/evaluation` tests what the report says.
"""

from __future__ import annotations

import numpy as np
import pytest

from align.evaluation.completions import ModelCompletion, behaviour_metrics
from align.evaluation.metric import Verdicts, compare_verdicts, mean_metric
from align.evaluation.model_runs import ModelRun
from align.evaluation.report_page import render_report
from align.evaluation.request import EvaluationData, EvaluationRequest, slices_of
from align.evaluation.results import summarise_runs
from align.evaluation.session import Evaluation
from align.registry import Ancestor, Checkpoint
from align.schema import Record, assistant, user

HOSTILE = "</p><script>document.title='taken'</script><img src='http://example.com/x.png' onerror='alert(1)'>"
LONG = "a" * 400
NAMES = ("first-model-with-a-rather-long-name@v12", "second@v1", "third@v3")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    records = [
        Record(prompt=[user(f"{HOSTILE if place % 5 == 0 else LONG if place % 5 == 1 else '请问价格？'} {place}")])
        for place in range(40)
    ]
    runs = []
    for place, name in enumerate(NAMES):
        texts = [HOSTILE if row % 3 else f"{LONG} \u202e\x07" for row in range(40)]
        written = [
            ModelCompletion([assistant(text)], int(size), bool(size % 7))
            for text, size in zip(texts, rng.integers(1, 60, 40), strict=True)
        ]
        run = ModelRun(name, Checkpoint(name, "policy", "nowhere"), written)
        scores = (rng.random(40) < 0.4 + 0.2 * place).astype(float)
        run.add(
            [
                mean_metric("gold", scores),
                mean_metric("reward_model", rng.normal(place, 2, 40)),
                *behaviour_metrics(written),
            ]
        )
        runs.append(run)
    material = EvaluationData(records, slices_of(records), {"name": "<b>data</b>", "digest": "sha256:0", "rows": 40})
    verdicts = {
        run.reference: [compare_verdicts("<i>judge</i>", NAMES[0], Verdicts(rng.random(40).round()))]
        for run in runs[1:]
    }
    result = summarise_runs(runs, EvaluationRequest(data="data"), material, verdicts)
    trees = [Ancestor(name, "policy", "dpo", None, parents=(Ancestor("base@v1", "base", "", None),)) for name in NAMES]
    path = tmp_path_factory.mktemp("report") / "report.html"
    evaluation = Evaluation(result, runs, material)
    path.write_text(render_report(evaluation, trees, also=[evaluation]), encoding="utf-8")
    return path


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light")])
def test_the_report_fits_and_nothing_in_it_runs_or_calls_out(browser, page_file, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: said.append(line.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))

    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")

    assert asked == [page_file.as_uri()]
    assert said == []
    assert page.title() == "<b>data</b>: evaluation"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("script, img").count() == 0
    assert page.locator(".said p", has_text="onerror='alert(1)'").count() > 0
    assert page.locator("svg.track").first.bounding_box()["width"] > 100
    assert page.locator("h2").all_inner_texts()[:3] == ["Gold", "All numbers", "Against the first model"]
    assert page.get_by_role("heading", name="On <b>data</b>, 40 records").count() == 1
    context.close()


@pytest.mark.browser
def test_every_number_can_be_reached_on_a_telephone_by_keyboard(browser, page_file):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(page_file.as_uri())

    tables = page.locator(".scroll")

    for place in range(tables.count()):
        box = tables.nth(place)
        assert box.get_attribute("tabindex") == "0"
        assert box.evaluate("each => getComputedStyle(each).overflowX") == "auto"
    context.close()

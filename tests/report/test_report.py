"""report.html: complete from whatever is there, self-contained, and fit to look at."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.compare import compare
from rlhf_t2i.tools.live_report import LiveReport
from rlhf_t2i.tools.report import gallery, headline, training_plots, write_report
from rlhf_t2i.tools.train import train
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.utils import numbers
from tests.report.fake_run import PROMPTS, make_run
from tests.report.headless import chromium


def test_page_holds_table_pictures_recipe_and_cost(run_folder):
    page = write_report(run_folder).read_text("utf-8")
    for text in (
        "improved by more than 3 standard errors",
        "pseudo_huber",
        "100 x pickscore",
        "5 min 0 s",
        "2.13.0+cpu",
    ):
        assert text in page
    assert page.count("data:image/") == 2 * 24 + 4 * 6 + 4 + 2 * 3
    assert "--out &lt;out&gt;" in page
    assert "Infinity" not in page


def test_page_is_the_same_twice(run_folder):
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()


def test_no_address_but_data_and_no_id_twice(run_folder):
    page = write_report(run_folder).read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_regularizer_loss_is_never_plotted(run_folder):
    rows = [{"step": s, "images": s, "divergence_loss": 1.0, "loss/divergence": 1.0} for s in range(3)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run_folder).read_text("utf-8")
    assert "divergence_loss" not in page
    assert "loss/divergence" not in page


def test_it_opens_with_the_unseen_scorer_and_the_image_that_all_scorers_call_better(run_folder):
    before, after = (results.read(run_folder / "evaluation" / when) for when in ("before", "after"))
    rows = compare(before, after)
    opening = headline.finished(before, after, rows, [])
    assert opening.label == "clip"  # measured, never trained on
    assert opening.number == numbers.signed(rows[1].difference)
    changes = {
        key: np.subtract(after.metrics[key].by_image, before.metrics[key].by_image) for key in ("pickscore", "clip")
    }
    order = np.argsort(-np.minimum(*(change / change.std() for change in changes.values()))).tolist()
    first: dict[str, int] = {}
    for index in order:
        first.setdefault(before.prompts[index], index)
    best = list(first.values())[:3]
    assert [pair.prompt for pair in opening.pairs] == [before.prompts[index] for index in best]
    assert len({pair.prompt for pair in opening.pairs}) == 3
    assert opening.pairs[0].before == gallery.image(before, best[0], [])
    assert opening.pairs[0].after == gallery.image(after, best[0], [])
    trained_alone = headline.finished(before, after, [row for row in rows if row.kind != "eval"], [])
    assert (trained_alone.label, "trained on" in trained_alone.note) == ("pickscore", True)
    assert headline.finished(before, after, [row for row in rows if row.kind == "diversity"], []) is None


def test_a_share_opens_as_percentages(run_folder):
    before, after = (results.read(run_folder / "evaluation" / when) for when in ("before", "after"))
    row = next(row for row in compare(before, after) if row.kind == "eval")
    row = replace(row, unit="share", before=0.331, after=0.724, difference=0.393)
    opening = headline.finished(before, after, [row], [])
    assert opening.number == "33% \N{RIGHTWARDS ARROW} 72%"
    assert "+39 points" in opening.note


def test_a_running_page_says_how_far_it_is_and_reloads(tmp_path):
    page = write_report(make_run(tmp_path, finished=False), live=True).read_text("utf-8")
    assert "Step 60 of 60" in page
    assert '<meta http-equiv="refresh"' in page
    opening = headline.running(training_plots.read(tmp_path), tmp_path / "samples", [])
    rewards = [
        json.loads(line)["reward/pickscore"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:60]
    ]
    assert opening.number == numbers.signed(sum(rewards[-10:]) / 10 - sum(rewards[:10]) / 10)
    (pair,) = opening.pairs
    assert pair.before == gallery.data_uri(tmp_path / "samples/step_000000.png", [], 768)
    assert pair.after == gallery.data_uri(tmp_path / "samples/step_000060.png", [], 768)
    assert '<meta http-equiv="refresh"' not in write_report(tmp_path).read_text("utf-8")


def test_the_report_is_rewritten_at_every_preview_and_never_ends_a_run(make_recipe, tmp_path, monkeypatch):
    class Callback(TrainCallback):
        pages, said = [], []

        def on_preview(self, out, step):
            self.pages.append((step, (out / "report.html").read_text("utf-8")))

        def on_message(self, text):
            self.said.append(text)

    callback, out = Callback(), tmp_path / "out"
    more = {"resume": False, "allow_recipe_change": False, "address": None, "callback": callback}
    train(make_recipe(steps=2, logging__samples_every=1), out, **more)
    assert [step for step, _ in callback.pages] == [0, 1, 2, 2]
    for step, page in callback.pages:
        assert f"Step {step} of 2" in page
    assert "reloads itself" not in (out / "report.html").read_text("utf-8")
    monkeypatch.setattr(headline, "running", lambda *_: 1 / 0)
    live = LiveReport(callback)
    for step in (1, 2):
        live.on_preview(out, step)
    assert [text for text in callback.said if "report.html" in text] == [
        "report.html could not be written while training (division by zero)"
    ]


def test_an_unfinished_run_says_so(tmp_path):
    page = write_report(make_run(tmp_path, finished=False)).read_text("utf-8")
    assert "This run is not finished" in page
    assert "Reward: pickscore" in page


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "no evaluation of the start" in write_report(tmp_path).read_text("utf-8")


def test_damaged_files_cost_their_part_only_and_are_named(run_folder):
    (run_folder / "run.json").write_text("{")
    (run_folder / "recipe.yaml").write_bytes(b"\xff\xfe: [")
    metrics = (run_folder / "metrics.jsonl").read_text().split("\n")
    (run_folder / "metrics.jsonl").write_text("\n".join([*metrics[:4], "rubbish", *metrics[5:]]))
    (run_folder / "evaluation" / "after" / "images" / "00000.png").write_bytes(b"not a picture")
    (run_folder / "evaluation" / "before" / "images" / "00001.png").unlink()
    data = bytearray((preview := run_folder / "samples" / "step_000000.png").read_bytes())
    data[len(data) // 2] ^= 1
    preview.write_bytes(data)
    page = write_report(run_folder).read_text("utf-8")
    assert "improved by more than 3 standard errors" in page
    for words in (
        "run.json is damaged", "recipe.yaml is not UTF-8 text", "metrics.jsonl line 5 is damaged",
        "after/images/00000.png is no whole image", "before/images/00001.png is missing",
        "samples/step_000000.png is no whole image",
    ):  # fmt: skip
        assert page.count(words) == 1, words


def test_prompts_are_escaped(run_folder):
    path = run_folder / "evaluation"
    for name in ("before", "after"):
        file = path / name / "results.json"
        file.write_text(file.read_text().replace(PROMPTS[0], "<script>alert(1)</script>"))
    assert "<script>alert(1)" not in write_report(run_folder).read_text("utf-8")


@pytest.mark.slow
def test_page_in_a_browser(run_folder):
    check_in_browser(write_report(run_folder), pictures=82)


def check_in_browser(page, pictures):
    """No console error, no request, every picture drawn, nothing wider than the window; light and dark."""
    with chromium() as browser:
        backgrounds = set()
        for width, scheme in ((390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")):
            browser.open(page, width, scheme)
            assert browser.errors() == []
            assert browser.requests() == [page.resolve().as_uri()]
            assert browser.script("return document.documentElement.scrollWidth") <= width
            assert browser.script(OVERFLOWING) == []
            drawn = browser.script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
            assert drawn == [True] * pictures
            backgrounds.add(browser.script("return getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2


# Elements whose text is cut off or sticks out of the window; drawings scale with their card.
OVERFLOWING = """
return [...document.querySelectorAll("main *:not(svg *, thead, thead *)")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 1 || (getComputedStyle(e).overflowX === "visible" && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== "inline" && e.clientWidth > 0);
}).map(e => e.tagName + ": " + e.textContent.slice(0, 40))
"""


@pytest.mark.slow
def test_slider_moves_the_cut(run_folder):
    with chromium() as browser:
        browser.open(write_report(run_folder), 1440, "light")
        clip = "return getComputedStyle(document.querySelector('.pair img:last-of-type')).clipPath"
        assert "50%" in browser.script(clip)
        browser.script("const r = document.querySelector('input[type=range]'); r.value = 20;"
                       "r.dispatchEvent(new Event('input'))")  # fmt: skip
        assert "20%" in browser.script(clip)
        browser.script("document.querySelector('[data-mode=side]').click()")
        assert browser.script(clip) == "none"


def test_bytes_are_no_seconds(run_folder):
    page = write_report(run_folder).read_text("utf-8")
    drawing = page[page.index("<h3>Seconds per step</h3>") :]
    assert ">bytes<" not in drawing[: drawing.index("</figure>")]
    assert ">assistant<" in drawing[: drawing.index("</figure>")]


def test_prompts_that_were_trained_on_are_not_called_held_out(run_folder):
    assert "on held-out prompts" in write_report(run_folder).read_text("utf-8")
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("held_out: h.txt", "held_out: null"), "utf-8")
    page = write_report(run_folder).read_text("utf-8")
    assert "on held-out prompts" not in page
    assert "training saw these prompts" in page


def test_a_reward_that_learns_is_shown_with_its_scorer_and_its_trust():
    online = {"online/a/true": 0.4, "online/a/pull": 1.0, "online/a/rank_correlation": 0.2}
    rows = [{"step": n, "reward/a": 0.5, "reward/b": 0.1, **online} for n in range(1, 4)]
    plots = {plot.title: plot.svg for plot in training_plots.training(rows, {})}
    assert list(plots) == ["Reward: a", "Trust in the learned a", "Reward: b"]
    assert "scored, fresh samples" in plots["Reward: a"]
    assert "scored" not in plots["Reward: b"]
    assert "gradient that counts" in plots["Trust in the learned a"]
    assert "rank correlation" in plots["Trust in the learned a"]

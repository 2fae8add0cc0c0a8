"""ablate: rows once, failures named, the same bytes after kills, tables that say what was measured."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.tools.ablation import execute
from rlhf_t2i.tools.ablation.runner import ablate, scale_unit
from tests.ablation.conftest import MEASURE, TRAIN, small
from tests.report.test_report import check_in_browser

FILES = ("table.md", "table.csv", "table.json")


def run(recipe: Path, out: Path, **options) -> str:
    return ablate(recipe, out, train=TRAIN, measure=MEASURE, **options)


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_sdxl, tiny_prompts):
    """A finished ablation."""
    import yaml

    from tests import tiny

    folder = tmp_path_factory.mktemp("ablation")
    (folder / "prompts.txt").write_bytes(tiny_prompts.read_bytes())
    base = tiny.recipe_dict(tiny_sdxl, folder / "prompts.txt", steps=3)
    base["algorithm"] = {"rewards": [{"name": "pickscore", "scale": 100.0}]}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "ablation.yaml").write_text(yaml.safe_dump(small()))
    run(folder / "ablation.yaml", folder / "out", parallel=2)
    return folder


def test_table_holds_every_row_and_marks_the_papers_figures(done):
    text = (done / "out" / "table.md").read_text()
    assert "| row | seeds | PickScore | PickScore, the paper's | Diversity | fid |" in text
    assert "the paper's own figures" in text
    assert "0.2304" in text
    rows = list(csv.DictReader((done / "out" / "table.csv").open()))
    assert {row["row"] for row in rows} == {row["name"] for row in small()["rows"]}
    best = next(row for row in rows if row["row"] == "ph_100" and row["metric"] == "pickscore")
    assert float(best["low"]) < float(best["mean"]) < float(best["high"])
    assert (best["seeds"], best["paper"]) == ("2", "0.2304")
    assert float(best["seed_sd"]) > 0
    diversity = next(row for row in rows if row["row"] == "initial" and row["metric"] == "pairwise_distance")
    assert 40 < float(diversity["mean"]) < 60
    assert "DI++ (2000) (not in the paper)" in text


def test_changes_are_paired_with_the_initial_row(done):
    changes = (done / "out" / "table.md").read_text().split("## Change from the initial row")[1].split("##")[0]
    rows = {row["name"]: row for row in json.loads((done / "out" / "table.json").read_text())["rows"]}
    label, metric = rows["ph_10"]["label"], next(iter(rows["ph_10"]["metrics"].values()))
    (line,) = [line for line in changes.splitlines() if line.startswith(f"| {label} |")]
    assert f"{metric['from_initial']['value']:+.4g}" in line
    assert rows["initial"]["label"] not in changes


def test_claims_are_judged_by_their_intervals(done):
    data = json.loads((done / "out" / "table.json").read_text())
    assert [claim["outcome"] for claim in data["claims"]] == ["holds", "does not hold"]
    assert len(data["equal_reward"]) == 3
    assert all(e["first"] == "KL" and e["difference"]["high"] < 0 for e in data["equal_reward"])


def test_scale_unit_converts_the_papers_scale(done):
    settings = json.loads((done / "out" / "rows" / "ph_10" / "seed_0" / "model" / "fake.json").read_text())
    assert settings == {"scale": 5.0, "kind": "pseudo_huber", "seed": 0}


def test_plots_and_page(done):
    assert sorted(p.name for p in (done / "out" / "plots").iterdir()) == [
        "divergence-over-images-seen.svg", "pickscore-against-diversity.svg", "pickscore-over-images-seen.svg",
    ]  # fmt: skip
    drawing = (done / "out" / "plots" / "pickscore-against-diversity.svg").read_text()
    assert "var(--" not in drawing
    page = (done / "out" / "report.html").read_text()
    assert "paper 0.2304" in page
    assert "does not hold" in page


@pytest.mark.slow
def test_page_in_a_browser(done):
    page = done / "out" / "report.html"
    check_in_browser(page, pictures=page.read_text().count("<img"))


def test_a_second_run_does_nothing_and_a_new_row_only_itself(done):
    said = []
    before = tables(done / "out")
    run(done / "ablation.yaml", done / "out", say=said.append)
    assert said == ["9 of 9 rows are finished"]
    assert tables(done / "out") == before


def test_only_some_rows_and_seeds(recipe_file, tmp_path):
    run(recipe_file(), tmp_path / "out", only=["ph_10"], seeds="5")
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["initial", "ph_10"]
    assert (tmp_path / "out" / "rows" / "ph_10" / "seed_5").is_dir()
    claims = json.loads((tmp_path / "out" / "table.json").read_text())["claims"]
    assert claims[0]["outcome"] == "not measured"
    assert "were not run" in claims[0]["detail"]


def test_a_changed_row_is_refused(recipe_file, tmp_path):
    run(recipe_file(), tmp_path / "out", only=["ph_10"], seeds="0")
    with pytest.raises(UsageError, match="steps is 3 there and 4 now"):
        run(recipe_file(), tmp_path / "out", only=["ph_10"], seeds="0", more=["steps=4"])


def test_other_content_under_the_same_names_is_seen(recipe_file, tmp_path, monkeypatch):
    """Cases B.2: a reward's code, what it imports, prompts and weights count, not their names."""
    monkeypatch.syspath_prepend(tmp_path)
    out, helper, weights = tmp_path / "out", tmp_path / "helper.py", tmp_path / "weights.bin"
    plugin = tmp_path / "scorer.py"
    plugin.write_text(SCORER, "utf-8")
    helper.write_text("LEVEL = 1\n", "utf-8")
    weights.write_bytes(b"1")
    judge = {"options": {"judge": {"weights": str(weights)}}, "metrics": ["pickscore", f"judge={plugin}:Scorer"]}
    recipe = recipe_file(evaluation=small()["evaluation"] | judge)
    reward = f"algorithm.eval_rewards=[{{name: '{plugin}:Scorer', label: judge, options: {{weights: {weights}}}}}]"
    options = {"only": ["ph_10"], "seeds": "0"}

    def said(**more):
        lines = []
        run(recipe, out, say=lines.append, **options, **more)
        return lines

    said()
    assert said() == ["2 of 2 rows are finished"]
    for file in (plugin, helper, weights):
        file.write_bytes(file.read_bytes() + b"\n")
        assert said()[0] == "0 of 2 rows are finished", file
        assert said() == ["2 of 2 rows are finished"]
    # A row that was trained with it is refused.
    out = tmp_path / "trained"
    said(more=[reward])
    helper.write_text("LEVEL = 3\n", "utf-8")
    with pytest.raises(UsageError, match=r"algorithm\.eval_rewards: judge \(content\) is"):
        said(more=[reward])
    helper.write_bytes(b"LEVEL = 1\n\n")
    said(more=[reward])
    with (tmp_path / "prompts.txt").open("a") as stream:
        stream.write("one more\n")
    with pytest.raises(UsageError, match=r"data\.prompts \(content\) is"):
        said(more=[reward])


SCORER = """
from rlhf_t2i.plugins import Options, Reward
import helper

class Weights(Options):
    weights: str

class Scorer(Reward):
    Options = Weights
"""


def test_a_failing_row_is_named_and_the_others_go_on(recipe_file, tmp_path):
    rows = small()["rows"]
    rows[1]["set"] = {"algorithm.rewards.0.scale": 666.0}
    with pytest.raises(RunError, match=r"2 of 9 rows failed.*kl_10.*the reward is on fire"):
        run(recipe_file(rows=rows), tmp_path / "out", parallel=2)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Not finished: kl_10/seed_0, kl_10/seed_1" in text
    assert "DI* (100)" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial": "initail"}, "did you mean 'initial'"),
        ({"titel": "x"}, "ablation.yaml, line .*unknown key 'titel'; did you mean 'title'"),
        ({"base": "./absent.yaml"}, "row 'initial': no such recipe"),
        ({"evaluation": {"prompts": "./prompts.txt", "steps": 4}}, "'steps' comes from the rows"),
        ({"evaluation": {"promts": "x"}}, "unknown key 'promts'; did you mean 'prompts'"),
        ({"rows": [*small()["rows"], {"name": "ph_10", "label": "again"}]}, "two rows are called 'ph_10'"),
        ({"rows": [{"name": "Initial row", "label": "x"}]}, "rows.0.name"),
        ({"frontiers": [{"name": "KL", "rows": ["kl_10", "kl_1000"]}]}, "did you mean"),
        ({"seeds": []}, "seeds"),
        ({"scale_unit": 0}, "scale_unit"),
    ],
)
def test_bad_recipes_are_one_sentence(recipe_file, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        run(recipe_file(**changes), tmp_path / "out")
    assert not (tmp_path / "out" / "rows").exists()


def test_a_bad_row_is_refused_before_anything_starts(recipe_file, tmp_path):
    rows = small()["rows"]
    rows[-1]["set"] = {"algorithm.divergance.name": "kl"}
    with pytest.raises(UsageError, match=r"row 'ph_100'.*did you mean 'divergence'"):
        run(recipe_file(rows=rows), tmp_path / "out")
    with pytest.raises(UsageError, match="no row is called 'nothing'"):
        run(recipe_file(), tmp_path / "out", only=["nothing"])
    for seeds in ("a", "1,1", "-1"):
        with pytest.raises(UsageError, match="--seeds"):
            run(recipe_file(), tmp_path / "out", seeds=seeds)


def test_the_unit_is_measured_once(recipe_file, tmp_path):
    # Pull 2.0, push 0.5 at scale 1: scale 1.2 makes their ratio 0.3, and that is 100 of the paper's units.
    said = []
    for _ in range(2):
        run(recipe_file(scale_unit="auto"), tmp_path / "out", only=["ph_100"], seeds="0", say=said.append)
    assert sum(line.startswith("calibration:") for line in said) == 1
    model = tmp_path / "out" / "rows" / "ph_100" / "seed_0" / "model" / "fake.json"
    assert json.loads(model.read_text())["scale"] == pytest.approx(1.2)
    with pytest.raises(RunError, match="no gradient norms"):
        scale_unit([{"step": 1}])


def test_slots_share_out_the_gpus(recipe_file, tmp_path, monkeypatch):
    from rlhf_t2i.tools.ablation import schema

    ablation = schema.load(recipe_file())
    ray = [
        "placement={mode: ray, groups: {a: {devices: 2, roles: [learner, generator, assistant, reference, reward]}}}"
    ]
    tasks = execute.tasks(ablation, tmp_path, ray, ["ph_10"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert execute.slots("auto", tasks) == ["0,1", "2,3"]
    with pytest.raises(UsageError, match="3 rows of 2 devices need 6 GPUs, and 5 are there"):
        execute.slots(3, tasks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execute.slots("auto", tasks) == [""]
    assert execute.slots(2, tasks) == ["", ""]


def slowly(recipe: Path, out: Path, log: Path) -> None:
    """The ablation in a process of its own, in which every step takes some time."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["FAKE_SECONDS"] = "0.15"
    run(recipe, out, parallel=2)


def written(out: Path) -> int:
    """Files and folders below the ablation's folder."""
    return sum(len(folders) + len(names) for _, folders, names in os.walk(out))


@pytest.mark.slow
def test_ten_random_kills_give_the_same_bytes(recipe_file, done, tmp_path):
    recipe, out = recipe_file(), tmp_path / "out"
    context = multiprocessing.get_context("forkserver")  # imports once
    context.set_forkserver_preload(["tests.ablation.test_ablate"])
    random.seed(1)
    killed = 0
    while killed < 10:
        process = context.Process(target=slowly, args=(recipe, out, tmp_path / "log"))
        process.start()
        # By what it has written, not by time: whatever the machine's speed, it gets on and is hit everywhere.
        reached = written(out) + random.randint(0, 12)
        while process.is_alive() and written(out) < reached:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.15))
        random.choice([process.kill, process.terminate])()
        process.join()
        killed += process.exitcode != 0
        if (out / "table.md").is_file() and "Not finished" not in (out / "table.md").read_text():
            # Finished between two shots: undo a row, so that there is something left to interrupt.
            victim = random.choice(sorted((out / "evaluations").glob("*/seed_*/results.json")))
            victim.unlink()
    run(recipe, out, parallel=2)
    assert tables(out) == tables(done / "out")


@pytest.mark.slow
def test_real_evaluation_of_the_initial_row(recipe_file, tmp_path, tiny_clip):
    """The initial row needs no training run: real images, scored by the real metrics."""
    evaluation = {"prompts": "./prompts.txt", "limit": 3, "images_per_prompt": 2, "metrics": ["pickscore", "diversity"],
                  "features": "vae", "options": {"pickscore": {"model": str(tiny_clip)}}}  # fmt: skip
    rows, nothing = [small()["rows"][0]], {"frontiers": [], "claims": []}
    text = ablate(recipe_file(evaluation=evaluation, rows=rows, **nothing), tmp_path / "out")
    assert "Initial model" in text
    assert (tmp_path / "out" / "evaluations" / "initial" / "images" / "00005.png").is_file()

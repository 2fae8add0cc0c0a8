"""The two shipped ablations: every row of the paper's Table 2, each a valid training recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_t2i.tools.ablation import execute, schema

RECIPES = Path(__file__).parents[2] / "recipes"
# algorithm.md 3.2: (divergence, mode, alpha_r, alpha_cfg)
TABLE_2 = {
    "dipp_r0_cfg0": ("kl", "inner", 0, 0),
    "dipp_r0_cfg7.5": ("kl", "inner", 0, 7.5),
    "dipp_r100_cfg7.5": ("kl", "inner", 100, 7.5),
    "distar_out_r100_cfg7.5": ("pseudo_huber", "outer", 100, 7.5),
    "distar_r0_cfg0": ("pseudo_huber", "inner", 0, 0),
    "distar_r0_cfg7.5": ("pseudo_huber", "inner", 0, 7.5),
    "distar_r1_cfg7.5": ("pseudo_huber", "inner", 1, 7.5),
    "distar_r10_cfg7.5": ("pseudo_huber", "inner", 10, 7.5),
    "distar_r100_cfg4.5": ("pseudo_huber", "inner", 100, 4.5),
    "distar_r100_cfg7.5": ("pseudo_huber", "inner", 100, 7.5),
    "distar_r100_cfg7.5_long": ("pseudo_huber", "inner", 100, 7.5),
}


@pytest.mark.parametrize("name", ["ablation_table2.yaml", "emoji64/ablation_table2.yaml"])
def test_every_row_of_table_2_is_there_and_valid(name, tmp_path):
    ablation = schema.load(RECIPES / name)
    tasks = execute.tasks(ablation, tmp_path, [])
    recipes = {task.variant.name: task.recipe for task in tasks}
    assert set(TABLE_2) < set(recipes)
    guidance = {7.5: recipes["distar_r0_cfg7.5"].algorithm.cfg.guidance_scale, 0: 0.0,
                4.5: recipes["distar_r100_cfg4.5"].algorithm.cfg.guidance_scale}  # fmt: skip
    for row, (divergence, mode, scale, cfg) in TABLE_2.items():
        algorithm = recipes[row].algorithm
        assert (algorithm.divergence.name, algorithm.cfg.mode) == (divergence, mode)
        assert algorithm.rewards[0].scale == pytest.approx(scale)  # the unit is 1, or measured first
        assert algorithm.cfg.guidance_scale == guidance[cfg]
    longer = recipes["distar_r100_cfg7.5_long"].steps / recipes["distar_r100_cfg7.5"].steps
    assert longer > 2
    assert not tasks[0].variant.train


def test_the_rows_of_the_tuning_page_differ_in_what_it_says(tmp_path):
    ablation = schema.load(RECIPES / "emoji64/ablation_tuning.yaml")
    recipes = {task.variant.name: task.recipe for task in execute.tasks(ablation, tmp_path, [])}
    scales = {name: recipe.algorithm.rewards[0].scale for name, recipe in recipes.items()}
    assert all(scales[name] == float(name.rpartition("_")[2]) for name in scales if "huber" in name or "kl" in name)
    assert {recipes[name].algorithm.divergence.name for name in recipes if "kl" in name} == {"kl"}
    assert recipes["guidance_6"].algorithm.cfg.guidance_scale == 6.0
    assert recipes["far_kl_3000"].steps == 2 * recipes["kl_3000"].steps


def test_the_papers_figures_stand_beside_the_large_rows_only():
    large = schema.load(RECIPES / "ablation_table2.yaml")
    assert all(len(row.paper) == 4 for row in large.rows if not row.note)
    best = next(row for row in large.rows if row.name == "distar_r100_cfg7.5_long")
    assert best.paper == {"image_reward": 1.140, "aesthetic": 5.83, "pickscore": 0.2331, "clip": 32.75}
    assert not any(row.paper for row in schema.load(RECIPES / "emoji64" / "ablation_table2.yaml").rows)


def test_the_small_ablation_repeats_its_main_rows_over_three_seeds():
    ablation = schema.load(RECIPES / "emoji64" / "ablation_table2.yaml")
    seeds = {row.name: row.seeds or ablation.seeds for row in ablation.rows}
    curves = {frontier.name: frontier.rows for frontier in ablation.frontiers}
    compared = {
        row for claim in ablation.claims for name in (claim.more, claim.less) for row in curves.get(name, [name])
    }
    assert {"dipp_r100_cfg7.5", "distar_r100_cfg7.5", "dipp_r0_cfg7.5", "distar_r0_cfg7.5"} < compared
    assert {name for name in compared if len(seeds[name]) < 3} == set()


def test_an_override_that_takes_a_rows_own_key_is_told():
    ablation = schema.load(RECIPES / "emoji64" / "ablation_table2.yaml")
    assert schema.overridden(ablation, ["steps=9", "optimization.batch_size=4"]) == [
        ("distar_r100_cfg7.5_long", "steps")
    ]
    assert schema.overridden(ablation, ["steps=9"], only=["distar_r100_cfg7.5"]) == []

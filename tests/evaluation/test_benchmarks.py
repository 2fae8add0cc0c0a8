"""Prompt lists of the benchmarks, in their published formats."""

from __future__ import annotations

import json
import os

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import benchmarks


def test_parti_tsv(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\n"a ""quoted"" cat"\tAnimals\tBasic\t\n'
    )
    found = benchmarks.load(f"parti:{path}")
    assert found.prompts == ["bond", 'a "quoted" cat']
    assert found.groups == ["Abstract", "Animals"]
    path.write_text("nothing\there\n1\t2\n")
    with pytest.raises(UsageError, match="no column 'Prompt'"):
        benchmarks.load(f"parti:{path}")


def test_hpsv2_json_per_style(tmp_path):
    for style in benchmarks.HPSV2_STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    found = benchmarks.load(f"hpsv2:{tmp_path}")
    assert len(found.prompts) == 8
    assert found.groups[:3] == ["anime", "anime", "concept-art"]
    (tmp_path / "photo.json").write_text("{}")
    with pytest.raises(UsageError, match="not a JSON list"):
        benchmarks.load(f"hpsv2:{tmp_path}")
    with pytest.raises(UsageError, match="no such prompt file"):
        benchmarks.load(f"hpsv2:{tmp_path / 'absent'}")


def test_coco_takes_one_caption_an_image(tmp_path):
    rows = [(7, 2, "second of image 2 "), (3, 2, "first of image 2"), (9, 1, "only of image 1")]
    path = tmp_path / "captions_val2014.json"
    path.write_text(
        json.dumps({"annotations": [dict(zip(("id", "image_id", "caption"), r, strict=True)) for r in rows]})
    )
    assert benchmarks.load(f"coco:{path}").prompts == ["only of image 1", "first of image 2"]
    path.write_text('{"annotations": [{"id": 1}]}')
    with pytest.raises(UsageError, match="no COCO captions"):
        benchmarks.load(f"coco:{path}")
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    assert benchmarks.load(f"coco:{tmp_path / 'captions.txt'}").prompts == ["one", "two"]
    with pytest.raises(UsageError, match="needs a file"):
        benchmarks.load("coco")


def test_the_hub_out_of_reach_is_one_sentence():
    with pytest.raises(UsageError, match="give a copy as parti:PATH"):
        benchmarks.load("parti")


def test_the_shipped_prompts_by_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [len(column) for column in benchmarks.load("emoji64").first(2)] == [2, 2]
    (tmp_path / "emoji64").mkdir()
    with pytest.raises(UsageError, match="emoji64 is a folder without files"):
        benchmarks.load("emoji64")
    with pytest.raises(UsageError, match="no such prompt file"):
        benchmarks.load("no_world")


@pytest.mark.parametrize("name", ["parti:/dev/zero", "coco:/dev/zero", "coco:{pipe}.json", "hpsv2:{folder}", "{pipe}"])
def test_what_never_ends_is_refused_at_once(name, tmp_path):
    """Cases G.8: devices and pipes."""
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "anime.json")
    with pytest.raises(UsageError, match="regular file"):
        benchmarks.load(name.format(pipe=tmp_path / "pipe", folder=tmp_path))

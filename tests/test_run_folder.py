"""The run folder: who may use it, and what a damaged file in it leads to."""

import pytest
import torch

from mmpretrain import checkpoint, run_folder
from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import OptionError
from mmpretrain.tracking.jsonl import LogError
from mmpretrain.tracking.tracker import Tracker
from tests import runs


def config(tmp_path, **changes):
    return recipes.assemble(runs.recipe(tmp_path, tmp_path / "run", **changes))


@pytest.mark.parametrize("content", [b"", b"a: [", b"- 1", b"a: !!python/object/apply:os.mkdir [x]", b"a: \xff", b"1: 2\nb: 3"])
def test_a_damaged_recipe_in_the_folder_is_refused_unless_forced(tmp_path, content):
    run_folder.write_recipe(config(tmp_path), {})
    state = {"step": 4, "positions": {}, "skipped_steps": 0}
    checkpoint.save(tmp_path / "run" / "checkpoints", 4, {"model": {"w": torch.ones(2)}}, {}, {"state": state}, keep=1)
    found, skipped = run_folder.newest(config(tmp_path))
    assert run_folder.check_resume(config(tmp_path), found, skipped) == [f"resuming from {found} (step 4)"]
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(OptionError, match=r"config\.yaml is damaged|different recipe.*\n  1: 2 in the run"):
        run_folder.check_resume(config(tmp_path), found, skipped)
    said = run_folder.check_resume(config(tmp_path, resume="force"), found, skipped)
    assert said[-1] == f"resuming from {found} (step 4)"


@pytest.mark.parametrize("run_dir", ["file", "file/below", "zero\0byte"])
def test_a_folder_that_cannot_be_written_is_the_recipes_fault(tmp_path, run_dir):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"run_dir .* cannot be written: .*Choose another run_dir"):
        run_folder.lock(recipes.assemble(runs.recipe(tmp_path, tmp_path / run_dir)))


@pytest.mark.parametrize("name", ["metrics", "results", "skipped"])
@pytest.mark.parametrize("line", [b"junk", b"[1]", b'{"step": "x"}'])
def test_a_junk_line_is_named(tmp_path, name, line):
    (tmp_path / f"{name}.jsonl").write_bytes(line + b"\n{}\n")
    with pytest.raises(LogError, match=rf"{name}\.jsonl.*Delete that line"):
        Tracker(tmp_path, 1, 10, resume_step=5)


def test_a_line_of_metrics_that_lacks_its_numbers_is_no_obstacle(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    Tracker(tmp_path, 1, 10, resume_step=5).close()

"""common/checkpoint.py: folders appear whole or not at all. Whole runs are in test_train.py."""
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import checkpoint as dcp

from common.checkpoint import begin, check_out_folder, finish, read_log, save_checkpoint, save_prm


class Killed(Exception):
    """Nothing reacts to it: what is on disk is what kill -9 leaves."""


def new_run(seed=0):
    """A model and an optimizer with moments."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def progress(step):
    return {"step": step, "best": 0.5, "best_step": step, "worse": 1, "settings": {"lr": 0.1},
            "totals": {"tokens": 7}}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ------------------------------------------------------------ checkpoints

def test_a_checkpoint_comes_back(tmp_path):
    model, optimizer = new_run()
    save_checkpoint(tmp_path, model, optimizer, progress(3))
    fresh, fresh_optimizer = new_run(seed=1)
    restored = begin(tmp_path, True, {"lr": 0.1}, fresh, fresh_optimizer)
    assert restored == progress(3)
    assert torch.equal(fresh.weight, model.weight)
    moments = [o.state_dict()["state"][0]["exp_avg"] for o in (optimizer, fresh_optimizer)]
    assert torch.equal(*moments)


def killed(*args, **keywords):
    raise Killed


@pytest.mark.parametrize("place, name", [(dcp, "save"), (Path, "write_text"), (os, "replace")],
                         ids=["before the tensors", "before the counters", "before the rename"])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, place, name):
    model, optimizer = new_run()
    save_checkpoint(tmp_path, model, optimizer, progress(3))
    old = model.weight.detach().clone()
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, model, optimizer, progress(4))
    fresh, fresh_optimizer = new_run(seed=1)
    assert begin(tmp_path, True, {"lr": 0.1}, fresh, fresh_optimizer)["step"] == 3
    assert torch.equal(fresh.weight, old)
    assert names(tmp_path) == ["checkpoint-00000003", "log.jsonl"]


def test_the_new_checkpoint_counts_before_the_old_one_goes(tmp_path, monkeypatch):
    model, optimizer = new_run()
    save_checkpoint(tmp_path, model, optimizer, progress(3))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, model, optimizer, progress(4))
    assert begin(tmp_path, True, {"lr": 0.1}, model, optimizer)["step"] == 4
    assert names(tmp_path) == ["checkpoint-00000004", "log.jsonl"]


def test_begin_cuts_the_log_behind_the_checkpoint(tmp_path):
    model, optimizer = new_run()
    save_checkpoint(tmp_path, model, optimizer, progress(2))
    rows = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "log.jsonl").write_text(rows + '{"st')  # a line cut off by the kill
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2, 3, 4]
    begin(tmp_path, True, {"lr": 0.1}, model, optimizer)
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("resume", [False, True])
def test_begin_without_a_checkpoint_starts_again(tmp_path, resume):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    for folder in ("checkpoint.partial", "step-000001"):
        (tmp_path / folder).mkdir()
    state = begin(tmp_path, resume, {"lr": 0.1}, *new_run())
    assert (state["step"], state["best"]) == (0, math.inf)
    assert names(tmp_path) == ["log.jsonl"]
    assert read_log(tmp_path) == []


def test_begin_refuses_other_settings(tmp_path):
    model, optimizer = new_run()
    save_checkpoint(tmp_path, model, optimizer, progress(2))
    with pytest.raises(ValueError, match="--lr was 0.1, is 0.2"):
        begin(tmp_path, True, {"lr": 0.2}, model, optimizer)
    assert names(tmp_path) == ["checkpoint-00000002"]


def test_finish_keeps_all_but_the_checkpoints(tmp_path):
    for folder in ("checkpoint-00000002", "checkpoint.partial", "step-000001"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model.safetensors").write_text("")
    finish(tmp_path)
    assert names(tmp_path) == ["model.safetensors", "step-000001"]


# ------------------------------------------------------------ the best PRM

def save(folder, state):
    """As PRM.save does: two files, the folder complete or absent."""
    folder.mkdir()
    for name in ("model.safetensors", "prm_head.safetensors"):
        (folder / name).write_text(str(float(state["bias"][0])))


@pytest.mark.parametrize("backwards", [False, True], ids=["a to z", "z to a"])
@pytest.mark.parametrize("moves", [0, 1])
def test_no_kill_mixes_two_prms(tmp_path, monkeypatch, moves, backwards):
    """Killed before or between the two moves, in whatever order the folder lists its files."""
    prm, _ = new_run()
    prm.save = save
    save_prm(tmp_path, prm, best=True)
    torch.nn.init.constant_(prm.bias, 5.0)
    original, order = os.replace, Path.iterdir
    calls = []

    def replace(*args):
        if len(calls) == moves:
            raise Killed
        calls.append(args)
        original(*args)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: sorted(order(self), reverse=backwards))
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save_prm(tmp_path, prm, best=True)
    # without the backbone's weights nothing loads; --resume comes by again
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["prm_head.safetensors"]
    shutil.rmtree(tmp_path / "best")
    save_prm(tmp_path, prm, best=True)
    assert {file.read_text() for file in tmp_path.glob("*.safetensors")} == {"5.0"}


# ------------------------------------------------------------ --out, before any work

@pytest.mark.parametrize("resume, overwrite, log", [
    (False, False, False), (False, False, True), (True, False, False)],
    ids=["something else", "a run", "no run to resume"])
def test_a_folder_that_is_taken(tmp_path, resume, overwrite, log):
    (tmp_path / "log.jsonl" if log else tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is taken: --resume goes on with it"):
        check_out_folder(tmp_path, resume, overwrite, 1, 1)


@pytest.mark.parametrize("resume, overwrite", [(True, False), (False, True), (True, True)])
def test_a_folder_that_may_be_used(tmp_path, resume, overwrite):
    (tmp_path / "log.jsonl").write_text("")
    check_out_folder(tmp_path, resume, overwrite, 1, 1)
    assert names(tmp_path) == ["log.jsonl"]


def test_a_folder_is_made(tmp_path):
    check_out_folder(tmp_path / "a" / "b", False, False, 1, 1)
    assert names(tmp_path / "a") == ["b"]


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out cannot be written: Not a directory"):
        check_out_folder(tmp_path / "file" / "out", False, False, 1, 1)


@pytest.mark.parametrize("old_bytes, fits", [(0, False), (6000, True)])
def test_a_full_disk_counts_what_will_be_replaced(tmp_path, monkeypatch, old_bytes, fits):
    (tmp_path / "model.safetensors").write_bytes(b"x" * old_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    if fits:
        check_out_folder(tmp_path, False, True, 200, 200)  # 6,400 bytes
    else:
        with pytest.raises(ValueError, match="needs 0.0 GB, 0.0 GB are free"):
            check_out_folder(tmp_path, False, True, 200, 200)

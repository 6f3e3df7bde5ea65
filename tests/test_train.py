"""train.py on a model of two thin layers: what is exact is compared exactly, on one rank and on two gloo ranks."""
import json
import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, FORKS, begin, run_ranks, two_devices
from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

import common.metrics
import train
from common.data import held_out, read_set
from common.examples import encode_rows, plan
from common.metrics import metrics
from prm_model import load_prm
from tiny import world
from tiny.make import make_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with rows.jsonl (uneven step counts) and `model`, a random backbone whose steps end in a line end."""
    home, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    with open(home / "rows.jsonl", "w") as file:
        for domain, steps in (("math", (2, 9)), ("code", (1, 7))):
            for p in world.problems(domain, "train", 24, steps=steps):
                done = world.write(p, "A", rng)
                file.write(json.dumps(dict(prompt=p["question"], completions=done, labels=world.grade(p, done))) + "\n")
    make_tokenizer(home / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    torch.manual_seed(0)
    Qwen2Model(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, step_separator="\n", pad_token_id=0, eos_token_id=1,
        bos_token_id=None)).save_pretrained(home / "model")
    return home


def flags(home, out, *more):
    return ["--data", f"{home}/rows.jsonl", "--model", f"{home}/model", "--out", str(out), "--val-fraction", "0.2",
            "--batch-size", "4", "--eval-every", "3", "--max-steps", "8", "--epochs", "4",
            "--device", DEVICE, "--dtype", "float32", "--accumulate", "1", *map(str, more)]


def read_log(out, kind="train"):
    return [r for r in map(json.loads, open(Path(out) / "log.jsonl")) if r["kind"] == kind]


def losses(out):
    """Step -> (training loss, gradient norm), and the validation losses."""
    return [(r["step"], r["loss"], r["norm"]) for r in read_log(out)], [r["loss"] for r in read_log(out, "eval")]


def close(a, b, tolerance=1e-5):
    (steps_a, evals_a), (steps_b, evals_b) = losses(a), losses(b)
    return len(steps_a) == len(steps_b) and all(
        x[0] == y[0] and abs(x[1] - y[1]) < tolerance and abs(x[2] - y[2]) < 100 * tolerance * (1 + x[2])
        for x, y in zip(steps_a, steps_b)) and evals_a == pytest.approx(evals_b, abs=tolerance)


def same(a, b):
    """The very losses; on a GPU, whose kernels may add in any order, the same up to that."""
    return losses(a) == losses(b) if DEVICE == "cpu" else close(a, b)


# ---------------------------------------------------------------- loss and figures, by hand

def test_loss_by_hand():
    # p = 1/2, 3/4, 1/4 with y = 1, 1, 1/2:  ln 2 + ln 4/3 + (ln 4 + ln 4/3) / 2
    loss = train.prm_loss(torch.tensor([0.0, math.log(3), -math.log(3)]), torch.tensor([1.0, 1.0, 0.5]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3) + (math.log(4) + math.log(4 / 3)) / 2)


def test_soft_label_is_where_the_loss_is_least():
    z = torch.logit(torch.tensor([0.9])).requires_grad_()
    train.prm_loss(z, torch.tensor([0.9])).backward()
    assert z.grad.item() == pytest.approx(0, abs=1e-7)  # with int(label), as in TRL, it would be 0.9


def test_figures_by_hand():
    p = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.6, 0.2], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.0])
    f = metrics(torch.logit(p), y, torch.tensor([0, 0, 0, 0, 1, 1]))
    # right .9 .8 .6 against wrong .8 .3 .2: 3 + (tie 1/2 + 2) + 2 of 9; place 0: .9 .8 against .8 .3, place 1: .6 .2
    assert f["auc"] == pytest.approx(7.5 / 9)
    assert f["auc_within"] == pytest.approx((2 + 1.5 + 1) / 5)
    assert f["accuracy"] == pytest.approx(5 / 6)
    assert f["f1_wrong"] == pytest.approx(2 * 2 / (3 + 2))
    assert f["brier"] == pytest.approx((0.01 + 0.64 + 0.04 + 0.09 + 0.01 + 0.04) / 6)
    assert f["ece"] == pytest.approx((0.1 + abs(1.6 - 1) + 0.3 + 0.1 + 0.2) / 6)  # the two 0.8 share a bin


def test_a_later_is_worse_model_gets_half_within_places():
    t = torch.arange(6).repeat(50)
    y = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 1 - t / 6).float()
    f = metrics(-t.double(), y, t)
    assert f["auc"] > 0.7
    assert f["auc_within"] == 0.5


def test_one_class_has_no_auc():
    assert metrics(torch.zeros(3), torch.ones(3), torch.zeros(3, dtype=torch.long))["auc"] is None


# ---------------------------------------------------------------- rows in, tensors out

def test_encoding_is_that_of_the_prm(home):
    prm = load_prm(home / "model", fresh=True)
    found = list(read_set(f"{home}/rows.jsonl"))
    rows = encode_rows(prm, found, 512)
    assert len(rows) == len(found) == 48
    for row, (_, source) in zip(rows, found):
        ids, positions = prm.encode(source["prompt"], source["completions"])
        assert (row.ids.tolist(), row.positions.tolist()) == (ids, positions)
        assert row.labels.tolist() == [float(y) for y in source["labels"]]
        assert row.steps.tolist() == list(range(len(positions)))


def test_masks_truncation_and_soft_labels(home):
    prm = load_prm(home / "model", fresh=True)
    steps = ["January: 7+5=12", "February: 12*2=23", "March: 23+1=24", "Answer: 24"]

    def encode(labels, length=512, **k):
        row = ("f:1", dict(prompt="Ann has 7 shells.", completions=steps, labels=labels))
        return encode_rows(prm, [row], length, **k)
    full = encode([0.9, 0.25, None, 1])[0]
    assert full.labels.tolist() == pytest.approx([0.9, 0.25, 1.0])
    assert full.steps.tolist() == [0, 1, 3]
    first = encode([1, 0, 0, 1], mask_after_first_error=True)[0]
    assert first.labels.tolist() == [1, 0]  # the first error itself is learnt
    assert len(first.ids) == first.positions[-1] + 1  # and what follows is not even encoded
    cut = encode([1, 0, 0, 1], length=int(full.positions[1]) + 1)[0]
    assert cut.labels.tolist() == [1, 0]
    assert encode([1, 0, 0, 1], length=int(full.positions[0])) == []  # no label is left: dropped
    assert encode([None] * 4) == []


def test_plan_deals_each_row_once_whatever_the_ranks():
    rng = random.Random(0)
    lengths = [rng.randint(5, 400) for _ in range(1000)]
    for group in (1, 3, 8):
        steps = plan(lengths, group, 16, 3000, seed=1, epoch=2)
        micros = [m for step in steps for m in step]
        assert sorted(i for m in micros for i in m) == list(range(1000))
        assert all(len(m) <= 16 and len(m) * max(lengths[i] for i in m) <= 3000 for m in micros)
        assert all(len(s) == group for s in steps[:-1])
        assert micros == [m for step in plan(lengths, 1, 16, 3000, seed=1, epoch=2) for m in step]
    padded = sum(len(m) * max(lengths[i] for i in m) for m in micros)
    assert sum(lengths) / padded > 0.9
    assert micros != [m for step in plan(lengths, 1, 16, 3000, seed=1, epoch=3) for m in step]


# ---------------------------------------------------------------- bad input: one line, before any training

def test_malformed_row(home, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": ')
    argv = [*flags(home, tmp_path / "out"), "--data", str(tmp_path / "bad.jsonl")]
    fails(capsys, "bad.jsonl:1: not JSON", argv)
    assert not (tmp_path / "out").exists()


def fails(capsys, message, argv):
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert "error: " in last
    assert message in last


@pytest.mark.parametrize("more, message", [
    (["--data", "nothing.jsonl"], "nothing.jsonl: no such file"),
    (["--val-fraction", "0"], "validation would be empty"), (["--val-fraction", "1"], "training would be empty"),
    (["--batch-tokens", "5"], "no row has a label within 5 tokens"),
    (["--batch-size", "0"], "--batch-size must be positive"), (["--lr", "0"], "--lr must be positive"),
    (["--device", "mps"], "--device mps: there is none"), (["--model", "nowhere"], "nowhere: no such folder"),
    (["--fsdp"], "--fsdp needs torchrun"),
])
def test_bad_flags(home, tmp_path, capsys, more, message):
    fails(capsys, message, [*flags(home, tmp_path / "out"), *more])


def test_out_is_taken_or_full(home, tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    fails(capsys, "is taken", flags(home, tmp_path))
    fails(capsys, "is taken", flags(home, tmp_path, "--resume"))  # that is no run of ours
    fails(capsys, "cannot be written", flags(home, tmp_path / "thesis.tex" / "out"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    fails(capsys, "GB are free", flags(home, tmp_path / "out"))


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    assert "--mask-after-first-error" in capsys.readouterr().out


# ---------------------------------------------------------------- runs on one rank

@pytest.fixture(scope="module")
def whole(home):
    """An uninterrupted run with dropout."""
    result = train.main(flags(home, home / "whole"))
    return home / "whole", result


def test_a_run_leaves_its_best_prm(home, whole):
    out, result = whole
    assert sorted(f.name for f in out.iterdir()) == [
        "config.json", "log.jsonl", "model.safetensors", "prm_head.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    evals = {r["step"]: r["loss"] for r in read_log(out, "eval")}
    assert list(evals) == [0, 1, 2, 3, 4, 6, 8]  # the powers of two, and each third
    best = min((1, 2, 3, 4, 6, 8), key=evals.get)
    assert (result["best_step"], result["best"]) == (best, evals[best])
    prm = load_prm(out)  # reloaded, it has the loss that was logged
    held = [(w, r) for w, r in read_set(f"{home}/rows.jsonl") if held_out(r["prompt"], 0.2)]
    p = [x for s in prm.score([r["prompt"] for _, r in held], [r["completions"] for _, r in held]) for x in s]
    y = [y for _, r in held for y in r["labels"]]
    assert sum(-math.log(a if b else 1 - a) for a, b in zip(p, y)) / len(y) == pytest.approx(evals[best], abs=1e-4)
    start, end = read_log(out, "start")[0], read_log(out, "end")[0]
    assert start["rows"] + start["val_rows"] == 48
    assert end["tokens"] == read_log(out)[-1]["tokens"]
    assert end["flops"] == 6 * start["active_parameters"] * end["tokens"]
    again = train.main(flags(home, out, "--resume"))
    assert again is None  # ended: nothing to do


class Killed(Exception):
    pass


@pytest.mark.parametrize("how, last", [("kill", 8), ("SIGTERM", 7), ("SIGTERM in the last but one", 7)])
def test_resumed_is_uninterrupted(home, whole, tmp_path, monkeypatch, how, last):
    """Stopped in a random step, resumed: the very same losses (dropout included), best step, and weights."""
    at = last if "last" in how else random.Random(how).randint(1, last)
    count, original = [0], train.step_flops

    def interrupt(*a):
        count[0] += 1
        if count[0] == at and how == "kill":
            raise Killed  # nothing in train.py reacts to it: what is on disk is what kill -9 leaves
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*a)
    monkeypatch.setattr(train, "step_flops", interrupt)
    out = tmp_path / "out"
    if how == "kill":
        with pytest.raises(Killed):
            train.main(flags(home, out))
    else:
        assert train.main(flags(home, out)) is None
        assert len(list(out.glob("checkpoint-*"))) == 1
    monkeypatch.undo()
    result = train.main(flags(home, out, "--resume"))
    assert same(out, whole[0]), at
    assert result["best_step"] == whole[1]["best_step"]
    a, b = load_prm(out).state_dict(), load_prm(whole[0]).state_dict()
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=0 if DEVICE == "cpu" else 1e-4) for k in a)


def test_kill_9_and_resume(home, whole, tmp_path):
    """A real SIGKILL, while the log shows a random step: whatever half a file that leaves, --resume goes on from it."""
    argv, at = flags(home, tmp_path / "out"), random.Random(5).randint(1, 5)
    log = tmp_path / "out" / "log.jsonl"
    [run] = begin(train.main, argv)
    while run.is_alive() and (not log.exists() or log.read_text().count('"kind": "train"') < at):
        time.sleep(0.002)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert not read_log(tmp_path / "out", "end")
    with open(tmp_path / "out" / "log.jsonl", "a") as file:
        file.write('{"kind": "tra')  # a line cut off by the kill
    train.main([*argv, "--resume"])
    assert same(tmp_path / "out", whole[0]), at


def test_resume_with_other_settings_is_refused(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "step_flops", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or (0, 0))
    train.main(flags(home, tmp_path / "out"))
    monkeypatch.undo()
    fails(capsys, "--lr was None, is 0.1", flags(home, tmp_path / "out", "--resume", "--lr", "0.1"))


def test_accumulation_is_a_large_batch(home, tmp_path):
    for name, size, accumulate in (("large", 64, 1), ("small", 8, 8)):  # each step is the whole epoch
        train.main(flags(home, tmp_path / name, "--batch-size", size, "--accumulate", accumulate, "--dropout", 0))
    assert close(tmp_path / "large", tmp_path / "small")


def test_nan_stops_the_run_and_names_the_row(home, tmp_path, capsys):
    rows = [json.loads(line) for line in open(home / "rows.jsonl")]
    rows[7]["completions"][0] = "~~~"  # a token of no other row, whose embedding is broken
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = Qwen2Model.from_pretrained(home / "model")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    model.embed_tokens.weight.data[tokenizer("~")["input_ids"]] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    argv = flags(home, tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--model", tmp_path / "model",
                 "--eval-every", 1, "--max-steps", 1000, "--val-fraction", 0.1)
    assert not held_out(rows[7]["prompt"], 0.1)
    fails(capsys, "rows.jsonl:8.", argv)
    done = [r["step"] for r in read_log(tmp_path / "out")]
    assert all(math.isfinite(r["loss"]) for r in read_log(tmp_path / "out"))
    if done:
        assert (tmp_path / "out" / f"checkpoint-{done[-1]:08d}").exists()


def test_a_nan_in_validation_is_never_the_best(home, tmp_path, monkeypatch):
    original, calls = train.validate, [0]

    def validate(*a):
        calls[0] += 1
        return original(*a) | ({"loss": math.nan} if calls[0] == 2 else {})  # the first after a step
    monkeypatch.setattr(train, "validate", validate)
    assert train.main(flags(home, tmp_path / "out"))["best_step"] > 1


def test_truncated_rows_train_without_nan(home, tmp_path):
    train.main(flags(home, tmp_path / "out", "--batch-tokens", 60, "--val-fraction", 0.5))
    start = read_log(tmp_path / "out", "start")[0]
    assert start["dropped"] > 0
    assert start["rows"] + start["val_rows"] + start["dropped"] == 48
    assert all(math.isfinite(r["loss"]) for r in read_log(tmp_path / "out"))


def test_accounting(monkeypatch):
    monkeypatch.setattr(common.metrics, "peak_flops", lambda _: 1e3)
    totals = Counter(tokens=5, flops=10, flops_with_attention=10)
    figures = common.metrics.accounting([[0], [1]], [3, 4], 4, (600, 100), 2.0, None, totals)
    assert figures == {"tokens_per_second": 3.5, "padding": 1 / 8, "mfu": 0.35, "tokens": 12, "seconds": 2.0,
                       "flops": 610, "flops_with_attention": 710}


def test_frozen_backbone(home, tmp_path, monkeypatch):
    """Its states are computed once, and training goes as if they were computed in each step."""
    argv = ["--freeze-backbone", "--lr", 0.01, "--epochs", 2]
    train.main(flags(home, tmp_path / "out", *argv))
    before, after = load_prm(home / "model", fresh=True), load_prm(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(before.backbone.parameters(), after.backbone.parameters()))
    assert not torch.equal(before.head[0].weight, after.head[0].weight)
    start, end = read_log(tmp_path / "out", "start")[0], read_log(tmp_path / "out", "end")[0]
    tokens = sum(len(e.ids) for e in encode_rows(before, list(read_set(f"{home}/rows.jsonl")), 16384))
    trained = sum(p.numel() for p in before.head.parameters())
    labels = sum(row["labels"] for row in read_log(tmp_path / "out", "train"))
    assert end["flops"] == 2 * start["active_parameters"] * tokens + 6 * trained * labels

    def load_frozen(*args, **keywords):
        prm = load_prm(*args, **keywords)
        prm.backbone.requires_grad_(False)
        return prm
    monkeypatch.setattr(train, "load_prm", load_frozen)
    train.main(flags(home, tmp_path / "again", *argv[1:]))
    monkeypatch.undo()
    assert close(tmp_path / "again", tmp_path / "out")
    train.main([*flags(home, tmp_path / "more"), "--model", str(tmp_path / "out")])  # a PRM can be trained on
    assert read_log(tmp_path / "more", "eval")[0]["loss"] == pytest.approx(
        min(r["loss"] for r in read_log(tmp_path / "out", "eval")[1:]), abs=1e-5)


def test_a_frozen_backbone_drops_nothing_out(home, tmp_path, monkeypatch):
    """Its states are kept for all epochs: they may not be those of one draw of dropout."""
    train.main(flags(home, tmp_path / "plain", "--freeze-backbone"))

    def load_with_dropout(*args, **keywords):
        prm = load_prm(*args, **keywords)
        for layer in prm.backbone.layers:
            layer.self_attn.attention_dropout = 0.5
        return prm
    monkeypatch.setattr(train, "load_prm", load_with_dropout)
    train.main(flags(home, tmp_path / "dropout", "--freeze-backbone"))
    assert same(tmp_path / "plain", tmp_path / "dropout")


def test_bf16_and_recomputed_activations(home, whole, tmp_path):
    train.main(flags(home, tmp_path / "again", "--checkpointing"))
    assert close(tmp_path / "again", whole[0])
    train.main(flags(home, tmp_path / "bf16", "--dtype", "bfloat16", ))
    assert close(tmp_path / "bf16", whole[0], 0.05)
    tokens = [r["tokens"] for r in read_log(tmp_path / "bf16", "train")]
    padded = (tokens[1] - tokens[0]) / (1 - read_log(tmp_path / "bf16", "train")[1]["padding"])
    assert padded == pytest.approx(8 * round(padded / 8))  # rows of 8 n tokens
    assert not close(tmp_path / "bf16", whole[0], 1e-7)


# ---------------------------------------------------------------- two gloo ranks

def several(runs, queue):
    rank, original = int(os.environ["RANK"]), train.step_flops
    for argv, kill in runs:
        count = [0]

        def counted(*a, count=count, kill=kill):
            count[0] += 1
            if count[0] == kill:
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)  # one rank is told, both must stop
            return original(*a)
        train.step_flops = counted
        result = train.main(argv)
        queue.put((rank, argv[argv.index("--out") + 1], result and result["stopped_early"], count[0]))


@pytest.fixture(scope="module")
def ranks(home, tmp_path_factory):
    """All runs that need two processes, in one pair of them, since torch takes seconds to start; and the runs of one
    process that they should equal. -> (folder of the runs, {name: [(stopped early, steps) of each rank]})."""
    folder = tmp_path_factory.mktemp("ranks")
    two, four, stop = ("--accumulate", 2), ("--accumulate", 4), ("--lr", 10, "--patience", 1, "--eval-every", 1)
    train.main(flags(home, folder / "one x 2", *two))  # dropout on: its masks belong to micro-batches, not to ranks
    train.main(flags(home, folder / "one x 4", *four))
    train.main(flags(home, folder / "one frozen", *two, "--freeze-backbone"))
    runs = [("ddp", (), 0), ("ddp cut", (), 3), ("ddp cut", ("--resume",), 0), ("fsdp", ("--fsdp",), 0),
            ("fsdp cut", ("--fsdp",), 5), ("fsdp cut", ("--fsdp", "--resume"), 0), ("early", stop, 0),
            ("ddp x 2", two, 0), ("fsdp x 2", (*two, "--fsdp"), 0), ("ddp frozen", ("--freeze-backbone",), 0)]
    jobs = [(flags(home, folder / name, *more), kill) for name, more, kill in runs]
    queue = FORKS.SimpleQueue()
    run_ranks(several, jobs, queue)
    ends = {}
    for _ in range(2 * len(jobs)):
        _, out, early, steps = queue.get()
        ends.setdefault(Path(out).name, []).append((early, steps))
    return folder, ends


@two_devices
@pytest.mark.parametrize("two, one, tolerance", [
    ("ddp", "one x 2", 1e-5), ("ddp x 2", "one x 4", 1e-5), ("fsdp", "ddp", 1e-5), ("fsdp x 2", "ddp x 2", 1e-5),
    ("ddp frozen", "one frozen", 1e-5), ("ddp cut", "ddp", 1e-12), ("fsdp cut", "fsdp", 1e-9)])
def test_two_ranks_are_one_with_twice_the_accumulation(ranks, two, one, tolerance):
    """Losses, norms of gradients, validation: by DDP and FSDP, accumulated, stopped and resumed."""
    folder, _ = ranks
    assert close(folder / two, folder / one, tolerance)


@two_devices
def test_early_stopping_ends_both_ranks_after_the_same_step(ranks):
    first, second = ranks[1]["early"]
    assert first == second
    early, steps = first
    assert early
    assert steps < 8


@two_devices
def test_weights_of_fsdp_are_those_of_one_rank(ranks):
    folder, _ = ranks
    sharded, whole = (load_prm(folder / name).state_dict() for name in ("fsdp", "one x 2"))
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-4, rtol=0)

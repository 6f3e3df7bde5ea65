"""similarity.py on models small enough to know the answer."""
import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_qwen

import similarity
from similarity import Reference, accumulate, score

ITEMS = [([5, 9, 17, 30, 7, 8], 3), ([5, 9, 40, 41, 42, 43, 44], 2), ([100, 3, 200, 60], 1), ([9, 9, 11, 12, 90], 2)]
SETS_OF = [{0, 1}, {0}, {2, 3}, {2}]  # of the items: two of math, two of code, the first of each selected


class TwoWeights(torch.nn.Module):
    """Two tokens, whose logits are (a, b · the token before)."""
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache, logits_to_keep):
        x = input_ids[:, -logits_to_keep:].float()
        return SimpleNamespace(logits=torch.stack([self.a.expand_as(x), self.b * x], dim=-1))


def patterns(lm, items):
    """Â of each item by plain autograd: (N, P) in fp64, parameters in the model's order."""
    rows, weights = [], list(lm.parameters())
    for ids, start in items:
        grads = torch.autograd.grad(score(lm, torch.tensor(ids), start), weights)
        rows.append(torch.cat([(w * g).abs().flatten() for w, g in zip(weights, grads)]).detach().double())
    return torch.stack([row / row.norm() for row in rows])


def test_A_by_hand():
    """Tokens 1, 1: the logits of token 1's successor are (a, b) = (ln 3 - 1, -1), so p = (3/4, 1/4). F = -log p(1):
    dF/da = 3/4 and dF/db = 1/4 - 1, so A = (3/4 (ln 3 - 1), 3/4)."""
    reference, sums = Reference(TwoWeights(math.log(3) - 1, -1.0), sketch=2), torch.zeros(1, 2)
    reference.accumulate([1, 1], 1, sums, torch.zeros(2))
    A = 0.75 * torch.tensor([math.log(3) - 1, 1.0])
    assert torch.allclose(sums[0], A / A.norm())
    assert float(reference.square) == pytest.approx(float(A.square().sum()))


def test_hooks_give_plain_gradients_and_tied_embeddings_count_once():
    lm = random_qwen()
    want = patterns(lm, ITEMS)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    reference = Reference(lm)
    assert reference.P == want.shape[1] == sum(p.numel() for p in lm.parameters())
    for item, row in zip(ITEMS, want):
        sums = torch.zeros(1, reference.P)
        reference.accumulate(*item, sums, torch.zeros(reference.D))
        assert torch.allclose(sums[0].double(), row, atol=1e-6)
    assert all(p.grad is None for p in lm.parameters())


def test_low_memory_holds_no_gradient_and_changes_nothing():
    found, held = [], []
    for low_memory in (False, True):
        lm, most = random_qwen(), [0]
        reference = Reference(lm, low_memory=low_memory)
        for p in lm.parameters():  # called after similarity's own hook on the same tensor
            p.register_post_accumulate_grad_hook(lambda _, lm=lm, most=most: most.append(
                sum(q.grad is not None for q in lm.parameters())))
        found.append(accumulate(reference, ITEMS, SETS_OF))
        held.append((max(most), len(list(lm.parameters()))))
    (all_held, tensors), (none_held, _) = held
    assert all_held == tensors and none_held == 0
    assert all(torch.equal(a, b) for a, b in zip(*found))


def similarities(lm, **keywords):
    """(4, 4) S of the four sets over ITEMS, from the accumulated vectors, and the parts that add up to it."""
    reference = Reference(lm, **keywords)
    groups = similarity.products(accumulate(reference, ITEMS, SETS_OF)[0], reference.spans)
    size = torch.tensor([sum(k in s for s in SETS_OF) for k in range(4)]).double()
    return 100 * sum(groups.values()) / (size[:, None] * size), groups


def test_one_vector_a_set_is_the_double_sum():
    A, (found, groups) = patterns(random_qwen(), ITEMS), similarities(random_qwen())
    for i, j in itertools.product(range(4), repeat=2):
        pairs = [float(x @ y) for x, s in zip(A, SETS_OF) for y, t in zip(A, SETS_OF) if i in s and j in t]
        assert float(found[i, j]) == pytest.approx(100 * sum(pairs) / len(pairs), rel=1e-5)
    assert torch.equal(found, found.T)
    assert float(found[1, 1]) == pytest.approx(100, rel=1e-5)  # one response with itself
    assert set(groups) == {"embedding", "norm"} | {f"{k} {n}" for k in ("attention", "MLP", "norm") for n in (0, 1)}


def test_sign_and_scale_of_F_cancel():
    nll, logprob, logit = (similarities(random_qwen(), how=how)[0] for how in ("nll", "logprob", "logit"))
    assert torch.allclose(nll, logprob, rtol=1e-4)
    assert not torch.allclose(nll, logit, rtol=1e-2)


def test_params_takes_the_weights_it_names():
    lm = random_qwen()
    assert set(Reference(lm, params=r"1\.mlp").spans) == {n for n, _ in lm.named_parameters() if ".1.mlp." in n}
    with pytest.raises(ValueError, match="no weight's name matches"):
        Reference(lm, params="nothing")


def test_sketch_error_falls_with_the_root_of_D():
    """The error of the cosines, root mean square over 24 seeds, times sqrt(D): nearly the same from D = 31 to 251."""
    exact, scaled = patterns(random_qwen(layers=1, hidden=16), ITEMS), []
    for D in (32, 96, 256):
        errors = []
        for seed in range(24):
            reference = Reference(random_qwen(layers=1, hidden=16), sketch=D, seed=seed)
            kept = accumulate(reference, ITEMS, SETS_OF)[1].double()
            errors.append((kept @ kept.T - exact @ exact.T).triu(1))
        scaled.append(float(torch.stack(errors).square().mean() * reference.D) ** 0.5)
    assert max(scaled) < 1.5 * min(scaled)


ROWS = [{"question": f"How many {n}?", "domain": d, "picked": 1, "samples": [
            {"steps": [f"{n}+{k}={n + k}", end], "correct": k == 1} for k, end in enumerate(("Answer: 1", "Wait, 2"))]}
        for d in ("math", "code") for n in (1, 2)]


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def test_three_forms_of_sets_agree(tmp_path, lm_folder, capsys):
    """Picked of sample rows = the same as stepwise rows and as plain responses in files of their own."""
    picked, files, tables = write(tmp_path / "rows.jsonl", ROWS), [], []
    for d in ("math", "code"):
        rows = [(r["question"], s["steps"], i) for r in ROWS if r["domain"] == d for i, s in enumerate(r["samples"])]
        files += [write(tmp_path / d, [{"prompt": q, "completions": s} for q, s, _ in rows]),
                  write(tmp_path / f"{d}_prm", [{"prompt": q, "response": "\n".join(s)} for q, s, i in rows if i])]
    for sets in ([picked], files):
        similarity.main(["--model", str(lm_folder), "--sets", *sets, "--json", str(tmp_path / "s.json"),
                         "--plot", str(tmp_path / "s.png")])
        tables.append(json.loads((tmp_path / "s.json").read_text()))
    assert tables[0]["responses"] == tables[1]["responses"] == {"Math": 4, "Math_PRM": 2, "Code": 4, "Code_PRM": 2}
    one, other = ([x["S"] for name, x in t["table"].items() if name.startswith("S(")] for t in tables)
    assert one == pytest.approx(other, abs=1e-3)
    assert "correct only" in tables[0]["table"] and "correct only" not in tables[1]["table"]
    assert [x["share"] for x in tables[0]["phrases"].values()] == [0.5, 1, 0.5, 1]  # the selected ones say "Wait"
    assert (tmp_path / "s.png").stat().st_size > 1000 and "random subsets" in capsys.readouterr().out


def test_overlong_responses_are_cut_and_counted(tokenizer):
    r = [similarity.Response(0, "How many?", "1+1=2\n" * 50, None, {0})]
    whole, none = similarity.encode(tokenizer, r, "\n", 10 ** 6)
    items, cut = similarity.encode(tokenizer, r, "\n", 40)
    assert (none, cut) == (0, 1) and items[0] == (whole[0][0][:40], whole[0][1])
    with pytest.raises(ValueError, match="no token of the response in a context of 2"):
        similarity.encode(tokenizer, r, "\n", 2)


@pytest.mark.parametrize("text, want", [
    ("", "no responses in Math, Math_PRM, Code, Code_PRM"),
    ('{"domain": "math", "question": "q", "picked": 0, "samples": [{"steps": [""]}]}\n', "rows.jsonl:1: an empty"),
    ('{"domain": "math", "question": "q", "samples": [{"steps": ["a"]}]}\n', "rows.jsonl:1: no field 'picked'"),
    ('{"domain": "math", "question": "q", "picked": 0, "samples": []}\n{"prompt', "rows.jsonl:2: not JSON"),
    ('{"prompt": "q", "domain": "math", "completions": [1]}\n', "rows.jsonl:1: sequence item 0"),
])
def test_errors_are_one_line(tmp_path, lm_folder, capsys, text, want):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        similarity.main(["--model", str(lm_folder), "--sets", str(tmp_path / "rows.jsonl")])
    assert want in capsys.readouterr().err.strip().splitlines()[-1]


def test_two_ranks_give_what_one_gives(tmp_path):
    """From sampling, judging and selecting to the gradients."""
    arguments = ["--limit", "3", "--N", "3", "--json"]
    similarity.main([*arguments, str(tmp_path / "1")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                    ROOT / "similarity.py", *arguments, tmp_path / "2"], check=True, capture_output=True, cwd=tmp_path,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert one["responses"] == two["responses"] == {"Math": 9, "Math_PRM": 3, "Code": 9, "Code_PRM": 3}
    one, two = one["table"], two["table"]
    for a, b in zip(one.values(), two.values(), strict=True):
        assert [a["S"], *a["interval"]] == pytest.approx([b["S"], *b["interval"]], abs=1e-4)

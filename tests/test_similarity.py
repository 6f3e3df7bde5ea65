"""similarity.py on models small enough to know the answer."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_qwen, run_ranks

import similarity
from common.metrics import random_signs, sketch
from common.policy import load_policy
from common.responses import SETS, Response, encode, sets_of
from similarity import accumulate, activation

ITEMS = [([5, 9, 17, 30, 7, 8], 3), ([5, 9, 40, 41, 42, 43, 44], 2), ([100, 3, 200, 60], 1),
         ([9, 9, 11, 12, 90], 2)]
SETS_OF = [{"Math", "Math_PRM"}, {"Math"}, {"Code", "Code_PRM"}, {"Code"}]  # of the items


class TwoWeights(torch.nn.Module):
    """Two tokens, whose logits are (a, b · the token before)."""
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache, logits_to_keep):
        x = input_ids[:, -logits_to_keep:].float()
        return SimpleNamespace(logits=torch.stack([self.a.expand_as(x), self.b * x], dim=-1))


def members(name):
    return [item for item, names in zip(ITEMS, SETS_OF) if name in names]


def table_of(lm):
    """S (4, 4) of the four sets over ITEMS, from the sums."""
    sums = accumulate(lm, ITEMS, SETS_OF)[0].double()
    sizes = torch.tensor([len(members(name)) for name in SETS])
    return 100 * sums @ sums.T / (sizes[:, None] * sizes)


# ---------------------------------------------------------------- A and S

def test_A_by_hand():
    """Tokens 1, 1: after token 1 the logits are (a, b) = (ln 3 - 1, -1), so p = (3/4, 1/4).
    F = -log p(1): dF/da = 3/4 and dF/db = 1/4 - 1, so A = (3/4 (ln 3 - 1), 3/4)."""
    A = torch.stack(activation(TwoWeights(math.log(3) - 1, -1.0), [1, 1], 1))
    assert torch.allclose(A, 0.75 * torch.tensor([math.log(3) - 1, 1.0]))


def test_S_by_hand():
    """After token 1 the logits are (a, b): dF/da = p(0) = -dF/db, and A ~ (|a|, |b|) ~ (3, 4).
    After token 0 they are (a, 0): b has no gradient, and A ~ (1, 0). Their cosine is 3/5."""
    S = similarity.similarity(TwoWeights(-0.3, 0.4), [([1, 1], 1)], [([0, 1], 1)])
    assert float(S) == pytest.approx(60)


def test_tied_embeddings_count_once():
    lm = random_qwen()
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    A = activation(lm, *ITEMS[0])
    assert sum(a.numel() for a in A) == sum(p.numel() for p in lm.parameters())


@pytest.mark.parametrize("one", SETS)
@pytest.mark.parametrize("two", SETS)
def test_one_vector_a_set_is_the_double_sum(one, two):
    want = similarity.similarity(random_qwen(), members(one), members(two))
    got = table_of(random_qwen())[SETS.index(one), SETS.index(two)]
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_no_gradient_is_left():
    lm = random_qwen()
    accumulate(lm, ITEMS, SETS_OF)
    assert all(p.grad is None for p in lm.parameters())


def mean_logit(F, ids, start):
    ids = torch.tensor([ids])
    logits = F(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - start + 1).logits
    return logits[0, :-1].gather(1, ids[0, start:, None]).mean()


nll = similarity.loss


@pytest.mark.parametrize("other, same", [
    (lambda F, ids, start: -(len(ids) - start) * nll(F, ids, start), True), (mean_logit, False),
], ids=["log-probability", "mean logit"])
def test_sign_and_scale_of_F_cancel(monkeypatch, other, same):
    want = table_of(random_qwen())
    monkeypatch.setattr(similarity, "loss", other)
    assert torch.allclose(table_of(random_qwen()), want, rtol=1e-4 if same else 1e-2) == same


def test_params_takes_the_weights_it_names():
    lm = random_qwen()
    sums, _ = accumulate(lm, ITEMS, SETS_OF, params=r"1\.mlp")
    assert sums.shape[1] == sum(p.numel() for n, p in lm.named_parameters() if ".1.mlp." in n)
    with pytest.raises(ValueError, match="no weight's name matches"):
        accumulate(lm, ITEMS, SETS_OF, params="nothing")


def test_no_pattern_is_an_error():
    with pytest.raises(ValueError, match="norm 0.0: there is no pattern"):
        accumulate(TwoWeights(0.0, 0.0), [([1, 1], 1)], [{"Math"}])


# ---------------------------------------------------------------- sketches and controls

def test_sketch_by_hand():
    """D = 3, entries 1 2 3 4 | 5 6 7 with signs + - + - | + + -: 1 - 4 - 7, -2 + 5, 3 + 6."""
    pieces = [torch.tensor([[1., 2], [3, 4]]), torch.tensor([5., 6, 7])]
    signs = torch.tensor([1, -1, 1, -1, 1, 1, -1])
    assert sketch(pieces, signs, 3).tolist() == [-10, 3, 9]


def test_sketch_error_falls_with_the_root_of_D():
    """Root mean square error of a product of unit vectors over 200 seeds, times sqrt(D): near 1."""
    generator, scaled = torch.Generator().manual_seed(0), []
    x, y = (torch.rand(2, 1000, generator=generator) ** 8).unbind()
    x, y = x / x.norm(), y / y.norm()
    for D in (31, 97, 251):
        errors = []
        for seed in range(200):
            signs = random_signs(1000, seed)
            errors.append(float(sketch([x], signs, D) @ sketch([y], signs, D) - x @ y))
        scaled.append(math.sqrt(D * sum(e * e for e in errors) / len(errors)))
    assert max(scaled) < 1.3 * min(scaled)
    assert 0.5 < scaled[0] < 2


def test_the_mean_over_random_subsets_is_S_of_all():
    """Two problems, two responses to each, one of them selected: a random subset has either."""
    responses = []
    for domain, problem, selected in itertools.product(("math", "code"), "ab", (False, True)):
        responses.append(Response(domain, problem, "x", sets_of(domain, selected, None)))
    draws = similarity.random_subsets(responses, 4000, 0)
    assert draws.sum(1).unique().tolist() == [4]  # as many as are selected
    assert torch.allclose(draws.mean(0), torch.full((8,), 0.5).double(), atol=0.03)


# ---------------------------------------------------------------- files, errors, ranks

def sample_rows():
    """Two problems a domain, two samples each; the second is selected, and correct."""
    rows = []
    for domain, n in itertools.product(("math", "code"), (1, 2)):
        samples = [{"steps": [f"{n}+1={n + 1}", "Answer: 1"], "correct": False},
                   {"steps": [f"{n}+2={n + 2}", "Wait, 2"], "correct": True}]
        question = f"How many {n}?"
        rows.append({"question": question, "domain": domain, "picked": 1, "samples": samples})
    return rows


def write(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def stepwise(rows):
    return [{"prompt": r["question"], "completions": r["samples"][k]["steps"]}
            for r, k in itertools.product(rows, (0, 1))]


def selected(rows):
    steps = [(r["question"], r["samples"][r["picked"]]["steps"]) for r in rows]
    return [{"prompt": question, "response": "\n".join(x)} for question, x in steps]


@pytest.fixture(scope="module")
def results(tmp_path_factory, lm_folder):
    """{number of files: what --json has}: sample rows in one or two files, the same ones as
    stepwise rows and plain responses in four."""
    folder, rows, results = tmp_path_factory.mktemp("sets"), sample_rows(), {}
    math_rows, code_rows = rows[:2], rows[2:]
    forms = [[rows], [math_rows, code_rows],
             [stepwise(math_rows), selected(math_rows), stepwise(code_rows), selected(code_rows)]]
    for form in forms:
        files = [write(folder / f"{k}.jsonl", x) for k, x in enumerate(form)]
        json_file = folder / "s.json"
        similarity.main(["--model", str(lm_folder), "--sets", *files, "--json", str(json_file)])
        results[len(files)] = json.loads(json_file.read_text())
    return results


@pytest.mark.parametrize("files", [2, 4])
@pytest.mark.parametrize("pair", similarity.TABLE_2, ids="-".join)
def test_all_forms_of_sets_agree(results, files, pair):
    one, other = (results[n]["table"]["S({}, {})".format(*pair)]["S"] for n in (1, files))
    assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("files, controls", [(1, True), (2, True), (4, False)])
def test_what_is_judged_has_controls(results, files, controls):
    assert results[files]["responses"] == {"Math": 4, "Math_PRM": 2, "Code": 4, "Code_PRM": 2}
    assert ("correct only" in results[files]["table"]) == controls
    assert "selected, tokens shuffled" in results[files]["table"]


def test_S_of_the_correct_ones(results):
    """Exactly the selected ones are correct here: by sketch and exactly, the same S."""
    table = results[1]["table"]
    assert table["correct only"]["S"] == pytest.approx(table["S(Math_PRM, Code_PRM)"]["S"], abs=0.5)


def test_overlong_responses_are_cut_and_counted(lm_folder):
    policy, r = load_policy(lm_folder), [Response("math", "How many?", "1+1=2\n" * 50, {"Math"})]
    whole, none = encode(policy, r)
    policy.context = 40
    items, cut = encode(policy, r)
    assert (none, cut) == (0, 1)
    assert items[0] == (whole[0][0][:40], whole[0][1])
    policy.context = 2
    with pytest.raises(ValueError, match="a question of 4 tokens does not fit into the model's context of 2"):
        encode(policy, r)


@pytest.mark.parametrize("text, want", [
    ("", "no responses in Math, Math_PRM, Code, Code_PRM"),
    ('{"domain": "math", "question": "q", "picked": 0, "samples": [{"steps": [""]}]}\n',
     "rows.jsonl:1: an empty"),
    ('{"domain": "math", "question": "q", "samples": [{"steps": ["a"]}]}\n',
     "rows.jsonl:1: no field 'picked'"),
    ('{"domain": "math", "question": "q", "picked": 0, "samples": []}\n{"prompt',
     "rows.jsonl:2: not JSON"),
    ('{"prompt": "q", "domain": "math", "completions": [1]}\n', "rows.jsonl:1: the steps must"),
    ('{"prompt": "q", "domain": "law", "completions": ["a"]}\n',
     "rows.jsonl:1: domain: math or code"),
], ids=["nothing", "empty", "not picked", "no JSON", "no text", "no domain"])
def test_errors_are_one_line(tmp_path, lm_folder, capsys, text, want):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit):
        similarity.main(["--model", str(lm_folder), "--sets", str(tmp_path / "rows.jsonl")])
    assert want in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_server_has_no_gradients(capsys):
    with pytest.raises(SystemExit):
        similarity.main(["--policy", "http://localhost:1/v1"])
    assert "search.py" in capsys.readouterr().err


def test_two_ranks_give_what_one_gives(tmp_path):
    """From sampling, judging and selecting to the gradients."""
    arguments = ["--limit", "3", "--N", "3", "--json"]
    similarity.main([*arguments, str(tmp_path / "1")])
    run_ranks(similarity.main, [*arguments, str(tmp_path / "2")])
    one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert one["responses"] == {"Math": 9, "Math_PRM": 3, "Code": 9, "Code_PRM": 3}
    assert two["responses"] == one["responses"]
    for a, b in zip(one["table"].values(), two["table"].values(), strict=True):
        assert [a["S"], *a["interval"]] == pytest.approx([b["S"], *b["interval"]], abs=1e-4)

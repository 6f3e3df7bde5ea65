"""beyond/reinforce.py: credit by hand, the objective against autograd, and runs of a model of two thin layers."""
import json
import math
import os
import random
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_qwen, run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from beyond import hacking, reinforce
from beyond.distil import choose_by_search
from beyond.reinforce import CREDITS, assign_credit, k3, objective
from beyond.rollouts import (
    Solution,
    columns,
    evaluate,
    is_verified,
    log_probs,
    sample_groups,
    score_and_judge,
)
from common.policy import Policy, load_policy
from common.tasks import Problem, load
from prm_model import PRM, aggregate, load_prm

ARGS = Namespace(aggregate="prod", verified=0.0, seed=0, credit="prm")


def solution(p, lengths=None, right=False, ids=None):
    lengths = lengths or [2] * len(p)
    return Solution(Problem("x", "?", "math", "1"), [5], ids or [7] * sum(lengths), ["s"] * len(p), lengths, False, 0.0,
                    p=list(p), right=right)


def credit(name, *group):
    return [a.tolist() for a in CREDITS[name](list(group), ARGS)]


# ---------------------------------------------------------------- credit by hand: two solutions

# one right with p = .9 .8, one wrong with p = .6 .1; each step has two tokens
GROUP = [([0.9, 0.8], True), ([0.6, 0.1], False)]
# R = 1, 0: (R - 1/2) / (1/2).  Products .72, .06: the same signs, and two of them are always one std away.
# sum: to go 1.7 .8 and .7 .1, means 1.2 .45.  progress: .9 - 1, .8 - .9 and .6 - 1, .1 - .6
HAND = {"outcome": [[1, 1, 1, 1], [-1, -1, -1, -1]], "prm": [[1, 1, 1, 1], [-1, -1, -1, -1]],
        "sum": [[0.5, 0.5, 0.35, 0.35], [-0.5, -0.5, -0.35, -0.35]],
        "advantage": [[-0.1, -0.1, -0.1, -0.1], [-0.4, -0.4, -0.5, -0.5]]}


@pytest.mark.parametrize("name", HAND)
def test_credit_by_hand(name):
    got = credit(name, *(solution(p, right=right) for p, right in GROUP))
    assert got == [pytest.approx(want, abs=1e-5) for want in HAND[name]]


def test_min_form_by_hand():
    # w = softmax(-p / .1): of .9 .8 it is 1/(1 + e), e/(1 + e); of .6 .1 it is 1/(1 + e^5), the rest
    e, e5 = math.e, math.exp(5)
    one, two = (0.9 + 0.8 * e) / (1 + e), (0.6 + 0.1 * e5) / (1 + e5)
    late, late2 = 0.8 * e / (1 + e), 0.1 * e5 / (1 + e5)
    got = credit("min", *(solution(p) for p, _ in GROUP))
    assert got[0] == pytest.approx([(one - two) / 2] * 2 + [(late - late2) / 2] * 2, abs=1e-6)
    assert got[1] == pytest.approx([-x for x in got[0]], abs=1e-6)


def test_a_solution_that_has_ended_has_nothing_to_come():
    # to go, token by token: .5 and .9 .9 .4; the baseline is half of the sum, with 0 behind the end
    got = credit("sum", solution([0.5], [1]), solution([0.5, 0.4], [2, 1]))
    assert got == [pytest.approx([-0.2]), pytest.approx([0.2, 0.45, 0.2])]


# A step of four tokens is cut in two; the new first half is right (p = 1) or no worse than the step before it.
@pytest.mark.parametrize("name, tolerance", [("outcome", 0), ("prm", 1e-6), ("min", 1e-3)])
def test_cutting_a_step_in_two_changes_no_advantage(name, tolerance):
    other = solution([0.9, 0.7], [3, 3], right=True)
    whole = credit(name, solution([0.95, 0.2], [2, 4]), other)
    parts = credit(name, solution([0.95, 1.0, 0.2], [2, 2, 2]), other)
    assert parts == [pytest.approx(want, abs=tolerance) for want in whole]


def test_cutting_a_step_in_two_leaves_progress_where_it_is_made():
    whole = credit("advantage", solution([0.9, 0.2], [2, 4]))[0]
    parts = credit("advantage", solution([0.9, 0.9, 0.2], [2, 2, 2]))[0]
    assert parts == pytest.approx([-0.1, -0.1, 0, 0, -0.7, -0.7])
    assert (whole[0], whole[-1]) == (parts[0], parts[-1])


def test_the_sum_form_pays_for_cutting():
    other = solution([0.9, 0.9], [3, 3])
    [whole, _] = credit("sum", solution([0.9, 0.9], [2, 4]), other)
    [parts, _] = credit("sum", solution([0.9, 0.9, 0.9], [2, 2, 2]), other)
    assert parts[0] == pytest.approx(whole[0] + 0.45)


def test_the_min_form_pays_for_length_too():
    """Steps equally good, one solution has one more. The softmax spreads one reward over more steps, so that at each place
    but the first the longer one has more to come: 1/2 and 2/3 of p at the second step, 0 and 1/3 at the third."""
    short, long = credit("min", solution([0.9] * 2), solution([0.9] * 3))
    assert short == pytest.approx([0, 0, -0.075, -0.075], abs=1e-6)
    assert long == pytest.approx([0, 0, 0.075, 0.075, 0.15, 0.15], abs=1e-6)


@pytest.mark.parametrize("name", ["outcome", "prm", "sum", "min"])
def test_equal_rewards_are_no_advantage(name):
    for advantage in credit(name, *(solution([0.3, 0.7], right=True) for _ in range(3))):
        assert advantage == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_share_of_problems_is_verified():
    args = Namespace(verified=0.1, seed=3, credit="prm", aggregate="prod")
    chosen = [i for i in range(2000) if is_verified(Problem(f"p{i}", "?", "math"), args)]
    assert 150 < len(chosen) < 250
    group = [solution([0.9], right=False), solution([0.1], right=True)]  # the PRM errs
    for i, sign in ((chosen[0], -1), (next(i for i in range(9) if i not in chosen), 1)):
        for s in group:
            s.problem = Problem(f"p{i}", "?", "math")
        assign_credit([group], args)
        assert group[0].advantage.tolist() == pytest.approx([sign] * 2, abs=1e-4)


# ---------------------------------------------------------------- the objective

# of three tokens with logits z, token 0 was taken:  d logp / dz = (1, 0, 0) - pi, and d r / dz = r (the same)
@pytest.mark.parametrize("A, ratio, passes", [(2.0, 1.0, True), (2.0, 1.1, True), (2.0, 1.3, False), (2.0, 0.5, True),
                                              (-1.0, 1.3, True), (-1.0, 0.9, True), (-1.0, 0.7, False)])
def test_gradient_of_the_objective_by_hand(A, ratio, passes):
    z = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)[:1]
    objective(logp, logp.detach() - math.log(ratio), torch.tensor([A]), 0.2).sum().backward()
    by_hand = A * ratio * (torch.tensor([1.0, 0, 0]) - z.detach().softmax(-1))
    torch.testing.assert_close(z.grad, by_hand if passes else torch.zeros_like(z))


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    values = k3(p.log(), q.log())
    assert values.min() >= 0
    assert float((p * values).sum()) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert k3(p.log(), p.log()).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- log-probabilities of sampled solutions

@pytest.fixture(scope="module")
def policy(tokenizer):
    return Policy(random_qwen(), tokenizer, "\n", max_solution_tokens=24)


@pytest.fixture(scope="module")
def prm():
    return load_prm(TINY / "prm")


@pytest.fixture(scope="module")
def problems():
    return load("tiny-math", limit=2) + load("tiny-code", limit=2)


def test_the_ratio_is_1_before_the_first_update(policy, problems):
    """log_probs, one padded forward, gives what the sampler gave token by token with its tree cache."""
    samples = sum(sample_groups(policy, problems, 3), [])
    with torch.no_grad():
        parts = log_probs(policy.lm, samples).split([len(s.ids) for s in samples])
    assert [float(part.sum()) for part in parts] == pytest.approx([s.logp for s in samples], abs=1e-3)
    logp = parts[0]
    assert objective(logp, logp, torch.full_like(logp, 3.0), 0.2).tolist() == [3.0] * len(logp)


def test_a_repeated_solution_is_one_weighted_row(policy, problems):
    a, b = sum(sample_groups(policy, problems[:2], 1), [])
    for s, value in ((a, 1.5), (b, -0.5)):
        s.advantage = torch.full((len(s.ids),), value)

    def gradient(rows, counts):
        policy.lm.zero_grad()
        advantage, weight = columns(rows, counts, "cpu")
        logp = log_probs(policy.lm, rows)
        (weight * objective(logp, logp.detach(), advantage, 0.2)).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.lm.parameters()])
    torch.testing.assert_close(gradient([a, a, a, b], {a: 1, b: 1}), gradient([a, b], {a: 3, b: 1}), rtol=1e-4, atol=1e-4)


def test_equal_samples_share_an_object(tokenizer, problems):
    greedy = Policy(random_qwen(), tokenizer, "\n", max_solution_tokens=24, temperature=0)
    [group] = sample_groups(greedy, problems[:1], 4)
    assert len(group) == 4
    assert len(set(group)) == 1


def test_a_solution_without_an_end_has_no_reward(policy, prm, problems):
    samples = sum(sample_groups(policy, problems, 2), [])  # random text of 24 tokens hardly ever ends
    score_and_judge(prm, samples, "\n")
    cut = [s for s in samples if s.cut]
    assert cut
    assert {aggregate(s.p, "prod") for s in cut} == {0.0}


# ---------------------------------------------------------------- two tokenizers

def letters():
    """A tokenizer of single bytes with a mark of its own, as unlike the policy's as can be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<extra_0>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", additional_special_tokens=["<extra_0>"])


def test_rewards_are_mapped_by_text_between_two_tokenizers(problems):
    """The credit of a step lies on just those tokens of the policy that are its text, though the PRM counts bytes."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, initializer_range=0.5,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048, pad_token_id=0)
    other = PRM(Qwen2Model(config).eval(), letters(), separator="<extra_0>").eval()
    policy = load_policy(TINY / "A")
    [group] = sample_groups(policy, problems[:1], 4)
    score_and_judge(other, group, policy.separator)
    for s, advantage in zip(group, CREDITS["advantage"](group, ARGS)):
        assert "\n".join(s.steps) == policy.tokenizer.decode(s.ids, skip_special_tokens=True).strip("\n")
        before, at = 1.0, 0
        for t, (text, length) in enumerate(zip(s.steps, s.lengths)):
            ids = "".join(step + "<extra_0>" for step in s.steps[:t + 1])  # one text, no cache, no batch
            ids = other.tokenizer(s.problem.question + "\n\n" + ids)["input_ids"]
            with torch.no_grad():
                hidden = other.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            p = other.head(hidden).sigmoid().item()
            span = slice(at, at + length)
            assert policy.tokenizer.decode(s.ids[span], skip_special_tokens=True).strip("\n") == text
            assert advantage[span].tolist() == pytest.approx([p - before] * length, abs=1e-4)
            before, at = p, at + length


# ---------------------------------------------------------------- evaluation, expert iteration

def test_figures_of_the_shipped_policy(prm, problems, tmp_path):
    policy = load_policy(TINY / "A")
    parts = evaluate(policy, prm, problems, "prod", tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in open(tmp_path / "samples.jsonl")]
    assert list(parts) == ["math", "code"]
    for domain, figures in parts.items():
        samples = [s for row in rows if row["domain"] == domain for s in row["samples"]]
        assert len(samples) == 16
        assert figures["single"] == sum(s["correct"] for s in samples) / 16
        # in this world a solution is right if, and nearly only if, all its steps are
        assert figures["single"] == pytest.approx(sum(all(s["true"]) for s in samples) / 16, abs=0.13)
        assert figures["reward"] == pytest.approx(sum(math.prod(s["scores"]) for s in samples) / 16)


@pytest.mark.parametrize("how", ["beam", "weighted"])
def test_expert_iteration_imitates_what_search_chose(how, prm, problems):
    policy = load_policy(TINY / "A")
    groups = choose_by_search(policy, prm, problems, Namespace(distil=how, aggregate="prod"), "step 0 ")
    assert [s.problem.id for [s] in groups] == [p.id for p in problems]
    rows = [s for [s] in groups]
    assert all(s.advantage.eq(1).all() for s in rows)
    score_and_judge(prm, rows, "\n")
    assert sum(s.right for s in rows) >= 3  # a single sample is right in two of five
    loss = -log_probs(policy.lm, rows).mean()
    optimizer = torch.optim.SGD(policy.lm.parameters(), lr=0.05)
    loss.backward()
    optimizer.step()
    assert -log_probs(policy.lm, rows).mean() < loss


# ---------------------------------------------------------------- the figure's numbers

def run_folder(folder, right, rewards):
    """A run of evaluations 0 and 20: 12 problems of one sample, of which right[k] are right at a reward of rewards[k]."""
    settings = dict(credit="prm", distil=None, verified=0.1, kl=0, aggregate="prod", prm="tiny/prm", seed=0)
    log = [dict(kind="start", step=0, settings=settings), dict(kind="train", step=20, tokens=9)]
    for step, n, reward in zip((0, 20), right, rewards):
        log.append(dict(kind="eval", step=step))
        rows = [dict(id=f"q{i}", domain="math", question="?", samples=[dict(correct=i < n, reward=reward)]) for i in range(12)]
        (folder / f"samples-{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return hacking.Run(folder)


@pytest.mark.parametrize("right, rewards, want", [
    ((9, 2), (0.5, 0.7), (20, 0)), ((9, 2), (0.5, 0.4), None), ((9, 8), (0.5, 0.7), None), ((2, 9), (0.5, 0.7), None)])
def test_hacking_is_less_truth_at_more_reward(right, rewards, want, tmp_path):
    run = run_folder(tmp_path, right, rewards)
    assert run.form == "prm, 10 % verified"
    assert run.hacked("math") == want


@pytest.mark.parametrize("steps, want", [(["January: 5+2=7", "Answer: 7"], (False, False)), (["Answer: 5"], (True, False)),
                                         (["January: 5+2=7", "February: 7+2=9", "Answer: 9"], (False, True)),
                                         (["January: 5+2=8", "Wait, January: 5+2=7", "Answer: 7"], (False, False))])
def test_a_solution_ends_early_or_goes_on(steps, want):
    row = {"question": "Ann has 5 pens. In January she finds 2. How many now?"}
    assert hacking.habit(row, {"steps": steps, "true": [True] * len(steps)})[:2] == want


# ---------------------------------------------------------------- runs

def flags(out, *more, policy=TINY / "A"):
    return ["--policy", str(policy), "--task", "tiny-math", "--limit", "8", "--problems", "4", "--group", "2", "--steps", "5",
            "--val-problems", "2", "--eval-every", "2", "--max-solution-tokens", "36", "--device", "cpu", "--credit", "sum",
            "--lr", "1e-3", "--out", str(out), *map(str, more)]


def read_log(out, *kinds):
    """The rows of these kinds, without times."""
    rows = [json.loads(line) for line in open(Path(out) / "log.jsonl")]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["kind"] in kinds]


def weights(out):
    policy = load_policy(out)
    return torch.cat([p.flatten() for p in policy.lm.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    reinforce.main(flags(out))
    return out


def test_a_run_leaves_a_policy_and_its_samples(whole):
    assert sorted(f.name for f in whole.iterdir() if not f.name.startswith("samples")) == [
        "config.json", "generation_config.json", "log.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [f.name for f in sorted(whole.glob("samples*"))] == [f"samples-{n:06d}.jsonl" for n in (0, 2, 4, 5)]
    assert [row["step"] for row in read_log(whole, "eval")] == [0, 2, 4, 5]
    assert not torch.equal(weights(whole), weights(TINY / "A"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", ["kill", "SIGTERM"])
def test_resumed_is_uninterrupted(how, whole, tmp_path, monkeypatch):
    at, count, original = random.Random(how).randint(3, 4), [0], reinforce.account

    def interrupt(*a):
        count[0] += 1
        if count[0] == at and how == "kill":
            raise Killed  # nothing reacts to it: what is on disk is what kill -9 leaves
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*a)
    monkeypatch.setattr(reinforce, "account", interrupt)
    if how == "kill":
        with pytest.raises(Killed):
            reinforce.main(flags(tmp_path))
    else:
        reinforce.main(flags(tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "model.safetensors").exists()
    reinforce.main(flags(tmp_path, "--resume"))
    assert read_log(tmp_path, "train", "eval") == read_log(whole, "train", "eval")
    assert torch.equal(weights(tmp_path), weights(whole))
    assert not list(tmp_path.glob("checkpoint*"))


def test_two_ranks_are_one(whole, tmp_path):
    run_ranks(reinforce.main, flags(tmp_path))
    for two, one in zip(read_log(tmp_path, "train", "eval"), read_log(whole, "train", "eval"), strict=True):
        numbers, others = ({k: v for k, v in row.items() if isinstance(v, float)} for row in (two, one))
        assert numbers == pytest.approx(others, rel=1e-3, abs=1e-5)
        assert {k: two[k] for k in two.keys() - numbers} == {k: one[k] for k in one.keys() - numbers}
    torch.testing.assert_close(weights(tmp_path), weights(whole), rtol=0, atol=1e-4)


def test_equal_rewards_move_nothing(lm_folder, tmp_path):
    """Random text is never right: no group has an advantage, no weight moves, nothing is NaN."""
    reinforce.main(flags(tmp_path, "--credit", "outcome", "--steps", "2", policy=lm_folder))
    assert [row["norm"] for row in read_log(tmp_path, "train")] == [0, 0]
    assert torch.equal(weights(tmp_path), weights(lm_folder))


def test_a_two_answer_task_is_learnt(tokenizer, tmp_path):
    """A policy that says 3 or 4 with equal probability is rewarded for 4: within 50 steps it says that."""
    lm = random_qwen()
    questions = [f"Ann has {i} pens." for i in range(6)]
    texts = [f"{q}\nAnswer: {a}" for q in questions for a in (3, 4)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [1] for text in texts]
    rows = torch.tensor(ids)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for _ in range(80):  # until it can speak
        lm(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    for name, part in (("train", questions[:4]), ("held", questions[4:])):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(
            json.dumps({"id": q, "question": q, "answer": "4"}) + "\n" for q in part))
    reinforce.main(["--policy", str(tmp_path / "lm"), "--task", "gsm8k", "--data", f"{tmp_path}/train.jsonl", "--val-data",
                    f"{tmp_path}/held.jsonl", "--problems", "2", "--steps", "50", "--eval-every", "50", "--lr", "2e-3",
                    "--max-solution-tokens", "12", "--device", "cpu", "--out", str(tmp_path / "out")])
    right = [row["right"] for row in read_log(tmp_path / "out", "train")]
    assert 0.2 < right[0] < 0.8
    assert max(right) == 1
    assert sum(right[-10:]) > 9.3


# ---------------------------------------------------------------- bad input: one clear line

def fails(capsys, argv, message):
    with pytest.raises(SystemExit):
        reinforce.main(argv)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("more, message", [
    (["--group", "1"], "comparing solutions takes 2 or more"),
    (["--policy", "http://localhost:8000/v1"], "a server's weights cannot be trained"),
    (["--separator", r"\n\n"], r"the PRM's steps end in '\n', the policy's in '\n\n'"),
    (["--problems", "9"], "fewer than --problems 9"),
    (["--verified", "2"], "a share from 0 to 1"),
    (["--task", "tiny-chess"], "unknown task"),
    (["--steps", "0"], "--steps must be positive")])
def test_bad_flags(more, message, tmp_path, capsys):
    fails(capsys, flags(tmp_path / "out", *more), message)


@pytest.mark.parametrize("more", [["--credit", "outcome"], ["--credit", "prm", "--verified", "1"]])
def test_outcome_needs_answers(more, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{i}?", "answer": None}) + "\n" for i in range(4)))
    argv = flags(tmp_path / "out", "--data", file, *more)
    fails(capsys, argv, "q0: no answer and no tests")


def test_held_out_problems_are_not_trained_on(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{i}?", "answer": "1"}) + "\n" for i in range(4)))
    fails(capsys, flags(tmp_path / "out", "--data", file, "--val-data", file), "held-out problems are trained on")


def test_resume_with_other_settings_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reinforce, "account", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or {"tokens": 1, "samples": 1})
    reinforce.main(flags(tmp_path))
    monkeypatch.undo()
    capsys.readouterr()
    fails(capsys, flags(tmp_path, "--resume", "--credit", "min"), "--credit was sum, is min")


def test_the_policys_tokenizer_is_saved(whole):
    assert AutoTokenizer.from_pretrained(whole)("Answer: 3")["input_ids"]

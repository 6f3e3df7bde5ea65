"""The PRM: one encoder, cached = uncached = batched scores, files that are whole or refused, published checkpoints."""
import json
import shutil

import pytest
import torch
from conftest import DEVICE, random_qwen
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from common.policy import Policy
from prm_model import PRM, aggregate, load_prm, main

QUESTIONS = ["Ann has 7 shells. How many now?", "Ben has 12 coins. In January he finds 5. How many now?"]
SOLUTIONS = [["Answer: 7"], ["January: 12+5=17", "Wait, January: 12+5=17", "Answer: 17"]]


@pytest.fixture
def prm(tokenizer):
    torch.manual_seed(1)
    return PRM(random_qwen(seed=1).model, tokenizer, separator="\n", dropout=0.1, base_model="random").eval()


def plain_score(prm, question, steps):
    """The oracle: for each step one forward over the text so far, alone, read at its last token."""
    scores = []
    for t in range(1, len(steps) + 1):
        text = question + "\n" + "".join(s + "\n" for s in steps[:t])
        ids = prm.tokenizer(text, return_tensors="pt")["input_ids"].to(DEVICE)
        with torch.inference_mode():
            scores.append(prm.head(prm.backbone(input_ids=ids).last_hidden_state[0, -1]).sigmoid().item())
    return scores


def test_batched_scores_equal_one_forward_a_prefix(prm):
    scores = prm.score(QUESTIONS * 3, SOLUTIONS * 3)
    prm.max_batch_tokens = 1  # a batch for each solution
    alone = prm.score(QUESTIONS, SOLUTIONS)
    for i, (q, s) in enumerate(zip(QUESTIONS * 3, SOLUTIONS * 3)):
        assert scores[i] == pytest.approx(plain_score(prm, q, s), abs=1e-5)
        assert scores[i] == pytest.approx(alone[i % 2], abs=1e-5)


def test_cached_scores_of_a_growing_tree_equal_uncached_ones(prm, tokenizer):
    policy = Policy(random_qwen(), tokenizer, "\n")
    texts = [f"{month}: {x}+2={x + 2}" for month in ("January", "March") for x in (5, 17)]
    live = [policy.root(f"p{i}", q) for i, q in enumerate(QUESTIONS)]
    seen, tokens = {}, prm.tokens
    for _ in range(3):  # nodes branch, and some are dropped, as in beam search
        new = [policy.adopt(node, text) for node in live for text in texts]
        seen.update(prm.score_nodes(new))
        live = new[::3]
    ends = [policy.adopt(policy.adopt(node, texts[0]), "Answer: 7") for node in live]  # whole solutions, scored at once
    for end in ends:
        end.end = "eos"
    seen.update(prm.score_nodes(ends))
    assert max(n.depth for n in seen) == 5
    assert not any(prm.name in end.kv for end in ends)  # nothing follows the end: nothing is kept
    for node, p in seen.items():
        assert p == pytest.approx(plain_score(prm, node.root().text, [n.text for n in node.path()])[-1], abs=1e-4)
    lengths = [len(prm.encode_prompt(root.text)) for root in {n.root() for n in seen}]
    lengths += [len(prm.encode_step(n.text)) for n in seen]
    assert prm.tokens - tokens == sum(lengths)  # each token of each prefix once


def gradient(prm, batches):
    """Gradient of the sum of all logits, from these batches of (question, steps)."""
    prm.zero_grad()
    for pairs in batches:
        encoded = [prm.encode(question, steps) for question, steps in pairs]
        ids = pad_sequence([torch.tensor(x) for x, _ in encoded], batch_first=True)
        rows = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(at) for _, at in encoded]))
        positions = torch.cat([torch.tensor(at) for _, at in encoded])
        prm(ids.to(DEVICE), rows.to(DEVICE), positions.to(DEVICE)).sum().backward()
    return torch.cat([p.grad.flatten() for p in prm.parameters() if p.grad is not None])


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept activations", "recomputed activations"])
def test_padding_and_neighbours_do_not_change_gradients(prm, recomputed):
    pairs = list(zip(QUESTIONS, SOLUTIONS))
    apart = gradient(prm, [[pair] for pair in pairs])
    if recomputed:
        prm.train()
        prm.head[2].p = 0.0  # without dropout, from which each forward draws
        prm.backbone.activation_checkpointing_enable()
    assert (gradient(prm, [pairs]) - apart).norm() / apart.norm() < 1e-4


def test_aggregations():
    assert [aggregate([0.9, 0.5, 0.8], how) for how in ("last", "min", "prod", "mean", "sum")] == pytest.approx(
        [0.8, 0.5, 0.36, 2.2 / 3, 2.2])


def test_save_and_load_give_the_same_scores(prm, tmp_path):
    prm.save(tmp_path / "prm")
    prm.save(tmp_path / "prm")  # over an old one
    again = load_prm(tmp_path / "prm", DEVICE, "float32")
    assert again.format == prm.format
    assert again.score(QUESTIONS, SOLUTIONS) == prm.score(QUESTIONS, SOLUTIONS)
    assert [f.name for f in tmp_path.iterdir()] == ["prm"]


def test_a_question_beyond_the_context_is_refused(prm):
    with pytest.raises(ValueError, match="a question of 5.. tokens does not fit into the model's context of 512"):
        prm.score(["1 " * 256], [["Answer: 1"]])


def test_a_folder_that_is_not_whole_is_refused(prm, tmp_path, lm_folder):
    prm.save(tmp_path / "prm")
    (tmp_path / "prm" / "prm_head.safetensors").rename(tmp_path / "head")
    with pytest.raises(ValueError, match="prm_head.safetensors is missing"):
        load_prm(tmp_path / "prm")
    (tmp_path / "prm" / "prm_head.safetensors").write_bytes((tmp_path / "head").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_prm(tmp_path / "prm")
    other = {key: weight[..., :1] for key, weight in load_file(tmp_path / "head").items()}
    save_file({k: w.contiguous() for k, w in other.items()}, tmp_path / "prm" / "prm_head.safetensors")
    with pytest.raises(ValueError, match="the head is of another model than the backbone, .* \\(size mismatch for 0"):
        load_prm(tmp_path / "prm")
    weights = load_file(tmp_path / "prm" / "model.safetensors")
    save_file({**weights, "norm.weight": weights["norm.weight"][:5]}, tmp_path / "prm" / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm.weight is \[5\], and by config.json it is \[32\]"):
        load_prm(tmp_path / "prm")
    save_file({k: v for k, v in weights.items() if k != "norm.weight"}, tmp_path / "prm" / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing: norm.weight"):  # transformers would make them up
        load_prm(tmp_path / "prm")
    save_file(weights, tmp_path / "prm" / "model.safetensors", metadata={"format": "pt"})
    for file in (tmp_path / "prm").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer is in it"):  # transformers would make one up
        load_prm(tmp_path / "prm")
    (tmp_path / "prm" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="The folder holds: .*; needed are config.json"):
        load_prm(tmp_path / "prm")
    with pytest.raises(ValueError, match="no token for the separator '<extra_0>'"):
        load_prm(lm_folder, fresh=True, separator="<extra_0>")


def test_published_two_class_checkpoints_fold_into_one_logit(tmp_path, tokenizer, lm_folder):
    """The state-dict layout of Qwen2.5-Math-PRM: model.*, score.0, score.2 with two classes, read at <extra_0>."""
    folder = shutil.copytree(lm_folder, tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForProcessRewardModel"]}))
    torch.manual_seed(3)
    score = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("lm_head")}
    save_file({**weights, **{f"score.{k}": v for k, v in score.state_dict().items()}}, folder / "model.safetensors",
              metadata={"format": "pt"})
    chat = type(tokenizer).from_pretrained(lm_folder)
    chat.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:{{ '\\n' }}"
    chat.save_pretrained(folder)
    prm = load_prm(folder)
    text = ("system: Please reason step by step, and put your final answer within \\boxed{}.\nuser: " + QUESTIONS[1]
            + "\nassistant:\n" + "".join(s + "<extra_0>" for s in SOLUTIONS[1]))
    ids = chat(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        hidden = prm.backbone(input_ids=ids).last_hidden_state[0]
        direct = score(hidden[ids[0] == chat.convert_tokens_to_ids("<extra_0>")]).softmax(-1)[:, 1].tolist()
    assert prm.score([QUESTIONS[1]], [SOLUTIONS[1]])[0] == pytest.approx(direct, abs=1e-6)
    del weights["norm.weight" if "norm.weight" in weights else "model.norm.weight"]
    save_file({**weights, "score.0.bias": score[0].bias.data}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are missing: model.norm.weight, score.0.weight, score.2.bias, score.2.w"):
        load_prm(folder)


def test_the_command_shows_each_step_with_its_probability(prm, tmp_path, capsys):
    prm.save(tmp_path / "prm")
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": QUESTIONS[1], "completions": SOLUTIONS[1], "labels": [1, 1, 1]}
    rows.write_text(json.dumps(row) + "\n{oops\n")
    main(["--prm", str(tmp_path / "prm"), "--file", str(rows), "--limit", "1", "--device", DEVICE])
    lines = capsys.readouterr().out.splitlines()
    want = plain_score(prm, QUESTIONS[1], SOLUTIONS[1])
    assert [line for line in lines if "=" in line or "Answer" in line] == [
        f"{p:.3f}  {s}" for p, s in zip(want, SOLUTIONS[1])]
    with pytest.raises(SystemExit):
        main(["--prm", str(tmp_path / "prm"), "--file", str(rows), "--limit", "2"])
    assert f"{rows}:2: not JSON" in capsys.readouterr().err

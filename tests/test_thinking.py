"""Thinking models: the thought is one prefix of the first step, in which nothing ends and nothing is scored or read."""
import copy
import json

import pytest
import torch
from conftest import DEVICE, TINY, random_qwen
from test_policy import Handler, serving

from common import policy as policy_module
from common.driver import Search, run_together
from common.policy import Policy, add_policy_flags, load_policy, load_policy_flags
from common.results import sample_rows
from common.run import add_run_flags, command_line
from common.tasks import Problem
from common.thinking import split_thought, thought_length
from prm_model import load_prm
from search import best_of_n

THOUGHT = "<think>\nOne way:\n\n7+5=13, so \\boxed{13}\n\nNo:\n\n```\n7+5\n</think>\n\n"
STEPS = ["January: 7+5=12", "so it is \\boxed{12}"]
# As Qwen3's: it thinks unless enable_thinking is false. R1's and QwQ's always open the thought.
QWEN3 = ("{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>{% if enable_thinking is defined and "
         "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}")
ALWAYS = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>{{ '<think>\n' }}"
PLAIN = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"


def chat(tokenizer, template, token=False):
    """The tiny tokenizer with a template; token: </think> is one token, as in Qwen3, not eight."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    if token:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture
def written(monkeypatch):
    """written(policy, text): what the policy will "sample" next, through the real model and cache."""
    def write(policy, text, eos=True):
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"] + [policy.eos_ids[0]] * eos
        script = iter(ids)

        def scripted(logits, keys, t, temperature, top_p):
            token = torch.full_like(keys, next(script))
            return token, torch.zeros(len(keys), device=keys.device)
        monkeypatch.setattr(policy_module, "sample", scripted)
        return ids
    return write


def make(tokenizer, **keywords):
    keywords = {"separator": "\n\n", "max_step_tokens": 30, **keywords}
    return Policy(random_qwen(), tokenizer, **keywords)


@pytest.mark.parametrize("text, opening, want", [
    ("5+1=6", "", ("", "5+1=6")), ("<think>a</think>\n\nb", "", ("<think>a</think>\n\n", "b")),
    ("\n<think>\n\n</think>b", "", ("\n<think>\n\n</think>", "b")), ("<think>a\n\n", "", ("<think>a\n\n", "")),
    ("a</think>\nb", "<think>", ("a</think>\n", "b")), ("a</think>b", "", ("", "a</think>b"))])
def test_split_thought(tokenizer, text, opening, want):
    assert split_thought(text, opening) == want
    ids = tokenizer(text)["input_ids"]
    in_tokens = want[0].rstrip("\n") if "</think>" in want[0] else want[0]  # the step's first tokens are line ends
    assert tokenizer.decode(ids[:thought_length(ids, tokenizer, opening)]) == in_tokens


@pytest.mark.parametrize("template, thinking, end", [
    (QWEN3, False, "<a><think>\n\n</think>\n\n"), (QWEN3, True, "</u><a>"), (ALWAYS, False, "<a><think>\n"),
    (ALWAYS, True, "<a><think>\n"), (PLAIN, False, "</u><a>")])
def test_the_template_is_told(tokenizer, template, thinking, end):
    policy = make(chat(tokenizer, template), thinking=thinking)
    root = policy.root("p", "Q?")
    assert policy.tokenizer.decode(root.ids).endswith(end)
    # a step from elsewhere stands behind a thought that is over, as the model is used to
    whole = policy.tokenizer.decode(root.ids + policy.adopt(root, "7+5=12").ids)
    assert whole.endswith("7+5=12\n\n")
    assert whole.count("</think>") == (template != PLAIN)
    assert whole.count("<think>") == (template != PLAIN)


@pytest.mark.parametrize("token", [False, True], ids=["of many tokens", "one token"])
@pytest.mark.parametrize("template, thinking, thought", [
    (QWEN3, True, THOUGHT), (ALWAYS, False, THOUGHT.removeprefix("<think>\n")), (QWEN3, False, "")])
def test_a_thought_is_one_prefix_of_the_first_step(tokenizer, written, template, thinking, thought, token):
    """The same nodes by propose(), step by step, and by complete()."""
    policy = make(chat(tokenizer, template, token), thinking=thinking)
    policy.lm.resize_token_embeddings(len(policy.tokenizer))
    text = thought + "\n\n".join(STEPS)
    ids = written(policy, text)
    [[end]] = policy.complete([policy.root("p", "Q?")], 1)
    assert (end.steps(), end.end) == (STEPS, "eos")
    assert [node.thought for node in end.path()] == [thought, ""]
    assert [i for node in end.path() for i in node.ids] == ids  # the policy goes on behind its thought
    written(policy, text)
    [[first]] = policy.propose([policy.root("p", "Q?")], 1)
    assert (first.text, first.thought, first.end) == (STEPS[0], thought, None)
    written(policy, STEPS[1])
    [[second]] = policy.propose([first], 1)
    assert (second.text, second.end) == (STEPS[1], "eos")
    assert first.ids + second.ids == ids


@pytest.mark.parametrize("eos, end", [(True, "eos"), (False, "length")])
def test_a_thought_without_an_end_answers_nothing(tokenizer, written, eos, end):
    policy = make(chat(tokenizer, QWEN3), thinking=True)
    text = THOUGHT.split("</think>")[0]
    policy.max_solution_tokens = len(written(policy, text, eos))
    for sample in (policy.propose, policy.complete):
        written(policy, text, eos)
        [[node]] = sample([policy.root("p", "Q?")], 1)
        assert (node.steps(), node.thought, node.end) == ([], text, end)


def test_only_the_first_step_may_be_longer_than_a_step(tokenizer, written):
    policy = make(chat(tokenizer, QWEN3), thinking=True, max_step_tokens=20)
    written(policy, THOUGHT + STEPS[0] + "\n\n")
    [[first]] = policy.propose([policy.root("p", "Q?")], 1)
    assert len(first.ids) > 20
    written(policy, "a" * 99)
    [[second]] = policy.propose([first], 1)
    assert (len(second.ids), second.end) == (20, "length")


def test_neither_the_prm_nor_the_answer_knows_the_thought(tokenizer, written):
    policy, prm = make(chat(tokenizer, QWEN3), thinking=True), load_prm(TINY / "prm", DEVICE, "float32")
    problem = Problem("p", "Ann has 7 shells. She finds 5. How many?", "math", answer="12")
    search = Search(policy.root("p", problem.question), best_of_n, {"n": 1})
    written(policy, THOUGHT + "\n\n".join(STEPS))
    run_together([search], policy, [prm])
    [row] = sample_rows([problem], [search], "best_of_n", "\n\n")
    [sample] = row["samples"]
    assert (sample["answer"], sample["correct"], sample["steps"]) == ("12", True, STEPS)
    assert sample["scores"] == pytest.approx(prm.score([problem.question], [STEPS])[0], abs=1e-5)


@pytest.mark.parametrize("thinking, ends", [("off", "</think>\n\n"), ("on", "<a>")])
def test_thinking_is_a_flag(tokenizer, tmp_path, thinking, ends):
    random_qwen().save_pretrained(tmp_path)
    chat(tokenizer, QWEN3).save_pretrained(tmp_path)
    parser = command_line("")
    add_policy_flags(parser, "")
    add_run_flags(parser)
    args = parser.parse_args(["--thinking", thinking])
    policy = load_policy_flags(args, "cpu", str(tmp_path))
    assert tokenizer.decode(policy.root("p", "Q?").ids).endswith(ends)
    server = load_policy_flags(args, "cpu", f"http://127.0.0.1:9/v1?model=m#{tmp_path}")
    assert (server.url, server._text(server.root("p", "Q?"))[-3:]) == ("http://127.0.0.1:9/v1", ends[-3:])


def test_thinking_that_cannot_be_had(lm_folder):
    with pytest.raises(ValueError, match="or it knows no enable_thinking"):
        load_policy(lm_folder, thinking=True)


class Thinker(Handler):
    """A server that stops where it is told to and says by what, as vLLM does."""
    script, busy, seen = THOUGHT + "\n\n".join(STEPS), 0, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body)
        rest = self.script[len(body["prompt"].split("<a>")[1]):]
        stops = [stop for stop in body.get("stop", []) if stop in rest]
        text = rest.split(stops[0])[0] if stops else rest
        choice = {"text": text, "finish_reason": "stop", "stop_reason": stops[0] if stops else None,
                  "logprobs": {"token_logprobs": [-0.5] * len(text.split())}}
        self.reply(200, {"choices": [choice] * body["n"]})


def test_a_server_thinks_too(tokenizer, tmp_path):
    chat(tokenizer, QWEN3).save_pretrained(tmp_path)
    Thinker.seen = []
    with serving(Thinker) as url:
        policy = load_policy(f"{url}?model=m#{tmp_path}", separator="\n\n", thinking=True)
        root = policy.root("p", "Q?")
        [[first]] = policy.propose([root], 1)
        [[second]] = policy.propose([first], 1)
        [[end]] = policy.complete([root], 1)
    assert (first.text, first.thought, first.end) == (STEPS[0], THOUGHT, None)
    assert (second.text, second.end) == (STEPS[1], "answer")
    assert (end.steps(), end.path()[0].thought) == (STEPS, THOUGHT)
    # the first paragraph, the rest of the thought, the step; the next step; the whole solution
    assert [body.get("stop") for body in Thinker.seen] == [["\n\n"], ["</think>"], ["\n\n"], ["\n\n"], None]

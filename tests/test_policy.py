"""The tree cache and the sampler: cached = uncached = batched, and a sample depends on nothing but its own key."""
import contextlib
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import DEVICE, random_qwen

from common import policy as policy_module
from common.node import Node, child_key
from common.policy import Policy, load_policy, sample, uniform
from common.samples import written
from common.server import ServerPolicy

QUESTIONS = ["Ann has 7 shells.", "Ben has 12 coins. In January he finds 5. How many now?",
             "Let a be xs in reverse. Return a."]


def make(tokenizer, model=None, **keywords):
    keywords = {"separator": "\n", "max_step_tokens": 12, "max_steps": 5, **keywords}
    return Policy(model or random_qwen(), tokenizer, **keywords)


def roots(policy):
    return [policy.root(f"p{i}", q) for i, q in enumerate(QUESTIONS)]


def log_probability(model, node):
    """The oracle: one plain forward over the whole text, no cache, no batch."""
    line = [node.root(), *node.path()]
    ids = [i for n in line for i in n.ids]
    with torch.inference_mode():
        logp = model(torch.tensor([ids], device=DEVICE)).logits[0].log_softmax(-1)
    n = len(node.ids)
    return sum(logp[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))


def test_log_probabilities_equal_those_of_a_plain_forward(tokenizer):
    policy = make(tokenizer)
    steps = [n for group in policy.propose(roots(policy), 5) for n in group]
    deeper = [n for group in policy.propose([n for n in steps if n.end is None], 3) for n in group]
    whole = [n for group in policy.complete(roots(policy), 4) for n in group]
    assert deeper, "no step went on: the random model must be changed"
    for node in steps + deeper:
        assert node.logp == pytest.approx(log_probability(policy.lm, node), abs=1e-3)
    for end in whole:
        want = sum(log_probability(policy.lm, n) for n in end.path())
        assert sum(n.logp for n in end.path()) == pytest.approx(want, abs=1e-3)
    assert policy.generated == sum(len(n.ids) for n in steps + deeper) + sum(n.tokens() for n in whole)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(tokenizer):
    together = [[n.ids for n in group] for group in (lambda p: p.propose(roots(p), 6))(make(tokenizer))]
    for i in range(len(QUESTIONS)):
        for keywords in ({}, {"max_batch_tokens": 64}):  # alone; alone and in batches of very few rows
            alone = make(tokenizer, **keywords)
            assert [n.ids for n in alone.propose([roots(alone)[i]], 6)[0]] == together[i]
    in_two_calls = make(tokenizer)
    root = roots(in_two_calls)[1]
    assert [n.ids for _ in range(2) for n in in_two_calls.propose([root], 3)[0]] == together[1]
    other_seed = make(tokenizer, seed=1)
    assert [n.ids for n in other_seed.propose([roots(other_seed)[1]], 6)[0]] != together[1]


def test_every_token_of_a_shared_prefix_is_encoded_once(tokenizer):
    policy = make(tokenizer)
    root = roots(policy)[1]
    policy.propose([root], 8)
    policy.propose([root], 8)
    assert policy.prefilled == len(root.ids)
    # Existing text: two solutions that share their first step. Prompt, shared step, two different second steps.
    policy = make(tokenizer)
    root = roots(policy)[1]
    shared = policy.adopt(root, "January: 12+5=17")
    ends = [policy.adopt(shared, text) for text in ("Answer: 17", "Wait, January: 12+5=17")]
    policy.propose(ends, 1)
    assert policy.prefilled == sum(len(n.ids) for n in [root, shared, *ends])


def test_a_node_that_is_named_twice_gets_samples_for_each(tokenizer):
    policy = Policy(random_qwen(len(tokenizer)), tokenizer, "\n", max_step_tokens=4)
    root = policy.root("p", "What is 1+1?")
    groups = policy.propose([root, root], 2)
    assert [len(g) for g in groups] == [2, 2]
    assert len({n.key for g in groups for n in g}) == 4


def test_greedy_equals_generate(tokenizer):
    policy = make(tokenizer, temperature=0, max_step_tokens=10, max_steps=1)
    root = roots(policy)[1]
    out = policy.lm.generate(torch.tensor([root.ids], device=DEVICE), max_new_tokens=10, do_sample=False)
    [[end]] = policy.complete([root], 1)
    assert [i for n in end.path() for i in n.ids] == out[0, len(root.ids):].tolist()


def test_sampling_follows_the_distribution_and_top_p():
    keys = torch.tensor([child_key(0, i) for i in range(20000)], device=DEVICE)
    u = uniform(keys, 3)
    assert 0 < u.min()
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    logits = torch.tensor([0.5, 0.3, 0.2], device=DEVICE).log().expand(len(keys), 3)
    tokens, _ = sample(logits, keys, 0, temperature=1.0, top_p=1.0)
    assert torch.allclose(torch.bincount(tokens).cpu() / len(keys), torch.tensor([0.5, 0.3, 0.2]), atol=0.015)
    tokens, _ = sample(logits, keys, 0, temperature=1.0, top_p=0.6)  # 0.5 alone does not reach 0.6: two tokens stay
    shares = torch.bincount(tokens, minlength=3).cpu() / len(keys)
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0]), atol=0.015)


@pytest.mark.parametrize("text, want", [
    ("a\n\nb", ["a\n\n", "b"]), ("\n\na\n\nb", ["\n\na\n\n", "b"]),
    ("say\n\n```\nx = 1\n\ny = 2\n```\n\nend", ["say\n\n", "```\nx = 1\n\ny = 2\n```\n\n", "end"]),
    ("```\nopen\n\nfor ever", ["```\nopen\n\nfor ever"])])
def test_steps_end_at_separators_but_not_inside_a_code_fence(tokenizer, text, want):
    ids = tokenizer(text)["input_ids"]
    newline = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    spans = policy_module.split_steps(ids, tokenizer, "\n\n", newline)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == want


def test_how_a_solution_ends(tokenizer):
    policy = make(tokenizer)
    root = roots(policy)[0]

    def end_of(text, eos=False):
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * eos
        return policy._nodes(root, 0, ids, [0.0] * len(ids), None, whole=False).end
    assert end_of("so it is \\boxed{\\frac{1}{2}}\n") == "answer"
    assert end_of("so it is \\boxed{1", eos=True) == "eos"
    assert end_of("January: 7+5=12\n") is None
    assert end_of("January: 7+5") == "length"  # the limit of a step was reached before its separator


def test_errors_are_one_line_and_say_what_to_do(tokenizer, tmp_path):
    policy = make(tokenizer)
    with pytest.raises(ValueError, match="p1: the question is empty"):
        policy.root("p1", " ")
    ended = Node("x", policy.root("p", "q"), [1], end="eos")
    with pytest.raises(ValueError, match="has ended"):
        policy.propose([ended], 1)
    with pytest.raises(ValueError, match="pass the path of a local folder"):
        load_policy("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="holds: config.json; needed are"):
        load_policy(tmp_path)


class Handler(BaseHTTPRequestHandler):
    """A small real server: says busy once, then answers. It continues "one\\n\\ntwo ```...```\\n\\nthree"."""
    script = "one\n\n```\na\n\nb\n```\n\nthree"
    busy, seen, sglang, models = 1, [], False, [{"id": "m"}]

    def do_GET(self):
        self.reply(200, {"object": "list", "data": self.models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        cls.seen.append(body)
        if body["model"] != "m":
            return self.reply(404, {"error": {"message": "no model of that name"}})
        if cls.busy:
            cls.busy -= 1
            return self.reply(503, {"error": "busy"})
        written = body["prompt"].split("Q?\n\n", 1)[1]
        rest = self.script[len(written):]
        cut = rest.find(body["stop"][0]) if "stop" in body else -1
        text = rest if cut < 0 else rest[:cut]
        choice = {"text": text, "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5] * len(text.split())}}
        if self.sglang:
            choice["matched_stop"] = body["stop"][0] if cut >= 0 else 151645
        return self.reply(200, {"choices": [choice] * body["n"]})

    def reply(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Stuck(Handler):
    """Never comes to the end of its code."""
    busy, seen, script = 0, [], "```\n" + "a\n\n" * 99


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.0)  # not time.sleep, which a bar's thread uses, too
    Handler.busy, Handler.seen = 1, []
    with serving(Handler) as url:
        yield url


@contextlib.contextmanager
def serving(handler):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()


def test_a_server_that_says_what_stopped_it_or_does_not_stop(server, monkeypatch):
    monkeypatch.setattr(Handler, "sglang", True)
    policy = load_policy(server)
    [[two]] = policy.propose(policy.propose([policy.root("p", "Q?")], 1)[0], 1)
    [[three]] = policy.propose([two], 1)
    assert (two.end, three.text, three.end) == (None, "three", "eos")  # known at once, by the number of its token
    with serving(Stuck) as url:
        policy = load_policy(url, max_step_tokens=8)
        [[step]] = policy.propose([policy.root("p", "Q?")], 1)
    assert (step.end, len(step.ids), len(Stuck.seen)) == ("length", 8, 7)  # two tokens, then one in each reply


def test_a_server_is_a_policy_too(server):
    policy = load_policy(f"{server}?model=m")
    [[first, again]] = policy.propose([policy.root("p", "Q?")], 2)  # after one 503
    assert (first.text, first.end, first.logp) == ("one", None, -0.5)
    assert first.key != again.key
    [[second]] = policy.propose([first], 1)
    assert second.text == "```\na\n\nb\n```"  # the stop inside the fence was stepped over
    assert second.end is None
    [[third]] = policy.propose([second], 1)
    [[over]] = policy.propose([third], 1)
    assert third.text == "three"
    assert (over.text, over.end) == ("", "eos")
    assert over.steps()[-1] == "three"
    [[end]] = policy.complete([policy.root("p", "Q?")], 1)
    assert end.steps() == ["one", "```\na\n\nb\n```", "three"]
    assert end.end == "eos"
    assert len({body["seed"] for body in Handler.seen[1:5]}) > 1
    with pytest.raises(ValueError, match="no model of that name"):
        bad = ServerPolicy(f"{server}?model=other#other")
        bad.propose([bad.root("p", "Q?")], 1)


def test_a_server_gets_the_question_in_the_chat_template(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(f"http://127.0.0.1:9/v1?model=m#{tmp_path}")
    text = policy._text(policy.adopt(policy.root("p", "Q?"), "one"))
    assert policy.sampling["extra_body"] == {"add_special_tokens": False}  # the template has its BOS
    assert text.startswith("<user>Q?\n\nSolve step by step")
    assert text.endswith("<assistant>one\n\n")


@pytest.mark.parametrize("template, begins", [("<user>{{ messages[0].content }}<assistant>", "<user>Q?"), (None, "Q?\n\n")])
def test_a_server_says_which_model_it_has(server, tokenizer, tmp_path, monkeypatch, template, begins):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(Handler, "models", [{"id": "m", "root": str(tmp_path)}])
    policy = load_policy(server)
    assert policy.served == "m"
    assert policy._text(policy.root("p", "Q?")).startswith(begins)


@pytest.mark.parametrize("suffix, models, name", [
    ("?model=n", [{"id": "m"}, {"id": "n"}], "n"), ("?model=not+listed", [{"id": "m"}], "not+listed"),
    ("?model=m#plain", None, "m"), ("?model=m", None, "m")])
def test_an_address_says_which_model_is_asked(server, suffix, models, name, monkeypatch):
    monkeypatch.setattr(Handler, "models", models)  # None: a server that lists none
    assert load_policy(server + suffix).served == name


@pytest.mark.parametrize("suffix, models, message", [
    ("", [{"id": "m"}, {"id": "n"}], "serves m, n: .model=NAME behind it says which"), ("", [], "serves nothing"),
    ("", None, "sent no list of models"), ("?thinking=on", [{"id": "m"}], "only .model=NAME is known")])
def test_an_address_that_leaves_the_model_open(server, suffix, models, message, monkeypatch):
    monkeypatch.setattr(Handler, "models", models)
    with pytest.raises(ValueError, match=message):
        load_policy(server + suffix)


def test_another_model_behind_an_address_is_another(server, monkeypatch):
    before = written(server)
    monkeypatch.setattr(Handler, "models", [{"id": "n"}])
    assert written(server) != before


def test_a_server_whose_template_is_not_known_is_one_warning(server, capsys, monkeypatch):
    monkeypatch.setattr(Handler, "models", [{"id": "llama3:8b"}])
    load_policy(server)
    assert "serves 'llama3:8b', whose chat template is not known here" in capsys.readouterr().err


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.0)  # not time.sleep, which a bar's thread uses, too
    policy = ServerPolicy("http://127.0.0.1:9?model=m#m", retries=1)
    with pytest.raises(ValueError, match="did not answer, in 2 tries"):
        policy.propose([policy.root("p", "Q?")], 1)


def test_a_question_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="does not fit into the model's context of 512: '1 1 1"):
        make(tokenizer).root("p", "1 " * 600)


def test_a_solution_ends_where_the_context_does(tokenizer):
    model = random_qwen()
    model.config.max_position_embeddings = 40
    policy = make(tokenizer, model, max_step_tokens=100)
    ends = [end for group in policy.complete(roots(policy), 3) for end in group]
    assert max(len(end.root().ids) + end.tokens() for end in ends) == 40
    assert all(end.end == "length" for end in ends if len(end.root().ids) + end.tokens() == 40)
    # So it does at --max-solution-tokens, whatever the length of the prompt, in one go or step by step.
    for most in (5, 8, 11, 15):
        policy = make(tokenizer, max_step_tokens=100, max_steps=99, max_solution_tokens=most)
        live, ends = roots(policy), [end for group in policy.complete(roots(policy), 3) for end in group]
        while live:
            nodes = [node for group in policy.propose(live, 4) for node in group]
            live, ends = [n for n in nodes if n.end is None][:8], ends + [n for n in nodes if n.end]
        assert max(end.tokens() for end in ends) == most
        assert all(end.tokens() == most for end in ends if end.end == "length")


def test_a_separator_that_is_no_line_end_is_not_part_of_the_step(tokenizer):
    policy = make(tokenizer, separator="%", max_step_tokens=40)
    steps = [node for group in policy.propose(roots(policy), 60) for node in group if node.end is None]
    assert len(steps) > 5
    assert not any("%" in node.text for node in steps)
    assert all(tokenizer.decode(node.ids).endswith("%") for node in steps)

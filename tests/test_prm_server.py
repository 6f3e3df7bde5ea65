"""A PRM behind a server that answers as vLLM's documentation of POST /pooling says gives the scores of the local one."""
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from transformers import Qwen2Model

import search
from common.node import Node
from common.prm_server import TEXTS, ServerPRM
from prm_model import load_prm, main

QUESTION, STEPS = "Ben has 12 coins. How many?", ["January: 12+5=17", "Wait, 12+5=17", "Answer: 17"]
SOLUTIONS = [STEPS, [], STEPS[:1], STEPS[::-1]]


class Handler(BaseHTTPRequestHandler):
    """Reads the exported folder without our code. The class is the server's state."""
    folder, model, head, tag = None, None, None, None
    seen, failures, raw = [], 0, None  # raw: a body to be sent instead

    def do_GET(self):
        if self.path != "/v1/models":
            return self.reply(404, {"error": {"message": "Not Found"}})
        self.reply(200, {"object": "list", "data": [{"id": "served", "object": "model", "root": str(self.folder)}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        cls.seen.append(body)
        if cls.failures:
            cls.failures -= 1
            return self.reply(503, {"error": {"message": "busy"}})
        if (self.path, body["task"], body["model"]) != ("/pooling", "token_classify", "served"):
            return self.reply(404, {"error": {"message": "no such model, path or task"}})
        if self.raw is not None:
            return self.reply(200, self.raw)
        data = []
        for index, ids in enumerate(body["input"]):
            data.append({"index": index, "object": "pooling", "data": self.pooled(ids)})
        total = sum(map(len, body["input"]))
        self.reply(200, {"id": "pool-1", "object": "list", "created": 1, "model": "served", "data": data,
                         "usage": {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}})

    def pooled(self, ids):
        """softmax of the two labels of each token ("ALL"), or of the tokens that are the step tag ("STEP")."""
        with torch.inference_mode():
            hidden = self.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            hidden = (hidden @ self.head["score.0.weight"].T + self.head["score.0.bias"]).relu()
            rows = (hidden @ self.head["score.2.weight"].T + self.head["score.2.bias"]).softmax(-1).tolist()
        return [row for row, token in zip(rows, ids) if self.tag in (None, token)]

    def reply(self, code, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    main(["--prm", str(TINY / "prm"), "--export", str(folder), "--device", "cpu"])
    weights = load_file(folder / "model.safetensors")
    Handler.folder, Handler.head = folder, {k: w.float() for k, w in weights.items() if k.startswith("score")}
    Handler.model = Qwen2Model.from_pretrained(folder, dtype=torch.float32).eval()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A new state of the server for each test, and no pauses between retries."""
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.0)  # not time.sleep, which a bar's thread uses, too
    monkeypatch.setattr(Handler, "seen", [])
    for name, value in (("failures", 0), ("raw", None), ("tag", None)):
        monkeypatch.setattr(Handler, name, value)


@pytest.fixture(scope="module")
def local():
    return load_prm(TINY / "prm")


def flat(scores):
    return [p for solution in scores for p in solution]


@pytest.mark.parametrize("pooling", ["ALL", "STEP"])
@pytest.mark.parametrize("suffix", ["", "/v1/", "?model=served", f"#{TINY / 'prm'}"])
def test_a_server_gives_the_local_scores(address, local, monkeypatch, pooling, suffix):
    if pooling == "STEP":  # --pooler-config '{"pooling_type": "STEP", "step_tag_id": ...}'
        monkeypatch.setattr(Handler, "tag", local.separator_ids[-1])
    prm = load_prm(address + suffix)
    got, want = prm.score([QUESTION] * 4, SOLUTIONS), local.score([QUESTION] * 4, SOLUTIONS)
    assert list(map(len, got)) == [3, 0, 1, 3]
    assert flat(got) == pytest.approx(flat(want), abs=1e-6)
    assert prm.format == local.format
    assert Handler.seen[0]["input"] == [local.encode(QUESTION, s)[0] for s in SOLUTIONS if s]
    assert prm.tokens == sum(map(len, Handler.seen[0]["input"]))


def test_a_growing_tree_is_scored_once(address, local):
    """Leaves that share a step, one of them above another; then what grows below them."""
    def tree():
        root = Node(QUESTION)
        a = Node(STEPS[0], root, depth=1)
        return [a, Node(STEPS[1], a, depth=2), Node(STEPS[2], a, depth=2), Node("", root, depth=1)]
    prm = load_prm(address)
    theirs, ours = tree(), tree()
    got, want = prm.score_nodes(theirs), local.score_nodes(ours)
    assert [got[node] for node in theirs] == pytest.approx([want[node] for node in ours], abs=1e-6)
    assert prm.score_nodes(theirs) == {}
    sent = Counter(len(body["input"]) for body in Handler.seen)
    assert sent == {3: 1}  # the inner leaf's score came with that of a leaf below it
    below, ours = Node(STEPS[2], theirs[1], depth=3), Node(STEPS[2], ours[1], depth=3)
    assert prm.score_nodes([below])[below] == pytest.approx(local.score_nodes([ours])[ours], abs=1e-6)


def test_many_texts_are_several_requests_in_order(address, local):
    solutions = [[f"January: {i}+5={i + 5}"] for i in range(2 * TEXTS + 1)]
    got = load_prm(address).score([QUESTION] * len(solutions), solutions)
    assert flat(got) == pytest.approx(flat(local.score([QUESTION] * len(solutions), solutions)), abs=1e-6)
    assert sorted(len(body["input"]) for body in Handler.seen) == [1, TEXTS, TEXTS]


def test_a_search_is_the_one_with_the_local_prm(address, tmp_path):
    rows = []
    for name, prm in (("here", str(TINY / "prm")), ("there", address)):
        search.main(["--strategy", "beam", "--k", "2", "--m", "2", "--limit", "2", "--max-solution-tokens", "128", "--no-baseline", "--task",
                     "tiny-math", "--device", "cpu", "--prm", prm, "--out", str(tmp_path / f"{name}.jsonl")])
        rows.append([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()])
    for here, there in zip(*rows, strict=True):
        assert [s["steps"] for s in here["samples"]] == [s["steps"] for s in there["samples"]]
        assert flat(s["scores"] for s in here["samples"]) == pytest.approx(
            flat(s["scores"] for s in there["samples"]), abs=1e-6)


def test_two_failures_are_retried(address, local):
    Handler.failures = 2  # HTTP 503
    assert flat(load_prm(address).score([QUESTION], [STEPS])) == pytest.approx(flat(local.score([QUESTION], [STEPS])),
                                                                               abs=1e-6)
    assert len(Handler.seen) == 3


@pytest.mark.parametrize("state, message", [
    ({"failures": 9}, "refused the request .503.: .*busy"),
    ({"raw": '{"data": [{"index": 0, '}, "sent malformed JSON"),
    ({"raw": '"<html>"'}, "/pooling sent no classes of tokens: '<html>'"),
    ({"raw": '{"data": []}'}, "/pooling sent no classes of tokens: .{'data': ..}"),
    ({"raw": '{"data": [{"index": 0, "data": [[0.5]]}]}'}, "sent 1 rows for .* start vLLM with --pooler-config"),
    ({"tag": 151651}, "sent 0 rows for .* 4 of which can end a step"),  # what vLLM takes if nobody tells it otherwise
], ids=["always busy", "malformed JSON", "a text", "no rows", "one row", "another tag"])
def test_a_server_that_does_not_score_is_one_line(address, state, message, monkeypatch):
    for name, value in state.items():
        monkeypatch.setattr(Handler, name, value)
    prm = ServerPRM(address, load_prm, retries=2)
    with pytest.raises(ValueError, match=message) as error:
        prm.score([QUESTION], [STEPS])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix, message", [("?model=other", "#FOLDER says where they are .other: no such folder"),
                                             ("?modle=served", "only .model=NAME is known"),
                                             ("#/nowhere", "#FOLDER says where they are ./nowhere: no such folder"),
                                             ("/wrong", "refused the request .404.: .*Not Found")])
def test_an_address_that_is_wrong(address, suffix, message):
    with pytest.raises(ValueError, match=message):
        ServerPRM(address + suffix, load_prm, retries=0)


def test_a_server_that_is_not_there_is_soon_an_error():
    with pytest.raises(ValueError, match="http://127.0.0.1:9/v1 did not answer, in 3 tries"):
        load_prm("http://127.0.0.1:9")


def test_the_script_shows_scores_but_cannot_export(address, capsys, tmp_path):
    main(["--prm", address, "--question", QUESTION, "--steps", *STEPS, "--device", "cpu"])
    assert "Answer: 17" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--prm", address, "--export", str(tmp_path / "out"), "--device", "cpu"])
    assert "--export: the weights of a PRM on a server are not here" in capsys.readouterr().err


def test_what_the_caller_says_of_the_format_is_sent(address):
    prm = load_prm(address, separator="\n\n")
    prm.score([QUESTION], [STEPS])
    assert Handler.seen[0]["input"] == [load_prm(TINY / "prm", separator="\n\n").encode(QUESTION, STEPS)[0]]

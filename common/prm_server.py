"""The PRM behind a server: vLLM's POST /pooling with the task "token_classify".

    python prm_model.py --prm runs/prm --export runs/served
    vllm serve runs/served --runner pooling --pooler-config '{"pooling_type": "ALL"}'
    python search.py --strategy beam --prm http://localhost:8000

The address is http://host:port/path?model=NAME#FOLDER, as common/server.py has it. Token ids are
sent, made by the one encoder of training and scoring; from the classes' probabilities that come
back for each token, those at the separators are picked. Request and reply are documented in
https://docs.vllm.ai/en/latest/models/pooling_models.
"""
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from common.models import address_parts
from common.run import expect
from common.server import answered, connect, find_model

TEXTS = 16     # of one request
REQUESTS = 8   # at once


class ServerPRM:
    """What search and evaluation use of a PRM, scored elsewhere.

    load_prm is given: prm_model.py stands above common/ and imports this file. keywords: as there.
    """

    def __init__(self, address, load_prm, retries=5, **keywords):
        url, _, _ = address_parts(address)
        self.url = url.rstrip("/").removesuffix("/v1")  # /pooling stands beside /v1
        self.client = connect(self.url, retries)
        listing = connect(f"{self.url}/v1", retries)
        self.served, folder = find_model(address, listing, f"{self.url}/v1")
        try:
            # shapes without weights: all that is used of it is its encoder
            self.encoder = load_prm(folder, "meta", **keywords)
        except ValueError as error:
            raise ValueError(f"{self.url}: config.json and tokenizer of its PRM are needed here; "
                             f"{self.url}#FOLDER says where they are ({error})") from error
        self.format = self.encoder.format
        self.parameters = self.encoder.parameters  # Figure 1 counts them
        self.name = f"prm:{address}"  # under which a node keeps its p_t
        self.pool = ThreadPoolExecutor(REQUESTS)
        self.tokens = 0               # sent so far; vLLM encodes each text anew

    def score(self, questions, solutions):
        """p_t of every step: questions (B) texts, solutions (B) lists of steps -> (B) lists."""
        texts = [self.encoder.encode(*pair) for pair in zip(questions, solutions, strict=True)]
        scores = iter(self._scores([text for text in texts if text[1]]))
        return [next(scores) if positions else [] for _, positions in texts]

    def score_nodes(self, leaves):
        """p_t of every step on the paths to `leaves` that has none yet -> {node: p_t}."""
        paths, wanted = [], {}
        # the deepest first: one text has the scores of all steps before it
        for leaf in sorted(leaves, key=lambda leaf: -leaf.depth):
            path = leaf.path()
            new = [node for node in path if self.name not in node.hidden and node not in wanted]
            if new:
                wanted.update(dict.fromkeys(new))
                paths.append(path)
        texts = [self.encoder.encode(path[0].root().text, [node.text for node in path])
                 for path in paths]
        for path, scores in zip(paths, self._scores(texts)):
            for node, p in zip(path, scores):
                if node in wanted:
                    wanted[node] = node.hidden[self.name] = p
        return wanted

    def _scores(self, texts):
        """texts: [(token ids, positions of the steps)] -> a list of p_t for each."""
        parts = [texts[i:i + TEXTS] for i in range(0, len(texts), TEXTS)]
        self.tokens += sum(len(ids) for ids, _ in texts)
        return list(chain.from_iterable(self.pool.map(self._ask, parts)))

    def _ask(self, texts):
        """One request."""
        body = {"model": self.served, "task": "token_classify", "input": [ids for ids, _ in texts],
                "encoding_format": "float", "use_activation": True}  # probabilities, not logits
        reply = answered(self.client,
                         lambda: self.client.post("/pooling", body=body, cast_to=object))
        try:
            rows = {item["index"]: item["data"] for item in reply["data"]}
            return [self._pick(rows[i], *text) for i, text in enumerate(texts)]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{self.url}/pooling sent no classes of tokens: "
                             f"{str(reply)[:200]!r}") from error

    def _pick(self, rows, ids, positions):
        """p_t (steps) from rows (tokens, labels) of probabilities, whose last label is "correct".

        A server that pools by "STEP" sends the rows of one token only, its step_tag_id.
        """
        where = range(len(ids))
        if len(rows) != len(ids):
            where = [i for i in where if ids[i] == ids[positions[0]]]
        expect(len(rows) == len(where),
               f"{self.url} sent {len(rows)} rows for {len(ids)} tokens, {len(where)} of which can "
               "end a step: start vLLM with --pooler-config '{\"pooling_type\": \"ALL\"}'")
        expect(all(len(row) <= 2 and 0 <= row[-1] <= 1 for row in rows),
               f"{self.url} sent no probabilities of one or two labels: {rows[:1]}")
        p_of = dict(zip(where, rows))
        return [p_of[position][-1] for position in positions]

"""The process reward model (§2.2, B.1): a decoder whose LM head is replaced by a scalar head.

For a problem Q and steps x_1 .. x_T it says p_t = PRM(Q, x_1, .., x_t), the probability that step
x_t is correct (Eq. 1). Each step is followed by a separator, and p_t is read off the hidden state
at the separator's last token, so one forward scores all steps of a solution.

    python prm_model.py --prm tiny/prm --question "Ann has 7 shells. In January she finds 5. In \\
February she doubles them. In March she loses 9. In April she finds 6. In May she buys 8. How \\
many now?" --steps "January: 7+5=12" "February: 12*2=24" "March: 24-9=25"
    python prm_model.py --prm tiny/prm --file samples.jsonl    # sample rows or stepwise rows

--prm takes a folder that train.py wrote, a published PRM (common/formats/published.py lists them),
or a server (common/prm_server.py). Of a plain LM, --fresh-head shows an untrained head.

Shapes: B solutions, T tokens, M steps that get a p_t (in training: labelled ones), h hidden size.
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import math
import os
import shutil
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer

from common.cache import batches, encode_missing
from common.data import read_solutions
from common.formats.published import TEXTS, export, load_published
from common.models import bos, check, dtype_of, load_head, load_pretrained, must_fit
from common.page import Page, solution_tree
from common.prm_server import ServerPRM
from common.results import coloured
from common.run import TINY, command_line, distributed


class PRM(nn.Module):
    """Backbone and head. `format` is what must travel with the weights: separator, template, ..."""

    def __init__(self, backbone, tokenizer, separator="\n\n", template="plain", system=None,
                 dropout=0.0, base_model=None, max_batch_tokens=65536, name="prm"):
        super().__init__()
        h = backbone.config.hidden_size
        self.backbone = backbone
        # B.1: two linear layers and one logit in place of the LM head's vocabulary
        self.head = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Dropout(dropout), nn.Linear(h, 1))
        self.head.to(backbone.device, backbone.dtype)
        self.tokenizer = tokenizer
        self.name = name                          # under which the tree cache keeps its states
        self.max_batch_tokens = max_batch_tokens  # padded tokens of one forward that scores
        self.context = getattr(backbone.config, "max_position_embeddings", None)
        self.tokens = 0                           # encoded by score() and score_nodes() so far
        self.format = {"separator": separator, "template": template, "system": system,
                       "dropout": dropout, "base_model": base_model}
        self.separator_ids = self._ids(separator)
        # a published PRM's own text; None: ours
        self.text = TEXTS[template](tokenizer, separator) if template in TEXTS else None
        # A mark such as <extra_0> must be one token; line ends may take several.
        too_long = separator.strip() and len(self.separator_ids) > 1
        if too_long or tokenizer.decode(self.separator_ids) != separator or not separator:
            raise ValueError(f"{base_model or name}: the tokenizer has no token for the separator "
                             f"{separator!r}")

    def forward(self, ids_BT, rows_M, positions_M):  # README, step 5
        """Logits (M), of p = sigmoid(logit), of the steps that end at (rows_M, positions_M).

        ids_BT is padded on the right. Attention is causal, so that padding needs no mask.
        """
        hidden_BTh = self.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_Mh = hidden_BTh[rows_M, positions_M]  # the head runs on M positions, not on B x T
        return self.head(hidden_Mh).squeeze(-1).float()

    # -------- the one encoder, of training and of scoring

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_prompt(self, question):
        """Token ids of everything before the first step."""
        if self.text:
            return self.text.prompt(question)
        if self.format["template"] == "plain":
            end = "\n" if self.format["separator"] == "\n" else "\n\n"
            return bos(self.tokenizer) + self._ids(question) + self._ids(end)
        messages = [{"role": "user", "content": question}]
        if self.format["system"]:
            messages.insert(0, {"role": "system", "content": self.format["system"]})
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                       tokenize=True, return_dict=False))

    def encode_step(self, step, first=False):
        """Token ids of a step, then of the separator, whose last token carries the label. A step is
        tokenised by itself: no token may cross its end, or scores would depend on what follows."""
        if self.text:
            return self.text.step(step, first)
        return self._ids(step) + self.separator_ids

    def encode(self, question, steps):
        """(ids, positions): all tokens of a solution, and where each step's separator ends."""
        ids = self.encode_prompt(question)
        positions = []
        for step in steps:
            ids = ids + self.encode_step(step, first=not positions)
            positions.append(len(ids) - 1)
        return ids, positions

    # -------- scoring

    @torch.inference_mode()
    def score(self, questions, solutions):
        """p_t of every step: questions (B) texts, solutions (B) lists of steps -> (B) lists of p_t.

        Each solution is encoded once; a batch holds solutions of similar length.
        """
        device = self.backbone.device
        items = []
        for i, (question, steps) in enumerate(zip(questions, solutions, strict=True)):
            items.append((i, *self.encode(question, steps)))
            must_fit(min(items[-1][2], default=0), self.context, question)
        scores = [[] for _ in items]
        scored = [item for item in items if item[2]]  # those that have a step
        for batch in batches(scored, lambda item: len(item[1]), self.max_batch_tokens, device):
            ids_BT = pad_sequence([torch.tensor(ids) for _, ids, _ in batch], batch_first=True)
            counts = torch.tensor([len(positions) for _, _, positions in batch])
            rows_M = torch.arange(len(batch)).repeat_interleave(counts)
            positions_M = torch.cat([torch.tensor(positions) for _, _, positions in batch])
            logits_M = self(ids_BT.to(device), rows_M.to(device), positions_M.to(device))
            split = logits_M.sigmoid().cpu().split(counts.tolist())  # one transfer a batch
            for (i, ids, _), p in zip(batch, split):
                scores[i] = p.tolist()  # batches are by length: back to the caller's order
                self.tokens += len(ids)
        return scores

    @torch.inference_mode()
    def score_nodes(self, leaves):
        """p_t of every step on the paths to `leaves` that has none yet -> {node: p_t}.

        By the tree cache (common/cache.py) each token of each prefix is encoded once.
        """
        def ids_of(node):
            if node.parent is None:
                return self.encode_prompt(node.text)
            return self.encode_step(node.text, first=node.parent.parent is None)
        count, hidden = encode_missing(self.backbone, self.name, leaves, ids_of,
                                       self.max_batch_tokens)
        self.tokens += count
        nodes = [node for node in hidden if node.parent]  # the prompt has no score
        if not nodes:
            return {}
        logits_M = self.head(torch.stack([hidden[node] for node in nodes])).squeeze(-1).float()
        return dict(zip(nodes, logits_M.sigmoid().tolist()))

    def save(self, folder, state=None):
        """Write backbone, head, tokenizer and config.json. The folder appears whole or not at all.

        state: what to write in place of state_dict(), when weights are gathered from shards.
        """
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        old = folder.with_name(folder.name + ".old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        parts = {"backbone": {}, "head": {}}  # the backbone stays a folder that others can load
        for key, weight in (state or self.state_dict()).items():
            part, _, name = key.partition(".")
            parts[part][name] = weight.contiguous()
        self.backbone.config.prm = self.format  # by which load_prm() knows its own
        self.backbone.save_pretrained(partial, state_dict=parts["backbone"])
        self.tokenizer.save_pretrained(partial)
        save_file(parts["head"], partial / HEAD_FILE)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)  # a kill leaves the old one, none, or the new one: no mixture
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------ one number for a solution

# Appendix C has PRM-Last and PRM-Min. The default is the product: the probability that all steps
# are right, if their errors are independent. Unlike the sum it does not reward longer solutions.
AGGREGATIONS = {"last": lambda p: p[-1], "min": min, "prod": math.prod,
                "mean": lambda p: sum(p) / len(p), "sum": sum}


def aggregate(scores, how):
    """R_i of a solution from its p_t. 0 without steps."""
    return AGGREGATIONS[how](scores) if scores else 0.0


# ------------------------------------------------------------ loading: ours, then others'

HEAD_FILE = "prm_head.safetensors"


def load_prm(path, device="cpu", dtype=None, seed=0, fresh=False, **keywords):
    """A PRM from a folder, hub id or server. A ValueError says what is missing, or how to get it.

    fresh: an LM that is no PRM gets an untrained head. device "meta": shapes only, which FSDP
    fills. keywords (separator, template, dropout, ...) override what the folder says.
    """
    path = str(path)
    if path.startswith(("http://", "https://")):
        return ServerPRM(path, load_prm, **keywords)
    dtype = dtype_of(dtype, device)
    config = load_pretrained(AutoConfig, path)
    form = getattr(config, "prm", None) or {}
    meta = str(device) == "meta"
    if form and not meta and config.architectures != ["Qwen2ForProcessRewardModel"]:
        backbone, head = load_pretrained(AutoModel, path, dtype=dtype), HEAD_FILE
    else:
        backbone, head, theirs = load_published(path, config, dtype, fresh or bool(form),
                                                keywords.get("template"), meta)
        form = form or theirs
    backbone.to(device)
    if not meta:
        check(backbone, path)  # the tree cache computes what this model does, or a ValueError
    torch.manual_seed(seed)  # an untrained head must be the same on every rank
    prm = PRM(backbone, load_pretrained(AutoTokenizer, path), name=f"prm:{path}",
              **{"base_model": path} | form | keywords)
    if head:
        load_head(prm.head, path, head)
    return prm.eval()


# ------------------------------------------------------------ the script: Figures 6 and 8

def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--prm", default=str(TINY / "prm"), help="folder, hub id, or http://host:port of a server")
    a("--question")
    a("--steps", nargs="+", help="the solution, one argument a step")
    a("--file", help="JSONL of sample rows or stepwise rows (see common/data.py)")
    a("--fresh-head", action="store_true", help="an untrained head on a plain LM")
    a("--limit", type=int, default=3, help="rows of --file to show (3)")
    a("--html", metavar="FILE", help="the same as a page")
    a("--export", metavar="FOLDER", help="write it as vLLM serves it: Qwen2ForProcessRewardModel")
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if not (args.file or args.export or args.question and args.question.strip() and args.steps):
        parser.error("give --question and --steps, --file, or --export")
    with parser:
        rank, _, device = distributed(args.device)
        if rank > 0:
            return  # a few solutions need no second one
        page = Page(args.html)
        prm = load_prm(args.prm, device, args.dtype, fresh=args.fresh_head)
        if args.export:
            return export(prm, args.export)
        pairs = [(args.question, args.steps)]
        if args.file:
            pairs = list(islice(read_solutions(args.file), args.limit))
        if not pairs:
            raise ValueError(f"{args.file}: no solutions")
        for (question, steps), scores in zip(pairs, prm.score(*zip(*pairs))):
            page.add(solution_tree, args.prm, question, steps, scores)
            print(f"\n{question}")
            for step, p in zip(steps, scores):
                print(coloured(step, p))
            print("  ".join(f"{how} {aggregate(scores, how):.3f}" for how in AGGREGATIONS))


if __name__ == "__main__":
    main()

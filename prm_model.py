"""The process reward model (§2.2, Appendix B.1): a decoder with its LM head replaced by a two-layer scalar head.

Given a problem Q and steps x_1 .. x_T it says p_t = PRM(Q, x_1, .., x_t), the probability that step x_t is correct
(Eq. 1). Each step is followed by a separator, and p_t is read off the hidden state at the separator's last token, so
one forward scores all steps of a solution. There is one encoder, used by training and by scoring alike.

    python prm_model.py --prm tiny/prm --question "Ann has 7 shells. In January she finds 5. How many now?" \\
        --steps "January: 7+5=11" "Answer: 11"
    python prm_model.py --prm tiny/prm --file samples.jsonl        # sample rows or stepwise rows

--prm takes a folder that train.py wrote, a published Qwen/Qwen2.5-Math-PRM-7B or -72B (their two output classes are
folded into one logit, exactly), or any plain backbone, whose head is then untrained (and a warning says so).

Shapes: B solutions, T tokens, M labelled steps, h hidden size.
"""
import math
import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen2Model, Qwen2PreTrainedModel
from transformers.utils import cached_file

from common.cache import chunks, extend
from common.data import read_rows
from common.policy import dtype_of, load_pretrained
from common.results import coloured
from common.run import command_line, distributed

HEAD_FILE = "prm_head.safetensors"
# What the model card of Qwen/Qwen2.5-Math-PRM-7B asks for: its system prompt, and <extra_0> after every step.
PUBLISHED = {"separator": "<extra_0>", "template": "chat",
             "system": "Please reason step by step, and put your final answer within \\boxed{}."}


class PRM(nn.Module):
    """Backbone and head. `format` holds what must travel with the weights: separator, template, dropout, base model."""

    def __init__(self, backbone, tokenizer, separator="\n\n", template="plain", system=None, dropout=0.0,
                 base_model=None, max_batch_tokens=65536, name="prm"):
        super().__init__()
        if not hasattr(backbone, "layers"):
            raise ValueError(f"{base_model or name}: a {type(backbone).__name__} is not laid out like Llama and Qwen")
        h = backbone.config.hidden_size
        self.backbone, self.tokenizer, self.name, self.max_batch_tokens = backbone, tokenizer, name, max_batch_tokens
        self.head = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Dropout(dropout), nn.Linear(h, 1))
        self.head.to(backbone.device, backbone.dtype)
        self.format = {"separator": separator, "template": template, "system": system, "dropout": dropout,
                       "base_model": base_model}
        self.separator_ids = self._ids(separator)
        # A mark such as <extra_0> must be one token; line ends may take several.
        if not self.separator_ids or (separator.strip() and len(self.separator_ids) > 1) or \
                tokenizer.decode(self.separator_ids) != separator:
            raise ValueError(f"{base_model or name}: the tokenizer has no token for the separator {separator!r}")
        self.tokens = 0  # encoded by score() and score_nodes(), all told
        # What follows attention in the last layer serves its own position only: forward() has it for M, not B x T
        self.wanted = None  # ((B, T), rows (M), positions (M))
        for part in (backbone.layers[-1].self_attn.o_proj, backbone.layers[-1].mlp):
            part.register_forward_pre_hook(self._gather)
            part.register_forward_hook(self._scatter)

    def _gather(self, part, inputs):
        return (inputs[0][self.wanted[1:]][None],) if self.wanted else None  # (1, M, h): also where a batch is expected

    def _scatter(self, part, inputs, output):
        if self.wanted:
            whole = output.new_zeros(*self.wanted[0], output.shape[-1])
            return whole.index_put(self.wanted[1:], output[0])

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    # ------------------------------------------------ the one encoder

    def encode_prompt(self, question):
        """Token ids of everything before the first step."""
        if self.format["template"] == "plain":
            return self._ids(question) + self._ids("\n" if self.format["separator"] == "\n" else "\n\n")
        messages = [{"role": "system", "content": self.format["system"]}] if self.format["system"] else []
        return list(self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": question}], add_generation_prompt=True, tokenize=True,
            return_dict=False))

    def encode_step(self, step):
        """Token ids of one step: tokenised by itself, then the separator, whose last token carries the label."""
        return self._ids(step) + self.separator_ids

    def encode(self, question, steps):
        """(ids, positions): all tokens of a solution, and for each step the index of its separator's last token."""
        ids, positions = self.encode_prompt(question), []
        for step in steps:
            ids = ids + self.encode_step(step)
            positions.append(len(ids) - 1)
        return ids, positions

    def label_text(self, ids, positions, labels):
        """What is trained on, for the eye: the text of each token, behind a labelled one its label and a line end."""
        carried = dict(zip(positions.tolist(), labels.tolist()))
        texts = [repr(x)[1:-1] for x in self.tokenizer.batch_decode([[i] for i in ids.tolist()])]
        return " ".join(x + (f" <{carried[i]:g}>\n" if i in carried else "") for i, x in enumerate(texts))

    # ------------------------------------------------ forward and scoring

    def forward(self, ids_BT, rows_M, positions_M):
        """Logits (M) of the steps at (rows_M, positions_M). ids_BT is padded on the right, and attention is causal,
        so padding needs no mask; the head and the last layer's MLP run on the M labelled positions only."""
        # Checkpointing runs the layer again when `wanted` is gone; torch.compile would compile again for each M
        if not self.backbone.is_activation_checkpointing and self.backbone._compiled_call_impl is None:
            self.wanted = ids_BT.shape, rows_M, positions_M
        hidden = self.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
        self.wanted = None
        return self.head(hidden[rows_M, positions_M]).squeeze(-1).float()

    @torch.inference_mode()
    def score(self, questions, solutions):
        """p_t of every step: questions (B) strings, solutions (B) lists of steps -> (B) lists of floats in [0, 1].

        Batches hold solutions of similar length; each is encoded once, in one forward for all its steps.
        """
        items = [(i, *self.encode(q, s)) for i, (q, s) in enumerate(zip(questions, solutions, strict=True))]
        scores = [[] for _ in items]
        device = self.backbone.device
        for batch in chunks([x for x in items if x[2]], lambda x: len(x[1]), self.max_batch_tokens, device):
            ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens) for _, tokens, _ in batch], batch_first=True)
            rows = torch.tensor([row for row, x in enumerate(batch) for _ in x[2]])
            positions = torch.tensor([p for x in batch for p in x[2]])
            p = iter(self(*(x.to(device) for x in (ids, rows, positions))).sigmoid().tolist())
            for i, tokens, where in batch:
                scores[i] = [next(p) for _ in where]
                self.tokens += len(tokens)
        return scores

    @torch.inference_mode()
    def score_nodes(self, leaves):
        """Score every step on the paths to `leaves` that this PRM has not scored -> {node: p_t in [0, 1]}.

        Uses the tree cache of common/policy.py: each token of each prefix is encoded once in the life of the tree.
        """
        spent, states = extend(self.backbone, self.name, leaves, self._node_ids, self.max_batch_tokens)
        self.tokens += spent
        nodes = [n for n in states if n.parent is not None]
        if not nodes:
            return {}
        logits = self.head(torch.stack([states[n] for n in nodes])).squeeze(-1).float()
        return dict(zip(nodes, logits.sigmoid().tolist()))

    def _node_ids(self, node):
        return self.encode_prompt(node.text) if node.parent is None else self.encode_step(node.text)

    # ------------------------------------------------ files

    def save(self, folder, state=None):
        """Write backbone, head, tokenizer and config.json. The folder appears at once or not at all.

        state: what to write instead of state_dict(), as when the weights are gathered from shards or cast.
        """
        state = self.state_dict() if state is None else state
        folder = Path(folder)
        partial, old = (folder.with_name(folder.name + x) for x in (".partial", ".old"))
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
        self.backbone.config.prm = self.format
        self.backbone.save_pretrained(partial, state_dict={k.removeprefix("backbone."): v for k, v in state.items()
                                                           if k.startswith("backbone.")})
        self.tokenizer.save_pretrained(partial)
        save_file({k.removeprefix("head."): v.contiguous() for k, v in state.items() if k.startswith("head.")},
                  partial / HEAD_FILE)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)


AGGREGATIONS = {"last": lambda s: s[-1], "min": min, "prod": math.prod, "mean": lambda s: sum(s) / len(s), "sum": sum}


def aggregate(scores, how):
    """One number for a solution from its step scores (Appendix C): PRM-Last, PRM-Min, and three more."""
    return AGGREGATIONS[how](scores) if scores else 0.0


def load_prm(path, device="cpu", dtype=None, seed=0, fresh=False, **keywords):
    """Load a PRM from a folder or the hub. Errors are ValueErrors that say what is missing or how to get it.

    fresh: a folder without a head is what is wanted, no warning. device "meta": shapes only, for FSDP to fill.
    keywords: separator, template, dropout, max_batch_tokens ... override what the folder says.
    """
    path, dtype = str(path), dtype_of(dtype, device)
    config = load_pretrained(AutoConfig, path)
    tokenizer = load_pretrained(AutoTokenizer, path)
    published = "Qwen2ForProcessRewardModel" in (config.architectures or ())
    own, head = getattr(config, "prm", None) or (PUBLISHED if published else {}), None
    form = {"base_model": path, "separator": getattr(config, "step_separator", "\n\n"), **own, **keywords}
    if str(device) == "meta":
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, dtype=dtype)
    elif published:
        backbone, head = _load_published(path, dtype)
    else:
        backbone = load_pretrained(AutoModel, path, dtype=dtype)
        if own:
            try:
                head = load_file(cached_file(path, HEAD_FILE))
            except OSError as error:
                raise ValueError(f"{path}: {HEAD_FILE} is missing: it is not a whole PRM, save it again") from error
            except SafetensorError as error:
                raise ValueError(f"{path}/{HEAD_FILE}: not a whole safetensors file ({error})") from error
    backbone.to(device)
    torch.manual_seed(seed)  # an untrained head must be the same on every rank
    prm = PRM(backbone, tokenizer, name=f"prm:{path}", **form)
    if head is None and not fresh:
        print(f"warning: {path} has no PRM head: using an untrained one, whose scores mean nothing", file=sys.stderr)
    elif head is not None:
        prm.head.load_state_dict(head)
    return prm.eval()


class Published(Qwen2PreTrainedModel):
    """The layout of https://huggingface.co/Qwen/Qwen2.5-Math-PRM-7B, so that its files can be loaded."""

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.model, self.score = Qwen2Model(config), nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 2))
        self.post_init()


def _load_published(path, dtype):
    """Backbone, and a head of ours with the same p = softmax(z)_1 = sigmoid(z_1 - z_0): the last layer is linear, so
    the difference of its two rows is a head for z_1 - z_0."""
    whole = load_pretrained(Published, path, dtype=dtype)
    w = whole.score.state_dict()
    weight, bias = (w[f"2.{x}"][1:] - w[f"2.{x}"][:1] for x in ("weight", "bias"))
    return whole.model, {"0.weight": w["0.weight"], "0.bias": w["0.bias"], "3.weight": weight, "3.bias": bias}


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--prm", default=str(Path(__file__).parent / "tiny" / "prm"), help="folder or hub id")
    parser.add_argument("--question")
    parser.add_argument("--steps", nargs="+", help="the solution, one argument a step")
    parser.add_argument("--file", help="JSONL of sample rows or stepwise rows (see common/data.py)")
    parser.add_argument("--limit", type=int, default=3, help="rows of --file to show (default 3)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if not args.file and not (args.question and args.question.strip() and args.steps):
        parser.error("give --question and --steps, or --file")
    with parser:
        pairs = list(islice(read_solutions(args.file), args.limit)) if args.file else [(args.question, args.steps)]
        if not pairs:
            raise ValueError(f"{args.file}: no solutions")
        prm = load_prm(args.prm, distributed(args.device)[2], args.dtype)
    for (question, steps), scores in zip(pairs, prm.score(*zip(*pairs))):
        print(f"\n{question}")
        for step, p in zip(steps, scores):
            print(coloured(step, p))
        print("  ".join(f"{how} {aggregate(scores, how):.3f}" for how in AGGREGATIONS))


def read_solutions(file):
    """Yield (question, steps) from a JSONL file of sample rows or stepwise rows."""
    for number, row in read_rows(file):
        try:
            yield from ([(row["prompt"], row["completions"])] if "completions" in row else
                        [(row["question"], s["steps"]) for s in row["samples"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: neither a sample row nor a stepwise row ({error!r})") from error


if __name__ == "__main__":
    main()

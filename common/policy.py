"""The LLM being guided (§2.2, B.3): samples next steps, or whole solutions, for many partial solutions at once.

A solution is a path in a tree: the root holds the prompt, every other node one step. Each node keeps the keys and
values of its own tokens only; a batch is put together by concatenating them along each path. So a prompt is encoded
once however many samples are drawn from it, a prefix shared by two nodes is computed once, and beams that are dropped
or branch again need no copying rules. The PRM (prm_model.py) uses the same cache for its own keys and values.

Any Hugging Face causal LM with Llama-like attention will do (num_key_value_heads in its config, full attention in every
layer): a local folder or a hub id; or a server that speaks OpenAI's /v1/completions with n above 1 (vLLM, SGLang,
`transformers serve`), which shares prefixes by itself.

    policy = load_policy("tiny/A")
    root = policy.root("problem-7", "Ann has 7 shells. In January she finds 5. ...")
    steps = policy.propose([root], 4)[0]      # 4 sampled next steps
    ends = policy.complete(steps, 2)          # 2 whole solutions from each of them

Shapes: B rows, M new tokens, P prefix tokens, L layers, H key-value heads, D head dimension, V vocabulary.
"""
import hashlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.cache import Rows, chunks, extend

# Asked of models with a chat template. Without one the prompt is the question and a separator.
INSTRUCTION = {"math": "Solve step by step, with an empty line between steps. "
                       "Put the final answer in \\boxed{} at the end.",
               "code": "First explain the idea in short steps with an empty line between them, "
                       "then give the whole program in one ```python block.",
               "judge": "Check the steps in order. End with one line, \"First wrong step: N\", or "  # annotate.py
                        "\"First wrong step: none\"."}


@dataclass(eq=False)  # identity, not value: two samples of the same text are two nodes
class Node:
    """One step of a solution, or the prompt (parent None). Everything before it is found by following `parent`."""
    text: str                       # the step without its separator; of the root: the question
    parent: "Node | None" = None
    ids: list = field(default_factory=list)    # the policy's tokens, separator included
    logp: float = 0.0               # log-probability of ids given the path, at temperature 1
    end: str | None = None          # None: goes on. "eos": end-of-text token; "answer": \boxed{}; "length": cut off
    key: int = 0                    # the node's own random stream: hash of (seed, problem id, sample indices)
    drawn: int = 0                  # children sampled so far: the next one has this sample index
    depth: int = 0                  # steps from the root
    domain: str = "math"
    p: float | None = None          # PRM: probability that this step is correct
    scores: list = field(default_factory=list)  # the same for each PRM of several
    kv: dict = field(default_factory=dict)      # model -> (tokens, L, 2, H, D) keys and values of own tokens
    hidden: dict = field(default_factory=dict)  # model -> (hidden size) last hidden state of the last token

    def line(self):
        """This node and all before it, from the root."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]

    def path(self):
        """The same without the root: the steps."""
        return self.line()[1:]

    def steps(self):
        return [n.text for n in self.path() if n.text]

    def root(self):
        return self.line()[0]

    def forget(self):
        """Give keys and values back, of all models: nothing will follow this node."""
        self.kv.clear()
        self.hidden.clear()

    def tokens(self):
        """Generated tokens on the path."""
        return sum(len(n.ids) for n in self.path())


def child_key(key, index):
    """The random stream of a node's index-th sample: 63 bits that depend on nothing but the path of indices."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{index}".encode(), digest_size=8).digest(), "big") >> 1


def next_keys(nodes, n):
    """[(node, keys of its next samples)] for n samples each (one number, or one a node). A node that is asked for
    twice goes on numbering where it was."""
    jobs = []
    for node, count in zip(nodes, [n] * len(nodes) if isinstance(n, int) else n):
        jobs.append((node, [child_key(node.key, node.drawn + i) for i in range(count)]))
        node.drawn += count
    return jobs


def chat_prompt(tokenizer, question, domain, tokenize):
    """The question in the model's chat template, as token ids or as text."""
    return tokenizer.apply_chat_template([{"role": "user", "content": f"{question}\n\n{INSTRUCTION[domain]}"}],
                                         add_generation_prompt=True, tokenize=tokenize, return_dict=False)


# ---------------------------------------------------------------- sampling

def uniform(keys, t):
    """One number in (0, 1) for each key (B) at time t: a counter-based generator, so that a row's randomness depends
    on its key and t alone and not on the batch. SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195), whose
    multiplications wrap around in int64; the right shifts are made logical by masking."""
    def shift(x, n):
        return (x >> n) & ((1 << (64 - n)) - 1)
    z = keys + torch.full_like(keys, t + 1) * -7046029254386353131
    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    z = z ^ shift(z, 31)
    return (shift(z, 11).double() + 0.5) / (1 << 53)


def sample(logits, keys, t, temperature, top_p):
    """logits (B, V) -> tokens (B), their log-probabilities (B) under the untempered model.

    Inverse transform: the first token at which the cumulative probability passes u. Ties and order are the
    vocabulary's, so equal logits and an equal key give an equal token. temperature 0 is greedy.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = (logits if temperature == 1 else logits / temperature).softmax(-1)
        if top_p < 1:  # the smallest set of most probable tokens whose mass reaches top_p
            ordered, order = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        mass = probs.cumsum(-1)
        u = uniform(keys, t).float().clamp(max=1 - 2 ** -24)[:, None] * mass[:, -1:]  # float32 may round it to 1
        tokens = torch.searchsorted(mass, u, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


class Policy:
    """A causal LM that proposes steps. Counters (generated, prefilled) only ever grow."""

    def __init__(self, model, tokenizer, separator="\n\n", seed=0, temperature=1.0, top_p=1.0, max_step_tokens=512,
                 max_steps=40, max_solution_tokens=2048, max_batch_tokens=65536, name="policy"):
        model.set_attn_implementation("sdpa")  # the one that takes our masks
        self.lm, self.model, self.tokenizer = model, model.base_model, tokenizer
        self.separator, self.name = separator, name
        self.seed, self.temperature, self.top_p = seed, temperature, top_p
        self.max_step_tokens, self.max_steps, self.max_solution_tokens = max_step_tokens, max_steps, max_solution_tokens
        self.max_batch_tokens = max_batch_tokens
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = eos if eos is not None else tokenizer.eos_token_id
        self.eos_ids = eos if isinstance(eos, list) else [eos]
        self.eos = torch.tensor(self.eos_ids, device=model.device)
        # Only a token with the separator's last character can complete it: all others need no look at their text.
        strings = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        closing = torch.zeros(max(model.config.vocab_size, len(strings)), dtype=torch.bool)
        closing[[i for i, s in enumerate(strings) if separator[-1] in s]] = True
        self.closing, self.closing_ids = closing.to(model.device), set(closing.nonzero()[:, 0].tolist())
        self.context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        self.generated = self.prefilled = 0

    def root(self, problem_id, question, domain="math"):
        """The prompt of a problem as a node. The seed and the problem's id fix all that is sampled below it."""
        if not question.strip():
            raise ValueError(f"problem {problem_id}: the question is empty")
        return Node(question, ids=self._ids(question, domain), key=child_key(self.seed, problem_id), domain=domain)

    def _ids(self, text, domain=None):
        """Tokens of a step, or of the prompt, which has a domain."""
        if domain and self.tokenizer.chat_template:
            return chat_prompt(self.tokenizer, text, domain, tokenize=True)
        return self.tokenizer(text + self.separator, add_special_tokens=False)["input_ids"]

    def adopt(self, node, text):
        """Existing text as a step below a node. Its tokens count as prefilled, not generated."""
        return Node(text, node, self._ids(text), key=child_key(node.key, f"adopted 0 {text}"), depth=node.depth + 1,
                    domain=node.domain)

    def propose(self, nodes, n):
        """n sampled next steps for each node (n: one number or one a node) -> a list of new nodes for each node."""
        return self._generate(nodes, n, whole=False)

    def complete(self, nodes, n):
        """n sampled continuations to the end for each node -> for each node a list of last nodes, one a solution."""
        return self._generate(nodes, n, whole=True)

    @torch.inference_mode()
    def _generate(self, nodes, n, whole):
        if bad := next((node for node in nodes if node.end), None):
            raise ValueError(f"cannot continue a solution that has ended ({bad.end}): {bad.text!r}")
        self.prefilled += extend(self.model, self.name, nodes, lambda x: x.ids, self.max_batch_tokens)[0]
        groups = next_keys(nodes, n)
        jobs = [(node, key) for node, keys in groups for key in keys]  # one a sample
        limit = min(self.max_solution_tokens, self.max_step_tokens * (self.max_steps if whole else 1))

        def width(job):
            return sum(len(x.ids) for x in job[0].line()) + min(limit, 256)
        made = {}
        for batch in chunks(jobs, width, self.max_batch_tokens):
            for job, (ids, logps, kv) in zip(batch, self._sample_rows(batch, whole, limit)):
                made[job] = self._nodes(job[0], job[1], ids, logps, kv, whole)
        return [[made[node, key] for key in keys] for node, keys in groups]

    def _sample_rows(self, batch, whole, limit):
        """The decoding loop. batch: (node, key) -> for each (token ids, log-probabilities, keys and values)."""
        device, head = self.model.device, self.lm.get_output_embeddings()
        parents = {}  # laid out once each, then repeated
        index = torch.tensor([parents.setdefault(node, len(parents)) for node, _ in batch], device=device)
        rows = Rows(self.model, self.name, [p.line() for p in parents], room=min(limit, 64))
        rows.keep(index)
        logits = head(torch.stack([p.hidden[self.name] for p in parents]))[index]
        keys = torch.tensor([key for _, key in batch], device=device)
        alive = torch.arange(len(batch), device=device)  # the batch item that each row works on
        length = torch.zeros_like(alive)                 # tokens of the rows that have stopped, 0 while they go on
        end = torch.tensor([self._most(node) for node, _ in batch], device=device)
        tokens, logps = [], []                           # one (rows) tensor for each t
        results = [None] * len(batch)
        for t in range(limit):
            token, logp = sample(logits, keys[alive], t, self.temperature, self.top_p)
            tokens.append(token)
            logps.append(logp)
            stop = torch.isin(token, self.eos) | (t == limit - 1) | (rows.position + 1 >= end[alive])
            if not whole:
                maybe = (self.closing[token] & ~stop & (length == 0)).nonzero()[:, 0]
                if len(maybe):
                    texts = self.tokenizer.batch_decode(torch.stack(tokens, 1)[maybe].tolist())
                    stop[maybe] = torch.tensor([step_end(x, self.separator) >= 0 for x in texts], device=device)
            length = torch.where(stop & (length == 0), t + 1, length)
            stopped = length.nonzero()[:, 0]
            # A stopped row costs as much as a live one, and taking it out copies the cache: do so by quarters.
            if 4 * len(stopped) >= len(alive):
                ids, lps = (torch.stack(x, 1)[stopped].tolist() for x in (tokens, logps))
                which = zip(stopped.tolist(), alive[stopped].tolist(), length[stopped].tolist())
                for i, (row, item, n) in enumerate(which):
                    kv = None if whole else rows.new_kv(row, n - 1)  # the last token has not been encoded yet
                    results[item] = ids[i][:n], lps[i][:n], kv
                left = (length == 0).nonzero()[:, 0]
                if len(left) == 0:
                    return results
                rows.keep(left)
                alive, length, token = alive[left], length[left], token[left]
                tokens, logps = [x[left] for x in tokens], [x[left] for x in logps]
            if rows.length == rows.mask.shape[1]:
                rows.grow(min(limit - t, 64))
            logits = head(rows.append(token[:, None])[:, -1])

    def _most(self, node):
        """How many tokens the prompt and a solution below it may have."""
        return min(self.context, len(node.root().ids) + self.max_solution_tokens)

    def _nodes(self, parent, key, ids, logps, kv, whole):
        """The sampled tokens as nodes below parent, one a step; returns the last."""
        self.generated += len(ids)
        ended = ids[-1] in self.eos_ids
        spans = _split(ids, self.tokenizer, self.separator, self.closing_ids) if whole else [(0, len(ids))]
        node = parent
        for i, (a, b) in enumerate(spans):
            text = self.tokenizer.decode(ids[a:b], skip_special_tokens=True).removesuffix(self.separator).strip("\n")
            node = Node(text, node, ids[a:b], sum(logps[a:b]), depth=node.depth + 1, domain=parent.domain,
                        key=key if i == len(spans) - 1 else child_key(key, f"step {i}"))
        over = (whole or node.depth >= self.max_steps or sum(len(n.ids) for n in node.line()) >= self._most(node) or
                step_end(self.tokenizer.decode(ids), self.separator) < 0)
        node.end = "eos" if ended else "answer" if FINAL.search(node.text) else "length" if over else None
        if kv is not None and node.end is None:
            node.kv[self.name] = kv
        return node


# The other way for a solution to be over, beside the end-of-text token: a complete \boxed{...}.
FINAL = re.compile(r"\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}")


def step_end(text, separator):
    """Where the separator is that ends a step: after some text, and not inside an open code fence. -1: nowhere."""
    at = text.find(separator, len(text) - len(text.lstrip()))
    while at >= 0 and text.count("```", 0, at) % 2:
        at = text.find(separator, at + 1)
    return at


def _split(ids, tokenizer, separator, closing):
    """Spans (a, b) of the steps of a whole solution, cut where propose() would have stopped. closing: a set of ids."""
    spans, a = [], 0
    for b in range(1, len(ids) + 1):
        if b == len(ids) or (ids[b - 1] in closing and step_end(tokenizer.decode(ids[a:b]), separator) >= 0):
            spans.append((a, b))
            a = b
    if len(spans) > 1 and not tokenizer.decode(ids[spans[-1][0]:], skip_special_tokens=True).strip():
        (a, _), (_, b) = spans[-2:]  # nothing but the end-of-text token is left: it belongs to the step before
        spans[-2:] = [(a, b)]
    return spans


# ---------------------------------------------------------------- loading

def load_pretrained(kind, path, **keywords):
    """AutoX.from_pretrained with one-line errors, also where weights are missing, which transformers would make up.
    Never runs code from the hub, never unpickles."""
    try:
        if kind in (AutoConfig, AutoTokenizer):
            return kind.from_pretrained(path, trust_remote_code=False, **keywords)
        model, info = kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True,
                                           output_loading_info=True, **keywords)
        if info["missing_keys"]:
            raise ValueError("weights are missing: " + ", ".join(sorted(info["missing_keys"])[:6]))
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(path).is_dir():
            has = ", ".join(sorted(f.name for f in Path(path).iterdir())) or "nothing"
            raise ValueError(f"{path}: cannot load it ({reason}). The folder holds: {has}; needed are config.json, "
                             "model.safetensors and the tokenizer's files") from error
        raise ValueError(f"{path}: no such folder, and the hub gave: {reason}. Offline, pass the path of a local "
                         "folder (made by save_pretrained or `hf download`)") from error


def dtype_of(name, device):
    """A dtype by its name; None is bfloat16 on cuda and float32 elsewhere."""
    return getattr(torch, name or ("bfloat16" if str(device).startswith("cuda") else "float32"))


def load_policy(path, device="cpu", dtype=None, served=None, separator=None, chat_tokenizer=None, **keywords):
    """A Policy from a folder or hub id, or a ServerPolicy from an http:// address (served: its name of the model;
    chat_tokenizer: folder or hub id of the tokenizer whose chat template the question is put into).

    dtype: name; None is bfloat16 on cuda and float32 elsewhere. separator None: what the folder's config says
    ("step_separator", as in the tiny world), else an empty line.
    """
    if str(path).startswith(("http://", "https://")):
        if not served:
            raise ValueError("a server needs --policy-model, the name under which it serves the model")
        from common.server import ServerPolicy  # which is a Policy but for the model: it imports this file
        keywords.pop("max_batch_tokens", None)
        chat = load_pretrained(AutoTokenizer, chat_tokenizer) if chat_tokenizer else None
        return ServerPolicy(path, served, chat, separator=separator or "\n\n", **keywords)
    path = str(path)
    tokenizer = load_pretrained(AutoTokenizer, path)
    model = load_pretrained(AutoModelForCausalLM, path, dtype=dtype_of(dtype, device)).to(device).eval()
    separator = separator or getattr(model.config, "step_separator", None) or "\n\n"
    return Policy(model, tokenizer, separator, name=f"policy:{path}", **keywords)


def add_policy_flags(parser, default=None, without=()):
    """The flags of every script that samples from LLMs; load_policy_flags reads them. No --policy without a default.
    without: flags that a script has no use for; they keep their defaults."""
    def a(flag, **keywords):
        if flag not in without:
            return parser.add_argument(flag, **keywords)
        parser.set_defaults(**{flag[2:].replace("-", "_"): keywords.get("default")})
    if default:
        a("--policy", default=default, help="folder, hub id, or http://host:port/v1 of a server")
    a("--policy-model", help="the server's name of the model")
    a("--chat-tokenizer", help="of a chat model behind a server: folder or hub id, for its chat template")
    a("--separator", help="text between steps (default: what the folder says, else an empty line)")
    a("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    a("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this mass (1: all)")
    a("--max-step-tokens", type=int, default=512, help="tokens of a step; a longer one ends the solution (512)")
    a("--max-steps", type=int, default=40, help="steps of a solution (40)")
    a("--max-solution-tokens", type=int, default=2048, help="tokens of a solution, without the prompt (2048)")
    a("--max-batch-tokens", type=int, default=65536,
      help="padded tokens of a batch, counting 256 new ones a row: lower it to save memory (65536)")


def load_policy_flags(args, device, path=None, **keywords):
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must not be negative, and --top-p is above 0 and at most 1")
    if min(args.max_step_tokens, args.max_steps, args.max_solution_tokens, args.max_batch_tokens) < 1:
        raise ValueError("--max-step-tokens, --max-steps, --max-solution-tokens, --max-batch-tokens: 1 or more")
    names = ("seed", "temperature", "top_p", "max_step_tokens", "max_steps", "max_solution_tokens", "max_batch_tokens",
             "chat_tokenizer")
    options = {**{name: getattr(args, name) for name in names}, **keywords}
    separator = args.separator and args.separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return load_policy(path or args.policy, device, args.dtype, args.policy_model, separator, **options)

"""The LLM that is guided (§2.2, B.3): it samples next steps, or whole solutions, for many partial
solutions at once.

    policy = load_policy("tiny/A")
    root = policy.root("problem-7", "Ann has 7 shells. In January she finds 5. ...")
    steps = policy.propose([root], 4)[0]      # 4 sampled next steps
    ends = policy.complete(steps, 2)          # 2 whole solutions from each of them

A solution is a path in a tree of nodes (node.py) whose keys and values are cached (cache.py). Any
Hugging Face causal LM with Llama-like full attention will do, from a folder or the hub; or a server
that speaks OpenAI's /v1/completions (server.py).

Shapes: B rows, V vocabulary, h hidden size.
"""
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cache import PathBatch, batches, encode_missing
from common.models import bos, check, dtype_of, is_address, load_pretrained, must_fit, own_logits
from common.node import Node, child_key, next_keys
from common.run import amount, bounded, expect, natural
from common.thinking import split_thought, thought_length, thought_of

# Asked of models with a chat template. Without one the prompt is the question and a separator.
INSTRUCTION = {
    "math": "Solve step by step, with an empty line between steps. "
            "Put the final answer in \\boxed{} at the end.",
    "code": "First explain the idea in short steps with an empty line between them, "
            "then give the whole program in one ```python block.",
    "judge": "Check the steps in order. End with one line, \"First wrong step: N\", or "
             "\"First wrong step: none\"."}  # annotate.py --judge


def chat_prompt(tokenizer, question, domain, tokenize, thinking=False):
    """The question in the model's chat template, as token ids or as text. Templates that do not
    know enable_thinking ignore it."""
    messages = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION[domain]}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize,
                                         return_dict=False, enable_thinking=thinking)


# ------------------------------------------------------------ sampling

def uniform(keys, t):
    """A number in (0, 1) for each key (B) at time t, by a counter-based generator: a row's random
    numbers depend on its key and t alone. SplitMix64 (Steele et al. 2014, doi
    10.1145/2660193.2660195); its products wrap around in int64, as they should."""
    def shift(x, n):
        return (x >> n) & ((1 << (64 - n)) - 1)  # the mask makes a right shift logical
    z = keys + torch.full_like(keys, t + 1) * -7046029254386353131
    z = (z ^ shift(z, 30)) * -4658895280553007687
    z = (z ^ shift(z, 27)) * -7723592293110705685
    z = z ^ shift(z, 31)
    return (shift(z, 11).double() + 0.5) / (1 << 53)


def sample(logits, keys, t, temperature, top_p):
    """logits (B, V) -> tokens (B), and their log-probabilities (B) under the untempered model.

    Inverse transform: the first token at which the cumulative probability passes u. Its order is
    the vocabulary's, so equal logits and an equal key give an equal token. temperature 0: greedy.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = (logits if temperature == 1 else logits / temperature).softmax(-1)
        if top_p < 1:
            probs = nucleus(probs, top_p)
        mass = probs.cumsum(-1)
        # float32 may round u to 1, and then no token passes it
        u = uniform(keys, t).float().clamp(max=1 - 2 ** -24)[:, None] * mass[:, -1:]
        tokens = torch.searchsorted(mass, u, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def nucleus(probs, top_p):
    """probs (B, V) with 0 outside the smallest set of most probable tokens whose mass is top_p."""
    ordered, order = probs.topk(min(1024, probs.shape[-1]))
    if (ordered.sum(-1) < top_p).any():  # rare; sorting a large vocabulary is slow
        ordered, order = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


# ------------------------------------------------------------ where a step and a solution end

# A complete \boxed{...} ends a solution, as the end-of-text token does.
FINAL = re.compile(r"\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}")


def step_end(text, separator):
    """Where the separator is that ends a step: behind some text, and not inside an open code fence.
    -1: nowhere."""
    at = text.find(separator, len(text) - len(text.lstrip()))
    while at >= 0 and text.count("```", 0, at) % 2:
        at = text.find(separator, at + 1)
    return at


def split_steps(ids, tokenizer, separator, closing, opening=""):
    """Spans (a, b) of the steps in a whole solution's ids, cut where propose() would have stopped.
    closing: the set of ids that can complete a separator. A thought belongs to the first step."""
    spans = []
    a = thought_length(ids, tokenizer, opening)
    if a == len(ids):
        return [(0, a)]  # no step yet
    for b in range(a + 1, len(ids) + 1):
        may_end = ids[b - 1] in closing
        if b == len(ids) or may_end and step_end(tokenizer.decode(ids[a:b]), separator) >= 0:
            spans.append((a, b))
            a = b
    last = tokenizer.decode(ids[spans[-1][0]:], skip_special_tokens=True)
    if len(spans) > 1 and not last.strip():
        # nothing but the end-of-text token is left: it belongs to the step before
        spans[-2:] = [(spans[-2][0], spans[-1][1])]
    return [(0, spans[0][1]), *spans[1:]]


# ------------------------------------------------------------ the policy

class Policy:
    """A causal LM that proposes steps. Its counters of tokens (generated, prefilled) only grow."""

    def __init__(self, model, tokenizer, separator="\n\n", max_batch_tokens=None, name="policy",
                 **settings):
        self.configure(tokenizer, separator, **settings)
        model.set_attn_implementation("sdpa")  # the one that takes our masks
        self.lm = model
        self.model = model.base_model
        self.name = name
        self.max_batch_tokens = max_batch_tokens or decoded_at_once(model)
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = eos if isinstance(eos, list) else [eos]
        self.eos = torch.tensor(self.eos_ids, device=model.device)
        # Only a token with the separator's last character can complete it. All others need no look
        # at their text, which is most of what would keep a GPU waiting.
        strings = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        closing = torch.zeros(max(model.config.vocab_size, len(strings)), dtype=torch.bool)
        closing[[i for i, string in enumerate(strings) if separator[-1] in string]] = True
        self.closing = closing.to(model.device)
        self.closing_ids = set(closing.nonzero()[:, 0].tolist())
        self.context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize

    def configure(self, tokenizer, separator, seed=0, temperature=1.0, top_p=1.0,
                  max_step_tokens=sys.maxsize, max_steps=40, max_solution_tokens=2048,
                  thinking=False):
        """What does not depend on where the model is: also of a ServerPolicy."""
        self.tokenizer = tokenizer
        self.separator = separator
        self.thinking = thinking
        self.opening, self.no_thought = thought_of(tokenizer, thinking)
        self.seed = seed
        self.temperature = temperature
        self.top_p = top_p
        self.max_step_tokens = max_step_tokens
        self.max_steps = max_steps
        self.max_solution_tokens = max_solution_tokens
        self.generated = 0
        self.prefilled = 0

    def root(self, problem_id, question, domain="math"):
        """A problem's prompt as a node. The seed and the id fix all that is sampled below it."""
        expect(question.strip(), f"problem {problem_id}: the question is empty")
        key = child_key(self.seed, problem_id)
        ids = self._ids(question, domain)
        must_fit(len(ids), self.context, question)
        return Node(question, ids=ids, key=key, domain=domain)

    def _ids(self, text, domain=None):
        """Tokens of a step, or of the prompt, which has a domain."""
        if domain and self.tokenizer.chat_template:
            return chat_prompt(self.tokenizer, text, domain, True, self.thinking)
        ids = self.tokenizer(text + self.separator, add_special_tokens=False)["input_ids"]
        return bos(self.tokenizer) + ids if domain else ids

    def adopt(self, node, text):
        """Existing text as a step below a node. Its tokens count as prefilled, not as generated."""
        thought = "" if node.parent else self.no_thought
        return Node(text, node, self._ids(thought + text), depth=node.depth + 1, thought=thought,
                    key=child_key(node.key, f"adopted 0 {text}"), domain=node.domain)

    def propose(self, nodes, n):
        """n next steps below each node (n: a number, or one a node) -> for each a list of nodes."""
        return self._generate(nodes, n, whole=False)

    def complete(self, nodes, n):
        """n continuations of each node to the end -> for each a list of last nodes."""
        return self._generate(nodes, n, whole=True)

    @torch.inference_mode()
    def _generate(self, nodes, n, whole):
        for node in nodes:
            expect(not node.end, f"a solution that has ended ({node.end}) cannot go on: "
                   f"{node.text!r}")
        tokens, _ = encode_missing(self.model, self.name, nodes, lambda node: node.ids,
                                   self.max_batch_tokens)
        self.prefilled += tokens
        groups = next_keys(nodes, n)
        jobs = []  # (node, key), one a sample
        for node, keys in groups:
            jobs += [(node, key) for key in keys]

        def width(job):
            return sum(len(n.ids) for n in job[0].line()) + min(self._limit(job[0], whole), 256)
        children = {}
        for batch in batches(jobs, width, self.max_batch_tokens):
            samples = self._sample_rows(batch, whole)
            for (node, key), (ids, logps, kv) in zip(batch, samples):
                children[node, key] = self._nodes(node, key, ids, logps, kv, whole)
        found = []
        for node, keys in groups:
            found.append([children[node, key] for key in keys])
        return found

    def _limit(self, node, whole):
        """Tokens that are sampled below a node in one go. A thought may be longer than a step."""
        thinks = node.parent is None and (self.thinking or self.opening)
        step = self.max_solution_tokens if thinks else self.max_step_tokens
        return min(self.max_solution_tokens, step * (self.max_steps if whole else 1))

    def _sample_rows(self, batch, whole):
        """The decoding loop: (node, key) -> (ids, log-probabilities, keys and values) for each."""
        device = self.model.device
        limits = [self._limit(node, whole) for node, _ in batch]
        limit = max(limits)
        parents = {}  # each is laid out once, then repeated
        index = [parents.setdefault(node, len(parents)) for node, _ in batch]
        index = torch.tensor(index, device=device)
        rows = PathBatch(self.model, self.name, [p.line() for p in parents], room=min(limit, 64))
        rows.keep(index)
        hidden = torch.stack([p.hidden[self.name] for p in parents])
        logits = own_logits(self.lm, hidden)[index]
        keys = torch.tensor([key for _, key in batch], device=device)
        alive = torch.arange(len(batch), device=device)  # the batch item that each row works on
        length = torch.zeros_like(alive)  # tokens of the rows that have stopped, 0 of the others
        most = torch.tensor([self._most(node) for node, _ in batch], device=device)
        most = most.minimum(rows.position + torch.tensor(limits, device=device))
        tokens, logps = [], []            # a tensor (rows) for each t
        results = [None] * len(batch)
        for t in range(limit):
            token, logp = sample(logits, keys[alive], t, self.temperature, self.top_p)
            tokens.append(token)
            logps.append(logp)
            full = rows.position + 1 >= most[alive]
            stop = torch.isin(token, self.eos) | full
            if not whole:
                self._stop_at_separators(stop, length, token, tokens, batch, alive)
            length = torch.where(stop & (length == 0), t + 1, length)
            stopped = length.nonzero()[:, 0]
            # A stopped row costs as much as a live one, but taking it out copies the cache: wait
            # until a quarter has stopped.
            if 4 * len(stopped) >= len(alive):
                ids = torch.stack(tokens, 1)[stopped].tolist()
                values = torch.stack(logps, 1)[stopped].tolist()
                places = zip(stopped.tolist(), alive[stopped].tolist(), length[stopped].tolist())
                for i, (row, item, n) in enumerate(places):
                    # the last token has not been encoded; nothing follows a whole solution
                    kv = None if whole else rows.new_kv(row, n - 1)
                    results[item] = ids[i][:n], values[i][:n], kv
                left = (length == 0).nonzero()[:, 0]
                if len(left) == 0:
                    return results
                rows.keep(left)
                alive, length, token = alive[left], length[left], token[left]
                tokens = [column[left] for column in tokens]
                logps = [column[left] for column in logps]
            if rows.length == rows.mask.shape[1]:
                rows.grow(min(limit - t, 64))
            logits = own_logits(self.lm, rows.append(token[:, None])[:, -1])

    def _opening(self, parent):
        """What the prompt has written of the thought of a step below this node."""
        return "" if parent.parent else self.opening

    def _stop_at_separators(self, stop, length, token, tokens, batch, alive):
        """Set stop (rows) where the tokens so far end in a separator."""
        candidates = (self.closing[token] & ~stop & (length == 0)).nonzero()[:, 0]
        if len(candidates):
            texts = self.tokenizer.batch_decode(torch.stack(tokens, 1)[candidates].tolist())
            pairs = zip(texts, alive[candidates].tolist())
            steps = [split_thought(text, self._opening(batch[i][0]))[1] for text, i in pairs]
            ended = [step_end(step, self.separator) >= 0 for step in steps]
            stop[candidates] = torch.tensor(ended, device=stop.device)

    def _most(self, node):
        """How many tokens the prompt and a solution below it may have."""
        return min(self.context, len(node.root().ids) + self.max_solution_tokens)

    def _nodes(self, parent, key, ids, logps, kv, whole):
        """The sampled tokens as nodes below parent, one a step; returns the last."""
        self.generated += len(ids)
        spans = [(0, len(ids))]
        opening = self._opening(parent)
        if whole:
            spans = split_steps(ids, self.tokenizer, self.separator, self.closing_ids, opening)
        node = parent
        for i, (a, b) in enumerate(spans):
            text = self.tokenizer.decode(ids[a:b], skip_special_tokens=True)
            thought, text = ("", text) if i else split_thought(text, opening)
            text = text.removesuffix(self.separator).strip("\n")
            own_key = key if i == len(spans) - 1 else child_key(key, f"step {i}")
            node = Node(text, node, ids[a:b], sum(logps[a:b]), key=own_key, depth=node.depth + 1,
                        domain=parent.domain, thought=thought)
        tokens = sum(len(n.ids) for n in node.line())
        cut = whole or node.depth >= self.max_steps or tokens >= self._most(node)
        if ids[-1] in self.eos_ids:
            node.end = "eos"
        elif FINAL.search(node.text):
            node.end = "answer"
        elif cut or step_end(split_thought(self.tokenizer.decode(ids), opening)[1],
                             self.separator) < 0:
            node.end = "length"
        if kv is not None and node.end is None:
            node.kv[self.name] = kv
        return node


def decoded_at_once(model):
    """Padded tokens of a batch that decodes, counting 256 new ones a row: on a GPU what fits into a
    quarter of its memory, whatever else it holds, so that equal GPUs have equal batches."""
    if model.device.type != "cuda":
        return 65536
    config = model.config.get_text_config()
    size = model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # keys and values exist twice while rows are dropped, and a row that is counted with 256 new
    # tokens may come to 1,024; a row has five copies of its logits
    kv_bytes = 4 * 2 * 2 * config.num_hidden_layers * heads * width * size
    logit_bytes = 5 * 4 * config.vocab_size / 256
    memory = torch.cuda.get_device_properties(model.device).total_memory
    return int(memory / 4 / (kv_bytes + logit_bytes))


# ------------------------------------------------------------ loading

def load_policy(path, device="cpu", dtype=None, separator=None, **keywords):
    """A Policy from a folder or hub id, or a ServerPolicy from an http:// address (server.py).

    dtype: a name; None is bfloat16 on cuda and float32 elsewhere. separator None: what the model's
    config says ("step_separator", as in tiny/), else an empty line. thinking=True lets a model
    think (common/thinking.py).
    """
    if is_address(path):
        from common.server import ServerPolicy  # which is a Policy but for the model
        return ServerPolicy(path, separator, **keywords)
    tokenizer = load_pretrained(AutoTokenizer, path)
    model = load_pretrained(AutoModelForCausalLM, path, dtype=dtype_of(dtype, device))
    check(model.to(device).eval(), path)
    separator = separator or getattr(model.config, "step_separator", None) or "\n\n"
    return Policy(model, tokenizer, separator, name=f"policy:{path}", **keywords)


def add_policy_flags(parser, default=None, without=()):
    """The flags of every script that samples from LLMs; load_policy_flags reads them. No --policy
    without a default; `without`: flags that a script has no use for keep their defaults."""
    def a(flag, **keywords):
        if flag not in without:
            return parser.add_argument(flag, **keywords)
        parser.set_defaults(**{flag[2:].replace("-", "_"): keywords.get("default")})
    if default:
        a("--policy", default=default, help="folder, hub id, or http://host:port/v1 of a server")
    a("--thinking", choices=["on", "off"], default="off", help="if the chat template can (off)")
    a("--separator", help="text between steps (what the folder says, else an empty line)")
    a("--temperature", type=amount, default=1.0, help="0 is greedy (1)")
    a("--top-p", type=bounded(1e-6, 1, "a number above 0 and at most 1"), default=1.0,
      help="sample from the smallest set of this mass (1: all)")
    a("--max-solution-tokens", type=natural, default=2048, help="tokens without the prompt (2048)")


def load_policy_flags(args, device, path=None, **keywords):
    names = ("seed", "temperature", "top_p", "max_solution_tokens")
    options = {name: getattr(args, name) for name in names} | keywords
    separator = args.separator
    if separator:  # "\\n" on the command line is a line end
        separator = separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return load_policy(path or args.policy, device, args.dtype, separator,
                       thinking=args.thinking == "on", **options)

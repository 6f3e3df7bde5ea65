"""PRMs that others have trained: their layouts and their texts, loaded as ours.

    layout                       whose                    head
    Qwen2ForProcessRewardModel   Qwen2.5-Math-PRM         Linear-ReLU-Linear, two labels
    ...ForTokenClassification    TRL, PURE                linear, one or two labels
    Qwen2ForPrmModel             Skywork-o1-Open-PRM      linear, one label
    a causal LM, by its name     Math-Shepherd, RLHFlow   the LM head's rows of "+" and "-"

A head of theirs becomes our Linear-ReLU-Linear with one logit, without loss: two labels have
p = softmax(z)_1 = sigmoid(z_1 - z_0), and a linear u passes a ReLU as u = relu(u) - relu(-u).
"""
import copy
import re
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from common.models import load_pretrained
from common.run import expect

KNOWN = """known are: a folder that train.py wrote; Qwen2ForProcessRewardModel (Qwen2.5-Math-PRM); \
...ForTokenClassification with one or two labels (TRL, PURE); Qwen2ForPrmModel \
(Skywork-o1-Open-PRM); causal LMs named math-shepherd...prm or RLHFlow/...PRM, whose "+" is the \
score. An untrained head on any LM is made by train.py, or shown by prm_model.py --fresh-head"""


# ------------------------------------------------------------ their texts, as token ids

class TRL:
    """TRL's and PURE's tokens: [BOS] question, then each step and the separator, each by itself.
    Skywork tokenises the question together with its line end."""

    def __init__(self, tokenizer, separator, question_end=""):
        self.tokenizer = tokenizer
        self.question_end = question_end
        self.separator_ids = self.ids(separator)
        # TRL 1.13 puts a BOS before the question if there is one, even if the tokenizer adds none.
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question):
        return self.bos + self.ids(question + self.question_end)

    def step(self, step, first):
        return self.ids(step) + self.separator_ids


class MathShepherd(TRL):
    """"question step ки\\nstep ки", tokenised as one text; the score is read at each ки."""
    mark = "ки"

    def prompt(self, question):
        return self.tokenizer(question)["input_ids"]  # with the BOS that this tokenizer adds

    def step(self, step, first):
        # Tokenised behind a mark: at the beginning of a text SentencePiece would put a space.
        text = f"{' ' if first else chr(10)}{step} {self.mark}"
        return self.ids(self.mark + text)[len(self.ids(self.mark)):]


class RLHFlow(TRL):
    """Chat turns: each step is a user's, each answer "+"; the score is read where the answer
    begins. The question is in the first step's turn."""

    def __init__(self, tokenizer, separator):
        super().__init__(tokenizer, separator)
        turns = [("user", "<<1>>"), ("assistant", "+"), ("user", "<<2>>")]
        messages = [{"role": role, "content": text} for role, text in turns]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self.head, rest = chat.split("<<1>>")
        between, end = rest.split("<<2>>")
        # Between two steps: the end of the turn, which is the first step's, then "+" and a header.
        self.later = between.removeprefix(end)
        self.separator_ids = self.ids(end)

    def prompt(self, question):
        return self.ids(self.head + question.strip())

    def step(self, step, first):
        return self.ids((" " if first else self.later) + step.strip()) + self.separator_ids


TEXTS = {"trl": TRL, "skywork": partial(TRL, question_end="\n"), "math-shepherd": MathShepherd,
         "rlhflow": RLHFlow}

# What the card of Qwen/Qwen2.5-Math-PRM-7B asks for: this prompt, and <extra_0> after each step.
QWEN = {"separator": "<extra_0>", "template": "chat",
        "system": "Please reason step by step, and put your final answer within \\boxed{}."}


# ------------------------------------------------------------ their weights

class Qwen2ForProcessRewardModel(Qwen2PreTrainedModel):
    """The layout of Qwen/Qwen2.5-Math-PRM-7B and -72B, so that their files can be loaded."""

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 2))  # wrong, right
        self.post_init()


class SkyworkPRM(Qwen2PreTrainedModel):
    """The layout of Skywork-o1-Open-PRM; the LM head in its files is not used."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.v_head = nn.ModuleDict({"summary": nn.Linear(config.hidden_size, 1)})
        self.post_init()


@torch.no_grad()
def fold(weight, bias=None):
    """Our head's state dict from a linear one (1, h), or (2, h) whose label 1 is "correct"."""
    h = weight.shape[1]
    first, second = weight.new_zeros(h, h), weight.new_zeros(1, h)
    b = weight.new_zeros(1)
    # the sign of z_1 is +, and of two labels that of z_0 is -
    for i, sign in zip(range(len(weight))[::-1], (1, -1)):
        first[2 * i], first[2 * i + 1] = weight[i], -weight[i]
        second[0, 2 * i], second[0, 2 * i + 1] = sign, -sign
        b += 0 if bias is None else sign * bias[i]
    return {"0.weight": first, "0.bias": weight.new_zeros(h), "3.weight": second, "3.bias": b}


def load_qwen(path, dtype):
    whole = load_pretrained(Qwen2ForProcessRewardModel, path, dtype=dtype)
    published = whole.score.state_dict()
    head = {"0.weight": published["0.weight"], "0.bias": published["0.bias"]}
    for name in ("weight", "bias"):
        wrong, right = published[f"2.{name}"].split(1)
        head[f"3.{name}"] = right - wrong  # layer 2 of ours is the dropout
    return whole.model, head


def load_classifier(path, dtype):
    whole = load_pretrained(AutoModelForTokenClassification, path, dtype=dtype)
    head = getattr(whole, "score", None) or whole.classifier
    expect(isinstance(head, nn.Linear) and head.out_features <= 2,
           f"{path}: its head is {head}, not linear with one or two labels")
    return whole.base_model, fold(head.weight, head.bias)


def load_skywork(path, dtype):
    whole = load_pretrained(SkyworkPRM, path, dtype=dtype)
    head = whole.v_head["summary"]
    return whole.model, fold(head.weight, head.bias)


def load_token_prm(path, dtype):
    lm = load_pretrained(AutoModelForCausalLM, path, dtype=dtype)
    tokenizer = load_pretrained(AutoTokenizer, path)
    rows = [tokenizer(mark, add_special_tokens=False)["input_ids"][-1] for mark in "-+"]
    # Math-Shepherd's Mistral has a window of 4,096 tokens, within which it makes no difference.
    lm.config.sliding_window = None
    return lm.base_model, fold(lm.get_output_embeddings().weight[rows])


def layout_of(path, config, template=None):
    """(loader, format) of a published PRM, or None. template: what the caller says that it is."""
    architecture = (config.architectures or [""])[0]
    name = f"{path} {getattr(config, '_name_or_path', '')}".lower()
    if architecture == "Qwen2ForProcessRewardModel":
        return load_qwen, QWEN
    if architecture.endswith("ForTokenClassification"):
        return load_classifier, {"separator": "\n", "template": "trl"}
    if architecture == "Qwen2ForPrmModel":
        return load_skywork, {"separator": "\n", "template": "skywork"}
    for kind, pattern in (("math-shepherd", "math-shepherd.*prm"), ("rlhflow", "rlhflow.*prm")):
        if architecture.endswith("ForCausalLM") and (kind == template or re.search(pattern, name)):
            return load_token_prm, {"separator": "\n", "template": kind}
    return None


def load_published(path, config, dtype, fresh=False, template=None, meta=False):
    """(backbone, head or None, format) of a folder or hub id that train.py did not write.

    fresh: an LM that is no PRM is wanted, too, without a head. meta: shapes only, no weights.
    """
    layout = layout_of(path, config, template)
    expect(layout or fresh, f"{path}: no PRM of a known layout ({config.model_type}, architectures "
           f"{config.architectures}); {KNOWN}")
    load, form = layout or (None, {"separator": getattr(config, "step_separator", "\n\n")})
    if meta:
        with torch.device("meta"):
            return AutoModel.from_config(config, dtype=dtype), None, form
    if not load:
        return load_pretrained(AutoModel, path, dtype=dtype), None, form
    return *load(path, dtype), form


# ------------------------------------------------------------ ours, as theirs

def export(prm, folder):
    """Write a PRM as a Qwen2ForProcessRewardModel, which vLLM serves. load_prm reads that, too."""
    expect(hasattr(prm, "backbone"), "--export: the weights of a PRM on a server are not here")
    taken = Path(folder).is_file() or Path(folder).is_dir() and any(Path(folder).iterdir())
    expect(not taken, f"--export {folder} is taken: a new folder is expected")
    config = copy.deepcopy(prm.backbone.config)
    expect(config.model_type == "qwen2", "--export: vLLM has no class for a PRM of type "
           f"{config.model_type}, only for one of type qwen2")
    expect([*map(type, prm.head)] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear],
           "--export: that class has the head Linear-ReLU-Linear, this PRM another one")
    config.prm, config.num_labels = prm.format, 2
    with torch.device("meta"):  # made without weights: they are put in place below
        whole = Qwen2ForProcessRewardModel(config)
    first, last = prm.head[0], prm.head[3]
    second = nn.Linear(config.hidden_size, 2, device=last.weight.device, dtype=last.weight.dtype)
    # softmax((0, z))_1 = sigmoid(z)
    second.weight.data = torch.cat([torch.zeros_like(last.weight), last.weight]).detach()
    second.bias.data = torch.cat([torch.zeros_like(last.bias), last.bias]).detach()
    whole.model, whole.score = prm.backbone, nn.Sequential(first, nn.ReLU(), second)
    whole.save_pretrained(folder)
    prm.tokenizer.save_pretrained(folder)
    print(f"written: {folder}")

"""What of a model family the tree cache and the sampler rely on: right, or refused at loading.

docs/models.md lists families, exact or refused (python benchmarks/families.py).
"""
import socket
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.cache import encode_missing
from common.node import Node
from common.run import expect

TOKENS = 20         # of the check
SHORT_WINDOW = 4    # stands for any sliding window or chunk in the check: shorter than its text
# Largest relative difference: rounding alone gives 1e-6 in fp32, and some hundredths in bf16.
TOLERANCE = {torch.float32: 1e-3}
WINDOWS = ("sliding_window", "attention_chunk_size")


def bos(tokenizer):
    """[BOS] if the tokenizer puts it before a text, as Llama's and Gemma's do; [] if not (Qwen's).
    A chat template has its own."""
    first = tokenizer("")["input_ids"][:1]  # some add an end-of-text token, too
    return first if first == [tokenizer.bos_token_id] else []


def must_fit(tokens, context, question):
    """ValueError: a question of so many tokens leaves no room in the model's context (or None)."""
    expect(not context or tokens < context, f"a question of {tokens} tokens does not fit into the "
           f"model's context of {context}: {question.strip()[:40]!r} ...")


def own_logits(lm, hidden):
    """Logits (B, V) of hidden states (B, h): the head, then its scaling (Granite divides, Cohere
    multiplies) and soft-capping (Gemma 2). check() finds out if a family does something else."""
    config = lm.config
    logits = lm.get_output_embeddings()(hidden)
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def check(model, path):
    """Raise a ValueError unless a forward by the tree cache equals a plain one on random tokens.

    model: a backbone, or an LM, whose logits are compared, too. One forward of 20 tokens and two
    cached ones, a fraction of the time that loading takes.
    """
    reason = "computes something else"
    try:
        if model.base_model is not model:
            model.set_attn_implementation("sdpa")  # the one that takes the cache's masks
        difference = cached_difference(model)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
            ValueError) as error:
        difference = float("nan")
        reason = f"does not work ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    if not difference < TOLERANCE.get(model.dtype, 0.2):  # NaN is refused, too
        raise ValueError(f"{path}: a model of type {model.config.model_type} cannot be used here: "
                         f"the tree cache, made for full attention as in Llama and Qwen, {reason}")


@torch.inference_mode()
def cached_difference(model):
    """Relative difference of hidden states, and of an LM's logits, with the cache and without."""
    backbone, config = model.base_model, model.config
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (TOKENS,), generator=random).tolist()
    # Two paths of different lengths, so that the shorter one is padded: root, a, b and root, c.
    root = Node("", ids=ids[:7])
    a = Node("", root, ids[7:17])
    ends = [Node("", a, ids[17:]), Node("", root, ids[7:9])]
    windows = {}  # a window as long as the context makes no difference
    for name in WINDOWS:
        if 0 < (getattr(config, name, None) or 0) < (config.max_position_embeddings or 0):
            windows[name] = getattr(config, name)
            setattr(config, name, SHORT_WINDOW)
    try:
        whole = torch.tensor([ids], device=model.device)
        plain = backbone(input_ids=whole, use_cache=False).last_hidden_state[0, [-1, 8]]
        pairs = []
        if backbone is not model:
            plain_logits = model(input_ids=whole, use_cache=False).logits[0, [-1, 8]]
    finally:
        for name, window in windows.items():
            setattr(config, name, window)
    encode_missing(backbone, "check", [a], lambda node: node.ids, TOKENS)
    _, hidden = encode_missing(backbone, "check", ends, lambda node: node.ids, 4 * TOKENS)
    cached = torch.stack([hidden[node] for node in ends])
    pairs.append((plain, cached))
    if backbone is not model:
        pairs.append((plain_logits, own_logits(model, cached)))
    return max(float((x.float() - y.float()).norm() / x.float().norm()) for x, y in pairs)


# ------------------------------------------------------------ loading

def is_address(path):
    return str(path).startswith(("http://", "https://"))


def address_parts(address):
    """(URL, NAME or None, FOLDER or "") of http://host:port/path?model=NAME#FOLDER"""
    parts = urlparse(address)
    query = parse_qs(parts.query.replace("+", "%2B"))  # a plus is no space in a model's name
    expect(query.keys() <= {"model"}, f"{address}: only ?model=NAME is known")
    url = parts._replace(query="", fragment="").geturl()
    return url, query.get("model", [None])[0], unquote(parts.fragment)


def short_name(path):
    """The last part of a folder or hub id; of an address its model's, or the host."""
    if is_address(path):
        url, name, _ = address_parts(path)
        path = name or urlparse(url).netloc
    return Path(path).name


def names_folder(path):
    """Can it be no hub id, whether it exists or not?"""
    if is_address(path):
        return False
    in_folder = "/" in path and Path(path).parent.is_dir()  # runs/prm, beside other runs
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or in_folder


def is_local(path):
    """Is asking the hub pointless? Then a wrong name fails at once, not after 25 s of retries."""
    if names_folder(str(path)) or Path(path).is_dir():
        return True
    if getproxies():  # a proxy resolves the hub's name for us
        return False
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, 443)
    except OSError:
        return True  # no network: what was downloaded before still loads
    return False


def load_pretrained(kind, path, **keywords):
    """AutoX.from_pretrained with one-line errors, also for missing weights, which transformers
    would make up. It never runs code from the hub, and never unpickles."""
    set_verbosity_error()  # what its warnings would say of the weights is in our own errors
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers: a line of noise for each model in a log
    local = keywords["local_files_only"] = is_local(path)
    try:
        if kind is AutoTokenizer and Path(path).is_dir() and not any(
                any(Path(path).glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
            raise ValueError("no tokenizer is in it")  # transformers would make one up
        if kind in (AutoConfig, AutoTokenizer):
            return kind.from_pretrained(path, trust_remote_code=False, **keywords)
        model, info = kind.from_pretrained(path, trust_remote_code=False, use_safetensors=True,
                                           output_loading_info=True,
                                           ignore_mismatched_sizes=True, **keywords)
        for name, there, here in sorted(info["mismatched_keys"]):
            raise ValueError(f"{name} is {list(there)}, and by config.json it is {list(here)}")
        missing = ", ".join(sorted(info["missing_keys"])[:6])
        expect(not missing, f"weights are missing: {missing}")
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if Path(path).is_dir():
            files = ", ".join(sorted(f.name for f in Path(path).iterdir())) or "nothing"
            raise ValueError(f"{path}: cannot load it ({lines[0]}). The folder holds: {files}; "
                             "needed are config.json, model.safetensors and the tokenizer's "
                             "files") from error
        hub = "" if local else f", and the hub gave: {lines[0]}"
        raise ValueError(f"{path}: no such folder{hub}. Offline, pass the path of a local folder "
                         "(made by save_pretrained or `hf download`)") from error


def load_head(head, path, source):
    """Fill a PRM's head from a state dict, or from the file of that name, which PRM.save() wrote.
    ValueError: there is no such file, or it is another model's."""
    try:
        named = isinstance(source, str)
        head.load_state_dict(load_file(cached_file(path, source)) if named else source)
    except OSError as error:
        raise ValueError(f"{path}: {source} is missing: it is not a whole PRM, save it again") \
            from error
    except SafetensorError as error:
        raise ValueError(f"{path}/{source}: not a whole safetensors file ({error})") from error
    except RuntimeError as error:  # a line for each weight; the first one says enough
        why = str(error).strip().splitlines()[1].strip()
        raise ValueError(f"{path}: the head is of another model than the backbone, or prm_model.py "
                         f"has another head since ({why})") from error


def dtype_of(name, device):
    """A dtype by its name; None is bfloat16 on cuda and float32 elsewhere."""
    default = "bfloat16" if str(device).startswith("cuda") else "float32"
    return getattr(torch, name or default)

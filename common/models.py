"""What of a model family the tree cache and the sampler rely on: right, or refused at loading.

    check(model, path)       the cache computes what the model does, or a ValueError
    own_logits(lm, hidden)   what the family does behind its LM head included
    bos(tokenizer)           what the tokenizer puts before a text

docs/models.md lists families, exact or refused (python benchmarks/families.py).
"""
import torch

from common.cache import encode_missing
from common.node import Node

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

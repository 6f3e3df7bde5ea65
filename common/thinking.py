"""Thinking models (Qwen3, QwQ, DeepSeek-R1): what they write before </think> is no step.

    python search.py --strategy beam --policy Qwen/Qwen3-8B --thinking on ...

A thought is a prefix of the first step: its tokens belong to that step's node, so the policy goes
on behind them. No step is cut in it, a \\boxed{} in it ends nothing, no answer is read in it, and
the PRM, whose training data have no thoughts, neither scores nor sees it.
"""
from bisect import bisect_left

BEGIN, END = "<think>", "</think>"


def split_thought(text, opening=""):
    """(thought, what follows): the thought ends by </think> and line ends, or not yet.

    "<think>Hm.</think>\\n5 + 1 = 6" -> ("<think>Hm.</think>\\n", "5 + 1 = 6")
    opening: BEGIN if the prompt has written that already.
    """
    if not (opening + text).lstrip().startswith(BEGIN):
        return "", text
    rest = text.partition(END)[2].lstrip("\n")
    return text[:len(text) - len(rest)], rest


def thought_length(ids, tokenizer, opening=""):
    """How many of a solution's tokens are its thought, up to </think>."""
    if not split_thought(tokenizer.decode(ids), opening)[0]:
        return 0
    # all prefixes that are long enough have it: a thought of 10,000 tokens is decoded 14 times
    return bisect_left(range(len(ids)), True, key=lambda n: END in tokenizer.decode(ids[:n]))


def thought_of(tokenizer, thinking):
    """(opening, what adopted text puts in the place of a thought): what the chat template writes of
    a thought by itself, and how it is passed over."""
    on = off = ""
    if tokenizer and tokenizer.chat_template:
        on, off = (tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False,
            enable_thinking=x) for x in (True, False))
    if (on if thinking else off).rstrip().endswith(BEGIN):  # QwQ's and R1's always do
        return BEGIN, f"{END}\n\n"
    if thinking and on == off:
        raise ValueError("--thinking on: there is no chat template, or it knows no enable_thinking")
    return "", f"{BEGIN}\n\n{END}\n\n" if thinking else ""

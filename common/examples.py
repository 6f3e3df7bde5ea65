"""Labelled solutions as tensors: how train.py encodes, groups and batches them.

Shapes: B rows of a micro-batch, T tokens (padded on the right), M labelled steps.
"""
import random
from collections import namedtuple
from itertools import chain

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.cache import batches
from common.run import bar, gather, is_first, rank_and_world

# One encoded solution. ids: its tokens. Of each labelled step: the position of its separator's last
# token, the label y in [0, 1], its place t among the steps. where: file:line, for messages.
Example = namedtuple("Example", "ids positions labels steps where")
NONE = torch.zeros(0, dtype=torch.long)


def encode_rows(prm, rows, max_length, mask_after_first_error=False):
    """(where, stepwise row) pairs -> Examples, encoded as the PRM will read them when it scores.

    What follows the last labelled step cannot change the loss and is cut off. Rows left without a
    label (all beyond max_length tokens, or none known) are dropped: their mean loss would be NaN.
    """
    examples = []
    for where, row in tqdm(rows, "encode", disable=not is_first() or None, leave=False):
        ids, positions = prm.encode(row["prompt"], row["completions"])
        labelled = []
        for t, (position, y) in enumerate(zip(positions, row["labels"])):
            if y is not None and position < max_length:
                labelled.append((position, float(y), t))
            if mask_after_first_error and y is not None and y < 0.5:
                break  # the first error itself is learnt
        if labelled:
            positions, labels, steps = (torch.tensor(column) for column in zip(*labelled))
            ids = torch.tensor(ids[:positions[-1] + 1])
            examples.append(Example(ids, positions, labels, steps, where))
    return examples


def plan(lengths, group, batch_size, batch_tokens, seed=0, epoch=0):
    """One epoch as optimizer steps, each a list of at most `group` micro-batches of row numbers.

    Rows of similar length share a micro-batch: shuffle, sort each 32 micro-batches' worth of rows,
    cut, shuffle the micro-batches. The plan is the same on every rank, and for every number of
    ranks with the same group = ranks x accumulation.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    micros = []
    for a in range(0, len(order), 32 * batch_size):
        micros.append([])
        for i in sorted(order[a:a + 32 * batch_size], key=lengths.__getitem__):
            full = len(micros[-1]) == batch_size
            if full or lengths[i] * (len(micros[-1]) + 1) > batch_tokens:
                micros.append([])
            micros[-1].append(i)
    rng.shuffle(micros)
    return [micros[a:a + group] for a in range(0, len(micros), group)]


def get_batch(examples, numbers, device, multiple=1):
    """Numbers of examples -> ids (B, T) or kept states (B, T, h); of each labelled step its row,
    position, label and place (M).

    T is rounded up to a multiple: bf16 matrix units want 8, and CPUs keep a kernel for each shape.
    """
    # a rank that has no micro-batch left in an epoch's last step takes part with a zero gradient
    first = examples[0].ids[:1]  # a token, or a kept state
    nothing = Example(first, NONE, NONE.float(), NONE, "")
    chosen = [examples[i] for i in numbers] or [nothing]
    ids_BT = pad_sequence([example.ids for example in chosen], batch_first=True)
    if ids_BT.ndim == 2:  # and no kept states (B, T, h)
        ids_BT = F.pad(ids_BT, (0, -ids_BT.shape[1] % multiple))
    counts = torch.tensor([len(example.labels) for example in chosen])
    rows_M = torch.arange(len(chosen)).repeat_interleave(counts)
    positions_M = torch.cat([example.positions for example in chosen])
    labels_M = torch.cat([example.labels for example in chosen])
    steps_M = torch.cat([example.steps for example in chosen])
    tensors = (ids_BT, rows_M, positions_M, labels_M, steps_M)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


class HeadOnly(torch.nn.Module):
    """A PRM whose backbone's states are kept: takes them (B, T, h) in place of token ids."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, states_BTh, rows_M, positions_M):
        return self.head(states_BTh[rows_M, positions_M]).squeeze(-1).float()


@torch.no_grad()
def keep_states(prm, examples, max_tokens, device, autocast, multiple=1):
    """Examples with the hidden states (M, h) of their labelled steps in place of their ids.

    A frozen backbone computes the same ones in each epoch: here once, shared among the ranks. Each
    rank then holds all of them in main memory: h numbers a label, of 2 bytes in bf16.
    """
    rank, world = rank_and_world()
    states = {}
    with bar(len(examples), "hidden states") as progress:
        own = range(rank, len(examples), world)
        for numbers in batches(own, lambda i: len(examples[i].ids), max_tokens, device):
            ids_BT, rows_M, positions_M, *_ = get_batch(examples, numbers, device, multiple)
            with autocast():
                output = prm.backbone(input_ids=ids_BT, use_cache=False)
                hidden_Mh = output.last_hidden_state[rows_M, positions_M].cpu()
                if torch.is_autocast_enabled(device.type):  # the head would round them anyway
                    hidden_Mh = hidden_Mh.to(torch.get_autocast_dtype(device.type))
            parts = hidden_Mh.split([len(examples[i].labels) for i in numbers])
            states.update((i, part.clone()) for i, part in zip(numbers, parts))
            progress.update(len(numbers) * world)
    states = dict(chain.from_iterable(part.items() for part in gather(states)))
    return [example._replace(ids=states[i], positions=torch.arange(len(example.labels)))
            for i, example in enumerate(examples)]


def label_text(tokenizer, example):
    """What is trained on, for the eye: each token's text, behind a labelled one <label>."""
    words = [repr(tokenizer.decode([token]))[1:-1] for token in example.ids.tolist()]
    for position, y in zip(example.positions.tolist(), example.labels.tolist()):
        words[position] += f" <{y:g}>\n"
    return " ".join(words)

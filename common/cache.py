"""The tree cache (Appendix D.3): each token of each prefix is encoded once in the life of a tree.

A node keeps the keys and values of its own tokens only. Here two paths share a prompt and a step:

        prompt [q1 q2 q3]            a batch of b and c, padded on the left:
           |
        a [a1 a2]                    row b:  -  -  q1 q2 q3 a1 a2 b1      4 nodes keep 9 tokens;
         /      \\                    row c:  q1 q2 q3 a1 a2 c1 c2 c3      the two rows have 14
     b [b1]   c [c1 c2 c3]

A PathBatch copies the pieces of its paths side by side for one model call. A prefix that two paths
share is computed once, dropping a path is dropping its nodes, and a path that branches again needs
no copying rules. Policy and PRM keep theirs apart, by name. This file is a second reading: it
computes what a plain forward over each whole text would (tests/test_policy.py).

Shapes: B rows, M new tokens, P prefix tokens, L layers, H key-value heads, D head dimension,
h hidden size.
"""
from itertools import chain

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


class PathBatch:
    """Keys and values of B paths side by side: to transformers it is the cache of one model call.

    It has room for tokens to come, so that appending writes in place. DynamicCache would copy all
    keys and values at each token.
    """

    def __init__(self, model, name, paths, room):
        """paths: B lists of nodes whose keys and values are known; room: tokens to be appended."""
        config = model.config
        device = model.device
        L, H = config.num_hidden_layers, config.num_key_value_heads
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pieces = []
        for path in paths:
            pieces.append([node.kv[name] for node in path if name in node.kv])
        counts = torch.tensor([sum(map(len, row)) for row in pieces], device=device)
        B, P = len(paths), int(counts.max())
        self.model = model
        self.prefix = P
        self.length = P         # tokens of a row so far, padding included
        self.position = counts  # (B) position of each row's next token, without padding
        self.mask = torch.zeros(B, P + room, dtype=torch.bool, device=device)
        self.mask[:, :P] = torch.arange(P, device=device) >= P - counts[:, None]
        kv = torch.zeros(B, P + room, L, 2, H, D, dtype=model.dtype, device=device)
        if P:  # one copy for the whole batch: all tokens, in the order in which the mask lists them
            kv[self.mask] = torch.cat(list(chain.from_iterable(pieces)))
        self.kv = kv.permute(2, 3, 0, 4, 1, 5).contiguous()  # (L, 2, B, H, P + room, D)

    def append(self, ids, mask=None):
        """Run the model on ids (B, M) -> hidden states (B, M, h). mask (B, M): False is padding on
        the right."""
        M = ids.shape[1]
        start = self.length
        self.mask[:, start:start + M] = True if mask is None else mask
        visible = self.mask[:, None, None, :start + M]
        if M > 1:
            square = torch.ones(M, start + M, dtype=torch.bool, device=ids.device)
            itself = torch.eye(M, start + M, dtype=torch.bool, device=ids.device).roll(start, 1)
            # A padding query with no key gives NaN in some attention kernels: let it see itself.
            visible = visible & square.tril(diagonal=start) | itself
        positions = self.position[:, None] + torch.arange(M, device=ids.device)
        output = self.model(input_ids=ids, attention_mask=visible, position_ids=positions,
                            past_key_values=self, use_cache=True)
        self.position = self.position + (M if mask is None else mask.sum(1))
        self.length = start + M
        return output.last_hidden_state

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by each layer's attention with its new keys and values (B, H, M, D); returns all
        so far."""
        end = self.length + keys.shape[2]
        self.kv[layer, 0, :, :, self.length:end] = keys
        self.kv[layer, 1, :, :, self.length:end] = values
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def new_kv(self, row, n):
        """Keys and values of a row's first n appended tokens (n, L, 2, H, D): a copy, since a view
        would keep the whole batch alive."""
        new = self.kv[:, :, row, :, self.prefix:self.prefix + n]
        return new.permute(3, 0, 1, 2, 4).contiguous()

    def keep(self, rows):
        """Go on with these rows, in this order; a row may be named several times."""
        self.kv = self.kv[:, :, rows].contiguous()
        self.mask = self.mask[rows]
        self.position = self.position[rows]

    def grow(self, room):
        """Room for more tokens."""
        self.kv = pad(self.kv, (0, 0, 0, room))
        self.mask = pad(self.mask, (0, room))


# Padded tokens of one forward that encodes text. A CPU is fastest where activations stay in its own
# cache: the tiny PRM scores twice as many tokens a second by 4096 as by 65536. A GPU is busy with
# 131072; more would only take memory.
ENCODED_AT_ONCE = {"cpu": 4096, "cuda": 131072}


def batches(items, length, max_tokens, device=None):
    """Split items, longest first, into batches of at most max_tokens padded tokens (or one item).
    device: where text is encoded, which has a limit of its own."""
    if device is not None:
        max_tokens = min(max_tokens, ENCODED_AT_ONCE.get(device.type, max_tokens))
    batch = []
    for item in sorted(items, key=length, reverse=True):
        if batch and (len(batch) + 1) * length(batch[0]) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def encode_missing(model, name, leaves, ids_of, max_tokens):
    """Encode each token on the paths to `leaves` that has not been -> (tokens, {node: hidden (h)}).

    Missing nodes are followed downwards in chains: a chain begins below an encoded node and ends
    where the tree branches. So there are as many forwards as branchings, not as nodes.
    ids_of(node) gives a node's tokens for this model; the hidden state is that of its last token.
    Keys, values and hidden states stay at the nodes, except on chains that end a solution, since
    nothing will follow them.
    """
    missing = {}  # node -> its tokens that are still to be encoded
    below = {}    # node -> its missing children
    for node in leaves:
        while node is not None and name not in node.hidden and node not in missing:
            # a generated step has all but its last token encoded by the sampling
            missing[node] = ids_of(node)[len(node.kv.get(name, ())):]
            below.setdefault(node.parent, []).append(node)
            node = node.parent
    hidden = {}
    count = 0
    while missing:
        rows = []  # (encoded nodes before, chain of missing nodes, their tokens)
        for head in [node for node in missing if node.parent not in missing]:
            nodes = [head]
            while len(below.get(nodes[-1], ())) == 1:
                nodes += below[nodes[-1]]
            before = head.line() if name in head.kv else head.line()[:-1]
            rows.append((before, nodes, list(chain.from_iterable(missing[n] for n in nodes))))

        def width(row):
            return len(row[2]) + sum(len(node.kv[name]) for node in row[0])
        for batch in batches(rows, width, max_tokens, model.device):
            count += sum(len(ids) for _, _, ids in batch)
            hidden.update(encode_rows(model, name, batch, missing, below))
        missing = {node: ids for node, ids in missing.items() if node not in hidden}
    return count, hidden


def encode_rows(model, name, rows, missing, below):
    """One forward for the rows of encode_missing() -> {node: hidden state of its last token}."""
    ids = pad_sequence([torch.tensor(ids) for _, _, ids in rows], batch_first=True)
    counts = torch.tensor([len(ids) for _, _, ids in rows])
    mask = torch.arange(ids.shape[1]) < counts[:, None]
    batch = PathBatch(model, name, [before for before, _, _ in rows], ids.shape[1])
    states = batch.append(ids.to(model.device), mask.to(model.device))
    last = {}        # node -> (row, position) of its last token
    continued = []   # nodes that others may follow: they keep keys, values and hidden state
    for row, (_, nodes, new) in enumerate(rows):
        needed = nodes[-1].end is None or nodes[-1] in below
        kv = batch.new_kv(row, len(new)) if needed else None
        end = 0
        for node in nodes:
            start, end = end, end + len(missing[node])
            last[node] = row, end - 1
            if needed:
                known = [node.kv[name]] if name in node.kv else []
                node.kv[name] = torch.cat([*known, kv[start:end]])
                continued.append(node)
    places = torch.tensor(list(last.values()))
    hidden = dict(zip(last, states[places[:, 0], places[:, 1]]))  # one gather for all
    for node in continued:
        node.hidden[name] = hidden[node]
    return hidden

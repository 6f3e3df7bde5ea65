"""The tree cache (Appendix D.3): each token of each prefix is encoded once in the life of a tree.

Shapes: B rows, M new tokens, P prefix tokens, L layers, H key-value heads, D head dimension.
"""
import torch
from torch.nn.utils.rnn import pad_sequence


class PathBatch:
    """A batch of paths laid side by side, padded on the left, for one model: what one forward works on. To the model it
    is the cache, with room for the tokens to come: appending writes in place, where DynamicCache copies it all."""

    def __init__(self, model, name, paths, room):
        """paths: B lists of nodes whose keys and values are known; room: new tokens that will be appended."""
        config, device = model.config, model.device
        L, H = config.num_hidden_layers, config.num_key_value_heads
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts = [[n.kv[name] for n in path if name in n.kv] for path in paths]
        lengths = torch.tensor([sum(len(t) for t in row) for row in parts], device=device)
        B, P = len(paths), int(lengths.max())
        self.model, self.prefix, self.length = model, P, P  # length: tokens of a row so far, padding included
        self.position = lengths  # (B) position of the next token
        self.mask = torch.zeros(B, P + room, dtype=torch.bool, device=device)
        self.mask[:, :P] = torch.arange(P, device=device) >= P - lengths[:, None]
        self.kv = torch.zeros(B, P + room, L, 2, H, D, dtype=model.dtype, device=device)
        if P:  # one copy for the whole batch: all tokens of all paths, in the order in which the mask lists them
            self.kv[self.mask] = torch.cat([t for row in parts for t in row])
        self.kv = self.kv.permute(2, 3, 0, 4, 1, 5).contiguous()  # (L, 2, B, H, P + room, D)

    def append(self, ids, mask=None):
        """Run the model on ids (B, M), padding on the right where mask (B, M) is False -> hidden states (B, M, h)."""
        M, start = ids.shape[1], self.length
        self.mask[:, start:start + M] = True if mask is None else mask
        seen = self.mask[:, None, None, :start + M]
        if M > 1:
            ones = torch.ones(M, start + M, dtype=torch.bool, device=ids.device)
            seen = seen & ones.tril(diagonal=start)
            # The padding's own rows would attend to nothing, which is NaN in some kernels: let them see themselves.
            seen = seen | torch.eye(M, start + M, dtype=torch.bool, device=ids.device).roll(start, dims=1)
        positions = self.position[:, None] + torch.arange(M, device=ids.device)
        out = self.model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=self,
                         use_cache=True)
        self.position, self.length = self.position + (M if mask is None else mask.sum(1)), start + M
        return out.last_hidden_state

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by the attention of each layer: its new keys and values (B, H, M, D) -> all so far."""
        end = self.length + keys.shape[2]
        self.kv[layer, 0, :, :, self.length:end], self.kv[layer, 1, :, :, self.length:end] = keys, values
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]

    def new_kv(self, row, n):
        """Keys and values of the first n appended tokens of a row: (n, L, 2, H, D), a copy that outlives the batch."""
        return self.kv[:, :, row, :, self.prefix:self.prefix + n].permute(3, 0, 1, 2, 4).contiguous()

    def keep(self, rows):
        """Go on with these rows (B'), in this order; a row may be named several times."""
        self.kv, self.mask, self.position = self.kv[:, :, rows].contiguous(), self.mask[rows], self.position[rows]

    def grow(self, room):
        """Room for more tokens."""
        self.kv = torch.nn.functional.pad(self.kv, (0, 0, 0, room))
        self.mask = torch.nn.functional.pad(self.mask, (0, room))


# Padded tokens of one forward that encodes text. A CPU is fastest where activations stay in its cache: the tiny PRM
# scores twice as many tokens a second by 4096 as by 65536. Elsewhere memory alone is the limit (--max-batch-tokens).
ENCODED_AT_ONCE = {"cpu": 4096}


def batches(items, length, max_tokens, device=None):
    """Split items, longest first, into batches of at most max_tokens padded tokens (one item at least), and of what
    this device encodes at once."""
    batch = []
    if device is not None:
        max_tokens = min(max_tokens, ENCODED_AT_ONCE.get(device.type, max_tokens))
    for item in sorted(items, key=length, reverse=True):
        if batch and (len(batch) + 1) * length(batch[0]) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def encode_missing(model, name, leaves, ids_of, max_tokens):
    """Encode every token on the paths to `leaves` that has not been -> (tokens it took, {node: hidden state (h)}).

    Nodes that are missing are followed downwards in chains: a chain begins below an encoded node and ends where the
    tree branches, so nothing is computed twice and there are as many forwards as there are branchings, not nodes.
    ids_of(node) gives the tokens of a node for this model. The hidden state is the one of a node's last token.
    Keys and values stay in node.kv[name] and the hidden state in node.hidden[name], except on chains that end the
    solution: nothing will follow them.
    """
    todo, below, states, spent = {}, {}, {}, 0
    for node in leaves:
        while node is not None and name not in node.hidden and node not in todo:
            todo[node] = ids_of(node)[len(node.kv.get(name, ())):]  # a generated step: all but its last token is known
            below.setdefault(node.parent, []).append(node)
            node = node.parent
    while todo:
        rows = []
        for head in [n for n in todo if n.parent not in todo]:
            chain = [head]
            while len(below.get(chain[-1], ())) == 1:
                chain.append(below[chain[-1]][0])
            known = head.line() if name in head.kv else head.line()[:-1]
            rows.append((known, chain, [i for n in chain for i in todo[n]]))
        for batch in batches(rows, lambda r: len(r[2]) + sum(len(n.kv[name]) for n in r[0]), max_tokens, model.device):
            spent += sum(len(new) for _, _, new in batch)
            states.update(_extend_rows(model, name, batch, todo, below))
        todo = {node: ids for node, ids in todo.items() if node not in states}
    return spent, states


def _extend_rows(model, name, rows, todo, below):
    """One forward for rows of (nodes before, chain of nodes to encode, their new tokens: todo has them by node)."""
    ids = pad_sequence([torch.tensor(new) for _, _, new in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(new) for _, _, new in rows])[:, None]
    batch = PathBatch(model, name, [prefix for prefix, _, _ in rows], ids.shape[1])
    hidden = batch.append(ids.to(model.device), mask.to(model.device))
    last, kept = {}, []  # of each node: the row and the position of its last token
    for row, (_, chain, new) in enumerate(rows):
        keep = chain[-1].end is None or chain[-1] in below
        kv, at = batch.new_kv(row, len(new)) if keep else None, 0
        for node in chain:
            start, at = at, at + len(todo[node])
            last[node] = row, at - 1
            if keep:
                node.kv[name] = torch.cat([*([node.kv[name]] if name in node.kv else []), kv[start:at]])
                kept.append(node)
    states = dict(zip(last, hidden[tuple(torch.tensor(list(last.values())).T)]))  # one gather for all
    for node in kept:
        node.hidden[name] = states[node]
    return states

"""PRMs that others have published: their layouts and formats, loaded as ours."""
from torch import nn
from transformers import Qwen2Model, Qwen2PreTrainedModel

from common.policy import load_pretrained

# What the card of Qwen/Qwen2.5-Math-PRM-7B asks for: this prompt, and <extra_0> after each step.
PUBLISHED = {"separator": "<extra_0>", "template": "chat",
             "system": "Please reason step by step, and put your final answer within \\boxed{}."}


class Published(Qwen2PreTrainedModel):
    """The layout of Qwen/Qwen2.5-Math-PRM-7B and -72B, so that their files can be loaded."""

    def __init__(self, config):
        super().__init__(config)
        h = config.hidden_size
        self.model = Qwen2Model(config)
        self.score = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 2))  # wrong, right
        self.post_init()


def load_published(path, dtype):
    """(backbone, state dict of our head), exactly the published p.

        p = softmax(z)_1 = sigmoid(z_1 - z_0)

    z is linear in the first layer's output, so our one logit is z_1 - z_0: the difference of the
    last layer's two rows. ValueError: load_pretrained's.
    """
    whole = load_pretrained(Published, path, dtype=dtype)
    published = whole.score.state_dict()
    head = {"0.weight": published["0.weight"], "0.bias": published["0.bias"]}
    for name in ("weight", "bias"):
        wrong, right = published[f"2.{name}"].split(1)
        head[f"3.{name}"] = right - wrong  # layer 2 of ours is the dropout
    return whole.model, head

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
        self.score = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 2))
        self.post_init()


def load_published(path, dtype):
    """(backbone, head). Its p = softmax(z)_1 = sigmoid(z_1 - z_0), and z is linear in the first
    layer's output: so the difference of the last layer's two rows is exactly our one logit."""
    whole = load_pretrained(Published, path, dtype=dtype)
    w = whole.score.state_dict()
    return whole.model, {"0.weight": w["0.weight"], "0.bias": w["0.bias"],
                         "3.weight": w["2.weight"][1:] - w["2.weight"][:1],
                         "3.bias": w["2.bias"][1:] - w["2.bias"][:1]}

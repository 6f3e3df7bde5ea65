"""Models for tests: a random Qwen2 of 30,000 parameters with the tiny world's tokenizer. Nothing is downloaded.

PRM_TEST_DEVICE=cuda puts the models of test_policy, test_prm_model, test_search and test_train on the GPU, and what
these tests start, in fp32. Without it no test sees a GPU."""
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start: threads that share a core only spin
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # train.py allows TF32, 10 bits of mantissa: here fp32 is fp32

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
DEVICE = os.environ.get("PRM_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor do the scripts that tests start
torch.set_num_threads(1)
two_devices = pytest.mark.skipif(DEVICE != "cpu" and torch.cuda.device_count() < 2, reason="needs two GPUs")


def random_qwen(seed=0, layers=2, hidden=32, **keywords):
    """Large random weights: next-token distributions are far from uniform, and differences show."""
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=512, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                         initializer_range=0.3, step_separator="\n", **keywords)
    return Qwen2ForCausalLM(config).to(DEVICE).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "A")


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory, tokenizer):
    """A random LM as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("lm")
    random_qwen().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

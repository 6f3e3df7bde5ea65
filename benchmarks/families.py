"""Which model families are computed exactly, and which are refused: the table of docs/models.md.

    python benchmarks/families.py                  # all; tiny random weights, nothing is downloaded
    python benchmarks/families.py qwen3 gemma2     # some

exact: hidden states and logits by the tree cache equal those of a plain forward to 1e-5 (relative, fp32), and greedy
sampling gives the tokens of transformers' generate. refused: load_policy and load_prm raise a one-line error. A family
that is neither is printed as WRONG, and the exit status is 1.
"""
import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.models import cached_difference, check  # noqa: E402
from common.node import Node  # noqa: E402
from common.policy import Policy  # noqa: E402

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
             eos_token_id=1, initializer_range=0.2)
# name -> config keys beside SIZES; a name may say more than the model type, after a comma
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": None}, "mistral, window": {"sliding_window": 16}, "mixtral": {},
    "qwen2": {}, "qwen2, window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": 4}, "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}, "qwen3_next": {},
    "gemma": {}, "gemma2": {}, "gemma3_text": {"sliding_window": 16}, "phi": {}, "phi3": {"sliding_window": None},
    "phi3, window": {"sliding_window": 16}, "granite": {"logits_scaling": 8.0},
    "cohere": {}, "cohere2": {"sliding_window": 16}, "nanochat": {"final_logit_softcapping": 2.0},
    "olmo": {}, "olmo2": {}, "olmo3": {"sliding_window": 16}, "smollm3": {}, "stablelm": {}, "starcoder2": {},
    "glm": {}, "glm4": {}, "nemotron": {}, "helium": {}, "exaone4": {"sliding_window": 16},
    "gpt_oss": {"num_local_experts": 4}, "gpt2": {}, "gpt_neox": {}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {}, "mamba": {}, "falcon_h1": {},
    "lfm2, convolutions": {"layer_types": ["conv", "full_attention"] * 2},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                    "moe_intermediate_size": 32, "first_k_dense_replace": 1}}


def verdict(name, tokenizer):
    """exact, refused, or WRONG: a model that is neither."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(",")[0], **SIZES | FAMILIES[name])
    lm = AutoModelForCausalLM.from_config(config).eval()
    try:
        check(lm, name)
        check(lm.base_model, name)
    except ValueError:
        return "refused"
    ids = torch.randint(3, 489, (1, 40), generator=torch.Generator().manual_seed(1))
    policy = Policy(lm, tokenizer, "\n", temperature=0, max_step_tokens=12, max_steps=1)
    [[end]] = policy.complete([Node("q", ids=ids[0].tolist())], 1)
    want = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 40:].tolist()
    tokens = []
    for node in end.path():
        tokens += node.ids
    return "exact" if cached_difference(lm) < 1e-5 and tokens == want else "WRONG"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types (all)")
    args = parser.parse_args(argv)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "A")
    print("| family | verdict |\n|---|---|")
    results = []
    for name in args.families or FAMILIES:
        results.append(verdict(name, tokenizer))
        print(f"| {name} | {results[-1]} |", flush=True)
    return int("WRONG" in results)


if __name__ == "__main__":
    sys.exit(main())

"""Models of others: each published PRM layout scores as its own forward does; each policy is exact or refused."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, random_qwen
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForTokenClassification,
)

from benchmarks import families
from common.driver import run_together, warn_once
from common.formats.published import export, fold
from common.models import bos, check
from common.policy import Policy, load_policy
from common.server import ServerPolicy
from prm_model import PRM, load_prm, main

QUESTION, STEPS = "Ben has 12 coins. How many?", ["January: 12+5=17", "Wait, 12+5=17", "Answer: 17"]
SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512, pad_token_id=0, eos_token_id=1)


def at(model, ids, places):
    """logits (places, labels) of one plain forward."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, places]


def trl_tokens(tokenizer, bos):
    """The rows that TRL 1.13.0 trains on: BOS if there is one, no line end behind the question, steps by themselves."""
    def tokens(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, places = bos + tokens(QUESTION), []
    for step in STEPS:
        ids += tokens(step) + tokens("\n")
        places.append(len(ids) - 1)
    return ids, places


def cached_scores(prm):
    """The same scores by the tree cache, one step after the other."""
    policy = Policy(random_qwen(), AutoTokenizer.from_pretrained(TINY / "A"), "\n")
    node, scores = policy.root("p", QUESTION), []
    for step in STEPS:
        node = policy.adopt(node, step)
        scores += prm.score_nodes([node]).values()
    return scores


def same(prm, direct):
    assert prm.score([QUESTION], [STEPS])[0] == pytest.approx(direct.tolist(), abs=1e-5)
    assert cached_scores(prm) == pytest.approx(direct.tolist(), abs=1e-5)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("family, bos", [("qwen2", False), ("llama", True)])
def test_a_token_classifier_of_trl(tmp_path, family, bos, labels):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "A")
    if bos:
        tokenizer.bos_token = tokenizer.decode([2])
        model = LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=labels))
    else:
        model = Qwen2ForTokenClassification(type(random_qwen().config)(**SIZES, num_labels=labels))
    model.score.bias.data.normal_()
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids, places = trl_tokens(tokenizer, [2] if bos else [])
    prm = load_prm(tmp_path)
    assert prm.encode(QUESTION, STEPS) == (ids, places)
    z = at(model, ids, places)
    same(prm, z[:, 0].sigmoid() if labels == 1 else z.softmax(-1)[:, 1])
    prm.save(tmp_path / "ours")  # written in our format it keeps their text
    same(load_prm(tmp_path / "ours"), z[:, 0].sigmoid() if labels == 1 else z.softmax(-1)[:, 1])


def test_three_labels_are_refused(tmp_path, tokenizer):
    Qwen2ForTokenClassification(type(random_qwen().config)(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="out_features=3.*not linear with one or two labels"):
        load_prm(tmp_path)


def test_skyworks_value_head(tmp_path, lm_folder):
    """Keys model.*, lm_head.weight and v_head.summary.*; BOS, then the question with its line end as one text."""
    folder = shutil.copytree(lm_folder, tmp_path / "skywork")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForPrmModel"]}))
    torch.manual_seed(3)
    head = torch.nn.Linear(32, 1)
    weights = {**load_file(folder / "model.safetensors"), "lm_head.weight": torch.zeros(512, 32)}
    save_file({**weights, **{f"v_head.summary.{k}": v for k, v in head.state_dict().items()}},
              folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    tokenizer.bos_token = tokenizer.decode([2])
    tokenizer.save_pretrained(folder)
    ids = tokenizer.encode(tokenizer.bos_token + QUESTION + "\n")
    places = []
    for step in STEPS:
        ids += tokenizer.encode(step) + [tokenizer.encode("\n")[-1]]
        places.append(len(ids) - 1)
    lm = AutoModelForCausalLM.from_pretrained(lm_folder)
    with torch.inference_mode():
        hidden = lm.model(torch.tensor([ids])).last_hidden_state[0, places]
        direct = head(hidden)[:, 0].sigmoid()
    prm = load_prm(folder)
    assert prm.encode(QUESTION, STEPS) == (ids, places)
    same(prm, direct)


def sentencepiece():
    """A tokenizer like Mistral's: a space before a text, bytes for line ends, BOS added."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<s>": 2}
    for piece in [f"<0x{i:02X}>" for i in range(256)] + ["▁", "к", "и", "ки", "▁ки", "▁+", "▁-", "▁1"] + [
            chr(i) for i in range(33, 127)]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("к", "и"), ("▁", "ки"), ("▁", "+"), ("▁", "-"), ("▁", "1")]
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def random_mistral(folder, tokenizer):
    torch.manual_seed(1)
    lm = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4096)).eval()
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm


def test_math_shepherds_marks(tmp_path):
    """The text of its card as one string; p = softmax over "+" and "-" at each mark."""
    tokenizer = sentencepiece()
    folder = tmp_path / "math-shepherd-mistral-7b-prm"
    lm = random_mistral(folder, tokenizer)
    ids = tokenizer.encode(f"{QUESTION} " + "\n".join(f"{step} ки" for step in STEPS))
    mark, candidates = tokenizer.encode("ки")[-1], tokenizer.encode("+ -")[1:]
    assert tokenizer.convert_ids_to_tokens([mark, *candidates]) == ["▁ки", "▁+", "▁-"]
    places = [i for i, token in enumerate(ids) if token == mark]
    prm = load_prm(folder)
    assert prm.encode(QUESTION, STEPS) == (ids, places)
    same(prm, at(lm, ids, places)[:, candidates].softmax(-1)[:, 0])


def test_rlhflows_chat_turns(tmp_path, tokenizer):
    """Each step is a user's turn, answered by "+", which is predicted by the last token of the header before it."""
    tokenizer = type(tokenizer).from_pretrained(TINY / "A")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<b>", "<h>", "<e>"]})
    tokenizer.chat_template = ("{{ '<b>' }}{% for m in messages %}<h>{{ m.role }}<h>{{ '\n\n' }}"
                               "{{ m.content | trim }}<e>{% endfor %}"
                               "{% if add_generation_prompt %}<h>assistant<h>{{ '\n\n' }}{% endif %}")
    folder = tmp_path / "RLHFlow" / "Llama3.1-8B-PRM-Mistral-Data"
    lm = random_mistral(folder, tokenizer)
    turns, direct = [], []
    plus_minus = [tokenizer.encode(mark)[-1] for mark in "+-"]
    for t, step in enumerate(STEPS):
        text = step if t else f"{QUESTION} {step}"
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        direct.append(at(lm, ids, -3)[plus_minus].softmax(-1)[0])
    prm = load_prm(folder)
    assert prm.encode(QUESTION, STEPS)[0] == ids[:-2]
    same(prm, torch.stack(direct))
    other = shutil.copytree(folder, tmp_path / "mine")  # of another name, but the caller knows
    same(load_prm(other, template="rlhflow"), torch.stack(direct))


def test_a_folder_that_is_no_prm(lm_folder, capsys):
    with pytest.raises(ValueError, match="no PRM of a known layout.*known are: .*TRL.*Skywork.*--fresh-head"):
        load_prm(lm_folder)
    arguments = ["--prm", str(lm_folder), "--question", QUESTION, "--steps", *STEPS, "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(arguments)
    main([*arguments, "--fresh-head"])
    assert "Answer: 17" in capsys.readouterr().out


def test_an_exported_prm_gives_the_same_scores(tmp_path):
    """In the layout of Qwen2.5-Math-PRM, read here without our code, and by load_prm."""
    folder = tmp_path / "vllm"
    main(["--prm", str(TINY / "prm"), "--export", str(folder), "--device", "cpu"])
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForProcessRewardModel"], "qwen2")
    prm, again = load_prm(TINY / "prm"), load_prm(folder)
    want = prm.score([QUESTION], [STEPS])[0]
    assert again.format == prm.format
    assert again.score([QUESTION], [STEPS])[0] == pytest.approx(want, abs=1e-6)
    weights = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"model", "score"}
    ids, places = prm.encode(QUESTION, STEPS)
    with torch.inference_mode():
        hidden = prm.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, places]
        hidden = (hidden @ weights["score.0.weight"].T + weights["score.0.bias"]).relu()
        z = hidden @ weights["score.2.weight"].T + weights["score.2.bias"]
    assert z.softmax(-1)[:, 1].tolist() == pytest.approx(want, abs=1e-6)


def test_other_families_are_not_exported(tmp_path):
    folder = tmp_path / "math-shepherd-mistral-7b-prm"
    random_mistral(folder, sentencepiece())
    with pytest.raises(ValueError, match="no class for a PRM of type mistral, only for one of type qwen2"):
        export(load_prm(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [1, 2])
def test_folding_loses_nothing_in_bfloat16(labels):
    """Not even where z_1 - z_0 of the weights would be rounded."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(labels, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    z = hidden @ weight.T
    w = fold(weight)
    folded = (hidden @ w["0.weight"].T + w["0.bias"]).relu() @ w["3.weight"].T + w["3.bias"]
    want = z[:, -1:] - z[:, :1] if labels == 2 else z
    assert torch.equal(folded, want)


# ------------------------------------------------------------ policies: exact, or refused


@pytest.mark.parametrize("family, verdict", [("cohere", "exact"), ("granite", "exact"), ("mistral, window", "refused"),
                                             ("gpt2", "refused")])
def test_the_table_of_families(family, verdict, capsys):
    assert families.main([family]) == 0
    row = f"| {family} | {verdict} |"
    assert capsys.readouterr().out.splitlines()[-1] == row
    assert row in (ROOT / "docs" / "models.md").read_text()


def test_the_table_has_every_family():
    table = (ROOT / "docs" / "models.md").read_text()
    assert [name for name in families.FAMILIES if f"| {name} | " not in table] == []


@pytest.mark.parametrize("load", [load_policy, lambda folder: load_prm(folder, fresh=True)], ids=["policy", "PRM"])
def test_a_window_longer_than_the_check_is_refused_by_name(tmp_path, tokenizer, load):
    config = MistralConfig(**SIZES, sliding_window=128)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type mistral cannot be used here"):
        load(tmp_path)


def test_the_check_leaves_the_model_as_it_was():
    lm = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=128)).eval()
    before, state = lm.config.to_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match="mistral"):
        check(lm, "x")
    assert lm.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    lm.config.sliding_window = SIZES["max_position_embeddings"]  # no token is ever outside of this one
    check(lm, "x")


def test_logits_that_the_head_alone_does_not_give_are_refused(monkeypatch):
    monkeypatch.setattr("common.models.own_logits", lambda lm, hidden: lm.get_output_embeddings()(hidden))
    with pytest.raises(ValueError, match="of type granite"):
        check(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval(), "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_not_refused(dtype):
    check(random_qwen(layers=12).to(getattr(torch, dtype)), "x")


def test_bos_once_where_the_tokenizer_adds_it(tokenizer):
    mistral = sentencepiece()
    assert (bos(tokenizer), bos(mistral)) == ([], [2])
    policy = Policy(random_qwen(), mistral, "\n")
    root = policy.root("p", QUESTION)
    assert root.ids == mistral(QUESTION + "\n")["input_ids"]
    assert 2 not in policy.adopt(root, STEPS[0]).ids
    ids, _ = PRM(random_qwen().model, mistral, separator="\n").encode(QUESTION, STEPS)
    assert [i for i, token in enumerate(ids) if token == 2] == [0]


def test_a_server_without_a_template_gets_text_and_adds_the_bos(tokenizer):
    assert "extra_body" not in ServerPolicy(f"http://127.0.0.1:9/v1?model=m#{TINY / 'A'}").sampling


# ------------------------------------------------------------ one separator for both


@pytest.mark.parametrize("policy, separator, template, warns", [
    ("\n\n", "\n", "plain", True), ("\n", "\n", "plain", False), ("\n\n", "\n", "trl", True),
    ("\n\n", "<extra_0>", "chat", False), ("\n\n", "\n", "rlhflow", False)])
def test_separators_that_differ_are_one_line(capsys, policy, separator, template, warns):
    policy = SimpleNamespace(separator=policy)
    prm = SimpleNamespace(format={"separator": separator, "template": template})
    warn_once.cache_clear()
    for _ in range(2):  # but not again for each batch of problems
        run_together([], policy, [prm, object()])
    want = ["warning: the policy ends a step by '\\n\\n', the PRM was trained with '\\n': --separator '\\n' makes "
            "them equal"] if warns else []
    assert capsys.readouterr().err.splitlines() == want


@pytest.mark.parametrize("served, said, want", [(str(TINY / "A"), None, "\n"), (str(TINY / "A"), "%", "%"),
                                                ("m", None, "\n\n")])
def test_a_server_takes_the_separator_of_the_folder_that_it_serves(served, said, want):
    assert load_policy(f"http://127.0.0.1:9/v1?model=m#{served}", separator=said).separator == want


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_an_export_overwrites_nothing(taken, tmp_path):
    target = tmp_path / "there"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is taken: a new folder is expected"):
        export(load_prm(TINY / "prm"), target)

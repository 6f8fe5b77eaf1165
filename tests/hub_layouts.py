"""Small models laid out file by file as on the hub: which files there are, how they are named, keys, and dtypes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.small import WORDS
from tests.small_lm import WORDS as OTHER_WORDS

_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _corpus() -> list[str]:
    chance = random.Random(0)
    words = [*WORDS, *OTHER_WORDS, *map(str, range(100)), "instruction", "response", "system", "user", "assistant"]
    return [" ".join(chance.choices(words, k=12)) for _ in range(400)]


def _sentencepiece(file: Path, kind: str, size: int, **options: Any) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus()),
        model_writer=model,
        vocab_size=size,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    file.write_bytes(model.getvalue())


def _byte_pairs(folder: Path, *special: str, whole: bool = False) -> int:
    """vocab.json and merges.txt, and with `whole` tokenizer.json; returns how many tokens there are."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_corpus(), vocab_size=400, special_tokens=[*special], show_progress=False)
    tokenizer.save_model(str(folder))
    if whole:
        tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def _config(config: Any, **as_there: Any) -> dict[str, Any]:
    """What config.json says; `dtype` only where it is given, under the name that the hub's files have for it."""
    said = config.to_dict()
    for key in ("dtype", "torch_dtype", "transformers_version"):
        said.pop(key, None)
    return {**said, **as_there}


def _pickle(tensors: Mapping[str, Tensor], file: Path) -> None:
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, file)


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}


def deberta_v3(folder: Path) -> Path:
    """microsoft/deberta-v3-base: config.json without dtype, spm.model, a pickle in float16 with pretraining heads."""
    folder.mkdir()
    special = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    pieces = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    _sentencepiece(folder / "spm.model", "unigram", 120, **{f"{k}_id": i for k, i in special.items()}, **pieces)
    torch.manual_seed(0)
    config = DebertaV2Config(
        **_SIZES,
        vocab_size=160,
        intermediate_size=48,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        layer_norm_eps=1e-7,
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tensors = {f"deberta.{key}": tensor for key, tensor in DebertaV2Model(config).state_dict().items()}
    for head in ("lm_predictions.lm_head", "mask_predictions"):
        tensors |= {f"{head}.dense.weight": torch.randn(32, 32), f"{head}.dense.bias": torch.zeros(32)}
        tensors |= {f"{head}.LayerNorm.weight": torch.ones(32), f"{head}.LayerNorm.bias": torch.zeros(32)}
    tensors |= {
        "lm_predictions.lm_head.bias": torch.zeros(160),
        "mask_predictions.classifier.weight": torch.ones(1, 32),
    }
    _pickle(_half(tensors), folder / "pytorch_model.bin")
    said = {k: v for k, v in _config(config, pos_att_type="p2c|c2p").items() if k != "architectures"}
    _write(folder, {"config.json": said, "tokenizer_config.json": {"do_lower_case": False, "vocab_type": "spm"}})
    return folder


def llama_7b(folder: Path) -> Path:
    """yahma/llama-7b-hf: tokenizer.model alone, float16 in two pickles with an index, inv_freq in each layer."""
    folder.mkdir()
    _sentencepiece(folder / "tokenizer.model", "bpe", 400, byte_fallback=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        **_SIZES, vocab_size=400, intermediate_size=48, max_position_embeddings=2048, initializer_range=0.1
    )
    tensors = dict(LlamaForCausalLM(config).state_dict())
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000 ** (-torch.arange(0, 8, 2) / 8)
    keys, names = sorted(tensors), [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, part in zip(names, parts, strict=True):
        _pickle(_half({key: tensors[key] for key in part}), folder / name)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(
        folder,
        {
            "config.json": _config(
                config, torch_dtype="float16", architectures=["LlamaForCausalLM"], pad_token_id=None
            ),
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True},
            "pytorch_model.bin.index.json": {
                "metadata": {"total_size": sum(2 * t.numel() for t in tensors.values())},
                "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
            },
            "special_tokens_map.json": tokens,
            "tokenizer_config.json": {
                **tokens,
                "add_bos_token": True,
                "add_eos_token": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
                "pad_token": None,
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
            },
        },
    )
    return folder


def roberta(folder: Path) -> Path:
    """roberta-base as it was: vocab.json and merges.txt, 514 positions for 512 tokens, the pretraining head."""
    folder.mkdir()
    size = _byte_pairs(folder, "<s>", "<pad>", "</s>", "<unk>", "<mask>")
    torch.manual_seed(0)
    config = RobertaConfig(
        **_SIZES,
        vocab_size=size,
        intermediate_size=48,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tensors = dict(RobertaForMaskedLM(config).state_dict())
    tensors["roberta.embeddings.position_ids"] = torch.arange(514).unsqueeze(0)
    _pickle(tensors, folder / "pytorch_model.bin")
    _write(folder, {"config.json": _config(config, architectures=["RobertaForMaskedLM"])})
    return folder


def opt(folder: Path) -> Path:
    """facebook/opt-125m: a pickle in float16, GPT-2's tokenizer with tokens of its own."""
    folder.mkdir()
    size = _byte_pairs(folder, "<s>", "<pad>", "</s>", "<unk>")
    torch.manual_seed(0)
    config = OPTConfig(
        **_SIZES, vocab_size=size, ffn_dim=48, max_position_embeddings=512, word_embed_proj_dim=32, dropout=0.0
    )
    tensors = {k: t for k, t in OPTForCausalLM(config).state_dict().items() if k != "lm_head.weight"}
    _pickle(_half(tensors), folder / "pytorch_model.bin")
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    more = {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}
    _write(
        folder,
        {
            "config.json": _config(config, torch_dtype="float16", architectures=["OPTForCausalLM"]),
            "special_tokens_map.json": tokens,
            "tokenizer_config.json": {**tokens, **more},
        },
    )
    return folder


def gpt2(folder: Path) -> Path:
    """gpt2: keys without `transformer.`, the causal masks among them, no padding token."""
    folder.mkdir()
    size = _byte_pairs(folder, "<|endoftext|>", whole=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    tensors = dict(GPT2Model(config).state_dict())
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(512, 512).tril().view(1, 1, 512, 512)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(
        folder,
        {
            "config.json": _config(config, architectures=["GPT2LMHeadModel"]),
            "tokenizer_config.json": {"model_max_length": 512},
        },
    )
    return folder


def qwen2_5(folder: Path) -> Path:
    """Qwen/Qwen2.5-0.5B-Instruct: safetensors in bfloat16, the head tied to the embedding, a chat template."""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = _byte_pairs(folder, *special, whole=True)
    torch.manual_seed(0)
    config = Qwen2Config(
        **_SIZES,
        vocab_size=size,
        intermediate_size=48,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.1,
    )
    tensors = Qwen2ForCausalLM(config).to(torch.bfloat16).state_dict()
    del tensors["lm_head.weight"]
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    added = {str(i): {"content": token, "special": True} for i, token in enumerate(special)}
    _write(
        folder,
        {
            "config.json": _config(config, torch_dtype="bfloat16", architectures=["Qwen2ForCausalLM"]),
            "generation_config.json": {"eos_token_id": [2, 0], "pad_token_id": 0},
            "tokenizer_config.json": {
                "added_tokens_decoder": added,
                "bos_token": None,
                "chat_template": _CHATML,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "tokenizer_class": "Qwen2Tokenizer",
            },
        },
    )
    return folder


def bert(folder: Path) -> Path:
    """bert-base-uncased: vocab.txt, LayerNorm.gamma and beta, the pretraining heads."""
    folder.mkdir()
    words = [*WORDS, *(word.lower() for word in OTHER_WORDS)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]))
    torch.manual_seed(0)
    config = BertConfig(
        **_SIZES, vocab_size=64, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    old = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    tensors = {}
    for key, tensor in BertForPreTraining(config).state_dict().items():
        for new, then in old:
            key = key.replace(new, then)
        tensors[key] = tensor
    _pickle(tensors, folder / "pytorch_model.bin")
    _write(
        folder,
        {
            "config.json": _config(config, architectures=["BertForMaskedLM"]),
            "tokenizer_config.json": {"do_lower_case": True},
        },
    )
    return folder


LAYOUTS = {
    "deberta_v3": deberta_v3,
    "llama_7b": llama_7b,
    "roberta": roberta,
    "opt": opt,
    "gpt2": gpt2,
    "qwen2_5": qwen2_5,
    "bert": bert,
}

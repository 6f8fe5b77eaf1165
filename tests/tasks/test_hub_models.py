"""Models as they lie on the hub are loaded whole, in the dtype that is said, or refused with what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import sentencepiece
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config

from aflora_dist import AFLoRAError, extras
from aflora_dist.options import Config, ModelConfig
from aflora_dist.tasks import model as models
from aflora_dist.tasks import unreadable
from aflora_dist.tasks.batches import Texts, create_loaders
from aflora_dist.tasks.data import Data
from aflora_dist.tasks.dtypes import check_weights
from aflora_dist.tasks.limits import Limits
from aflora_dist.tasks.model import load_base, load_language_model, outline_base
from tests.hub_layouts import LAYOUTS

HALF = {"deberta_v3": torch.float32, "llama_7b": torch.float32, "opt": torch.float32, "qwen2_5": torch.bfloat16}
HEADS = {"deberta_v3": ["pooler", "classifier"], "bert": ["classifier"], "roberta": ["classifier"]}
DECODERS = ("llama_7b", "opt", "gpt2", "qwen2_5")
_SIGHT = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
TEXT = "good film the plot is very awful 23"


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder laid out like that, made once."""
    folder = tmp_path_factory.mktemp("hub")

    def made(name: str) -> Path:
        return folder / name if (folder / name).is_dir() else LAYOUTS[name](folder / name)

    return made


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by its own keys."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.bin"):
        found |= torch.load(file, weights_only=True)
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_is_the_one_that_is_stored(name: str, lying: Callable[[str], Path]) -> None:
    folder = lying(name)
    loaded, tokenizer, head = load_base(ModelConfig(name=str(folder)), ["no", "yes"])
    assert head == HEADS.get(name, ["score"])
    dtype = HALF.get(name, torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {dtype} == {loaded.config.dtype}
    there = stored(folder)
    prefix = f"{loaded.base_model_prefix}."
    for key, parameter in loaded.named_parameters():
        if not key.startswith(tuple(f"{module}." for module in head)):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            kept = next(there[k] for k in (key, old, key.removeprefix(prefix)) if k in there)
            assert torch.equal(parameter, kept.to(dtype)), key
    assert tokenizer.pad_token_id is not None
    assert loaded.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", DECODERS)
def test_a_language_model_lacks_nothing(name: str, lying: Callable[[str], Path]) -> None:
    loaded, tokenizer = load_language_model(ModelConfig(name=str(lying(name))))
    assert {p.dtype for p in loaded.parameters()} == {HALF.get(name, torch.float32)}
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (name != "llama_7b")
    assert bool(tokenizer.chat_template) == (name == "qwen2_5")


@pytest.mark.parametrize(("name", "file"), [("deberta_v3", "spm.model"), ("llama_7b", "tokenizer.model")])
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(
    name: str, file: str, lying: Callable[[str], Path]
) -> None:
    folder = lying(name)
    _, tokenizer, _ = load_base(ModelConfig(name=str(folder)), ["no", "yes"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / file)).encode(TEXT)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == pieces
    assert tokenizer.decode(pieces).strip() == TEXT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["deberta_v3", "qwen2_5", "gpt2"])
def test_a_dtype_that_is_named_is_taken(name: str, dtype: Any, lying: Callable[[str], Path]) -> None:
    loaded, _, _ = load_base(ModelConfig(name=str(lying(name)), dtype=dtype), ["no", "yes"])
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("name", ["opt", "qwen2_5", "llama_7b"])
def test_a_plan_counts_on_the_dtype_that_the_run_will_have(name: str, lying: Callable[[str], Path]) -> None:
    for dtype in (None, "float16"):
        config = ModelConfig(name=str(lying(name)), dtype=dtype)  # type: ignore[arg-type]
        outlined, _ = outline_base(config, ["no", "yes"])
        loaded, _, _ = load_base(config, ["no", "yes"])
        assert [p.dtype for p in outlined.parameters()] == [p.dtype for p in loaded.parameters()]


def launched(engine: DistributedType, precision: str) -> Any:
    plugin = SimpleNamespace(zero_stage=2) if engine == DistributedType.DEEPSPEED else None
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(state=state, distributed_type=engine, mixed_precision=precision)


def test_deepspeed_without_mixed_precision_is_given_float32(lying: Callable[[str], Path]) -> None:
    zero, plain = launched(DistributedType.DEEPSPEED, "no"), launched(DistributedType.NO, "no")
    config = ModelConfig(name=str(lying("qwen2_5")))
    for accelerator, dtype in ((zero, torch.float32), (plain, torch.bfloat16)):
        loaded, _, _ = load_base(config, ["no", "yes"], accelerator)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    for dtype, precision in (("float16", "fp16"), ("bfloat16", "bf16")):
        named = ModelConfig(dtype=dtype)  # type: ignore[arg-type]
        with pytest.raises(AFLoRAError, match=f"dtype={dtype} does not work with DeepSpeed.*precision {precision}"):
            check_weights(named, zero)
        check_weights(named, launched(DistributedType.DEEPSPEED, precision))
        check_weights(named, plain)


def test_roberta_has_two_positions_less_than_it_says(lying: Callable[[str], Path]) -> None:
    for name, positions in (("roberta", 512), ("bert", 512), ("deberta_v3", 512), ("opt", 512)):
        loaded, _, _ = load_base(ModelConfig(name=str(lying(name))), ["no", "yes"])
        limits = Limits.of(loaded, name)
        limits.check_length(positions)
        if name != "deberta_v3":  # which counts differences
            loaded(input_ids=torch.full((1, positions), 7))  # it has them
        with pytest.raises(AFLoRAError, match=rf"max_length={positions + 1} is more than the {positions} positions"):
            limits.check_length(positions + 1)


@pytest.mark.parametrize("gone", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"]])
@pytest.mark.parametrize("name", ["deberta_v3", "llama_7b"])
def test_a_tokenizer_that_cannot_be_read_names_the_packages(
    name: str, gone: list[str], lying: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*args: Any, **kwargs: Any) -> None:  # what transformers says without them
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    folder = str(lying(name))
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", nothing)
    missing = {unreadable._SENTENCEPIECE[package] for package in gone}
    monkeypatch.setattr(unreadable, "installed", lambda module: module not in missing)
    with pytest.raises(AFLoRAError, match=rf"sentencepiece and protobuf.*: pip install {' '.join(gone)}\.") as raised:
        load_base(ModelConfig(name=folder), ["no", "yes"])
    assert "tiktoken" not in str(raised.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "file", "left", "said"),
    [
        ("qwen2_5", "model.safetensors", 0.5, "model.safetensors cannot be read: .* damaged: fetch or save it again"),
        ("qwen2_5", "model.safetensors", 0, "model.safetensors cannot be read: .* damaged: fetch or save it again"),
        ("deberta_v3", "pytorch_model.bin", 0.5, "pytorch_model.bin cannot be read: it is cut, or no file of weights"),
        ("deberta_v3", "pytorch_model.bin", None, "pytorch_model.bin is only Git LFS's pointer .* git lfs pull"),
        ("llama_7b", "pytorch_model-00002-of-00002.bin", 0.5, "00002-of-00002.bin cannot be read: it is cut"),
        ("deberta_v3", "spm.model", 0.5, "no SentencePiece model .* that is whole"),
        ("deberta_v3", "spm.model", None, "spm.model is only Git LFS's pointer"),
        ("qwen2_5", "tokenizer.json", 0.5, "tokenizer.json cannot be read: .*line.* Fetch or save it again"),
    ],
)
def test_a_file_that_is_cut_or_not_fetched_is_named(
    name: str, file: str, left: float | None, said: str, lying: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(lying(name), folder)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(POINTER if left is None else whole[: int(len(whole) * left)])
    config, decodes = ModelConfig(name=str(folder)), name in DECODERS

    def load() -> None:
        models.fetch(config, language_model=decodes)
        _ = load_language_model(config) if decodes else load_base(config, ["no", "yes"])

    with pytest.raises(AFLoRAError, match=rf"{folder}.*{said}"):
        load()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("named otherwise", r"lacks 37 of 37 weights .* bert.embeddings.word_embeddings.weight, .*\(module\."),
        ("lacks one", r"lacks 1 of 37 weights .* sizes: bert.encoder.layer.1.output.dense.weight\. They"),
        ("fewer words", r"lacks 1 of 37 weights .* sizes: bert.embeddings.word_embeddings.weight\. They"),
    ],
)
def test_a_checkpoint_without_the_model_s_own_weights_is_refused(
    how: str, said: str, lying: Callable[[str], Path], tmp_path: Path
) -> None:
    """They would be frozen at random; a head, and a pooler, would train."""
    folder = tmp_path / "model"
    shutil.copytree(lying("bert"), folder)
    tensors = stored(folder)
    if how == "named otherwise":  # as DataParallel does
        tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
    if how == "lacks one":
        del tensors["bert.encoder.layer.1.output.dense.weight"]
    if how == "fewer words":
        tensors["bert.embeddings.word_embeddings.weight"] = tensors["bert.embeddings.word_embeddings.weight"][:40]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(AFLoRAError, match=f"{folder}.*{said}"):
        load_base(ModelConfig(name=str(folder)), ["no", "yes"])


def test_what_is_said_of_a_text_does_not_hang_on_longer_ones_beside_it(
    lying: Callable[[str], Path], tmp_path: Path
) -> None:
    """Generating models' tokenizers pad on the left, and GPT-2 counts positions from there."""
    folder = tmp_path / "model"
    shutil.copytree(lying("gpt2"), folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512, "padding_side": "left"}')
    model, tokenizer, _ = load_base(ModelConfig(name=str(folder)), ["no", "yes"])
    assert tokenizer.padding_side == "left"
    collate = Texts(Config(), tokenizer, Limits.of(model, "gpt2"), Accelerator(cpu=True)).collate
    rows = [dict(tokenizer(text)) for text in ("good film", TEXT)]
    with torch.no_grad():
        alone, together = model(**collate(rows[:1])).logits, model(**collate(rows)).logits[:1]
    torch.testing.assert_close(together, alone)


def test_a_model_that_sees_too_is_told_by_what_texts_are_padded(lying: Callable[[str], Path], tmp_path: Path) -> None:
    """Its text has a configuration of its own, in which a classifier's end of a text is looked up."""
    folder = tmp_path / "model"
    shutil.copytree(lying("qwen2_5"), folder)
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    config = Gemma3Config(
        text_config={**text, "num_key_value_heads": 1, "vocab_size": 400, "pad_token_id": None},
        vision_config={**_SIGHT, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    model, tokenizer, head = load_base(ModelConfig(name=str(folder)), ["no", "yes"])
    assert head == ["score"]
    rows = tokenizer(["good film", TEXT], padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**rows).logits[0]
        alone = model(**tokenizer("good film", return_tensors="pt")).logits[0]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(("name", "left"), [("bert", r"all are \[UNK\]"), ("qwen2_5", "nothing is left of them")])
def test_texts_of_which_no_word_is_known_are_not_trained_on(
    name: str, left: str, lying: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of another language; or of a tokenizer that is of another kind than is said, here without its byte pairs."""
    folder = tmp_path / "model"
    shutil.copytree(lying(name), folder)
    if name == "qwen2_5":
        words = Tokenizer(WordLevel({"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "good": 3}))
        words.save(str(folder / "tokenizer.json"))
        for file in ("vocab.json", "merges.txt"):
            (folder / file).unlink(missing_ok=True)
    tokenizer = models.load_tokenizer(ModelConfig(name=str(folder)))
    text = "\u6620\u753b" if name == "bert" else "good"
    rows = datasets.Dataset.from_dict({"text": [text] * 64, "label": [0, 1] * 32})
    data = Data("files", rows, {"validation": rows}, ["no", "yes"], ("accuracy",))
    limits = Limits(name, 512, 400, 2)
    with pytest.raises(AFLoRAError, match=f"tokenizer of '{name}' knows no word of the first 64 .*: {left}"):
        create_loaders(Config(), data, tokenizer, limits, Accelerator(cpu=True))


def test_a_pointer_that_nobody_reads_is_no_reason_to_end(lying: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(lying("gpt2"), folder)
    for file in ("pytorch_model.bin", "tf_model.h5"):
        (folder / file).write_bytes(POINTER)
    models.fetch(ModelConfig(name=str(folder)), language_model=True)
    load_language_model(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("name", ["bert", "deberta_v3", "roberta", "gpt2", "qwen2_5", "llama_7b"])
def test_a_model_that_was_saved_without_its_tokenizer_is_refused(
    name: str, lying: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers makes most of them up, without a vocabulary: every word would be unknown, or none be left."""
    folder = tmp_path / "model"
    shutil.copytree(lying(name), folder)
    for file in folder.iterdir():
        if "config.json" not in file.name and not re.match(r"(pytorch_)?model", file.name):
            file.unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    config = ModelConfig(name=str(folder))
    with pytest.raises(AFLoRAError, match=r"no tokenizer.* [Ss]ave the (model's )?tokenizer"):
        load_base(config, ["no", "yes"])


def test_a_module_in_a_package_that_is_not_there_is_not_installed() -> None:
    assert extras.installed("google.protobuf")
    assert not extras.installed("no_such_package_here.at_all")


def test_a_model_of_no_such_kind_is_said_to_be_none(lying: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(lying("qwen2_5"), folder)
    T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=4, vocab_size=100).save_pretrained(folder)
    said = (
        r"transformers has no language model that goes on with a text of this kind of model \(T5Config\): AutoModelFor"
    )
    with pytest.raises(AFLoRAError, match=said):
        load_language_model(ModelConfig(name=str(folder)))


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(
        AFLoRAError, match=r"'models/of/mine' could not be loaded: .*\(model.name is a folder, a hub id"
    ):
        load_base(ModelConfig(name="models/of/mine"), ["no", "yes"])

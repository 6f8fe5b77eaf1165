"""An adapter is saved whole, by one call that is the same on every engine; and never in part."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, AFLoRAError, DivergedError, FreezingConfig
from tests.launch import free_port, launch_series
from tests.pages import PAGES, ROOT, snippets
from tests.small import add_by_transformers
from tests.small_lm import make_small_language_model

SAVING = [page for page in PAGES if any(re.search(r"\.save_|\.load_state", b.text) for b in snippets(page))]
# By launch configuration: the engine, and its ranks.
LAUNCHED = {
    "cpu": ("single", 1),
    "ddp": ("ddp", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "fsdp2": ("fsdp2", 2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHED)
def test_what_the_pages_save_is_all_that_was_trained(name: str, tmp_path: Path) -> None:
    """Their snippets as written, with launch/ and ds_configs/ as they are."""
    engine, ranks = LAUNCHED[name]
    assert [page.name for page in SAVING] == ["own_loop.md", "trainer.md"]
    model = make_small_language_model(tmp_path / "model")
    kinds = {"own_loop.md": AutoModelForSequenceClassification, "trainer.md": AutoModelForCausalLM}
    runs = []
    for page in SAVING:
        folder = tmp_path / page.stem
        folder.mkdir()
        for shipped in ("launch", "ds_configs"):
            (folder / shipped).symlink_to(ROOT / shipped)
        worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
        runs.append([*worker, "tests.workers.page", *map(str, (page, model, folder))])
    launcher = ["--config_file", str(ROOT / "launch" / f"{name}.yaml"), "--main_process_port", str(free_port())]
    launch_series(engine, ranks, runs, launcher=launcher)
    for page in SAVING:
        trained = torch.load(tmp_path / page.stem / "values.pt")
        assert (trained["kind"], trained["ranks"]) == (engine, ranks)
        base = kinds[page.name].from_pretrained(model)
        loaded = dict(PeftModel.from_pretrained(base, tmp_path / page.stem / "adapter").named_parameters())
        assert len(trained["values"]) >= 40
        for parameter, value in trained["values"].items():
            assert torch.equal(loaded[parameter], value), (page.name, parameter)
        if page.name == "trainer.md":
            assert trained["ways"] == [WAYS.get(engine, [SAVED] * ranks)[rank] for rank in range(ranks)]


SAVED = {"bare": "saved", "gathered": "saved", "is_main_process": "saved"}
REFUSED = dict.fromkeys(SAVED, "refused")
# What comes of PEFT's own save_pretrained on each rank, where ranks hold shards. Above rank 0 a gathered state dict is
# empty: written, it would take the place of the whole one.
WAYS = {
    "fsdp2": [SAVED | {"bare": "refused"}, SAVED | {"bare": "refused", "gathered": "refused"}],
    "zero3": [REFUSED, REFUSED | {"is_main_process": "saved"}],  # where nothing was gathered
}


def train(model: Any) -> AdaptiveFreezing:
    """One update and a freeze."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = FreezingConfig(total_steps=4, initial_steps=1, final_steps=1)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    accelerator.backward(model(input_ids=TOKENS, labels=TOKENS).loss)
    optimizer.step()
    freezing.freeze(freezing.remaining[:1])
    return freezing


TOKENS = torch.arange(1, 13).view(2, 6)


def resized(base: Any) -> Any:
    base.resize_token_embeddings(60)
    return get_peft_model(base, AFLoRAConfig(task_type="CAUSAL_LM"))


def several(base: Any) -> Any:
    model = get_peft_model(base, AFLoRAConfig(task_type="CAUSAL_LM", modules_to_save=["norm"]))
    model.add_adapter("other", AFLoRAConfig(r=2, task_type="CAUSAL_LM"))
    return model


def by_transformers(base: Any) -> Any:
    add_by_transformers(base, AFLoRAConfig(task_type="CAUSAL_LM"))
    return base


@pytest.mark.parametrize("adapted", [several, resized, by_transformers], ids=lambda adapt: adapt.__name__)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_is_gathered_is_what_peft_would_write(adapted: Callable[[Any], Any], tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    train(model).save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file())
    for file in (file for file in files if file.suffix == ".safetensors"):
        ours, theirs = load_file(tmp_path / "ours" / file), load_file(tmp_path / "theirs" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_model_that_saves_no_adapters_is_named(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_small_language_model(tmp_path / "base"))
    freezing = train(inject_adapter_in_model(AFLoRAConfig(task_type="CAUSAL_LM"), base))
    with pytest.raises(AFLoRAError, match="LlamaForCausalLM holds an AFLoRA adapter, but does not save adapters"):
        freezing.save_pretrained(tmp_path / "adapter")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    freezing = train(several(AutoModelForCausalLM.from_pretrained(base)))
    (tmp_path / "file").touch()
    with pytest.raises(AFLoRAError, match=r"The adapter could not be written to .*/file/adapter: Not a directory"):
        freezing.save_pretrained(tmp_path / "file" / "adapter")


def test_what_is_not_finite_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    freezing = train(several(AutoModelForCausalLM.from_pretrained(base)))
    freezing.save_pretrained(tmp_path / "adapter")
    kept = {path: path.read_bytes() for path in (tmp_path / "adapter").rglob("*") if path.is_file()}
    with torch.no_grad():
        freezing.engine.parameters[freezing.engine.trainable[0]].fill_(float("nan"))
    with pytest.raises(DivergedError, match="is not finite after step"):
        freezing.save_pretrained(tmp_path / "adapter")
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").rglob("*") if path.is_file()} == kept

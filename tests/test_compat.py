"""What differs between the releases of other libraries: each way tried, whichever release is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from peft import PeftModel
from peft.utils import PeftType
from torch import nn

from aflora_dist import AFLoRAConfig, AFLoRAError
from aflora_dist.compat import accelerate as compat_accelerate
from aflora_dist.compat import deepspeed
from aflora_dist.compat import transformers as compat_transformers
from aflora_dist.compat.accelerate import log, refuse_forgetful_load, store_configuration, unwrap
from aflora_dist.compat.deepspeed import divide_once, gather_completely, offsets, unpin
from aflora_dist.compat.peft import teach_saving
from aflora_dist.compat.transformers import checkpoint_activations
from tests.launch import ROOT, launch
from tests.versions import LIBRARIES, compare
from tests.workers.tiny import build_base, build_model


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_activations_are_checkpointed_under_the_name_that_there_is(name: str) -> None:
    told: list[Any] = []
    checkpoint_activations(SimpleNamespace(**{name: told.append}), use_reentrant=True)
    assert told == [{"use_reentrant": True}]


def test_a_model_s_own_loading_is_refused_where_it_leaves_values_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(compat_transformers, "is_older", lambda library, release: True)
    with pytest.raises(AFLoRAError, match=r"PeftModel\.from_pretrained.*, or install"):
        build_base().load_adapter(str(tmp_path))
    PeftModel.from_pretrained(build_base(), str(tmp_path)).load_adapter(str(tmp_path), "other")


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_checkpoint_of_which_the_optimizer_s_state_would_be_left_is_refused(
    older: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat_accelerate, "is_older", lambda library, release: older)
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name=kind))
    accelerator: Any = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    if older and kind == "SHARDED_STATE_DICT":
        with pytest.raises(AFLoRAError, match=r"accelerate 1\.13 or later reads this one"):
            refuse_forgetful_load(accelerator)
    else:
        refuse_forgetful_load(accelerator)
    refuse_forgetful_load(Accelerator(cpu=True))


def test_a_model_is_unwrapped_where_single_layers_of_it_are_compiled() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    for accelerator in (
        Accelerator(cpu=True),
        SimpleNamespace(unwrap_model=lambda model, **_: vars(model)["_orig_mod"]),
    ):
        assert unwrap(accelerator, model) is model
        assert "_orig_mod" not in vars(model)


def test_a_model_is_unwrapped_of_what_is_wrapped_around_all_of_it() -> None:
    model, compiled = build_model(), nn.Sequential(torch.compile(nn.Linear(2, 2)))
    for wrapped in (model, torch.compile(model), compile_regions(model), nn.DataParallel(model)):
        assert unwrap(Accelerator(cpu=True), wrapped) is model
    assert unwrap(Accelerator(cpu=True), nn.DataParallel(compiled)) is compiled


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_trackers_are_told_the_step_and_begin_once(name: str) -> None:
    told: list[Any] = []
    inner = SimpleNamespace(
        log=lambda values, step: told.append((values, step)),
        config=SimpleNamespace(update=lambda values, allow_val_change: told.append(values)),
    )
    own = {"log": inner.log, "store_init_configuration": told.append}
    refused = {"trackio": "log", "wandb": "store_init_configuration"}.get(name)
    tracker = SimpleNamespace(name=name, tracker=inner, **{key: own[key] for key in own if key != refused})
    store_configuration(tracker, {"lr": 1})
    log(tracker, {"loss": 2.0}, 3)
    assert told == [{"lr": 1}, ({"loss": 2.0}, 3)]


def test_parameters_lie_one_after_the_other_where_deepspeed_says_nothing() -> None:
    groups = [[torch.empty(2, 3), torch.empty(4), torch.empty(1)], [torch.empty(5)]]
    silent = SimpleNamespace(round_robin_bit16_groups=groups)
    assert offsets(silent) == [[0, 6, 10], [0]]
    padded = SimpleNamespace(round_robin_bit16_groups=groups, round_robin_bit16_offsets=[[0, 8, 12], [0]])
    assert offsets(padded) == [[0, 8, 12], [0]]


def test_deepspeed_s_own_pinned_buffers_are_let_go_of_where_it_has_some() -> None:
    let_go: list[bool] = []
    unpin(SimpleNamespace(_unpin_offload_buffers=lambda: let_go.append(True)))
    unpin(SimpleNamespace())
    assert let_go == [True]


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_deepspeed_that_divides_at_each_output_is_given_a_loss_that_is_divided(
    old: bool, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "is_older", lambda library, release: old)
    told: list[tuple[float, bool]] = []
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: 4,
        backward=lambda loss, retain_graph=False, scale_wrt_gas=True: told.append((loss, scale_wrt_gas)),
    )
    for _ in range(2):  # attaching again changes nothing
        divide_once(engine)
    engine.backward(8.0, scale_wrt_gas=scaled)
    assert told == [(2.0 if old and scaled else 8.0, scaled and not old)]


@pytest.mark.parametrize(("old", "device"), [(True, "cpu"), (True, "cuda"), (False, "cpu")])
def test_a_deepspeed_that_waits_for_the_last_of_several_gathers_one_after_the_other_on_a_cpu(
    old: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[Any] = []

    class Init:
        def _allgather_params_coalesced(self, param_list: list[str], hierarchy: int, quantize: bool) -> None:
            waited.append((param_list[-1], hierarchy, quantize))

    monkeypatch.setattr(deepspeed, "is_older", lambda library, release: old)
    monkeypatch.setattr("deepspeed.runtime.zero.partition_parameters.Init", Init)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    for _ in range(2):  # attaching again changes nothing
        gather_completely()
    Init()._allgather_params_coalesced(["A", "B"], 0, quantize=False)
    each = ["A", "B"] if (old, device) == (True, "cpu") else ["B"]
    assert waited == [(name, 0, False) for name in each]


@pytest.mark.distributed
def test_what_zero3_gathers_together_is_what_was_written() -> None:
    """Before a model is loaded, and freezing attached; with DeepSpeed 0.19.3 as it is a tenth of the rounds fail."""
    done = launch("zero3", 3, str(ROOT / "tests" / "workers" / "gathered.py"))
    assert done.returncode == 0, done.stderr
    assert "0 wrong" in done.stdout.splitlines()


@pytest.fixture
def forgetful_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `teach_saving` changes in PEFT is as before after the test."""
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "peft"]:
        if "get_peft_model_state_dict" in vars(module):
            found: Any = module.get_peft_model_state_dict
            monkeypatch.setattr(module, "get_peft_model_state_dict", getattr(found, "__wrapped__", found))
    for attribute in ("_member_map_", "_value2member_map_", "_member_names_"):
        monkeypatch.setattr(PeftType, attribute, getattr(PeftType, attribute).copy())


def test_a_peft_that_asks_no_tuner_saves_what_was_checked(forgetful_peft: None) -> None:
    """AFLoRA itself is saved so before PEFT 0.21: tests/adapter looks at what is refused."""
    seen: list[tuple[nn.Module, str, set[str]]] = []
    teach_saving("AFLORA", lambda model, name, state: seen.append((model, name, {*state})))
    assert "AFLORA" in list(PeftType)
    model = build_model()
    model.add_adapter("other", AFLoRAConfig(r=2, task_type="SEQ_CLS"))
    found = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert seen == [(model, "other", {*model.state_dict()})]
    assert found["base_model.model.bert.encoder.layer.0.output.dense.aflora.A"].shape == (2, 48)
    lora = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    assert len(peft.get_peft_model_state_dict(lora)) == 2
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "| the same | 0.0e+00 | 0.0e+00 |"),
        ({"losses": [1.0, 0.4]}, "| the same | 2.0e-01 | 0.0e+00 |"),
        ({"events": [[3, ["A"], {"A": 1.0, "B": 4.0}]]}, "| the same | 0.0e+00 | 5.0e-01 |"),
        ({"events": [[3, ["B"], {"A": 1.0, "B": 2.0}]]}, "| A at 3 but B at 3 | 0.0e+00 | 0.0e+00 |"),
        ({"events": []}, "| A at 3 but nothing at None | 0.0e+00 | 1.0e+00 |"),
    ],
)
def test_what_a_release_changes_in_silence_shows(
    changed: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"losses": [1.0, 0.5], "events": [[3, ["A"], {"A": 1.0, "B": 2.0}]]}
    found = [{"versions": dict.fromkeys(LIBRARIES, "1"), "trainings": {"t": t}} for t in (first, first | changed)]
    assert compare(found) is (not changed)
    assert capsys.readouterr().out.splitlines()[-1].endswith(told)

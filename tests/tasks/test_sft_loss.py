"""The chunked loss is the plain loss in a fraction of its memory; packed examples have the gradient of single ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aflora_dist import AFLoRAConfig, AFLoRAError
from aflora_dist.tasks.sft.batching import IGNORED, Collator, PromptCollator, pack
from aflora_dist.tasks.sft.loss import ChunkedCrossEntropy
from tests.small_lm import PIECES, make_small_language_model

EXAMPLES = [
    {"input_ids": [2, *range(10, 10 + n)], "labels": [IGNORED] * (1 + n // 3) + list(range(10 + n // 3, 10 + n))}
    for n in (3, 17, 6, 9, 2, 20, 5)
]


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_small_language_model(tmp_path / "model"))


def adapted(base: Any, **options: Any) -> Any:
    config = AFLoRAConfig(r=2, task_type="CAUSAL_LM", freezing="never", freezable="all", **options)
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if name.endswith("s_b"):
            torch.nn.init.normal_(p, std=0.1)  # else A and B have no gradient
    return model


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, examples: list[dict[str, Any]]) -> Tensor:
    """An example at a time."""
    total = torch.zeros(())
    for example in examples:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(example["labels"][1:]), reduction="sum")
    return total


def called(loss: ChunkedCrossEntropy, model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("positions", "targets")}
    return loss(model, inputs, batch["positions"], batch["targets"])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, at=name: f"{at}: {m}")


def head_trains(base: Any) -> Any:
    return adapted(base, modules_to_save=["lm_head"])


def head_has_lora(base: Any) -> Any:
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))


def all_trains(base: Any) -> Any:
    return base


@pytest.mark.parametrize("make", [adapted, head_trains, head_has_lora, all_trains])
@pytest.mark.parametrize("width", [None, 24, 200])
def test_chunked_and_packed_have_the_plain_loss_s_gradient(
    make: Callable[[Any], Any], width: int | None, base: Any
) -> None:
    model = make(base).train()
    expected = plain(model, EXAMPLES)
    wanted = gradients(model, expected)
    loss = ChunkedCrossEntropy(model, logits_per_chunk=3 * len(PIECES))
    found = called(loss, model, Collator(0, width=width)(EXAMPLES))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_close(gradients(model, found), wanted)
    with torch.no_grad():
        assert called(loss, model, Collator(0, 8, width)(EXAMPLES)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert model(input_ids=torch.tensor([[2, 10]])).logits.shape == (1, 2, len(PIECES))  # its head is its own again


def test_examples_that_attended_to_each_other_would_show(base: Any) -> None:
    batch = Collator(0, width=200)(EXAMPLES)
    loss = ChunkedCrossEntropy(base)
    right = called(loss, base, batch)
    places = torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)
    assert abs(called(loss, base, {**batch, "position_ids": places}) - right) > 1e-2


def test_a_model_that_caps_its_logits_has_its_own_loss(base: Any) -> None:
    own = type(base).forward

    class Capped(type(base)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = own(self, *args, **kwargs)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    for kind, whole in ((type(base), False), (Capped, True)):
        base.__class__ = kind
        loss = ChunkedCrossEntropy(base)
        loss.rehearse(base, {"input_ids": torch.arange(8).unsqueeze(0)})
        assert loss.whole is whole
        found = called(loss, base, Collator(0)(EXAMPLES))
        assert found.item() == pytest.approx(plain(base, EXAMPLES).item(), rel=1e-6)


def test_a_model_without_a_head_is_refused(base: Any) -> None:
    base.get_output_embeddings = lambda: None
    with pytest.raises(AFLoRAError, match="has no language-model head"):
        ChunkedCrossEntropy(base)


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive that were made inside, at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_a_vocabulary_of_128k_takes_at_most_a_third_of_the_memory() -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = adapted(LlamaForCausalLM(config))
    tokens = torch.randint(0, 128_256, (2, 96))
    batch = Collator(0)([{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens])
    peaks = []
    chunked = ChunkedCrossEntropy(model)
    for compute in (
        lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        lambda: called(chunked, model, batch) / len(batch["targets"]),
    ):
        with Peak() as peak:
            loss = compute()
            loss.backward()
        peaks.append((peak.most, loss.item()))
    assert peaks[1][1] == pytest.approx(peaks[0][1], rel=1e-5)
    print(f"plain {peaks[0][0] / 2**20:.0f} MiB, chunked {peaks[1][0] / 2**20:.0f} MiB")
    assert 3 * peaks[1][0] <= peaks[0][0]
    assert peaks[0][0] > 2 * 190 * 128_256 * 4  # the plain one's logits and their gradient were seen


def test_rows_are_packed_full_and_no_example_is_cut() -> None:
    rows = pack([3, 17, 6, 9, 2, 20, 5], 24)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert len(rows) == 3
    assert pack([30, 4], 24) == [[0], [1]]


def test_prompts_are_padded_where_nothing_follows() -> None:
    batch = PromptCollator(0)([{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]

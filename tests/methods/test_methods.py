"""Every method trains, logs, saves and resumes alike, and its adapter loads without this package's help."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from aflora_dist.errors import AFLoRAError, UnsupportedEngineError
from aflora_dist.methods import Method
from aflora_dist.methods.choose import create_method
from aflora_dist.names import of_base
from aflora_dist.training.command_line import parse
from aflora_dist.training.loop import train
from aflora_dist.training.run import main
from tests.launch import MAIN_JOB, launch
from tests.runs import command_line, lines, options_of_any, start_all
from tests.small_lm import make_small_language_model, write_problems

ADALORA = '{"init_r": 6, "target_r": 3, "beta1": 0.5}'
OPTIONS = {
    "lora": '{"r": 2, "lora_alpha": 4}',
    "adalora": ADALORA,
    "vera": '{"r": 16}',
    "miss": '{"r": 4}',
    "oft": '{"oft_block_size": 16}',
    "vblora": '{"r": 2, "num_vectors": 16, "vector_length": 16}',
    "unilora": '{"theta_d_length": 64}',
    "full": "{}",
}
RESUMED = ("lora", "adalora", "vera", "miss", "full")
ENDS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
TARGETS = rf".*\.layer\..*({'|'.join(ENDS)})"


def options(folder: Path, model: Path, data: Path, method: str, **more: Any) -> list[str]:
    """Command line of a run of 24 updates."""
    own = {"train.learning_rate": 3e-3, "method.name": method, "method.options": OPTIONS[method]}
    return options_of_any(folder, model, data, **own | more)


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 19, (7, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**tokens()).logits


def watched(method: Method, seen: dict[str, Any]) -> Method:
    """The method, and what its model held when it was adapted, and said when it was saved."""
    adapt, save = method.adapt, method.save

    def and_remember(model: Any, head: Any) -> Any:
        adapted = adapt(model, head)
        seen["start"] = {name: value.clone() for name, value in adapted.state_dict().items()}
        return adapted

    def and_ask(model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        seen["logits"] = logits(model)
        save(model, folder, values)

    method.adapt, method.save = and_remember, and_ask  # type: ignore[method-assign]
    return method


def run(arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    config, resolved = parse(arguments)
    seen: dict[str, Any] = {}
    result = train(config, resolved, watched(create_method(config), seen))
    assert result is not None
    return result, seen


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


def reloaded(folder: Path, model: Path) -> nn.Module:
    """The adapter as stock PEFT or transformers load it."""
    if not (folder / "adapter" / "adapter_config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    return PeftModel.from_pretrained(base, folder / "adapter")


@pytest.mark.parametrize("name", RESUMED)
def test_a_method_trains_saves_and_resumes_to_the_bit(
    name: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result, seen = run(options(whole, tiny_model, reviews, name))
    resumed, _ = run(
        [*options(cut, tiny_model, reviews, name), "--resume", str(whole / "checkpoints" / "step_00000010")]
    )
    assert (result["method"], result["steps"], result["freeze_events"]) == (name, 24, 0)
    assert result["avg_trainable_params"] > 0
    assert result["lora_r8_trainable_params"] == 2 * 8 * (4 * (32 + 32) + 2 * (32 + 48))  # attention, feed-forward
    assert result["head_params"] == (32 + 1) * 2

    metrics = [lines(folder, "metrics.jsonl") for folder in (whole, cut)]
    assert [m["loss"] for m in metrics[1]] == [m["loss"] for m in metrics[0][10:]]
    assert resumed["evaluations"] == result["evaluations"]
    ours, theirs = weights(cut), weights(whole)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key

    assert not (whole / "freeze_log.jsonl").exists()
    torch.testing.assert_close(logits(reloaded(whole, tiny_model)), seen["logits"], rtol=1e-5, atol=1e-5)


def in_a_plain_loop(
    model_folder: Path,
    reviews: Path,
    config: PeftConfig,
    start: dict[str, Tensor],
    *,
    head_rate: float,
    decay: float,
    stepped: Callable[[Any, int], None] = lambda model, step: None,
) -> tuple[nn.Module, list[float]]:
    """The model after 12 updates of all reviews at once, with PEFT and torch alone, and the losses; `stepped`: told
    of each update, from 1, while its gradients are there."""
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    model = get_peft_model(base, config)
    model.load_state_dict(start)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with (reviews / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([["negative", "positive"].index(row["label"]) for row in rows])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if "lora_" in n], "lr": 3e-3},
        {"params": [p for n, p in trained.items() if "lora_" not in n], "lr": head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1, 12)
    losses = []
    for step in range(1, 13):
        loss = model(**batch, labels=labels).loss  # AdaLoRA's regularisation included
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        stepped(model, step)
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def test_lora_trains_as_a_plain_loop_with_peft_does(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    # A batch of all examples, so that their order is nobody's business.
    more = {"train.batch_size": 100, "train.epochs": 12, "train.weight_decay": 0.0, "train.head_learning_rate": 1e-3}
    result, seen = run(options(tmp_path / "run", tiny_model, reviews, "lora", **more))

    lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, task_type="SEQ_CLS")
    model, losses = in_a_plain_loop(tiny_model, reviews, lora, seen["start"], head_rate=1e-3, decay=0.0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    assert losses[-1] < losses[0] - 1e-4
    assert [m["loss"] for m in lines(tmp_path / "run", "metrics.jsonl")] == pytest.approx(losses, rel=1e-5)
    assert result["avg_trainable_params"] == sum(p.numel() for n, p in trained.items() if "lora_" in n)
    torch.testing.assert_close(logits(model), seen["logits"], rtol=1e-4, atol=1e-5)


def test_adalora_changes_ranks_as_its_authors_loop_does(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    more = {"train.batch_size": 100, "train.epochs": 12}
    _, seen = run(options(tmp_path / "run", tiny_model, reviews, "adalora", **more))
    metrics = lines(tmp_path / "run", "metrics.jsonl")
    ranks = [m["mean_rank"] for m in metrics]
    assert ranks[-1] == pytest.approx(3, abs=0.2)
    assert ranks[0] == 6
    assert ranks == sorted(ranks, reverse=True)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (settings["total_step"], settings["tinit"], settings["tfinal"]) == (12, 1, 2)
    kept = {name: sum(pattern) for name, pattern in settings["rank_pattern"].items()}
    assert len(kept) == 12
    assert sum(kept.values()) / 12 == ranks[-1]
    assert len(set(kept.values())) > 1  # some layers matter more

    # PEFT's own example: update_and_allocate after the optimizer's step, before zero_grad.
    from peft import AdaLoraConfig

    config = AdaLoraConfig(
        **json.loads(ADALORA), total_step=12, tinit=1, tfinal=2, target_modules=TARGETS, task_type="SEQ_CLS"
    )
    theirs = []

    def allocate(model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)
        pattern = config.rank_pattern or {"": [True] * 6}
        theirs.append(sum(map(sum, pattern.values())) / len(pattern))

    _, losses = in_a_plain_loop(tiny_model, reviews, config, seen["start"], head_rate=4e-2, decay=0.1, stepped=allocate)
    assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4)
    assert ranks == theirs


@pytest.mark.parametrize("name", ["lora", "full", "ia3", "adalora"])
def test_a_language_model_is_trained_by_a_method_and_loads_again(name: str, tmp_path: Path) -> None:
    model = make_small_language_model(tmp_path / "model")  # its head is tied to the embedding
    write_problems(tmp_path / "train.jsonl", 64, seed=0)
    write_problems(tmp_path / "dev.jsonl", 16, seed=1)
    chosen = {
        "run.dir": tmp_path / "run",
        "run.log_every": 1,
        "run.tensorboard": False,
        "model.name": model,
        "data.task": "sft",
        "data.train_file": tmp_path / "train.jsonl",
        "data.validation_file": tmp_path / "dev.jsonl",
        "data.max_new_tokens": 2,
        "train.epochs": 2,
        "train.batch_size": 16,
        "train.learning_rate": 1e-2,
        "method.name": name,
    }
    if name == "adalora":
        with pytest.raises(AFLoRAError, match=r"orth_reg_weight\": 0"):
            run(command_line(chosen))
        chosen["method.options"] = '{"orth_reg_weight": 0, "init_r": 4, "target_r": 2}'
    result, seen = run(command_line(chosen))
    assert result["evaluations"][-1]["loss"] < result["evaluations"][0]["loss"]
    adapter = tmp_path / "run" / "adapter"
    again: Any = AutoModelForCausalLM.from_pretrained(adapter if name == "full" else model)
    if name != "full":
        again = PeftModel.from_pretrained(again, adapter)
    torch.testing.assert_close(logits(again), seen["logits"], rtol=1e-5, atol=1e-5)


# Each engine with methods that it could trip over: shared buffers, weights that are read, layers that are not linear.
ON = {
    "ddp": ["lora", "full", "adalora", "vblora"],
    "zero2": ["lora", "full", "vera", "vblora"],
    "zero3": ["lora", "full", "vera", "miss"],
    "fsdp2": ["lora", "full", "vera", "oft"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ON)
def test_methods_train_alike_on_two_ranks_and_go_on_in_one_process(
    engine: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    few = {"train.epochs": 1, "train.max_grad_norm": 1.0, "train.learning_rate": 1e-3, "train.head_learning_rate": 1e-3}
    for name in ON[engine]:
        run(options(tmp_path / "single" / name, tiny_model, reviews, name, **few))
    start_all(engine, [options(tmp_path / engine / name, tiny_model, reviews, name, **few) for name in ON[engine]])
    for name in ON[engine]:
        alone, apart, on = (tmp_path / kind / name for kind in ("single", engine, "on"))
        losses = [[m["loss"] for m in lines(folder, "metrics.jsonl")] for folder in (alone, apart)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), name
        found, expected = logits(reloaded(apart, tiny_model)), logits(reloaded(alone, tiny_model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

        saved = str(apart / "checkpoints" / "step_00000005")
        run([*options(on, tiny_model, reviews, name, **few), "--resume", saved])
        resumed = [m["loss"] for m in lines(on, "metrics.jsonl")]
        assert resumed == pytest.approx(losses[1][5:], rel=1e-5), name


@pytest.mark.parametrize("name", ["vblora", "unilora", "tinylora", "lily"])
def test_what_layers_share_is_not_cut_by_fsdp2(name: str, tiny_model: Path) -> None:
    config, _ = parse(["--method.name", name, "--method.options", OPTIONS.get(name, "{}")])
    method = create_method(config)
    method.adapt(AutoModelForSequenceClassification.from_pretrained(tiny_model), ["classifier"])
    method.check_engine("zero3", "no")
    with pytest.raises(AFLoRAError, match=rf"{name} shares a trained parameter between layers .*launch/ddp.yaml"):
        method.check_engine("fsdp2", "no")


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT, of norms
@pytest.mark.parametrize("name", ["lora", "vera", "miss", "oft", "ln_tuning"])
def test_adapted_layers_return_what_plain_ones_do_under_autocast(name: str, tiny_model: Path) -> None:
    chosen = {"target_modules": ["LayerNorm"]} if name == "ln_tuning" else json.loads(OPTIONS.get(name, "{}"))
    config, _ = parse(["--method.name", name, "--method.options", json.dumps(chosen)])
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    seen: dict[str, dict[str, torch.dtype]] = {}
    for when in ("plain", "adapted"):
        kinds = seen.setdefault(when, {})
        if when == "adapted":
            model = create_method(config).adapt(model, ["classifier"])
        for layer, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) or (when == "plain" and not list(module.children())):
                note = functools.partial(lambda n, m, i, output, kinds: kinds.update({n: output.dtype}), of_base(layer))
                module.register_forward_hook(functools.partial(note, kinds=kinds))
        with torch.autocast("cpu", torch.bfloat16):
            model(**tokens())
    assert seen["adapted"]
    assert seen["adapted"] == {layer: seen["plain"][layer] for layer in seen["adapted"]}


def test_adalora_is_refused_where_gradients_are_in_pieces(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    done = launch("zero2", 2, *MAIN_JOB, *options(tmp_path / "run", tiny_model, reviews, "adalora"))
    assert done.returncode == 2
    assert "zero2 keeps pieces of them on every rank" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2"])
def test_adalora_fits_no_engine_that_keeps_pieces_of_gradients(engine: str) -> None:
    method = create_method(parse(["--method.name", "adalora"])[0])
    for fits in ("single", "ddp"):
        method.check_engine(fits, "no")
    with pytest.raises(UnsupportedEngineError, match=f"{engine} keeps pieces of them on every rank. Use one process"):
        method.check_engine(engine, "no")


FREEZING: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"method.name": "lora", "method.options": '{"use_dora": true}', "freezing.unit": "layer"},
    "full": {"freezing.granularity": "matrix", "freezing.unit": "block", "freezing.score": "sensitivity"},
    "a pattern": {"method.name": "full", "freezing.freezable": r".*layer\.0\..*LayerNorm\.weight"},
    "a prefix": {"method.name": "lora", "freezing.prefix": True, "freezing.score": "front_to_back"},
}


@pytest.mark.parametrize("case", FREEZING)
def test_another_method_freezes_where_it_is_told_to_and_resumes_to_the_bit(
    case: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    asked = {"method.name": case, "method.options": "{}"} | FREEZING[case]
    asked |= {"freezing.enabled": True, "freezing.initial_epochs": 0.5, "freezing.final_epochs": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = options(whole, tiny_model, reviews, str(asked["method.name"])) + command_line(asked)
    run(common)
    events = [json.loads(line) for line in (whole / "freeze_log.jsonl").read_text().splitlines()]
    assert events[-1]["remaining"] == 0
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [line["trainable_params"] for line in metrics if "loss" in line]
    assert trained[0] == max(trained) > trained[-1] == events[-1]["trainable_params"]
    run([*common, "--run.dir", str(cut), "--resume", str(whole / "checkpoints" / "step_00000010")])
    resumed = [json.loads(line) for line in (cut / "freeze_log.jsonl").read_text().splitlines()]
    later, again = ([(e["step"], e["frozen"]) for e in log if e["step"] >= 10] for log in (events, resumed))
    assert later == again != []
    mine, theirs = weights(cut), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method.name": "loraa", "method.options": "{}"}, r"no method 'loraa'.*adalora.*lora.*vera"),
        ({"method.options": '{"rank": 8}'}, r"LoraConfig has no option 'rank'.*lora_alpha.*r,"),
        ({"method.options": '{"task_type": "X"}'}, r"task_type is set by aflora train"),
        ({"method.options": '{"target_modules": ["nothing"]}'}, r"PEFT cannot put lora into this model: No modules"),
        ({"method.options": '{"r": -1}'}, r"PEFT cannot put lora into this model"),
        ({"method.options": '{"rank_pattern": 3}'}, r"PEFT cannot put lora into this model"),
        ({"method.name": "aflora"}, r"method.options \(r, lora_alpha\) is for PEFT's other methods"),
        ({"method.name": "full"}, r"method.name=full has no options"),
        ({"adapter.r": 8}, r"adapter.r=8 is for AFLoRA, and method.name=lora"),
        ({"freezing.final_epochs": 1}, r"freezing.final_epochs=1.* is for AFLoRA.*--freezing.enabled true"),
        ({"method.name": "adalora", "method.options": "{}", "freezing.enabled": True}, r"AdaLoRA itself decides"),
        ({"method.name": "aflora", "method.options": "{}", "freezing.enabled": False}, r"adapter.freezing=never"),
        (
            {"method.name": "aflora", "method.options": "{}", "freezing.freezable": "x", "adapter.freezing": "never"},
            r"freezing.freezable says what freezes, and nothing does",
        ),
        ({"method.name": "vera", "method.options": "{}", "freezing.enabled": True}, r"shared by all layers"),
        ({"method.name": "prefix_tuning", "method.options": "{}"}, r"cannot train method.name=prefix_tuning: .*before"),
        ({"method.name": "p_tuning", "method.options": "{}"}, r"cannot train method.name=p_tuning"),
        ({"method.name": "xlora", "method.options": "{}"}, r"mixes adapters that were trained before"),
        ({"method.name": "adalora", "method.options": '{"total_step": 5}'}, r"total_step is set by aflora train"),
        ({"method.name": "adalora", "method.options": '{"tinit": 24}'}, r"schedule does not fit: .*24 \+ 4 .*has 24"),
        ({"method.name": "adalora", "method.options": '{"init_r": 8}'}, r"init_r=8 and target_r=8"),
    ],
)
def test_what_does_not_fit_is_said(
    asked: dict[str, Any], said: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    with pytest.raises(AFLoRAError, match=said):
        run(options(tmp_path / "run", tiny_model, reviews, "lora", **asked))
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_begins_at_a_token_of_its_row_is_not_packed() -> None:
    line = ["--model.name", "x", "--data.task", "sft", "--method.name", "lora"]
    line += ["--method.options", '{"alora_invocation_tokens": [5]}']
    create_method(parse(line)[0])
    with pytest.raises(AFLoRAError, match=r"alora_invocation_tokens: .*last place in a row.* Leave packing out"):
        create_method(parse([*line, "--data.packing", "true"])[0])


def test_adalora_keeps_the_best_epoch_with_its_own_ranks(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    asked = {"run.keep_best": "f1", "run.patience": 2}  # the first epoch ties with the others
    result, _ = run(options(tmp_path / "run", tiny_model, reviews, "adalora", **asked))
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    kept = {name: sum(pattern) for name, pattern in settings["rank_pattern"].items()}
    held = {name: len(value) for name, value in weights(tmp_path / "run").items() if name.endswith("lora_E")}
    assert sorted(kept.values()) == sorted(held.values())
    f1 = [evaluation["f1"] for evaluation in result["evaluations"]]
    then = lines(tmp_path / "run", "metrics.jsonl")[6 * (f1.index(max(f1)) + 1) - 1]
    assert sum(kept.values()) / len(kept) == then["mean_rank"] > 3.3
    assert logits(reloaded(tmp_path / "run", tiny_model)).isfinite().all()


def test_a_presets_freezing_does_not_keep_another_method_away() -> None:
    config, _ = parse(["--preset", "glue/cola", "--method.name", "lora", "--method.options.r", "4"])
    assert (config.method.name, config.method.options) == ("lora", {"r": 4})


def test_another_method_or_option_is_not_resumed(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"train.epochs": 1}
    assert main(options(tmp_path / "run", tiny_model, reviews, "lora", **few)) == 0
    saved = str(tmp_path / "run" / "checkpoints" / "step_00000005")
    other = options(tmp_path / "on", tiny_model, reviews, "lora", **few, **{"method.options": '{"r": 3}'})
    assert main([*other, "--resume", saved]) == 2
    assert "method.options is {'r': 2, 'lora_alpha': 4} there and {'r': 3} here" in capsys.readouterr().err

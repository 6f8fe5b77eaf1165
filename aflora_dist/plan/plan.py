"""The plan of a run: everything that can be known, and everything that can be refused, before a weight is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AFLoRAError
from ..methods import NoControl
from ..methods.choose import create_method, lora_parameters
from ..options import Config
from ..store.best import check_metric
from ..store.rundir import refuse_taken, written
from ..tasks.base import Task
from ..tasks.batches import BatchShape, create_sampler, enough
from ..tasks.data import unknown_task
from ..tasks.dtypes import check_weights
from ..tasks.glue import TASKS
from ..tasks.limits import Limits
from ..tasks.model import outline_base, outline_language_model
from ..training.build import check_launch, create_schedule, create_task, create_windows, hold, warm_up
from .launches import Launch
from .model import PlannedModel
from .records import EnginePlan, Parameters, Plan, Steps


def make_plan(config: Config, launches: Sequence[Launch], *, examples: int | None = None) -> Plan:
    """The plan of a run on each of these launches. A collective where data are read and there are several ranks.

    Args:
        launches: At least one.
        examples: How many training examples there are. None: they are read and tokenised, as the run would.

    Raises:
        AFLoRAError: The run would be refused, on every launch.
    """
    method = create_method(config)
    able = _Able(launches)
    able.check(lambda launch: check_launch(config, launch.num_processes))
    able.check(lambda launch: check_weights(config.model, launch))
    task = create_task(config) if examples is None else None
    assumptions: list[str] = []
    base, head = _outline(config, assumptions) if task is None else _load(task, able.first)
    limits = Limits.of(base, config.model.name) if task is None else task.limits
    limits.check_length(config.data.max_length)
    model_bytes = base.get_memory_footprint()
    model = method.adapt(base, head)
    held = hold(model, head, config.model.train_new, method)
    data = _assumed(config, examples or 0, assumptions) if task is None else _read(config, task, able.first)
    method.check(data.examples // config.train.batch_size)
    planned = PlannedModel(config, method, model, held)
    able.check(lambda launch: method.check_engine(launch.engine, launch.mixed_precision))
    steps = _steps(config, data, planned)
    create_windows(config, NoControl(moments=planned.moments), steps.total)  # may refuse
    if not planned.certain:
        assumptions.append(
            f"with freezing.rule={config.freezing.rule} the scores decide how many matrices freeze, every "
            f"{config.freezing.every} updates; what is said of the average and the end is so by the paper's rule"
        )
    if config.freezing.prefix and planned.freezes and planned.freezes.order is None:
        assumptions.append(
            "with freezing.prefix the scores decide when the rest of a block freezes: the middle of what is "
            "possible is said, and freezes of a rest alone are not listed"
        )

    return Plan(
        model=config.model.name,
        task=config.data.task,
        method=method.name,
        steps=steps,
        parameters=_parameters(planned, model, model_bytes),
        freezes=planned.freezes.events if planned.freezes and planned.certain else [],
        matrices=len(planned.numels),
        engines=[_engine(config, launch, able.refused.get(launch), data, planned) for launch in launches],
        directory=config.run.dir,
        writes=written(config.run, config.method.name != "full", planned.freezes is not None),
        directory_taken=refusal_of(refuse_taken, config.run),
        assumptions=assumptions,
    )


@dataclass(frozen=True)
class _Data:
    """The training data: how many examples, how long they are, and tokens in an epoch (None: not known)."""

    examples: int
    lengths: Sequence[int]
    packed: bool
    tokens: int | None


def _read(config: Config, task: Task, launch: Launch) -> _Data:
    sampler, _ = task.batches(launch)
    check_metric(config.run.keep_best, task.metrics())
    count = len(sampler.lengths)
    tokens = round(sum(sampler.lengths) / count * sampler.updates_per_epoch * sampler.batch_size)
    return _Data(count, sampler.lengths, sampler.packed, tokens)


def _assumed(config: Config, examples: int, assumptions: list[str]) -> _Data:
    count = min(examples, config.data.max_train_examples or sys.maxsize)
    enough(config, count)
    assumptions.append("micro-batches are counted as if every example had data.max_length tokens")
    return _Data(count, [config.data.max_length] * config.train.batch_size, False, None)


def _steps(config: Config, data: _Data, planned: PlannedModel) -> Steps:
    per_epoch = data.examples // config.train.batch_size
    total = config.train.updates(per_epoch)
    create_schedule(config, torch.optim.SGD([torch.zeros(())]), total)  # may refuse
    schedule = planned.freezes.schedule if planned.freezes else None
    return Steps(
        examples=data.examples,
        left_out=data.examples - per_epoch * config.train.batch_size,
        per_epoch=per_epoch,
        total=total,
        tokens=data.tokens,
        initial=schedule.initial_steps if schedule else None,
        final=schedule.final_steps if schedule and config.freezing.rule != "threshold" else None,
        warm_up=warm_up(config, total),
        learning_rates=planned.learning_rates,
    )


def _engine(config: Config, launch: Launch, refused: str | None, data: _Data, planned: PlannedModel) -> EnginePlan:
    if refused is not None:
        return EnginePlan(launch.engine, launch.num_processes, launch.mixed_precision, refused)
    sampler = create_sampler(config, data.lengths, BatchShape(launch), packed=data.packed)
    return planned.on(launch, sampler.micro_batches)


def _parameters(planned: PlannedModel, model: Any, model_bytes: int) -> Parameters:
    return Parameters(
        start=planned.start - planned.head,
        average=planned.average.less(planned.head),
        end=planned.end - planned.head,
        head=planned.head,
        lora_r8=lora_parameters(model),
        model=sum(p.numel() for p in model.parameters()),
        model_bytes=model_bytes,
    )


class _Able:
    """The launches on which a run has not been refused yet."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches = launches
        self.refused: dict[Launch, str] = {}

    @property
    def first(self) -> Launch:
        return next(launch for launch in self.launches if launch not in self.refused)

    def check(self, check: Callable[[Launch], Any]) -> None:
        """Take out those for which `check` raises; raises, too, if none is left."""
        for launch in self.launches:
            if launch not in self.refused and (reason := refusal_of(check, launch)):
                self.refused[launch] = reason
        if len(self.refused) == len(self.launches):
            raise AFLoRAError(self.refused[self.launches[0]])


def refusal_of(check: Callable[[Any], Any], argument: Any) -> str | None:
    """Why a check refuses this; None if it does not."""
    try:
        check(argument)
    except AFLoRAError as error:
        return str(error)
    return None


def _load(task: Task, launch: Launch) -> tuple[Any, list[str]]:
    """The model on the meta device, with the head that the data want."""
    try:
        return task.load(launch, weights=False)
    except AFLoRAError as error:
        error.add_note("A plan can do without data and tokenizer: --examples N says how many examples there are.")
        raise


def _outline(config: Config, assumptions: list[str]) -> tuple[Any, list[str]]:
    """The model and its head without any data."""
    task = config.data.task
    if task == "sft":
        return outline_language_model(config.model), []
    if task not in (*TASKS, "demo", "files"):
        raise unknown_task(task)
    labels: tuple[str, ...] | None = TASKS[task].labels if task in TASKS else ("0", "1")
    if task == "files":
        assumptions.append("the head is one for two classes: the labels were not read")
    return outline_base(config.model, None if labels is None else list(labels))

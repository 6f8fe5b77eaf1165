"""The plan of a run: everything that can be known, and everything that can be refused, before a weight is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import AFLoRAError
from ..methods import NoControl
from ..methods.choose import create_method, lora_parameters
from ..options import Config
from ..store.best import check_metric
from ..store.rundir import refuse_taken, written
from ..tasks.batches import BatchShape, create_sampler, enough
from ..tasks.data import unknown_task
from ..tasks.glue import TASKS
from ..tasks.limits import Limits
from ..tasks.model import outline_base, outline_language_model
from ..tasks.weights import check_weights
from ..training.build import check_launch, create_task, create_windows, hold, warm_up
from .events import Elements, Freezes
from .launches import Launch
from .memory import micro_batch_tokens
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
    if task is not None:
        try:
            base, head = task.load(able.first, weights=False)
        except AFLoRAError as error:
            error.add_note("A plan can do without data and tokenizer: --examples N says how many examples there are.")
            raise
    else:
        base, head = _outline(config, assumptions)
    limits = Limits.of(base, config.model.name) if task is None else task.limits
    limits.check_length("data.max_length", config.data.max_length)
    model = method.adapt(base, head)
    held = hold(model, head, config.model.train_new, method)
    if task is not None:
        sampler, _ = task.batches(able.first)
        check_metric(config.run.keep_best, task.metrics())
        count, lengths, packed = len(sampler.lengths), sampler.lengths, sampler.packed
        tokens = round(sum(lengths) / count * sampler.updates_per_epoch * sampler.batch_size)
    else:
        count = min(examples or 0, config.data.max_train_examples or sys.maxsize)
        enough(config, count)
        lengths, packed, tokens = [config.data.max_length] * config.train.batch_size, False, None
        assumptions.append("micro-batches are counted as if every example had data.max_length tokens")
    per_epoch = count // config.train.batch_size
    method.check(per_epoch)
    total = per_epoch * config.train.epochs
    what = PlannedModel(config, method, model, held)
    able.check(lambda launch: method.check_engine(launch.engine, launch.mixed_precision))
    control = NoControl(freezable=list(what.numels), schedule=what.schedule)
    create_windows(config, control, total)  # may refuse
    freezes = Freezes(what.schedule, what.policy, what.numels, what.start) if what.schedule else None
    average = freezes.average if freezes else Elements(what.start, what.start, what.start)
    if freezes and not what.certain:
        average = Elements(freezes.end.least, average.expected, what.start)
        assumptions.append(
            f"with freezing.rule=quantile the scores decide how many matrices freeze, every {config.freezing.every} "
            f"updates; what is said of the average and the end is so by the paper's rule"
        )

    def planned(launch: Launch) -> EnginePlan:
        if (reason := able.refused.get(launch)) is not None:
            return EnginePlan(launch.engine, launch.num_processes, launch.mixed_precision, reason)
        shape = BatchShape(launch)
        micro_batches = create_sampler(config, lengths, shape, packed=packed).micro_batches
        at_once = config.data.tokens_per_micro_batch or shape.tokens
        return what.on(launch, micro_batches, micro_batch_tokens(config, launch, at_once, micro_batches), freezes)

    return Plan(
        model=config.model.name,
        task=config.data.task,
        method=method.name,
        steps=Steps(
            examples=count,
            left_out=count - per_epoch * config.train.batch_size,
            per_epoch=per_epoch,
            total=total,
            tokens=tokens,
            initial=what.schedule.initial_steps if what.schedule else None,
            final=what.schedule.final_steps if what.schedule else None,
            warm_up=warm_up(config, total),
            learning_rates=what.learning_rates,
        ),
        parameters=Parameters(
            start=what.start - what.head,
            average=average.less(what.head),
            end=round((freezes.end if freezes else average).expected) - what.head,
            head=what.head,
            lora_r8=lora_parameters(model),
            model=sum(p.numel() for p in model.parameters()),
        ),
        freezes=freezes.events if freezes and what.certain else [],
        matrices=len(what.numels),
        engines=[planned(launch) for launch in launches],
        directory=config.run.dir,
        writes=written(config.run),
        directory_taken=_complaint(refuse_taken, config.run),
        assumptions=assumptions,
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
            if launch not in self.refused and (reason := _complaint(check, launch)):
                self.refused[launch] = reason
        if len(self.refused) == len(self.launches):
            raise AFLoRAError(self.refused[self.launches[0]])


def _complaint(check: Callable[[Any], Any], argument: Any) -> str | None:
    try:
        check(argument)
    except AFLoRAError as error:
        return str(error)
    return None


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

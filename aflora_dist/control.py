"""Adaptive freezing in a training loop: observe, decide, rebuild, by itself at every update.

Binds the freezing of Eq. 2-5 to an engine. The loop stays as accelerate's documentation writes it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from .adapter import AFLoRAModel
from .adapter.layer import AFLoRAPath
from .engines import Engine, ParameterState, create_engine
from .errors import AFLoRAError, DivergedError
from .freezing import SCORE_KINDS, CubicSchedule, Fragment, FreezingPolicy, FreezingScore, ScoreKind
from .processes import refuse_lonely_processes


@dataclass(frozen=True, kw_only=True)
class FreezingConfig:
    """When and by which score the projection matrices freeze; steps are optimizer updates.

    Args:
        total_steps: T, the updates of the whole training.
        initial_steps: t_i, updates before the first matrix may freeze (the paper: one epoch).
        final_steps: t_f, updates at the end with all matrices frozen (the paper: 70% of T).
        beta1, beta2: Decay of the smoothed gradient and of its uncertainty (Eq. 2, 3).
        score: "gradient" |g| (the paper's choice), "sensitivity" |w g| or "relative" |g / w| (Fig. 4).
        pairwise: Freeze A and B of a layer together (Table 6).

    Raises:
        AFLoRAError: The schedule does not fit, or an argument is out of range.
    """

    total_steps: int
    initial_steps: int
    final_steps: int
    beta1: float = 0.85
    beta2: float = 0.95
    score: ScoreKind = "gradient"
    pairwise: bool = False

    def __post_init__(self) -> None:
        self.schedule()
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise AFLoRAError(f"FreezingConfig: {name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.score not in SCORE_KINDS:
            raise AFLoRAError(f"FreezingConfig: score must be one of {', '.join(SCORE_KINDS)}, got {self.score!r}.")

    def schedule(self) -> CubicSchedule:
        return CubicSchedule(
            total_steps=self.total_steps, initial_steps=self.initial_steps, final_steps=self.final_steps
        )


@dataclass(frozen=True)
class FreezeEvent:
    """One line of freeze_log.jsonl.

    Attributes:
        step: The update after which the matrices froze, from 0.
        frozen: Their names, lowest score first.
        scores: Every score that was ranked; empty where `freeze` was called by hand.
        remaining: Freezable matrices that still train.
        trainable_params: Elements that the optimizer still updates.
        optimizer_state_bytes: Bytes of the optimizer's moments, over all ranks.
        rebuild_seconds: Time for the decision and the rebuild.
    """

    step: int
    frozen: list[str]
    scores: dict[str, float]
    remaining: int
    trainable_params: int
    optimizer_state_bytes: int
    rebuild_seconds: float


class AdaptiveFreezing:
    """Freezes an AFLoRA model's projection matrices while it trains, on every rank the same.

    Create it after `accelerator.prepare()`, on every rank. From then on each optimizer update is
    observed, and after an update at which floor(r(t) N) grows the matrices with the lowest scores
    stop training and are gone from gradients, optimizer and communication. Nothing has to be called.

    An adapter with `freezing="never"` or "always", or `freezable="none"`, is left as it is; only
    steps are counted then.

    Args:
        accelerator: The loop's `Accelerator`. Clip with `accelerator.clip_grad_norm_`: scores are
            taken before clipping.
        model, optimizer: As `accelerator.prepare()` returned them.
        config: Schedule and score.
        on_freeze: Called with each `FreezeEvent`, on every rank.

    Attributes:
        step: Updates done so far.
        seconds: Host time spent so far on observing, deciding and rebuilding.
        events: All freeze events so far.

    Raises:
        UnsupportedEngineError: The engine, or a feature of it, cannot be frozen exactly.
        AFLoRAError: Several processes were launched that do not know of each other.
        AFLoRAError: The model has nothing to freeze adaptively, or the ranks disagree.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        config: FreezingConfig,
        *,
        on_freeze: Callable[[FreezeEvent], None] | None = None,
    ) -> None:
        refuse_lonely_processes()
        self.config = config
        self.on_freeze = on_freeze
        self._precision = str(accelerator.mixed_precision)
        self.engine: Engine = create_engine(accelerator, model, optimizer)
        tuner = next((m for m in self.engine.model.modules() if isinstance(m, AFLoRAModel)), None)
        if tuner is None:
            raise AFLoRAError("AdaptiveFreezing needs an AFLoRA model: peft.get_peft_model(model, AFLoRAConfig(...)).")
        if tuner.freezing_attached:
            raise AFLoRAError("This model is frozen by another AdaptiveFreezing already; call its detach() first.")
        self._tuner: AFLoRAModel = tuner
        self._paths = _paths(self.engine.model)
        of_tuner = {id(parameter) for parameter in tuner.freezable_matrices().values()}
        trained = set(self.engine.trainable)
        self.freezable = [n for n, p in self.engine.parameters.items() if id(p) in of_tuner and n in trained]
        wanted = [tuner.peft_config[name] for name in tuner.active_adapters]
        if not self.freezable and any(c.freezing == "adaptive" and c.freezable != "none" for c in wanted):
            raise AFLoRAError(
                "AdaptiveFreezing has nothing to freeze: no projection matrix of the active adapter trains adaptively "
                "and is in the optimizer. Check AFLoRAConfig(freezable=..., freezing='adaptive') and the parameters "
                "that the optimizer was given."
            )
        self.schedule = config.schedule()
        self.policy = FreezingPolicy(self.freezable, pairwise=config.pairwise)
        self.numels = {name: self.engine.numel(name) for name in self.freezable}
        self.frozen: dict[str, int] = {}  # name -> step at which it froze
        self.events: list[FreezeEvent] = []
        self.step = 0
        self.seconds = 0.0
        self._agree(f"{config}{self.numels}", "were set up with different models or FreezingConfigs")
        self._scores = self._new_scores()
        self.engine.watch(self._observe, self._updated)
        tuner.freezing_attached = True

    @property
    def remaining(self) -> list[str]:
        """Freezable matrices that still train."""
        return [name for name in self.freezable if name not in self.frozen]

    @property
    def trainable_params(self) -> int:
        """Elements that the optimizer updates now."""
        return sum(self.engine.numel(name) for name in self.engine.trainable)

    def scores(self) -> dict[str, float]:
        """Eq. 4 of every matrix that still trains, as of the last update: one all-reduce of as many numbers.

        A collective: call it on every rank.

        Raises:
            DivergedError: A score is not finite; on every rank.
        """
        names = self.remaining
        if not names:
            return {}
        index = {name: i for i, name in enumerate(names)}
        vector = torch.zeros(len(names), dtype=torch.float64, device=self.engine.device)
        for score in self._scores:
            for name, partial in score.partial_sums().items():
                vector[index[name]] += partial
        with torch.profiler.record_function("aflora.all_reduce"):
            self.engine.sum_over_ranks(vector)
        scores = {name: total / self.numels[name] for name, total in zip(names, vector.tolist(), strict=True)}
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if broken:
            raise DivergedError(
                f"The freezing score of {broken[0]} is not finite after step {self.step}: a gradient was NaN or "
                f"infinite. Lower the learning rate, or look for the step at which the loss broke."
            )
        return scores

    def detach(self) -> None:
        """Stop observing and freezing; what is frozen stays so."""
        self.engine.unwatch()
        self._tuner.freezing_attached = False

    # -- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training on needs, whole and by name. A collective; the result is the same on every rank.

        Any engine on any number of ranks can go on from it, see `load_state_dict`.

        Returns:
            Tensors: "value/NAME" and "moment/KEY/NAME" of what trains (flat), "score/NAME" (2, numel) of
            what may still freeze, "fixed/NAME" of the adapter's other parameters. And a record that JSON
            can hold: step, freeze events, the optimizer's step counts, loss scale.
        """
        state = self.engine.state()
        tensors = {f"value/{name}": held.value for name, held in state.items()}
        for name, held in state.items():
            tensors |= {f"moment/{key}/{name}": moment for key, moment in held.moments.items()}
        tensors |= {f"score/{name}": averages for name, averages in self._gather_scores().items()}
        fixed = [name for name in self._adapter() if name not in state]
        tensors |= {f"fixed/{name}": value for name, value in self.engine.values(fixed).items()}
        record = {
            "step": self.step,
            "events": [asdict(event) for event in self.events],
            "freezing": asdict(self.config),
            "numels": {name: self.engine.numel(name) for name in (*state, *fixed)},
            "scalars": {
                name: {key: v.item() if isinstance(v, Tensor) else v for key, v in held.scalars.items()}
                for name, held in state.items()
            },
            "engine": self.engine.kind,
            "precision": self._precision,
            "scaling": self.engine.scaling(),
        }
        return tensors, record

    def load_state_dict(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on this or another engine. A collective.

        Call it right after creating this object, before the first update.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        self.check_state_dict(record)
        groups: dict[str, dict[str, Tensor]] = {"value": {}, "score": {}, "fixed": {}}
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "moment":
                moment, _, name = name.partition("/")
                moments.setdefault(name, {})[moment] = tensor
            elif kind in groups:
                groups[kind][name] = tensor
        self.engine.assign(groups["fixed"])
        self.events = [FreezeEvent(**event) for event in record["events"]]
        self.frozen = {name: event.step for event in self.events for name in event.frozen}
        for name in self.frozen:
            path, matrix = self._paths[name]
            path.frozen.add(matrix)
        self.step = record["step"]
        state = {}
        for name, value in groups["value"].items():
            scalars = {key: self._scalar(number) for key, number in record["scalars"][name].items()}
            state[name] = ParameterState(value, moments.get(name, {}), scalars)
        self.engine.rebuild(state)
        if (record["engine"], record["precision"]) == (self.engine.kind, self._precision):
            self.engine.restore_scaling(record["scaling"])
        self._scores = self._new_scores()
        averages = {name: tensor.to(self.engine.device) for name, tensor in groups["score"].items()}
        for score in self._scores:
            score.load(averages)

    def _scalar(self, number: float) -> Any:
        """An optimizer's step count as this one keeps it: a tensor in torch's own, an int in DeepSpeed's CPU Adam."""
        optimizer = self.engine.optimizer
        if not type(optimizer).__module__.startswith("torch."):
            return int(number)
        options = optimizer.param_groups[0]
        beside = options.get("fused") or options.get("capturable")  # then it lies where the weights do
        return torch.tensor(float(number), device=self.engine.device if beside else None)

    def check_state_dict(self, record: Mapping[str, Any]) -> None:
        """Look whether `load_state_dict` can go on from this record; nothing changes.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        mine = {name: self.engine.numel(name) for name in (*self.engine.trainable, *self._adapter())}
        theirs = record["numels"]
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise AFLoRAError(
                    f"The checkpoint is of another model: {name} has {theirs.get(name, 'no')} elements there and "
                    f"{mine.get(name, 'no')} here."
                )
        for option, value in asdict(self.config).items():
            if record["freezing"].get(option) != value:
                raise AFLoRAError(
                    f"The checkpoint is of another schedule: {option} is {record['freezing'].get(option)} there and "
                    f"{value} here."
                )

    def _adapter(self) -> list[str]:
        """Names of all parameters of the low-rank paths."""
        inside = {id(p) for path, _ in self._paths.values() for p in path.parameters()}
        return [name for name, p in self.engine.parameters.items() if id(p) in inside]

    # -- each update -------------------------------------------------------------------------

    def _observe(
        self,
        bucket: int,
        gradients: Sequence[Tensor],
        weights: Callable[[], Sequence[Tensor]],
        scale: Tensor | float,
    ) -> None:
        start = time.perf_counter()
        with torch.profiler.record_function("aflora.observe"):
            self._scores[bucket].observe(gradients, None if self.config.score == "gradient" else weights(), scale)
        self.seconds += time.perf_counter() - start

    def _updated(self) -> None:
        count = self.schedule.count(self.step, len(self.policy))
        if count > len(self.policy) - self._remaining_units():
            self._decide(count)
        self.step += 1

    def _remaining_units(self) -> int:
        return sum(names[0] not in self.frozen for names in self.policy.units.values())

    def _decide(self, count: int) -> None:
        start = time.perf_counter()
        with torch.profiler.record_function("aflora.decide"):
            scores = self.scores()
            names = self.policy.next_frozen(scores, count)
            self._agree(f"{self.step}{names}", f"want to freeze different matrices after step {self.step}")
        self._freeze(names, scores, start)

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze these matrices now, whatever the schedule says. A collective: call it on every rank.

        With pairwise freezing the other matrix of each pair freezes too.

        Raises:
            AFLoRAError: A name is not that of a freezable matrix that still trains.
        """
        unknown = sorted(set(names) - set(self.remaining))
        if unknown:
            raise AFLoRAError(f"{unknown[0]!r} is not a freezable matrix that still trains; see `remaining`.")
        chosen = set(names)
        whole = [name for unit in self.policy.units.values() if chosen & set(unit) for name in unit]
        self._agree(f"{self.step}{whole}", "were told to freeze different matrices")
        self._freeze(whole, {}, time.perf_counter())

    def _freeze(self, names: list[str], scores: dict[str, float], start: float) -> None:
        with torch.profiler.record_function("aflora.rebuild"):
            self._drop(names)
        self.events.append(
            FreezeEvent(
                step=self.step,
                frozen=names,
                scores=scores,
                remaining=len(self.remaining),
                trainable_params=self.trainable_params,
                optimizer_state_bytes=self.optimizer_state_bytes(),
                rebuild_seconds=time.perf_counter() - start,
            )
        )
        self.seconds += time.perf_counter() - start
        if self.on_freeze is not None:
            self.on_freeze(self.events[-1])

    def _drop(self, names: list[str]) -> None:
        """state -> drop names -> rebuild: the same for the optimizer and for the scores."""
        smoothed = self._gather_scores()
        state = self.engine.state()
        for name in names:
            self.frozen[name] = self.step
            path, matrix = self._paths[name]
            path.frozen.add(matrix)
            del state[name], smoothed[name]
        self.engine.rebuild(state)
        self._scores = self._new_scores()
        for score in self._scores:
            score.load(smoothed)

    def _gather_scores(self) -> dict[str, Tensor]:
        pieces: list[tuple[Fragment, Tensor]] = [piece for score in self._scores for piece in score.state()]
        return self.engine.gather(pieces, {name: self.numels[name] for name in self.remaining}, rows=2)

    def _new_scores(self) -> list[FreezingScore]:
        buckets = self.engine.buckets(self.remaining)
        return [
            FreezingScore(
                fragments,
                device,
                kind=self.config.score,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
            )
            for fragments, device in zip(buckets, self.engine.bucket_devices(), strict=True)
        ]

    def optimizer_state_bytes(self) -> int:
        """Bytes of the optimizer's moments over all ranks. A collective."""
        local = torch.tensor([self.engine.moment_bytes()], dtype=torch.float64, device=self.engine.device)
        return int(self.engine.sum_over_ranks(local).item())

    def _agree(self, what: str, complaint: str) -> None:
        """Raise on every rank unless all ranks hold the same text. One all-reduce of two numbers."""
        # 20 bits: the sums stay exact in float64 up to 4,096 ranks.
        digest = int(hashlib.sha256(what.encode()).hexdigest()[:5], 16)
        pair = torch.tensor([digest, digest**2], dtype=torch.float64, device=self.engine.device)
        total, squares = (int(number) for number in self.engine.sum_over_ranks(pair).tolist())
        if total**2 != squares * self.engine.world_size:  # the variance over ranks is not zero
            raise AFLoRAError(f"The ranks {complaint}. Start all of them with the same code, seed and configuration.")


def _paths(model: nn.Module) -> dict[str, tuple[AFLoRAPath, str]]:
    return {
        f"{name}.{matrix}": (module, matrix)
        for name, module in model.named_modules()
        if isinstance(module, AFLoRAPath)
        for matrix in ("A", "B")
    }


__all__ = ["AdaptiveFreezing", "FreezeEvent", "FreezingConfig"]

"""Which runs a study consists of, as far as that is known: what is chosen, is chosen by results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import AFLoRAError
from ..options import Config, changes_nothing, flat
from ..training.command_line import OPTIONS, parse
from .choice import NoChoiceError, Records, beyond, first_best, mean_of, number_of, seconds_of
from .description import Study, Sweep, Variant
from .metrics import measured_on, metrics_of
from .results import name_of
from .words import as_its_kind, is_true, is_whole, words_of

_STEP = 0.05  # of what `seconds_of` makes of the data: times differ by less from day to day


@dataclass(frozen=True)
class Planned:
    """A run of a study.

    Attributes:
        options: Of `aflora train`, by name; run.dir is not among them.
        config: What they come to.
        beyond: Whether it tries a value of a sweep that the study does not list.
    """

    task: str
    method: str
    options: dict[str, Any]
    config: Config
    beyond: bool = False

    @cached_property
    def name(self) -> str:
        return name_of(self.config)

    @property
    def seed(self) -> int:
        return self.config.train.seed

    def line(self) -> list[str]:
        """As the words of a command."""
        return words_of(self.options)


@dataclass
class Agenda:
    """The runs of a study as far as its results decide them.

    Attributes:
        searched: Those by which something is chosen.
        reported: Those that its tables show: (task, method) -> by seed; absent where a choice is still open.
        chosen: (task, method) -> what was chosen for it.
        broken: (task, method) -> why nothing can be chosen for it: it has no runs to report.
    """

    searched: list[Planned] = field(default_factory=list)
    reported: dict[tuple[str, str], dict[int, Planned]] = field(default_factory=dict)
    chosen: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    broken: dict[tuple[str, str], str] = field(default_factory=dict)
    open: int = 0  # runs that are not known yet

    def runs(self) -> list[Planned]:
        """Each once; seed by seed, so that tables fill evenly."""
        seeds = dict.fromkeys(seed for runs in self.reported.values() for seed in runs)
        shown = [runs[seed] for seed in seeds for runs in self.reported.values() if seed in runs]
        return list({run.name: run for run in (*self.searched, *shown)}.values())


class Grid:
    """A study's runs.

    Args:
        more: Options that all runs have besides, as a command line gives them: they win over what the study says.

    Raises:
        AFLoRAError: `aflora train` has no such option, or refuses its value; a rate that is searched is given for all
            runs; what is reported is looked at to choose it; a task has no such metric; two methods or tasks differ
            only in what makes no other run; methods of a task would be measured on different data.
    """

    def __init__(self, study: Study, more: Mapping[str, Any] | None = None) -> None:
        self.more = dict(more or {})
        self.told = {name: value for name, value in self.more.items() if not changes_nothing(name)}
        self.study = replace(study, part=(*study.part, *(f"{name}={value}" for name, value in self.told.items())))
        self._configs: dict[str, Config] = {}  # parsing takes a tenth of a second
        self._first: dict[str, Planned] = {}  # of each name
        self._measured: dict[str, Planned] = {}  # of each task
        self.metrics = {task: self._metric(task) for task in study.tasks}
        for method in study.reported:
            self._check(method)

    def plan(self, records: Records) -> Agenda:
        """The runs that are known by these results."""
        plan = Agenda()
        for task in self.study.tasks:
            for method in self.study.reported:
                try:
                    options = self._options(task, method, records, plan)
                except NoChoiceError as error:
                    plan.broken[task, method] = str(error)
                    continue
                if options is None:
                    plan.open += len(self.study.seeds)
                else:
                    plan.reported[task, method] = {
                        seed: self.run(task, method, options, seed) for seed in self.study.seeds
                    }
        return plan

    def run(self, task: str, method: str, options: Mapping[str, Any], seed: int) -> Planned:
        """One run; an AFLoRAError if `aflora train` has no such option, or refuses its value."""
        own = self.study.methods[method].options
        given, more = {**self.study.settings, **self.study.tasks[task]}, self.more
        given.pop("metric", None)
        kind = {**given, **own, **more}.get("method.name", "aflora")
        if kind != "aflora":  # what all are told is for whom it may concern
            freezes = is_true({**given, **own, **more}.get("freezing.enabled")) and kind != "adalora"
            unread = ("adapter.",) if freezes else ("adapter.", "freezing.")
            given, more = (
                {key: value for key, value in of.items() if not key.startswith(unread)} for of in (given, more)
            )
        said = {**given, **own, **more}
        try:
            late = {"train.seed": seed, **{name: as_its_kind(name, value) for name, value in options.items()}}
            return Planned(task, method, {**said, **late}, self._config(said, late))
        except AFLoRAError as error:
            raise AFLoRAError(f"{self.study.name}, {method} on {task}: {error}") from None

    def _config(self, said: dict[str, Any], late: Mapping[str, Any]) -> Config:
        """What options come to; numbers that were chosen for a run are put into what the others come to."""
        kinds = {name: kind for name in late if (kind := OPTIONS.get(name)) in (int, float)}
        numbers = {name: late[name] for name, kind in kinds.items() if isinstance(late[name], kind)}
        said = {**said, **{name: value for name, value in late.items() if name not in numbers}}
        key = json.dumps(said, sort_keys=True)
        if key not in self._configs:
            self._configs[key] = parse(words_of(said))[0]
        config, groups = self._configs[key], {name.partition(".")[0] for name in numbers}
        ours = {g: {n.partition(".")[2]: v for n, v in numbers.items() if n.startswith(f"{g}.")} for g in groups}
        return replace(config, **{group: replace(getattr(config, group), **ours[group]) for group in groups})

    def _metric(self, task: str) -> str:
        """What of result.json a task is reported by."""
        kind = self.run(task, next(iter(self.study.methods)), {}, 0).config.data.task
        there = metrics_of(kind)
        metric = str(self.study.tasks[task].get("metric", "loss" if kind == "sft" else there[0]))
        for said in (metric, *([] if self.study.sweep is None else filter(None, [self.study.sweep.metric]))):
            if said not in there:
                raise AFLoRAError(f"{self.study.name}: {task} has no metric {said!r}: it has {', '.join(there)}.")
        return metric

    def _check(self, method: str) -> None:
        """Try all values, and see that what is searched is decided by the search alone, on data of its own."""
        searched, sweep = self._searched(method), self.study.sweep
        given = (
            (self.more, "given for all runs"),
            (self.study.methods[method].options, "among its own options"),
            ({} if sweep is None else sweep.options, "among the options of the sweep"),
        )
        for option in searched:
            for options, where in given:
                if option in options:
                    raise AFLoRAError(
                        f"{self.study.name}: {option} is searched for {method}, and {where}, too. Drop one."
                    )
        for task in self.study.tasks:
            plain = self.run(task, method, {}, 0)
            data = plain.config.data
            if data.task in ("files", "sft") and data.name is None and data.train_file is None:
                raise AFLoRAError(
                    f"{self.study.name}, {task}: it names no data. Add --data.train_file FILE and "
                    f"--data.validation_file FILE, or --data.name NAME."
                )
            self._refuse_one_for_two(plain)
            self._refuse_other_data(plain)
            for option, values in searched.items():
                for value in values:
                    number_of(value)
                    self._refuse_one_for_two(self.run(task, method, {option: value}, 0))
            if not searched or sweep is None:
                continue
            if plain.config.data.hold_out:
                raise AFLoRAError(
                    f"{self.study.name}, {method} on {task}: data.hold_out is the sweep's to say (sweep.options), and "
                    f"is given for what is reported, too, which would be measured on what rates are chosen by. "
                    f"Drop it, and name data of their own to report on."
                )
            held = {name: said for name, said in sweep.options.items() if name not in self.more}
            if not self.run(task, method, held, sweep.seeds[0]).config.data.hold_out:
                raise AFLoRAError(
                    f"{self.study.name}, {method}: without data.hold_out the sweep would choose by what is reported. "
                    f"Give sweep.options a number of examples above 0, and leave --data.hold_out away."
                )

    def _refuse_other_data(self, run: Planned) -> None:
        """Raise for a run that is measured on other data than the methods it stands beside."""
        first = self._measured.setdefault(run.task, run)
        options = {*measured_on(run.config.data, self.metrics[run.task])}
        for option in sorted(options | {*measured_on(first.config.data, self.metrics[run.task])}):
            ours, theirs = (getattr(one.config.data, option) for one in (run, first))
            if ours != theirs:
                raise AFLoRAError(
                    f"{self.study.name}: on {run.task}, {run.method} is measured with data.{option}={ours}, and "
                    f"{first.method} with {theirs}: they would be compared on different data. Say it for the task."
                )

    def _refuse_one_for_two(self, run: Planned) -> None:
        """Raise for a run that would be taken for an earlier one, with other options."""
        first = self._first.setdefault(run.name, run)
        ours, theirs = flat(asdict(run.config)), flat(asdict(first.config))
        if differ := [name for name in ours if ours[name] != theirs.get(name)]:
            raise AFLoRAError(
                f"{self.study.name}: {first.method} on {first.task} and {run.method} on {run.task} differ only in "
                f"{', '.join(differ)}, which makes no other run of it: a table would show the same one for both. Give "
                f"both the same, or drop one."
            )

    def _searched(self, method: str) -> dict[str, list[Any]]:
        """Option -> values to try, of the methods that it takes rates from, too."""
        variant = self.study.methods[method]
        others = {} if variant.rates_of is None else self._searched(variant.rates_of)
        return {**others, **variant.sweep}

    def _options(self, task: str, method: str, records: Records, plan: Agenda) -> dict[str, Any] | None:
        """What was chosen for a method; None where that is open. Runs by which it is chosen are added to the plan."""
        variant = self.study.methods[method]
        chosen = self._search(task, method, records, plan)
        if chosen is not None and variant.seconds_of is not None:
            share = self._share(task, method, variant, chosen, records, plan)
            chosen = None if share is None else chosen | share
        if chosen is not None:
            plan.chosen[task, method] = chosen
        return chosen

    def _search(self, task: str, method: str, records: Records, plan: Agenda) -> dict[str, Any] | None:
        """The best value of each option that is searched, one option after the other, behind what another's came to."""
        variant = self.study.methods[method]
        chosen = {} if variant.rates_of is None else self._search(task, variant.rates_of, records, plan)
        for option, values in variant.sweep.items():
            if chosen is None:
                return None
            assert self.study.sweep is not None
            best = self._best(task, method, chosen, option, values, self.study.sweep, records, plan)
            chosen = None if best is None else {**chosen, option: best}
        return chosen

    def _best(
        self,
        task: str,
        method: str,
        chosen: Mapping[str, Any],
        option: str,
        values: list[Any],
        sweep: Sweep,
        records: Records,
        plan: Agenda,
    ) -> Any:
        tried = list(values)
        others = {name: said for name, said in sweep.options.items() if name not in self.more}
        while True:
            by_value = {
                value: [
                    replace(
                        self.run(task, method, {**chosen, **others, option: value}, seed), beyond=value not in values
                    )
                    for seed in sweep.seeds
                ]
                for value in tried
            }
            runs = [run for of_value in by_value.values() for run in of_value]
            if not self._are_done(runs, records, plan):
                return None
            where, metric = f"{method} on {task}", sweep.metric or self.metrics[task]
            means = {value: mean_of(where, [run.name for run in of], metric, records) for value, of in by_value.items()}
            best = first_best(means, metric)
            if best is None:
                raise NoChoiceError(f"{where}: no value of the sweep over {option} ended well.")
            wider = beyond(tried, best, is_whole(option, tried))
            if wider is None or len(tried) >= len(values) + sweep.wider:
                return best
            try:
                self.run(task, method, {**chosen, **others, option: wider[-1]}, sweep.seeds[0])
            except AFLoRAError:  # what lies beyond is none of the option's values
                return best
            tried = wider

    @staticmethod
    def _are_done(runs: list[Planned], records: Records, plan: Agenda) -> bool:
        """Whether these, by which something is chosen, are; adds them to the plan."""
        known = {run.name for run in plan.searched}
        plan.searched += [run for run in runs if run.name not in known]
        return all(run.name in records for run in runs)

    def _share(
        self, task: str, method: str, variant: Variant, chosen: Mapping[str, Any], records: Records, plan: Agenda
    ) -> dict[str, Any] | None:
        """So many examples as the method sees in another's seconds; both are run on all of them first."""
        assert variant.seconds_of is not None
        others = self._options(task, variant.seconds_of, records, plan)
        if others is None:
            return None
        times = []
        for name, options in ((method, chosen), (variant.seconds_of, others)):
            runs = [self.run(task, name, options, seed) for seed in self.study.seeds]
            if not self._are_done(runs, records, plan):
                return None
            ended = [records[run.name] for run in runs if "failed" not in records[run.name]]
            if not ended:
                raise NoChoiceError(f"{method} on {task}: no run of {name} has ended well, to take its seconds.")
            times.append((statistics.fmean(map(seconds_of, ended)), ended[0], runs[0].config.train.batch_size))
        (alone, record, batch), (theirs, _, _) = times
        share = min(1.0, round(theirs / alone / _STEP) * _STEP)
        examples = max(1, int(share * record["train_examples"]) // batch) * batch
        return {} if share == 1.0 else {"data.max_train_examples": examples}

"""The grammar of parameter names, and the only place that knows it. Needs no torch.

    base_model.model.bert.encoder.layer.3.output.dense.aflora.default.A             a tensor of an adapter
    base_model.model.classifier.modules_to_save.default.weight                      a head: it trains whole

`base_model.model.` is PEFT's, before every name of the model that it wraps; `default` is the adapter's name,
which PEFT leaves out of the files that it saves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WHOLE_BLOCK = "the whole block"  # the row of what freezes with all matrices of a block
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.aflora\.(?P<adapter>[^.]+)\.(?P<tensor>A|B|s_d|s_b)")
_NUMBERED = re.compile(r"(?:(?P<stack>.*?)\.)??(?P<layer>\d{1,9})(?:\.(?P<module>.*))?")  # by the first number


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of an adapter (Eq. 1), by name.

    Attributes:
        module: The adapted layer, as the model that was asked for its names calls it.
        adapter: PEFT's name of the adapter.
        tensor: A, B, s_d or s_b.

    >>> str(AdapterTensor("base_model.model.layers.0.up_proj", "default", "A"))
    'base_model.model.layers.0.up_proj.aflora.default.A'
    """

    module: str
    adapter: str
    tensor: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is a projection matrix, which may freeze; the vectors s_d and s_b never do."""
        return self.tensor in ("A", "B")

    def __str__(self) -> str:
        return f"{self.module}.aflora.{self.adapter}.{self.tensor}"


def adapter_tensor(name: str) -> AdapterTensor | None:
    """Take the name of an adapter's tensor apart; None if it is not one. `str` puts it together again.

    >>> adapter_tensor("base_model.model.layers.0.up_proj.aflora.default.s_b")
    AdapterTensor(module='base_model.model.layers.0.up_proj', adapter='default', tensor='s_b')
    >>> adapter_tensor("base_model.model.layers.0.up_proj.base_layer.weight") is None
    True
    """
    found = _TENSOR.fullmatch(name)
    return AdapterTensor(**found.groupdict()) if found else None


# How PEFT's methods begin the names of what they add to a layer (peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING).
_PREFIXES = (
    "adamss beft boft c3a delora deft fourierft frod glora gralora hada hira hra ia3 lily lokr lora miss oft osf "
    "peanut poly psoft pvera_lambda randlora road shadow shira supertuning tinylora unilora vblora vera_lambda waveft"
)
_TUNED = re.compile(rf"(?P<module>.+)\.(?:{_PREFIXES.replace(' ', '|')})_\w+\.[^.]+(?:\.weight|\.bias)?")


def module_of(name: str) -> str:
    """The layer that a parameter belongs to: who is adapted by it, or who has it, parametrized (weight_norm) or not.

    >>> module_of("base_model.model.layers.0.up_proj.lora_A.default.weight")
    'base_model.model.layers.0.up_proj'
    >>> module_of("layers.0.up_proj.weight"), module_of("layers.0.up_proj.parametrizations.weight.original1")
    ('layers.0.up_proj', 'layers.0.up_proj')
    """
    if (tensor := adapter_tensor(name)) is not None:
        return tensor.module
    tuned = _TUNED.fullmatch(name)
    owner = tuned["module"] if tuned else name.rpartition(".")[0]
    return f".{owner}".partition(".parametrizations.")[0][1:]


def is_adapter(name: str) -> bool:
    """Whether the tensor belongs to an AFLoRA adapter, in the model as in a saved file.

    >>> is_adapter("base_model.model.layers.0.up_proj.aflora.A"), is_adapter("base_model.model.embed.weight")
    (True, False)
    """
    return ".aflora." in name


def is_head(name: str) -> bool:
    """Whether the parameter belongs to a module that trains whole, such as a task head, and not to the adapter.

    >>> is_head("base_model.model.classifier.modules_to_save.default.weight")
    True
    """
    return ".modules_to_save." in name


def of_base(name: str) -> str:
    """What the model that PEFT wraps calls this module or parameter itself.

    >>> of_base("base_model.model.bert.pooler"), of_base("bert.pooler")
    ('bert.pooler', 'bert.pooler')
    """
    return name.removeprefix(_PREFIX)


def in_peft(name: str) -> str:
    """What PEFT's files call it, whether a PeftModel says its name or the model itself.

    >>> in_peft("bert.pooler"), in_peft("base_model.model.bert.pooler")
    ('base_model.model.bert.pooler', 'base_model.model.bert.pooler')
    """
    return f"{_PREFIX}{of_base(name)}"


# What wraps a module in place, by its class or a base of it, and the attribute that holds the module.
_WRAPPERS = {
    "ActivationWrapper": "_checkpoint_wrapped_module",  # of torch's CheckpointWrapper and OffloadWrapper
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
_ATTRIBUTES = {*_WRAPPERS.values()} - {"module"}  # what no module of a model is called


def named_modules(model: Any, *, remove_duplicate: bool = True) -> dict[str, Any]:
    """As torch's, by the names that modules have where nothing wraps any of them. A wrapper itself is left out.

    Activation checkpointing, FSDP1, torch.compile and data parallelism put a module of their own around another one,
    whose name then goes through an attribute of theirs.
    """
    inside = _unwrapped(model, remove_duplicate)
    return {inside[name]: module for name, module in model.named_modules(remove_duplicate=remove_duplicate)}


def named_parameters(model: Any, *, remove_duplicate: bool = True) -> dict[str, Any]:
    """As torch's, by the names that parameters have where nothing wraps a module: see `named_modules`."""
    known: set[int] = set()
    found = {}
    for name, module in named_modules(model, remove_duplicate=remove_duplicate).items():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=remove_duplicate):
            if id(parameter) not in known or not remove_duplicate:
                found[f"{name}.{own}" if name else own] = parameter
            known.add(id(parameter))
    return found


@contextmanager
def without_wrappers(model: Any) -> Iterator[None]:
    """Let `model.named_modules()` give the names of `named_modules`: PEFT looks for its layers' tensors by them."""
    modules, held = named_modules(model), vars(model).get("named_modules")
    model.named_modules = lambda *args, **kwargs: iter(modules.items())
    try:
        yield
    finally:
        del model.named_modules
        if held is not None:
            model.named_modules = held


def unwrapped(key: str) -> str:
    """A key of a state dict, which some wrappers rename and some do not, as the unwrapped model has it.

    >>> unwrapped("_orig_mod.layers.0._checkpoint_wrapped_module.up_proj.weight")
    'layers.0.up_proj.weight'
    """
    return ".".join(part for part in key.split(".") if part not in _ATTRIBUTES)


def _unwrapped(model: Any, remove_duplicate: bool) -> dict[str, str]:
    """The names that torch gives the modules -> those that they have where nothing wraps any of them."""
    names: dict[str, str] = {}
    holds: dict[str, str] = {}  # wrapper -> attribute
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):  # parents come first
        parent, _, own = name.rpartition(".")
        inside = names.get(parent, "")
        names[name] = inside if name and holds.get(parent) == own else f"{inside}.{own}" if inside else own
        classes = (kind.__name__ for kind in type(module).__mro__)
        if held := next((_WRAPPERS[kind] for kind in classes if kind in _WRAPPERS), None):
            holds[name] = held
    return names


@dataclass(frozen=True, order=True)
class MatrixPosition:
    """Where a projection matrix sits.

    Attributes:
        stack: What comes before the layer's number, such as "bert.encoder.layer"; "" where nothing does.
        layer: The layer's number; -1 for a matrix outside of numbered layers.
        kind: The module in the layer and the matrix, such as "intermediate.dense A".
    """

    stack: str
    layer: int
    kind: str


def matrix_position(name: str) -> MatrixPosition:
    """Where a matrix of freeze_log.jsonl sits.

    >>> matrix_position("base_model.model.model.layers.11.mlp.up_proj.aflora.default.B")
    MatrixPosition(stack='model.layers', layer=11, kind='mlp.up_proj B')
    >>> matrix_position("base_model.model.up.aflora.default.A")
    MatrixPosition(stack='', layer=-1, kind='up A')
    >>> matrix_position("0.up.weight"), matrix_position("layers.3.weight")  # of nn.Sequential; a layer is the block
    (MatrixPosition(stack='', layer=0, kind='up weight'), MatrixPosition(stack='layers', layer=3, kind='weight'))
    """
    parsed = adapter_tensor(name)
    module, tensor = (parsed.module, parsed.tensor) if parsed else name.rpartition(".")[::2]
    module = of_base(module)
    numbered = _NUMBERED.fullmatch(module)
    if numbered is None:
        return MatrixPosition("", -1, f"{module} {tensor}")
    kind = f"{numbered['module'] or ''} {tensor}".lstrip()
    return MatrixPosition(numbered["stack"] or "", int(numbered["layer"]), kind)


def grid(names: Iterable[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """Columns (stack, layer) and rows (kind) that have room for all these matrices.

    >>> grid(f"base_model.model.layers.{i}.up_proj.aflora.default.{m}" for i in (0, 1) for m in "AB")
    ([('layers', 0), ('layers', 1)], ['up_proj A', 'up_proj B'])
    """
    positions = [matrix_position(name) for name in names]
    return sorted({(p.stack, p.layer) for p in positions}), sorted({p.kind for p in positions})


def stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """What to write before the numbers of layers, to tell stacks apart: the first part that does; one needs nothing.

    >>> stack_names(["model.encoder.layers", "model.decoder.layers"])
    {'model.encoder.layers': 'encoder ', 'model.decoder.layers': 'decoder '}
    >>> stack_names(["layers"])
    {'layers': ''}
    """
    known = {stack: stack.split(".") for stack in stacks}
    if len(known) < 2:
        return dict.fromkeys(known, "")
    for parts in zip(*known.values(), strict=False):
        if len({*parts}) == len(known):
            return {stack: f"{part} " for stack, part in zip(known, parts, strict=True)}
    return {stack: f"{stack} ".lstrip() for stack in known}


def freeze_map_cells(
    names: Sequence[str], frozen: Mapping[str, int], ends: Sequence[tuple[int, int]]
) -> tuple[list[tuple[str, int]], list[str], dict[tuple[str, tuple[str, int]], int | None]]:
    """Columns and rows of Fig. 5, and after which step each cell's matrix (row, column) froze; None: it trains.

    Args:
        ends: As in `whole_blocks`: where blocks freeze whole, there is a row more for them.
    """
    columns, rows = grid(names)
    at = {(w.kind, (w.stack, w.layer)): frozen.get(name) for name in names if (w := matrix_position(name))}
    if any(lowest for _, lowest in ends):
        at |= {(WHOLE_BLOCK, columns[i]): step for i, step in enumerate(whole_blocks(ends, len(columns)))}
        rows = [*rows, WHOLE_BLOCK]
    return columns, rows, at


def whole_blocks(ends: Iterable[tuple[int, int]], blocks: int) -> list[int | None]:
    """After which step each block had frozen whole, from the bottom; None: it trains.

    Args:
        ends: (step, the lowest block that trains from then on).

    >>> whole_blocks([(3, 1), (8, 3)], 4)
    [3, 8, 8, None]
    """
    known = list(ends)
    return [next((step for step, lowest in known if lowest > block), None) for block in range(blocks)]


def times_as_many(count: float, than: float) -> str:
    """Two counts in words.

    >>> times_as_many(2_442_240, 290_000), times_as_many(2_442_240, 52_304_602)
    ('8.4 times as many', '21.4 times fewer')
    """
    if 0 < count < than:
        return f"{than / count:.1f} times fewer"
    return f"{count / max(than, 1):.1f} times as many"

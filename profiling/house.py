"""The house: which room of the package stands on which floor, and what imports say of it.

`python -m profiling.house` draws it: rooms by floor with their lines of code, and an arrow for each room that another
one imports. `tests/test_floors.py` holds it to the rule that nothing knows of what stands above it. Sources are read,
not imported.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aflora_dist"
PICTURE = ROOT / "docs" / "images" / "house.svg"

# Room -> floor. A room is a folder or a file of the package; a module that stands elsewhere than its folder is named.
FLOORS = {
    **dict.fromkeys(("errors", "names", "version"), 1),
    **dict.fromkeys(("options", "compat", "extras", "untrusted", "weights", "hub", "notices"), 2),
    **dict.fromkeys(("processes", "freezing", "leaving"), 3),
    **dict.fromkeys(("adapter", "engines"), 4),
    "control": 5,
    **dict.fromkeys(("methods", "tasks", "store"), 6),
    **dict.fromkeys(("figures", "traces", "watch"), 7),
    "training": 8,
    **dict.fromkeys(("trainer", "serve", "predict", "plan", "view", "study", "launch_files"), 9),
    **dict.fromkeys(("cli", "training.run"), 10),
}
ENTRY = (
    "",
    "_registration",
)  # the package's own face, what `import aflora_dist` does: it hands out names of all floors
SAID = {
    1: "what went wrong, names",
    2: "options, others' interfaces",
    3: "ranks; Eq. 2 to 5",
    4: "Eq. 1; gradients and state",
    5: "observe, decide, drop",
    6: "what trains, on what, kept where",
    7: "what is seen of a run",
    8: "the main job",
    9: "what people use",
    10: "what people start",
}


@dataclass(frozen=True)
class Import:
    """One name that one module takes from another, wherever in the module it does so."""

    source: str
    target: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: imports {self.name} of {self.target or 'aflora_dist'}"


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package ("" for itself) -> file, by name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return dict(sorted(found.items()))


def room(module: str) -> str:
    """The room that a module belongs to."""
    return module if module in FLOORS else module.partition(".")[0]


def imports(module: str, source: str | None = None) -> Iterator[Import]:
    """What a module takes from others of the package: at its top, within functions, for type checkers alone, by name.

    Args:
        module: Its dotted name below the package.
        source: Its text, if it is not to be read from its file.
    """
    file = modules().get(module, PACKAGE / "module.py")
    folder = [part for part in module.split(".") if part]
    if file.name != "__init__.py":
        folder = folder[:-1]
    text = source if source is not None else file.read_text(encoding="utf-8")
    by_name = "import_module(" in text  # then what names a module stands for an import of it
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            asked = [part for part in (node.module or "").split(".") if part]
            if node.level:
                base = [*folder[: len(folder) + 1 - node.level], *asked]
            elif asked[:1] == [PACKAGE.name]:
                base = asked[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield Import(module, whole if whole in modules() else ".".join(base), alias.name, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == PACKAGE.name:
                    yield Import(module, rest, alias.name, node.lineno)
        elif by_name and isinstance(node, ast.Constant) and node.value and node.value in modules():
            yield Import(module, str(node.value), str(node.value), node.lineno)


@cache
def arrows() -> dict[tuple[str, str], list[Import]]:
    """(room, room that it uses) -> the imports that say so; the package's own face is left out."""
    found: dict[tuple[str, str], list[Import]] = {}
    for module in modules():
        for taken in imports(module):
            pair = (room(taken.source), room(taken.target))
            if pair[0] != pair[1] and not {*pair} & {*ENTRY}:
                found.setdefault(pair, []).append(taken)
    return dict(sorted(found.items()))


def _reached(uses: dict[str, set[str]], start: str) -> set[str]:
    """All that one comes to by arrows from a room."""
    seen: set[str] = set()
    todo = [*uses.get(start, ())]
    while todo:
        if (at := todo.pop()) not in seen:
            seen.add(at)
            todo += uses.get(at, ())
    return seen


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Of rooms that use each other, directly or through others: each such group, by name."""
    uses: dict[str, set[str]] = {}
    for source, target in pairs:
        uses.setdefault(source, set()).add(target)
    below = {start: _reached(uses, start) for start in uses}
    groups = {tuple(sorted(other for other in below[one] if one in below.get(other, ()))) for one in below}
    return [list(group) for group in sorted(groups) if group]


def nearest(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that do not follow from the others: what a room uses through no room between."""
    uses: dict[str, set[str]] = {}
    for source, target in pairs:
        uses.setdefault(source, set()).add(target)
    reached = {name: _reached(uses, name) for name in uses}
    return {
        (source, target)
        for source, target in pairs
        if not any(target in reached.get(other, ()) for other in uses[source] if source not in reached.get(other, ()))
    }


@cache
def lines(name: str) -> int:
    """Of a room's code, blank ones and docstrings included."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for m, file in modules().items() if room(m) == name)


# -- the picture ----------------------------------------------------------------------------------

WIDTH, BOX, HEIGHT, GAP, LEFT, TOP = 1080, 104, 40, 36, 230, 20
COLOURS = {"low": ("#e8f5f2", "#2a9d8f"), "middle": ("#fdf6e3", "#c9a227"), "high": ("#eef0fb", "#3f51b5")}


def places() -> dict[str, tuple[float, float]]:
    """Room -> left and top of its box; the highest floor on top."""
    floors = sorted(set(FLOORS.values()), reverse=True)
    found = {}
    for row, floor in enumerate(floors):
        rooms = [name for name, at in FLOORS.items() if at == floor]
        step = (WIDTH - LEFT - 20) / len(rooms)
        for column, name in enumerate(rooms):
            found[name] = (LEFT + step * (column + 0.5) - BOX / 2, TOP + row * (HEIGHT + GAP))
    return found


def draw() -> str:
    """The house as SVG: rooms by floor, with lines of code; dark arrows for what a room uses, light ones where it
    reaches that through others, too."""
    where, height = places(), TOP + len(SAID) * (HEIGHT + GAP) + 14
    grey = '<path d="M0 0 L8 4 L0 8 z" fill="#8a8f98"/>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f"{grey}</marker></defs>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    all_arrows = arrows()
    dark = nearest({*all_arrows})
    for (source, target), taken in sorted(all_arrows.items(), key=lambda arrow: arrow[0] in dark):
        (x, y), (to_x, to_y) = where[source], where[target]
        if to_y == y:  # from side to side
            begin, end = ((x + BOX, y), (to_x - 2, y)) if to_x > x else ((x, y), (to_x + BOX + 2, y))
            begin, end = ((at_x, at_y + HEIGHT / 2) for at_x, at_y in (begin, end))
        else:
            down = to_y > y
            begin, end = (x + BOX / 2, y + HEIGHT * down), (to_x + BOX / 2, to_y - 2 if down else to_y + HEIGHT + 2)
        parts.append(
            f'<path d="M{begin[0]:.0f} {begin[1]:.0f} L{end[0]:.0f} {end[1]:.0f}" stroke="#5f6570"'
            f' stroke-opacity="{0.9 if (source, target) in dark else 0.13}" fill="none" marker-end="url(#a)"><title>'
            f"{escape(source)} uses {escape(target)}: {len(taken)} imports</title></path>"
        )
    for floor, said in SAID.items():
        y = TOP + (max(SAID) - floor) * (HEIGHT + GAP) + HEIGHT / 2 + 4
        parts.append(f'<text x="14" y="{y:.0f}" fill="#444">{floor:2}  {escape(said)}</text>')
    for name, (x, y) in where.items():
        floor = FLOORS[name]
        fill, stroke = COLOURS["low" if floor <= 4 else "middle" if floor <= 7 else "high"]
        shown = name if name.count(".") else f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        text = f'<text x="{x + BOX / 2:.0f}" text-anchor="middle"'
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="{stroke}"/>'
            f'{text} y="{y + 17:.0f}" font-weight="600">{escape(shown)}</text>'
            f'{text} y="{y + 32:.0f}" font-size="11" fill="#444">{lines(name):,} lines</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.house", description="Draw the package's rooms by floor.")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the file")
    args = parser.parse_args(argv)
    args.out.write_text(draw(), encoding="utf-8")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

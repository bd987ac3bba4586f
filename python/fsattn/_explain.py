"""explain: which kernels a call would run, and why."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _library, functional


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _find(function: Callable | str) -> Callable:
    if callable(function):
        return function
    if not isinstance(function, str):
        found = type(function).__name__
        raise TypeError(f"fn_or_name: must be a function or its name, found {found}")
    if function not in functional.__all__ or not function.islower():
        names = ", ".join(sorted(name for name in functional.__all__ if name.islower()))
        raise ValueError(f"fn_or_name: must be one of {names}, found {function!r}")
    return getattr(functional, function)


def _explain_backward(result: Any, inputs: list[Tensor]) -> None:
    outputs = [x for x in _tensors(result) if x.requires_grad]
    inputs = [x for x in inputs if x.requires_grad]
    if outputs and inputs:
        ones = [torch.ones_like(x) for x in outputs]
        torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


def explain(fn_or_name: Callable | str | None = None, /, *args: Any, **kwargs: Any) -> str:
    """Which kernels fn(*args, **kwargs) would run, with their workspace and the reason, as text.

    The operators of this library are planned and not run: one entry for each, in order. When the
    result requires a gradient, the entries of the backward follow. Whatever else fn does, it does
    on uninitialised results. Without arguments: what this build consists of.

    Args:
        fn_or_name: a function of this package or its name, a module, or any function that calls
            them.

    Raises:
        What the call itself would raise for invalid arguments; ValueError if nothing of this
        library was called.
    """
    if fn_or_name is None:
        return _library.describe_build()
    function = _find(fn_or_name)
    inputs = list(_tensors([args, kwargs]))
    if isinstance(function, torch.nn.Module):
        inputs += function.parameters()
    _library.begin_explaining()
    try:
        # The library notes what it would do by thread: the backward has to stay in this one.
        with torch.autograd.set_multithreading_enabled(False):
            _explain_backward(function(*args, **kwargs), inputs)
    finally:
        text = _library.end_explaining()
    if not text:
        raise ValueError("fn_or_name: must call an operator of fsattn, found none")
    return text.rstrip("\n")

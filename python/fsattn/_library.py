"""Loads the operator library, calls its operators and gives its errors their Python type.

The library registers `torch.ops.fsattn` through the LibTorch stable ABI and does not know Python,
so a C++ error arrives here as ValueError or RuntimeError; what it was is asked for afterwards.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

_FILE = "libfsattn_torch.so"

# fsattn::ErrorCode in include/fsattn/error.h, in order.
_EXCEPTIONS = (ValueError, TypeError, NotImplementedError, RuntimeError, RuntimeError)


def _find_library() -> Path:
    # An editable install has two folders in the package's path, sources and built files.
    folders = [Path(root) / "lib" for root in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / _FILE).is_file():
            return folder / _FILE
    raise ImportError(
        f"fsattn: {_FILE} was not found in {', '.join(map(str, folders))}; build it with "
        "`make build` or install the package with `pip install .`"
    )


def _load() -> ctypes.CDLL:
    path = _find_library()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"fsattn: {path} does not load under PyTorch {torch.__version__} (2.10 or newer is "
            f"needed): {error}"
        ) from error
    library = ctypes.CDLL(str(path))
    for name in ("last_error_message", "explain_end", "describe_build", "version"):
        getattr(library, f"fsattn_{name}").restype = ctypes.c_char_p
    return library


_library = _load()


def version() -> str:
    """The version of the library, from include/fsattn/version.h."""
    return _library.fsattn_version().decode()


def describe_build() -> str:
    """Version, CPU instruction set and threads, CUDA devices and compiled kernels, as text."""
    return _library.fsattn_describe_build().decode()


def begin_explaining() -> None:
    """From here to end_explaining(), operators of this thread describe themselves, not run."""
    _library.fsattn_explain_begin()


def end_explaining() -> str:
    """What the operators since begin_explaining() would have done."""
    return _library.fsattn_explain_end().decode()


def _translate(error: Exception) -> Exception:
    """The exception that the library's last error stands for; `error` if it is somebody else's."""
    if str(error) != _library.fsattn_last_error_message().decode():
        return error
    return _EXCEPTIONS[_library.fsattn_last_error_code()](str(error))


# torch.autograd.Functions of operators that have a derivative, from _autograd: the same as what is
# registered with the operators, without the time that PyTorch's wrapper of those takes to fill in
# defaults (about 60 us for 20 arguments). Not under transforms of functions, which only the
# registered ones know.
_functions: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}


def register_function(
    operator: torch._ops.OpOverload, function: type[torch.autograd.Function]
) -> None:
    """Makes call() run `function` where a gradient is wanted."""
    _functions[operator] = function


def wants_gradient(args: tuple) -> bool:
    """Whether a call of these arguments is differentiated, so far as autograd alone decides."""
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """operator(*args); errors of the library become ValueError, TypeError, NotImplementedError.

    A compiled graph holds the operator alone: errors at its run time are RuntimeError, or ValueError
    where PyTorch knows the C++ type, with the same text.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    function = None
    if wants_gradient(args) and not torch._C._are_functorch_transforms_active():
        function = _functions.get(operator)
    run = operator if function is None else function.apply
    try:
        return run(*args)
    except (RuntimeError, ValueError) as error:
        translated = _translate(error)
        if translated is error:
            raise
    raise translated

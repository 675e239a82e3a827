"""Operations of the C x R core. Importing this package imports neither torch nor triton (see pyproject.toml)."""

import importlib.util
import os

IMPLEMENTATIONS = ("torch", "triton", "reference")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests, and set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(impl: str | None, device: str, obstacle: str | None) -> str:
    """The implementation of an operation whose tensors are on `device`; `obstacle` says what Triton's kernels cannot do.

    None is "triton" on a GPU and "torch" elsewhere, and where the obstacle stands. "triton" asked for by name is
    never replaced: ValueError says what is in its way.
    """
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"impl: allowed are None, {', '.join(map(repr, IMPLEMENTATIONS))}, found {impl!r}")
    if device == "cpu" and not interpreted():
        obstacle = "it needs CUDA tensors (or TRITON_INTERPRET=1, its slow interpreter)"
    elif obstacle is None and importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    if impl == "triton" and obstacle:
        raise ValueError(f"impl 'triton': {obstacle}")
    return impl or ("triton" if device == "cuda" and not obstacle else "torch")

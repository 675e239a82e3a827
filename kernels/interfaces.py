"""transformers' attention interface for the shared-prefix layout: who calls the model says for which.

Axes: H query heads, T tokens, P positions of the longest text, d head size, e size of a value.
"""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor

from kernels.attention import Layout, shared_prefix_attention


@dataclass(frozen=True)
class Packing:
    """The layout of a packed sequence and each token's position in its own text."""

    layout: Layout
    positions: Tensor  # [T] int64, on the CPU


_PACKING: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed(layout: Layout, positions: Tensor):
    """Within the block a model with this attention computes a packed sequence; elsewhere SDPA, as before."""
    token = _PACKING.set(Packing(layout, positions))
    try:
        yield
    finally:
        _PACKING.reset(token)


_HIDES_NOTHING: dict[tuple, int] = {}  # a mask function -> the most places for which it was found to hide nothing


def seen(mask_function: Callable, P: int) -> Tensor | None:
    """What each of P places sees of those before it: bool [P, P] on the CPU, or None where that is all of them.

    P x P entries at every forward are as much work for a host as the forward is for a GPU where texts are long; so that a
    function hides nothing is remembered (`_frozen`). Fewer places hide no more.
    """
    try:
        key = _frozen(mask_function)
    except TypeError:
        key = None
    if P <= _HIDES_NOTHING.get(key, 0):
        return None
    zero, places = torch.tensor(0), torch.arange(P)
    sees = mask_function(zero, zero, places[:, None], places[None, :]).expand(P, P).cpu()
    if (~sees).tril_().any():
        return sees
    if key is not None:
        _HIDES_NOTHING[key] = P
    return None


def _frozen(x) -> tuple:
    """One of transformers' mask functions as its code, defaults and what it closes over, if none of that can change; else
    TypeError: of others nobody knows what they look at."""
    if isinstance(x, FunctionType) and x.__globals__.get("__name__") == "transformers.masking_utils":
        closed = tuple(cell.cell_contents for cell in x.__closure__ or ())
        return x.__code__, _frozen((x.__defaults__, *(x.__kwdefaults__ or {}).items(), closed))
    if isinstance(x, tuple):
        return tuple(map(_frozen, x))
    if x is None or isinstance(x, (bool, int, float, str)):
        return type(x), x
    raise TypeError(type(x))


def mask_interface(fallback: Callable):
    """transformers' mask interface; `fallback`: its own, for a model that is called without `packed`.

    What a layer sees is given as a function of two places in a text (causal, a sliding window, chunks); it is asked about
    the tokens' positions, so that every layer's own mask holds within each text. The mask carries the layout to the
    attention, through activation checkpointing too: bool [1, 1, T, T], or NaN [1, 1, 1, 1] where a layer sees all that
    the layout lets it (were another attention called, the result would be NaN, not wrong).
    """
    def attention_mask(*, mask_function, device=None, **options) -> Tensor | None:
        packing = _PACKING.get()
        if packing is None:
            return fallback(mask_function=mask_function, device=device, **options)
        at = packing.positions
        sees = seen(mask_function, int(at.max()) + 1)
        if sees is None:
            mask = torch.full((1, 1, 1, 1), torch.nan, device=device)
        else:
            mask = (sees[at][:, at] & packing.layout.mask())[None, None].to(device)
        mask.packing = packing
        return mask

    return attention_mask


def attention_interface(fallback: Callable):
    """transformers' attention interface: this attention where the mask carries a layout (`mask_interface`) or the model is
    called for one (`packed`); else `fallback`, the model's own.

    query [1, H, T, d] -> ([1, T, H, e], None). What the layout cannot have is refused: a batch, dropout.
    """
    def attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
        packing = getattr(attention_mask, "packing", None) or _PACKING.get()
        if packing is None:
            return fallback(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)
        if len(query) != 1 or dropout:
            raise ValueError("shared-prefix attention takes a batch of one and no dropout")
        mask = attention_mask[0, 0] if attention_mask is not None and attention_mask.dtype == torch.bool else None
        out = shared_prefix_attention(query[0], key[0], value[0], packing.layout, mask=mask,
                                      softcap=options.get("softcap"), sinks=options.get("s_aux"),
                                      scale=query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.unsqueeze(0), None

    return attention_forward

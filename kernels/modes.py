"""How linear_nll does its work: what is kept for the backward, and how many logits exist at a time."""

SLAB_ELEMENTS = 1 << 25       # logits held at a time: 128 MiB in float32
STORE_BYTES = 1 << 30         # U is kept for the backward up to this size, else its slabs are computed again
NARROW = 900                  # on a GPU, a hidden size up to which computing U again is cheaper than moving it
MODES = ("store", "recompute", "frozen_head", "loss_only")


def plan(N: int, V: int, itemsize: int, *, hidden_grad: bool, head_grad: bool, narrow: bool = False) -> str:
    """The mode for N tokens and V entries: by what needs a gradient, then by the bytes of U (`itemsize` an entry).

    loss_only: no gradient, 2NDV FLOPs. frozen_head: the head needs none, U W is taken slab by slab, 4NDV, N x D
    kept. store: U kept, 6NDV. recompute: nothing kept but the log-sum-exp, 8NDV; also where U is cheaper to compute
    again than to write and read (`narrow`; kernels/README.md has the arithmetic).
    """
    if not (hidden_grad or head_grad):
        return "loss_only"
    if not head_grad:
        return "frozen_head"
    return "recompute" if narrow or N * V * itemsize > STORE_BYTES else "store"


def slabs(N: int, V: int) -> list[slice]:
    """Rows of logits that are held at a time."""
    rows = max(1, SLAB_ELEMENTS // V)
    return [slice(start, min(start + rows, N)) for start in range(0, max(N, 1), rows)]

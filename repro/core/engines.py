"""Who computes a step: one process, which is the reference, or many ranks under torchrun and FSDP2 (`fully_shard`).

Of many ranks:
1. Rank 0 reads the weights; the others build the model without any. Each decoder layer is a group of its own, embedding,
   final norm and head (tied or not) are the root's; rank 0 sends every rank its shard.
2. A batch is one set of queries for any number of ranks: dealt out by length, each rank's queries in passes, the same
   number of passes on every rank (one without queries left does work that counts 0), since every pass gathers weights.
3. Gradients are summed over a rank's passes and travel once a step, in float32, where a whole gradient fits beside the
   model; else after each pass. The same sums either way.

The sum over ranks is the one-process gradient up to the order of additions. Nothing here depends on how long a text is
but which queries go together.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from repro.base.records import UserError, first_line
from repro.base.training import TrainSpec
from repro.core.logprobs import lengths_of, matrix_of, settled, slices
from repro.core.losses import objective
from repro.core.memory import usable_bytes
from repro.core.shapes import decoder_layers
from repro.core.tree import Pairs, Sampled, tokenised
from repro.models import load


@dataclass(frozen=True)
class TrainingPair:
    """One query's example: C rendered prompts and R responses; in training R = C, response j sampled under prompt j. A
    response is the token ids that were sampled, alone or with what stood around them, or a text (tree.py). `initial`: their
    summed log-probs [C][R] under the initial model, where the objective needs them."""

    query: str
    prompts: tuple[str, ...]
    responses: tuple[str | tuple[int, ...] | Sampled, ...]
    initial: tuple[tuple[float, ...], ...] | None = None


def ids_of(tokenizer, pairs: Sequence[TrainingPair], *, score_eos: bool) -> list[Pairs]:
    """The token ids of each query's pairs: every text is tokenised here, once."""
    return tokenised(tokenizer, [p.prompts for p in pairs], [p.responses for p in pairs], score_eos=score_eos)


def weights_dtype(spec: TrainSpec) -> str:
    """Of the weights in training. Frozen ones have 16 bits where they are multiplied as such in any case (on a GPU)."""
    frozen = spec.lora and spec.precision == "fp32_master" and torch.cuda.is_available()
    return "bfloat16" if spec.precision == "bf16" or frozen else "float32"


@contextmanager
def matmul_precision(model, precision: str):
    """bf16 products on float32 weights for "fp32_master", where the chip has them; nothing otherwise.

    On a CPU this is oneDNN's setting, which is nearer to float32 than autocast and as fast; on CUDA autocast.
    """
    if precision != "fp32_master":
        yield
    elif model.device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):  # a cached copy would outlive the update
            yield
    else:
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


class Objective(torch.nn.Module):
    """Queries -> their part of a batch's mean loss. Trunk, head and loss are one forward: whoever gathers weights around a
    forward (FSDP) has then gathered the head's too."""

    def __init__(self, model, spec: TrainSpec, way: str):
        """`way`: of repro/core/logprobs.py's WAYS, settled for the model."""
        super().__init__()
        self.model, self.spec, self.way = model, spec, way

    def forward(self, part: Sequence[Pairs], counted: int, queries: int, initial: Sequence = (),
                progress: float = 1.0) -> Tensor:
        """The objective of `part`, weighted as `counted` of the batch's `queries` (0: work that leaves no trace).
        `initial`: the initial model's [C][R] of each, where it needs them; `progress`: as of `objective`."""
        sums = matrix_of(self.way, self.model, part, length_normalize=False)
        before = sums.new_tensor(initial) if initial else None
        return objective(self.spec, sums, lengths_of(part, sums), initial=before, progress=progress) * counted / queries


class Scorer(Objective):
    """Queries -> their summed log-probs [B, C, R], in one forward of a model whose weights need no gradient."""

    def forward(self, part: Sequence[Pairs]) -> Tensor:
        # Without a budget, by which the forwards would be as many as the texts are long: all ranks must gather the weights
        # equally often.
        return matrix_of(self.way, self.model, part, length_normalize=False)


def settle(model, backend: str) -> str:
    """As `repro.core.logprobs.settled`, for a run: what was found before the weights were loaded must hold for them."""
    try:
        return settled(model, backend)
    except ValueError as e:
        raise UserError(f"the loaded model ({model.config.name_or_path}): {e}") from e


class OneProcess:
    """The whole of a batch here. repro/core/engines.py has the same methods for many ranks."""

    rank, ranks = 0, 1

    def load_model(self, name: str, *, dtype: str):
        """The model that `train` takes."""
        return load.load_model(name, dtype=dtype)

    def settle(self, model, backend: str) -> str:
        """The way of computing `backend` that is right for the loaded model. Raises UserError where none is."""
        return settle(model, backend)

    def prepare(self, objective: Objective) -> Objective:
        """The module to train, its weights where they belong."""
        self._objective = objective
        return objective

    def passes(self, lengths: list[int], budget: int) -> list[tuple[list[int], int]]:
        """This rank's forward-backward passes: which queries (`lengths`: packed tokens of each), how many count."""
        return [(list(range(*part.indices(len(lengths)))), part.stop - part.start) for part in slices(lengths, budget)]

    def before_backward(self, module: Objective, *, last: bool) -> None:
        """Gradients of the other passes are summed before they travel."""

    def clip(self, module: Objective, limit: float) -> float:
        """The gradient's norm over all ranks, before it is scaled down to `limit`."""
        return torch.nn.utils.clip_grad_norm_(module.parameters(), limit).item()

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        """Every rank's values, in the order of ranks."""
        return [values]

    def together(self, do: Callable) -> list:
        """What `do()` returns on every rank; where it raises UserError on any, it does on all."""
        return [do()]

    def export(self, save: Callable) -> None:
        """`save(model)` once, with all trained weights."""
        save(self._objective.model)


STEP_TIMEOUT = timedelta(seconds=60)   # of a step's collectives: how far ranks are apart is less than one pass
OTHER_TIMEOUT = timedelta(minutes=60)  # while rank 0 reads or writes a whole model, the others wait


def deal(lengths: list[int], ranks: int, budget: int) -> list[list[tuple[list[int], int]]]:
    """Per rank its passes: (which queries, how many of them count). The longest query first, to the rank with the fewest
    tokens so far. All ranks get the same number of passes; what fills up is the shortest query of all, counting 0."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for query in sorted(range(len(lengths)), key=lambda q: (-lengths[q], q)):
        rank = loads.index(min(loads))
        shares[rank].append(query)
        loads[rank] += lengths[query]
    passes = []
    for share in map(sorted, shares):
        cuts = slices([lengths[q] for q in share], budget) if share else []
        passes.append([(share[cut], len(share[cut])) for cut in cuts])
    shortest = min(range(len(lengths)), key=lambda q: lengths[q])
    most = max(map(len, passes))
    return [own + [([shortest], 0)] * (most - len(own)) for own in passes]


@contextmanager
def sharded() -> Iterator["Sharded"]:
    """The process group of a torchrun worker: NCCL where there are GPUs, gloo elsewhere."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=OTHER_TIMEOUT)
    yield Sharded("cuda" if cuda else "cpu")
    dist.destroy_process_group()  # not after an error: the other ranks may never come to it


class Sharded:
    """Many ranks in the place of `repro.core.engines.OneProcess`; every rank calls each method."""

    def __init__(self, device: str):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)
        self.group = dist.new_group(timeout=STEP_TIMEOUT)

    def load_model(self, name: str, *, dtype: str):
        """Rank 0: the model, on the CPU. The others: the same without weights."""
        found = []
        self.together(lambda: found.append(load.load_model(name, dtype=dtype, device="meta" if self.rank else "cpu")))
        return found[0]

    # ---- what core/loop.py calls

    def settle(self, model, backend: str) -> str:
        """Tried by rank 0, which has the weights, before they are dealt out."""
        return self.together(lambda: None if self.rank else settle(model, backend))[0]

    def prepare(self, objective: Objective) -> Objective:
        """Shard the objective in place and give every rank its weights, which are rank 0's."""
        model, spec = objective.model, objective.spec
        state = objective.state_dict() if self.rank == 0 else {}
        buffers = list(objective.buffers()) if self.rank == 0 else []
        objective.to("meta")
        model.tie_weights()
        self._objective, self._plain = objective, copy.deepcopy(model)  # the latter is what `export` fills
        mesh = DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=("ranks",))
        root = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        # On a GPU, autocast rounds the layers' matrices to bf16 in any case: they travel rounded. The rest of the
        # arithmetic stays as it is in one process: inputs of a layer are not cast, embedding and head are float32.
        halved = spec.precision == "fp32_master" and self.device.type == "cuda"
        layer = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False) if halved else root
        for module, policy in [*((block, layer) for block in decoder_layers(model)), (objective, root)]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # a sum: each rank's loss is its part of the mean already
            module.set_force_sum_reduction_for_comms(True)
        objective.to_empty(device=self.device)
        model.tie_weights()
        set_model_state_dict(objective, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for k, buffer in enumerate(objective.buffers()):
            if self.rank == 0:
                buffer.copy_(buffers[k])
            dist.broadcast(buffer, src=0)
        whole = 4 * sum(p.numel() for p in objective.parameters())
        own = sum(p.numel() * p.element_size() for p in objective.parameters()) // self.ranks
        free = min(room for room, in self.gather(usable_bytes(self.device) - own))
        self.one_reduction = whole <= free / 2
        return objective

    def passes(self, lengths: list[int], budget: int) -> list[tuple[list[int], int]]:
        return deal(lengths, self.ranks, budget)[self.rank]

    def before_backward(self, module, *, last: bool) -> None:
        module.set_requires_gradient_sync(last or not self.one_reduction)
        module.set_is_last_backward(last)

    def clip(self, module, limit: float) -> float:
        shards = [p.grad.to_local() for p in module.parameters()]
        norms = [torch.linalg.vector_norm(s, dtype=torch.float32) for s in shards if s.numel()]  # no copy in float32
        square = torch.stack([*norms, torch.zeros((), device=self.device)]).double().square().sum().reshape(1)
        dist.all_reduce(square, group=self.group)
        norm = math.sqrt(square.item())
        if norm > limit:
            for shard in shards:
                shard.mul_(limit / (norm + 1e-6))
        return norm

    def gather(self, *values: float) -> list[tuple[float, ...]]:
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(everyone, own, group=self.group)
        return [tuple(row.tolist()) for row in everyone]

    def together(self, do: Callable) -> list:
        try:
            own = do(), None
        except UserError as e:
            own = None, first_line(e)
        everyone: list = [None] * self.ranks
        dist.all_gather_object(everyone, own)
        failures = [(rank, failure) for rank, (_, failure) in enumerate(everyone) if failure is not None]
        if failures:
            rank, failure = failures[0]
            raise UserError(failure if rank == 0 else f"{failure} (rank {rank})")
        return [result for result, _ in everyone]

    # ---- after training

    def export(self, save: Callable) -> None:
        """`save(model)` on rank 0, with all trained weights in a model on the CPU."""
        state = get_model_state_dict(self._objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

        def fill():
            if self.rank == 0:
                self._plain.load_state_dict({k.removeprefix("model."): v for k, v in state.items()}, assign=True)
                self._plain.tie_weights()
                save(self._plain)

        self.together(fill)

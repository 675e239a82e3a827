"""Checkpoints between the steps of an iteration: weights, optimizer, trace. Any number of ranks reads what any other wrote.

torch.distributed.checkpoint writes and reads the shards. It knows no checksum and mixes two saves into one folder without
a word, and it would run code that someone put into its index; so each save has a folder of its own, a marker with sizes
and sha256 comes last, and nothing is loaded that the marker of this run's own folder does not confirm.
"""

import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage

from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from repro.base.records import (
    MARKER,
    UserError,
    file_facts,
    first_line,
    make_folder,
    read_json,
    remove_folder,
    seal,
    sealed,
    write_json,
)

TRAINED = StateDictOptions(ignore_frozen_params=True)  # what is frozen is the initial model's
KEEP = 2  # complete checkpoints: the newest, and one in case it is altered


class StepCheckpoints:
    """The step checkpoints of one iteration in `folder`, valid for `key` alone (config and inputs of the iteration).

    A step is saved when the work since the last save took `worth` times as long as that save did (0: every step), so that
    saving costs at most that share; the first always.
    """

    def __init__(self, folder: Path, key: str, *, worth: float = 10.0):
        self.folder, self.key, self.worth = Path(folder), key, worth
        self._cost, self._since = 0.0, time.monotonic()

    def _folders(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def restore(self, engine, module, optimizer) -> list[dict]:
        """Load the newest checkpoint that is complete and unaltered; returns its trace, [] where there is none."""
        for folder in engine.together(self._folders)[0]:
            complete = sealed(folder, self.key, slice(engine.rank, None, engine.ranks))
            if all(good for good, in engine.gather(complete)):
                break
            if engine.rank == 0:
                print(f"{folder}: {_why(folder, self.key)}; skipped", file=sys.stderr)
        else:
            return []
        saved = dict(zip(("module", "optimizer"), get_state_dict(module, optimizer, options=TRAINED)))
        engine.together(lambda: _io("read", checkpoint.load, saved, folder))
        set_state_dict(module, optimizer, model_state_dict=saved["module"], optim_state_dict=saved["optimizer"],
                       options=replace(TRAINED, strict=all(p.requires_grad for p in module.parameters())))
        trace = read_json(folder / "trace.json")
        if engine.rank == 0:
            print(f"going on after step {len(trace)} ({folder})", file=sys.stderr)
        return trace

    def save(self, engine, module, optimizer, trace: list[dict], *, now: bool = False) -> None:
        """Save after the step that ends `trace`, if it is worth it or `now`. Raises UserError where the disk refuses."""
        started = time.monotonic()
        due = now or not self._cost or started - self._since >= self.worth * self._cost
        if not engine.gather(due)[0][0]:  # rank 0's clock decides for all
            return
        folder = self.folder / f"step-{len(trace):06d}"
        engine.together(lambda: engine.rank or (remove_folder(folder), make_folder(folder)))
        state = dict(zip(("module", "optimizer"), get_state_dict(module, optimizer, options=TRAINED)))
        try:
            engine.together(lambda: _io("write", checkpoint.save, state, folder))
            parts = engine.together(lambda: self._files(engine.rank, folder, trace))
            files = {name: fact for part in parts for name, fact in part.items()}
            engine.together(lambda: engine.rank or seal(folder, self.key, files))
        except UserError:
            if engine.rank == 0:
                remove_folder(folder)
            raise
        engine.together(lambda: engine.rank or self._prune(folder))
        self._since = time.monotonic()
        self._cost = self._since - started

    def _files(self, rank: int, folder: Path, trace: list[dict]) -> dict[str, dict]:
        """What this rank wrote."""
        own = file_facts(folder, f"__{rank}_*")
        if rank == 0:
            write_json(folder / "trace.json", trace)
            own |= file_facts(folder, "trace.json") | file_facts(folder, ".metadata")
        return own

    def _prune(self, newest: Path) -> None:
        """Keep what a later call could take; what is newer than `newest` was skipped."""
        good = [folder for folder in self._folders() if folder <= newest and _key(folder) == self.key][:KEEP]
        for folder in self._folders():
            if folder not in good:
                remove_folder(folder)


def _key(folder: Path) -> str | None:
    """What a complete folder is valid for; None where it is torn."""
    try:
        return read_json(folder / MARKER)["key"]
    except (UserError, KeyError, TypeError):
        return None


def _why(folder: Path, key: str) -> str:
    if not (folder / MARKER).is_file():
        return "not complete (its save was interrupted)"
    return "altered" if _key(folder) in (key, None) else "of another config or other inputs"


def _io(doing: str, act, state: dict, folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as it says
            act(state, checkpoint_id=folder)
    except (checkpoint.CheckpointException, OSError, RuntimeError) as e:
        rank, (error, _) = min((getattr(e, "failures", None) or {0: (e, None)}).items(), key=lambda item: item[0])
        if isinstance(error, (SystemExit, KeyboardInterrupt)):  # a signal's, which torch has wrapped as a failure
            raise error from None
        raise UserError(f"cannot {doing} checkpoint {folder} (rank {rank}): {first_line(error)}; "
                        f"{disk_usage(folder).free / 2**20:.0f} MiB are free there") from e

"""SAMI: self-supervised alignment with mutual information (arXiv 2404.14313).

The public names, in the order in which the data passes through them. They load on first use:
`import repro` imports no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "load_queries": "datasets",
    "Constitution": "constitutions",
    "sample_responses": "sampling",
    "logprob_matrix": "logprobs",
    "symmetric_infonce": "losses",
    "train": "training",
    "mutual_information": "metrics",
    "judge_pairwise": "judging",
    "win_rate": "metrics",
    "Experiment": "config",
    "run": "pipeline",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'repro' has no attribute {name!r}")
    return getattr(import_module(f"repro.{_WHERE[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])

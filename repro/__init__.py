"""SAMI: self-supervised alignment with mutual information (arXiv 2404.14313).

The public names, in the order in which the data passes through them. They load on first use:
`import repro` imports no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "load_queries": "text.queries",
    "Principle": "text.principles",
    "Constitution": "text.principles",
    "load_model": "models.load",
    "load_tokenizer": "models.load",
    "sample_responses": "sampling.local",
    "logprob_matrix": "core.logprobs",
    "symmetric_infonce": "core.losses",
    "train": "core.loop",
    "mutual_information": "base.metrics",
    "judge_pairwise": "judges.rule",
    "win_rate": "base.metrics",
    "Experiment": "base.settings",
    "run": "stages.pipeline",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'repro' has no attribute {name!r}")
    return getattr(import_module(f"repro.{_WHERE[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])

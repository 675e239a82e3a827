"""The settings of an experiment under the name by which experiment files import them (repro/base/settings.py)."""

from repro.base.settings import (
    EMBEDDED,
    ENGINES,
    JUDGES,
    WRITERS,
    DataSpec,
    Experiment,
    JudgeSpec,
    ModelSpec,
    SamplingSpec,
    WriterSpec,
)
from repro.base.training import LoraSpec, TrainSpec, Update

__all__ = ["EMBEDDED", "ENGINES", "JUDGES", "WRITERS", "DataSpec", "Experiment", "JudgeSpec", "LoraSpec", "ModelSpec",
           "SamplingSpec", "TrainSpec", "Update", "WriterSpec"]

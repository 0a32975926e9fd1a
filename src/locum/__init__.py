"""Locum makes Mixture-of-Experts language models fit.

Importing it registers the loader for checkpoints with compressed layers, so that transformers'
`AutoModelForCausalLM.from_pretrained` opens them like any other.
"""

from .artefacts import load_plan, load_statistics, save_plan, save_statistics
from .bench import bench
from .checkpoint import read_shape
from .container import StandInExperts
from .demo import demo
from .errors import (
    CheckpointError,
    DataError,
    EngineError,
    LocumError,
    OptionError,
    OutputError,
    PlanError,
    StatisticsError,
    UnsupportedModel,
)
from .export import export
from .methods import METHODS
from .pipeline import compress, search
from .plan import Base, LayerPlan, Plan, Slot, make_plan
from .quality import evaluate, recover, report
from .shapes import LayerShape, ModelShape
from .stages import apply, calibrate, catalogue, diff, inspect, plan
from .statistics import Statistics
from .verify import verify

__all__ = [
    "METHODS",
    "Base",
    "CheckpointError",
    "DataError",
    "EngineError",
    "LayerPlan",
    "LayerShape",
    "LocumError",
    "ModelShape",
    "OptionError",
    "OutputError",
    "Plan",
    "PlanError",
    "Slot",
    "StandInExperts",
    "Statistics",
    "StatisticsError",
    "UnsupportedModel",
    "apply",
    "bench",
    "calibrate",
    "catalogue",
    "compress",
    "demo",
    "diff",
    "evaluate",
    "export",
    "inspect",
    "load_plan",
    "load_statistics",
    "make_plan",
    "plan",
    "read_shape",
    "recover",
    "report",
    "save_plan",
    "save_statistics",
    "search",
    "verify",
]

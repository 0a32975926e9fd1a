"""Locum makes Mixture-of-Experts language models fit.

Importing it registers the loader for checkpoints with compressed layers, so that transformers'
`AutoModelForCausalLM.from_pretrained` opens them like any other.
"""

from .checkpoints.checkpoint import read_shape
from .containers.container import StandInExperts
from .demonstration import demo
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
from .exports.export import export
from .files import load_plan, load_statistics, save_plan, save_statistics
from .methods import METHODS
from .plans.plan import Base, LayerPlan, Plan, Slot, make_plan
from .shapes import LayerShape, ModelShape
from .speed.bench import bench
from .stages.pipeline import compress, search
from .stages.quality import evaluate, recover, report
from .stages.stages import apply, calibrate, catalogue, diff, inspect, plan
from .stats.sums import Statistics
from .verification.verify import verify

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

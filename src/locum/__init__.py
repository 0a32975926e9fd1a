"""Locum makes Mixture-of-Experts language models fit.

Importing it registers the loader for checkpoints with compressed layers, so that transformers'
`AutoModelForCausalLM.from_pretrained` opens them like any other.
"""

from .checkpoints.load import load_model
from .checkpoints.patch import load_adapter
from .checkpoints.skeleton import read_shape
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
from .methods import METHODS
from .models.optimization import optimize
from .plans.plan import Base, LayerPlan, Plan, Slot, make_plan, stand_in
from .plans.plan_file import load_plan, save_plan
from .registries import catalogue, show
from .shapes import LayerShape, ModelShape
from .speed.bench import bench
from .stages.application import apply
from .stages.calibration import calibrate
from .stages.cleaning import clean
from .stages.comparison import compare
from .stages.compression import compress
from .stages.evaluation import evaluate
from .stages.frontier import frontier
from .stages.inspection import inspect
from .stages.planning import diff, plan
from .stages.recovery import recover
from .stages.reporting import report
from .stages.searching import search
from .stats.statistics_file import load_statistics, save_statistics
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
    "clean",
    "compare",
    "compress",
    "demo",
    "diff",
    "evaluate",
    "export",
    "frontier",
    "inspect",
    "load_adapter",
    "load_model",
    "load_plan",
    "load_statistics",
    "make_plan",
    "optimize",
    "plan",
    "read_shape",
    "recover",
    "report",
    "save_plan",
    "save_statistics",
    "search",
    "show",
    "stand_in",
    "verify",
]

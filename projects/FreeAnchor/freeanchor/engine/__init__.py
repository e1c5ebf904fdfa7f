"""What `train_net.py` runs, and a training script of your own can: checks, trainer, launching."""

from .benchmark import Figures, Setting, benchmark, default_setting, to_markdown
from .defaults import argument_parser, build_config, check, check_config, setup
from .hooks import MatchingPictures
from .launch import launch
from .learning import LearningCheck
from .loader import TrainLoader
from .optimizer import build_optimizer
from .replay import replay
from .results import verify
from .trainer import Trainer

__all__ = [
    "Figures",
    "LearningCheck",
    "MatchingPictures",
    "Setting",
    "TrainLoader",
    "Trainer",
    "argument_parser",
    "benchmark",
    "build_config",
    "build_optimizer",
    "check",
    "check_config",
    "default_setting",
    "launch",
    "replay",
    "setup",
    "to_markdown",
    "verify",
]

"""fastbn -- batch normalization for NumPy arrays on CPUs: exact, at the speed of memory, safe to put in a server.

``BatchNorm`` trains, ``FrozenBatchNorm`` serves; the functions are the same kernels without the objects.
"""

from fastbn._calibrate import calibrate
from fastbn._config import show_config
from fastbn._fold import FoldReport, fold_conv, fold_linear, fold_report
from fastbn._frozen import FrozenBatchNorm
from fastbn._functional import (
    backward_apply,
    backward_reduce,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    moments,
    normalize,
)
from fastbn._gap import GapReport, LayerGap, train_eval_gap
from fastbn._layer import BatchNorm
from fastbn._memory import get_recycle_limit, release_memory, set_recycle_limit
from fastbn._moments import Moments
from fastbn._state import load, save
from fastbn._threads import get_num_threads, num_threads, set_num_threads
from fastbn._version import __version__

__all__ = [
    "BatchNorm",
    "FoldReport",
    "FrozenBatchNorm",
    "GapReport",
    "LayerGap",
    "Moments",
    "__version__",
    "backward_apply",
    "backward_reduce",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "calibrate",
    "fold_conv",
    "fold_linear",
    "fold_report",
    "get_num_threads",
    "get_recycle_limit",
    "load",
    "moments",
    "normalize",
    "num_threads",
    "release_memory",
    "save",
    "set_num_threads",
    "set_recycle_limit",
    "show_config",
    "train_eval_gap",
]

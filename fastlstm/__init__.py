"""LSTM on CPUs: inference and training, fast and exact, from NumPy and Numba alone.

See `fastlstm.LSTM`; `fastlstm.optim` and `fastlstm.losses` for training; `fastlstm.torch` for a model in PyTorch.
Nothing is compiled by this import; the first call compiles, or loads what an earlier process did.
"""

from __future__ import annotations

from fastlstm import losses, optim
from fastlstm.config import show_config, warmup
from fastlstm.io import from_torch, load, save
from fastlstm.lstm import LSTM, Stream
from fastlstm.model import Linear, Sequential
from fastlstm.threads import get_num_threads, set_num_threads

__all__ = [
    "LSTM",
    "Linear",
    "Sequential",
    "Stream",
    "from_torch",
    "get_num_threads",
    "load",
    "losses",
    "optim",
    "save",
    "set_num_threads",
    "show_config",
    "warmup",
]
__version__ = "0.1.0"

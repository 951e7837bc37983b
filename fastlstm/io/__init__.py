"""Models from and to files and other libraries, one module for each.

| module | holds |
|---|---|
| `safetensors` | the native file format |
| `pytorch` | modules and state dicts of PyTorch |
| `sequences` | data for the command line: .npy, .csv, .wav |
| `files` | how a file is written: whole or not at all |
"""

from __future__ import annotations

from fastlstm.io.pytorch import from_torch
from fastlstm.io.safetensors import load, save

__all__ = ["from_torch", "load", "save"]

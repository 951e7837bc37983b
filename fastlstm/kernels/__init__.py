"""Everything that is compiled: SIMD vectors, activations, the tile and its panels, the sequence, the thread team."""

from __future__ import annotations

from fastlstm.kernels.peak import measure_peak

__all__ = ["measure_peak"]

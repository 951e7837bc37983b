"""The asv suite, one file a subject; the comparison with other libraries (`peers.py`); the dashboard of both.

| file | measures |
|---|---|
| `forward.py`, `backward.py` | a call, a step of a stream; a recorded call and its gradients |
| `reference.py` | speed-up over the NumPy reference, largest error against it in float64 |
| `peak.py` | share of the machine's multiply-add peak |
| `instructions.py` | instructions a call, counted by valgrind: the same number on a busy machine |
| `files.py`, `start.py`, `memory.py` | loading and saving; import and first call; bytes |
| `machine.py` | what it ran on: lanes, CPU features, threads, threading layer |
| `common.py` | what they share |
"""

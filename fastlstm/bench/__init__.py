"""The comparison of fastlstm with other LSTM libraries.

| module | holds |
|---|---|
| `cases` | the one table of sizes, and the weights and input of each |
| `answers` | what the reference makes of a problem in float64 |
| `engines` | one class per library: how a fair expert runs an LSTM with it |
| `training` | the same for training |
| `onnx_graph` | the ONNX model that ONNX Runtime and OpenVINO run |
| `worker` | the process in which one library lives |
| `compare` | starts the workers, checks their answers, times them in turn |
| `report` | tables and a chart from the JSON of a comparison |
| `command` | the options of ``fastlstm bench`` and ``benchmarks/peers.py`` |

Nothing here is imported by ``import fastlstm``.
"""

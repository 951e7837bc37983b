"""`torch.nn.LSTM` on the kernels: a class that takes its place in a model, gradients included.

It needs PyTorch, `pip install fastlstm[torch]`, and is imported by its own name, `import fastlstm.torch`.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fastlstm import lstm
from fastlstm.tape import Tape, record_again

__all__ = ["LSTM", "FallbackWarning", "accelerate"]

Array = NDArray[Any]
Results = tuple[Tensor, Tensor, Tensor]  # output, h_n, c_n
Model = TypeVar("Model")

CLASSES = Tensor, nn.Parameter
DTYPES = torch.float32, torch.float64
THOROUGH = 64  # steps times rows of a call that takes so long that reading its weights once more is nothing
SMALL = 8 << 10  # bytes of a weight that are read in a quarter of a microsecond

_warned: set[str] = set()


class FallbackWarning(RuntimeWarning):
    """`torch.nn.LSTM` itself computes a call, which these kernels cannot; given once for each reason."""


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` on these kernels: the same arguments, parameters, state dict, results and gradients.

    Parameters
    ----------
    *args, **kwargs
        Those of `torch.nn.LSTM`: `input_size`, `hidden_size`, `num_layers=1`, `bias=True`, `batch_first=False`,
        `dropout=0.0`, `bidirectional=False`, `proj_size=0`, `device=None`, `dtype=None`.

    Raises
    ------
    TypeError, ValueError
        As `torch.nn.LSTM` does.

    Warns
    -----
    FallbackWarning
        Once for each reason to leave a call to `torch.nn.LSTM`: a tensor that is not on the CPU, neither float32 nor
        float64, or of a subclass; autocast; a graph that is traced, scripted or compiled; transforms of `torch.func`;
        forward-mode differentiation; a `TorchDispatchMode`. Inside a compiled model a module whose `forward` is wrapped
        by `torch.compiler.disable` stays on the kernels.

    Notes
    -----
    Gradients are of first order; differentiating them again raises. In training mode a call that needs a gradient is
    recorded. In evaluation mode it is recorded only once a backward pass asks for it: `model.eval()` alone makes a call
    nearly as fast as `torch.no_grad()` does, and a backward pass through it runs the forward pass again.

    The weights are the module's parameters of the moment, packed for the kernels again when they have changed: when a
    parameter is another tensor, or torch has counted a change in place. Some changes torch does not count: those of
    optimisers with `fused=True`, through `weight.data` or NumPy, by another process. They are looked for in every
    number; but where no tape is written and there are fewer than 64 steps times rows, of a weight of more than 8 KB
    only in a sample that has a number of every row and every column, so that a single number set so may go unseen.

    The input, states and parameters of a call are used where they are, as by `tensor.numpy()`: torch does not resize
    them afterwards. `torch.jit.script` puts `torch.nn.LSTM` into the model that it is given; script a copy.

    Dropout repeats under `torch.manual_seed`; it does not drop the same elements as `torch.nn.LSTM`. The number of
    threads is that of `fastlstm.set_num_threads`, not that of `torch.set_num_threads`.

    Examples
    --------
    >>> import torch
    >>> from fastlstm.torch import LSTM
    >>> lstm = LSTM(3, 5, num_layers=2, batch_first=True)
    >>> output, (h_n, c_n) = lstm(torch.ones(2, 7, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 7, 5]), torch.Size([2, 2, 5]))
    >>> output.sum().backward()
    >>> lstm.weight_hh_l1.grad.shape
    torch.Size([20, 5])
    """

    _weights: _Weights | None = None  # as the last call found them

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer over a batch of sequences, or over one.

        Parameters
        ----------
        input : Tensor, (T, N, I); (N, T, I) if `batch_first`; (T, I) unbatched; or PackedSequence
            Of the parameters' dtype.
        hx : pair of Tensor, optional
            `h_0` (L*D, N, P) and `c_0` (L*D, N, H); without the N if unbatched. None is zeros.

        Returns
        -------
        output : Tensor, (T, N, D*P); (N, T, D*P) if `batch_first`; (T, D*P) unbatched; or PackedSequence
            The last layer's outputs, both directions side by side.
        (h_n, c_n) : Tensor, (L*D, N, P) and (L*D, N, H); without the N if unbatched
            State of each row after its last step.

        Raises
        ------
        RuntimeError, ValueError
            As `torch.nn.LSTM` does where a shape or a dtype is wrong.

        Examples
        --------
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> from fastlstm.torch import LSTM
        >>> packed = pack_sequence([torch.ones(2, 3), torch.ones(4, 3)], enforce_sorted=False)
        >>> output, (h_n, c_n) = LSTM(3, 5)(packed)
        >>> output.data.shape, output.batch_sizes
        (torch.Size([6, 5]), tensor([2, 2, 1, 1]))
        """
        obstacle = _obstacle_around()
        if obstacle:
            return self._fall_back(input, hx, obstacle)
        if isinstance(input, fx.Proxy):  # to torch.fx.symbolic_trace a module of torch.nn is a leaf
            given: Any = (input,) if hx is None else (input, hx)
            traced: Any = input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), given, {})
            return traced  # type: ignore[no-any-return]
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        for tensor in (x,) if hx is None else (x, hx[0], hx[1]):
            obstacle = _obstacle_in(tensor)
            if obstacle:
                return self._fall_back(input, hx, obstacle)
        weights = self._weights
        thorough = x.numel() >= THOROUGH * self.input_size or (self.training and torch.is_grad_enabled())
        if weights is None or not weights.current(self, thorough):
            weights = self.__dict__["_weights"] = _Weights(self, weights)
        batch_sizes = input.batch_sizes if packed else None
        if weights.layer is None or not self._fits(x, hx, weights.tensors[0].dtype, batch_sizes):
            if batch_sizes is not None:  # here torch does not check, and may compute with memory beyond the arrays
                self.check_input(x, batch_sizes) if hx is None else self.check_forward_args(x, hx, batch_sizes)
            return self._fall_back(input, hx, weights.obstacle)
        if packed and hx is not None:
            hx = self.permute_hidden(hx, input.sorted_indices)
        output, h_n, c_n = self._run(weights, weights.layer, x, hx, batch_sizes)
        if packed:
            return input._replace(data=output), self.permute_hidden((h_n, c_n), input.unsorted_indices)
        return output, (h_n, c_n)

    def _fits(self, x: Tensor, hx: Any, dtype: Any, batch_sizes: Tensor | None) -> bool:
        """Return whether dtypes and shapes are right, and there is something to compute."""
        *sizes, I = x.shape
        if x.dtype is not dtype or self.input_size != I or not x.numel():
            return False
        rows: tuple[int, ...] = ()
        if batch_sizes is not None:
            counts = batch_sizes.numpy()
            if not len(counts) or counts[-1] < 1 or (counts[1:] > counts[:-1]).any() or counts.sum() != len(x):
                return False
            rows = (int(counts[0]),)
        elif len(sizes) == 2:
            rows = (sizes[0] if self.batch_first else sizes[1],)
        if len(sizes) != (2 if rows and batch_sizes is None else 1):
            return False
        if hx is None:
            return True
        if len(hx) != 2:
            return False
        (h_0, c_0), H = hx, self.hidden_size
        count = self.num_layers * (2 if self.bidirectional else 1)
        fits = h_0.shape == (count, *rows, self.proj_size or H) and c_0.shape == (count, *rows, H)
        return fits and h_0.dtype is dtype and c_0.dtype is dtype

    def _run(self, weights: _Weights, layer: lstm.LSTM, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Results:
        """Run the layer on arguments that fit it."""
        h_0, c_0 = (None, None) if hx is None else hx
        seed = None
        if self.training and self.dropout and self.num_layers > 1:
            seed = int(torch.randint(1 << 62, (), device="cpu"))
        packing = None if batch_sizes is None else _Packing(batch_sizes, self.batch_first)
        if torch.is_grad_enabled():
            for tensor in (x, h_0, c_0, *weights.tensors):
                if tensor is not None and tensor.requires_grad:
                    lazy = not self.training
                    call = weights, layer, packing, seed, lazy
                    results: Results = _Recorded.apply(*call, x, h_0, c_0, *weights.tensors)
                    return results
        if seed is None:
            return _infer(layer, packing, x, h_0, c_0)
        tape = _record(layer, packing, seed, x, h_0, c_0)
        return _results(packing, tape.output, tape.state)

    def _fall_back(self, input: Any, hx: Any, obstacle: str) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Call `torch.nn.LSTM`, which raises where an argument is wrong; say why where it does not."""
        results: tuple[Any, tuple[Tensor, Tensor]] = super().forward(input, hx)
        if obstacle and not torch.compiler.is_dynamo_compiling():
            _warn(obstacle)
        return results

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_weights", None)
        return state

    def __prepare_scriptable__(self) -> nn.LSTM:
        _warn("graphs of torch.jit.script")
        plain = copy.copy(self)
        plain.__class__ = nn.LSTM
        return plain


def accelerate(model: Model) -> Model:
    """Make every `torch.nn.LSTM` in a model a `fastlstm.torch.LSTM`.

    The modules stay the same objects, with their parameters, hooks, names and mode. A subclass of `torch.nn.LSTM` is
    left as it is, except one that `torch.nn.utils.parametrize` made.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a `torch.nn.LSTM` itself. Changed in place.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> from fastlstm.torch import accelerate
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 5), "head": torch.nn.Linear(5, 1)})
    >>> type(accelerate(model)["encoder"])
    <class 'fastlstm.torch.LSTM'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kind = type(module)
        if kind is nn.LSTM:
            module.__class__ = LSTM
        elif kind.__bases__ == (nn.LSTM,) and parametrize.is_parametrized(module):
            members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, (LSTM,), members)
    return model


# What the kernels cannot do


def _warn(obstacle: str) -> None:
    if obstacle not in _warned:
        message = f"torch.nn.LSTM itself computes here: the kernels of fastlstm do not do {obstacle}"
        warnings.warn(message, FallbackWarning, stacklevel=6)  # where the module is called
        _warned.add(obstacle)


def _replace_dynamo() -> Any:
    """Return TorchDynamo's callback: None where it does not look at what is run. For PyTorch before 2.6."""
    callback = torch._C._dynamo.eval_frame.set_eval_frame(None)
    torch._C._dynamo.eval_frame.set_eval_frame(callback)
    return callback


_find_dynamo = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", _replace_dynamo)


def _in_dynamo() -> bool:
    return torch.compiler.is_compiling() or _find_dynamo() is not None


def _obstacle_around() -> str:
    """Return what keeps any call from the kernels now; nothing if nothing does."""
    if _in_dynamo():
        return "graphs of torch.compile or torch.export"
    if torch.jit.is_tracing():
        return "graphs of torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if torch._C._len_torch_dispatch_stack():
        return "calls under a TorchDispatchMode"
    return ""


def _obstacle_in(tensor: Any) -> str:
    """Return what keeps a tensor from the kernels; nothing if nothing does."""
    if type(tensor) not in CLASSES:
        return f"tensors of class {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"tensors on {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return f"tensors of {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"tensors of layout {tensor.layout}"
    return "tensors with a negative bit" if tensor.is_neg() else ""


# Weights


class _Weights:
    """A module's weights: a layer that reads them where they are, and what tells whether they have changed since."""

    def __init__(self, module: LSTM, before: _Weights | None) -> None:
        module._update_flat_weights()
        self.names = names = module._flat_weights_names
        self.tensors: tuple[Tensor, ...] = tuple(module._flat_weights)
        self.obstacle = next(filter(None, map(_obstacle_in, self.tensors)), "")
        self.layer: lstm.LSTM | None = None
        self.config = {name: getattr(module, name) for name in lstm.LSTM._SETTINGS}
        self.seen: list[tuple[bytes, bytes]] = []
        self._watched: list[tuple[Any, ...]] = []
        if self.obstacle:
            return
        arrays = [_array(tensor) for tensor in self.tensors]
        self.seen = [_look(array) for array in arrays]  # before the layer packs them, so that no change is missed
        layer = _make_layer(self.config, dict(zip(names, arrays, strict=True)), before.layer if before else None)
        shapes = layer._shapes()
        if any(a.dtype != layer.dtype or a.shape != shapes.get(name) for name, a in zip(names, arrays, strict=True)):
            return
        self.layer = layer
        if all(
            module._parameters.get(name) is tensor and tensor.is_contiguous() and not tensor.is_inference()
            for name, tensor in zip(names, self.tensors, strict=True)
        ):
            self._watched = [
                (name, tensor, tensor.data_ptr(), tensor._version, _sample(array), _bits(array), *seen)
                for name, tensor, array, seen in zip(names, self.tensors, arrays, self.seen, strict=True)
            ]

    def current(self, module: LSTM, thorough: bool) -> bool:
        """Return whether these are still the weights and the settings of the module."""
        parameters = module._parameters
        for name, tensor, pointer, version, sample, bits, seen, sums in self._watched:
            if (
                parameters.get(name) is not tensor
                or tensor._version != version
                or tensor.data_ptr() != pointer
                or not tensor.is_contiguous()
                or sample.tobytes() != seen
                or (thorough and _sums(bits) != sums)
            ):
                return False
        config = self.config
        alike = config["batch_first"] == module.batch_first and config["dropout"] == module.dropout
        return alike and bool(self._watched)


def _make_layer(config: dict[str, Any], params: dict[str, Array], like: lstm.LSTM | None = None) -> lstm.LSTM:
    """Return a layer on these arrays, which are not copied; `like`, of the same settings, shares what it has made."""
    layer = lstm.LSTM.__new__(lstm.LSTM)
    layer._configure(next(iter(params.values())).dtype, **config)
    layer._set_params(params)
    layer.__dict__["_fixed"] = False  # an optimiser writes to them
    if like is not None and (like.dtype, like._config) == (layer.dtype, layer._config):
        layer.__dict__["_made"] = like._made
    return layer


def _array(tensor: Tensor) -> Array:
    """Return the memory of a tensor as an array."""
    array: Array = tensor.detach().numpy() if tensor.requires_grad else tensor.numpy()
    return array


def _look(array: Array) -> tuple[bytes, bytes]:
    """Return what tells whether an array is still the same."""
    return _sample(array).tobytes(), _sums(_bits(array))


def _bits(array: Array) -> Array:
    """Return a view of the bits of the numbers, as integers."""
    return array.view(f"i{array.itemsize}")


def _sums(bits: Array) -> bytes:
    """Return the sums of rows and columns, with no regard to overflow: others where numbers changed or changed places.

    Of a bias, whose numbers the sample has all, nothing.
    """
    return b"".join(np.add.reduce(bits, axis, bits.dtype).tobytes() for axis in range(bits.ndim) if bits.ndim > 1)


def _sample(array: Array) -> Array:
    """Return a view of a number of every row and every column, and of all numbers where they are few."""
    numbers = array.reshape(-1)
    if array.ndim == 1 or array.nbytes <= SMALL:
        return numbers
    # A stride no longer than a row meets every row, and one with no divisor in common with it every column.
    rows, columns = array.shape
    strides = range(min(columns - 1, rows), 0, -1)
    return numbers[:: next((stride for stride in strides if math.gcd(stride, columns) == 1), 1)]


# Calls


class _Packing:
    """Where the steps of a packed sequence lie in a padded batch, laid out as the module's input."""

    def __init__(self, batch_sizes: Tensor, batch_first: bool) -> None:
        T, N = len(batch_sizes), int(batch_sizes[0])
        valid = np.arange(N) < batch_sizes.numpy()[:, None]
        t, n = valid.nonzero()
        self.batch_sizes = batch_sizes
        self.shape = (N, T) if batch_first else (T, N)
        self.places = torch.from_numpy(n * T + t if batch_first else t * N + n)
        self.lengths: Array = valid.sum(axis=0)

    def pad(self, steps: Tensor) -> Tensor:
        """Return steps (S, K) as a batch (T, N, K) or (N, T, K), with zeros past the lengths."""
        K = steps.shape[1]
        batch = steps.new_zeros(math.prod(self.shape), K)
        return batch.index_copy_(0, self.places, steps).view(*self.shape, K)

    def pack(self, batch: Tensor) -> Tensor:
        """Return the steps (S, K) of a batch."""
        return batch.flatten(0, 1).index_select(0, self.places)


def _infer(layer: lstm.LSTM, packing: _Packing | None, x: Tensor, h_0: Tensor | None, c_0: Tensor | None) -> Results:
    array, state, lengths = _arguments(packing, x, h_0, c_0)
    return _results(packing, *layer(array, state, lengths=lengths))


def _record(
    layer: lstm.LSTM, packing: _Packing | None, seed: int | None, x: Tensor, h_0: Tensor | None, c_0: Tensor | None
) -> Tape:
    array, state, lengths = _arguments(packing, x, h_0, c_0)
    tape = record_again(layer, array, state, owned=True) if lengths is None and seed is None else None
    if tape is None:
        tape = layer._record(layer._check_call(array, state, lengths, None), seed, None, owned=True)
    tape.output.flags.writeable = True  # torch itself tells when `x` or the output is written to
    return tape


def _arguments(
    packing: _Packing | None, x: Tensor, h_0: Tensor | None, c_0: Tensor | None
) -> tuple[Array, tuple[Array, Array] | None, Array | None]:
    """Return `x`, `state` and `lengths` for the layer."""
    state = None if h_0 is None or c_0 is None else (_array(h_0), _array(c_0))
    if packing is None:
        return _array(x), state, None
    return _array(packing.pad(x.detach())), state, packing.lengths


def _results(packing: _Packing | None, output: Array, state: tuple[Array, Array]) -> Results:
    """Return tensors on the memory of the layer's results; of a packed sequence the steps that there are."""
    tensor = torch.from_numpy(output)
    return tensor if packing is None else packing.pack(tensor), torch.from_numpy(state[0]), torch.from_numpy(state[1])


class _Held(np.ndarray[Any, Any]):
    """A byte with a tape: as one of the tensors that torch saves for the backward pass, it goes when they go."""

    tape: Tape
    x_at: int  # where the input was that the tape reads


_held: weakref.WeakValueDictionary[int, _Held] = weakref.WeakValueDictionary()  # by address


def _hold(tape: Tape, x: Tensor) -> Tensor:
    held = np.zeros(1, np.uint8).view(_Held)
    held.tape, held.x_at = tape, x.data_ptr()
    token = torch.from_numpy(held)
    _held[token.data_ptr()] = held
    return token


class _Recorded(torch.autograd.Function):
    """A call that torch differentiates: recorded at once, or where it is lazy in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: _Weights,
        layer: lstm.LSTM,
        packing: _Packing | None,
        seed: int | None,
        lazy: bool,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *tensors: Tensor,
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.config, ctx.names, ctx.seen, ctx.seed = weights.config, weights.names, weights.seen, seed
        ctx.batch_sizes = None if packing is None else packing.batch_sizes
        if lazy:
            ctx.save_for_backward(x, h_0, c_0, None, None, *tensors)
            return _infer(layer, packing, x, h_0, c_0)
        tape = _record(layer, packing, seed, x, h_0, c_0)
        results = _results(packing, tape.output, tape.state)
        output = results[0] if packing is None else None  # that on the tape's memory
        ctx.save_for_backward(x, h_0, c_0, output, _hold(tape, x), *tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            find = torch.compiler.disable(_Recorded._gradients) if _in_dynamo() else _Recorded._gradients
            gradients = find(ctx, *d_results)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _FirstOrder.apply(*(g if g is None else g.requires_grad_() for g in gradients))
        return (None,) * 5 + gradients

    @staticmethod
    def _gradients(
        ctx: Any, d_output: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h_0, c_0 and the weights; None for those that nobody asks for."""
        if any(d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in (d_output, d_h_n, d_c_n)):
            raise RuntimeError(
                "fastlstm.torch.LSTM cannot take many gradients at once; do without `is_grads_batched=True`"
            )
        x, h_0, c_0, _, token, *tensors = ctx.saved_tensors
        packing = None if ctx.batch_sizes is None else _Packing(ctx.batch_sizes, ctx.config["batch_first"])
        held = None if token is None else _held.get(token.data_ptr())
        if held is not None and held.x_at == x.data_ptr():
            tape = held.tape
        else:  # the call is lazy, a hook has put copies in the place of the saved tensors, or `share_memory_` moved x
            arrays = [_array(tensor) for tensor in tensors]
            if [_look(array) for array in arrays] != ctx.seen:
                raise RuntimeError("the weights of the LSTM have changed between the forward and the backward pass")
            config = ctx.config | ({"dropout": 0.0} if ctx.seed is None else {})
            layer = _make_layer(config, dict(zip(ctx.names, arrays, strict=True)))
            tape = _record(layer, packing, ctx.seed, x, h_0, c_0)
        if packing is not None and d_output is not None:
            d_output = packing.pad(d_output)
        d_out, *d_state = (None if part is None else _array(part) for part in (d_output, d_h_n, d_c_n))
        gradients = tape.backward(d_out, d_state)
        d_x = torch.from_numpy(gradients.x)
        found = (
            d_x if packing is None else packing.pack(d_x),
            *map(torch.from_numpy, gradients.state),
            *(torch.from_numpy(gradients.params[name]) for name in ctx.names),
        )
        return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[5:], strict=True))


class _FirstOrder(torch.autograd.Function):
    """Gradients that cannot be differentiated again, and say so rather than pass for constants."""

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "fastlstm.torch.LSTM has gradients of the first order alone; torch.nn.LSTM has those of the second"
        )

"""Optimisers, gradient clipping and learning rates for training with NumPy alone.

A loop that a checkpoint can go on with::

    optimiser = Adam(model)
    while optimiser.num_steps < total_steps:
        tape = model.record(x)
        loss, d_output = mse(tape.output, target)
        grads = tape.backward(d_output)
        clip_grad_norm(grads, 1.0)
        optimiser.lr = cosine_lr(optimiser.num_steps, 1e-3, total_steps, warmup_steps=100)
        optimiser.step(grads)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastlstm.checks import as_array, as_number, as_size, check_flag, check_shape
from fastlstm.model import Sequential
from fastlstm.parameters import compare_names

__all__ = ["SGD", "Adam", "Optimiser", "clip_grad_norm", "constant_lr", "cosine_lr", "step_lr"]

Array = NDArray[Any]
_MOST_STEPS = (1 << 63) - 1  # what an int64 holds


class Model(Protocol):
    """What an optimiser needs of a model: LSTM, Linear and Sequential have it."""

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the weights."""

    def load_state_dict(self, mapping: Mapping[str, object], /) -> None:
        """Replace the weights."""


class Gradients(Protocol):
    """What `tape.backward` returns, as far as it is used here."""

    @property
    def params(self) -> dict[str, Array]:
        """A gradient for each weight, under its name."""


class Optimiser(ABC):
    """What Adam and SGD have in common: the model, the learning rate, the number of steps, buffers beside the weights.

    A subclass writes `_update`. Its buffers start as zeros, one of each kind for each weight, under names such as
    `m.weight_ih_l0`.
    """

    def __init__(self, model: Model, lr: float, buffers: tuple[str, ...]) -> None:
        if isinstance(model, type) or not (hasattr(model, "state_dict") and hasattr(model, "load_state_dict")):
            raise TypeError(f"`model` must be an LSTM, a Linear or a Sequential, got {type(model).__name__}")
        if isinstance(model, Sequential) and len({id(layer) for layer in model}) < len(model):
            raise ValueError("`model` has one layer in two places, whose gradients would not be added up")
        params = model.state_dict()
        for name, p in params.items():
            _check_floats(f"model.state_dict()[{name!r}]", p)
        self.lr = lr
        self._model = model
        self._num_steps = 0
        self._buffers = {
            f"{buffer}.{name}": np.zeros(p.shape, p.dtype) for buffer in buffers for name, p in params.items()
        }

    @abstractmethod
    def _update(self, name: str, p: Array, g: Array) -> None:
        """Change a weight `p` in place by its gradient `g`, which is not to be written, in step `_num_steps`."""

    @property
    def lr(self) -> float:
        """Learning rate of the next step, at least 0; settable."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = as_number("lr", lr)

    @property
    def num_steps(self) -> int:
        """Number of steps done."""
        return self._num_steps

    def step(self, grads: Gradients | dict[str, Array]) -> None:
        """Change the weights of the model by one step.

        The step starts from the weights that the model has at that time, whoever set them.

        Parameters
        ----------
        grads : result of `tape.backward`, or dict of str to ndarray
            A gradient for every weight, under the names and of the shapes of `model.state_dict()`; cast to its dtype
            where NumPy's `same_kind` rule allows. Not modified, not kept.

        Raises
        ------
        TypeError
            If `grads` is something else, or an array has a dtype that does not cast.
        ValueError
            If a name is missing or unknown, or a shape is wrong. Model and optimiser are unchanged.

        Notes
        -----
        NaN and infinity propagate into the weights; `clip_grad_norm` returns a norm that tells.

        Examples
        --------
        >>> from fastlstm import Linear
        >>> from fastlstm.optim import SGD
        >>> linear = Linear(2, 1, bias=False)
        >>> linear.load_state_dict({"weight": [[1.0, 2.0]]})
        >>> SGD(linear, lr=0.5).step({"weight": [[4.0, -4.0]]})
        >>> linear.weight
        array([[-1.,  4.]], dtype=float32)
        """
        named = _named_gradients(grads)
        params = self._model.state_dict()
        trouble = compare_names(named, params)
        if trouble:
            raise ValueError(f"`grads` does not fit the model: {trouble}")
        arrays = {name: as_array(f"grads[{name!r}]", named[name], p.dtype) for name, p in params.items()}
        for name, p in params.items():
            check_shape(f"grads[{name!r}]", arrays[name], p.shape)
        self._num_steps += 1
        with np.errstate(all="ignore"):
            for name, p in params.items():
                self._update(name, p, arrays[name])
        self._model.load_state_dict(params)

    # Checkpoints

    def state_dict(self) -> dict[str, Array]:
        """Return copies of what a checkpoint needs besides the weights, to go on to the same bits.

        Returns
        -------
        dict of str to ndarray
            Of `Adam`: `adam.num_steps` () int64, `adam.lr` () float64, and for each weight `adam.m.<name>` and
            `adam.v.<name>`, the moments, of its shape and dtype. Of `SGD`: `sgd.num_steps`, `sgd.lr` and, where there
            is momentum, `sgd.b.<name>`. No name is that of a weight, so that one file can hold both.

        Examples
        --------
        >>> from fastlstm import Linear
        >>> from fastlstm.optim import Adam
        >>> model = Linear(2, 1, bias=False)
        >>> optimiser = Adam(model)
        >>> checkpoint = model.state_dict() | optimiser.state_dict()
        >>> list(checkpoint)
        ['weight', 'adam.num_steps', 'adam.lr', 'adam.m.weight', 'adam.v.weight']
        >>> model.load_state_dict(checkpoint, strict=False)
        >>> optimiser.load_state_dict(checkpoint)
        """
        return {
            self._prefix + "num_steps": np.array(self._num_steps, np.int64),
            self._prefix + "lr": np.array(self._lr, np.float64),
        } | {self._prefix + key: array.copy() for key, array in self._buffers.items()}

    def load_state_dict(self, mapping: Mapping[str, object]) -> None:
        """Go on from a checkpoint; the weights are the model's affair, the other settings are the constructor's.

        Parameters
        ----------
        mapping : mapping of str to array_like
            What `state_dict` returned. Names that do not begin with `adam.` or `sgd.` are passed over, as those of
            weights in the same file.

        Raises
        ------
        TypeError
            If `mapping` is not one, or an array has a dtype that does not cast.
        ValueError
            If a name is missing or unknown, or a shape or value is wrong: the checkpoint was cut short, or is that of
            another model or optimiser. The optimiser is unchanged.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"`mapping` must map names to arrays, got {type(mapping).__name__}")
        own = self.state_dict()
        found = {name: mapping[name] for name in mapping if str(name).startswith(self._prefix)}
        trouble = compare_names(found, own)
        if trouble:
            raise ValueError(f"`mapping` does not fit the optimiser: {trouble}")
        loaded = {name: np.array(as_array(name, found[name], array.dtype)) for name, array in own.items()}
        for name, array in own.items():
            check_shape(name, loaded[name], array.shape)
        num_steps = as_size(self._prefix + "num_steps", loaded[self._prefix + "num_steps"], least=0, most=_MOST_STEPS)
        self._lr = as_number(self._prefix + "lr", loaded[self._prefix + "lr"].item())
        self._num_steps = num_steps
        self._buffers = {key: loaded[self._prefix + key] for key in self._buffers}

    @property
    def _prefix(self) -> str:
        return type(self).__name__.lower() + "."


class Adam(Optimiser):
    """Adam, with decoupled weight decay (AdamW).

    Parameters
    ----------
    model : LSTM, Linear or Sequential
        Whose weights are trained; not copied.
    lr : float, default 0.001
        Learning rate, at least 0.
    betas : (float, float), default (0.9, 0.999)
        How much of the moments is kept in a step, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the second moment, at least 0.
    weight_decay : float, default 0.0
        w, at least 0; applies to every weight, biases included.

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range, or a layer is in `model` twice.

    Notes
    -----
    Step t with gradient g, as `torch.optim.AdamW` does it, elementwise and in the weights' dtype::

        m = beta_1 m + (1 - beta_1) g
        v = beta_2 v + (1 - beta_2) g^2
        p = (1 - lr w) p - lr / (1 - beta_1^t) m / (sqrt(v / (1 - beta_2^t)) + eps)

    Kingma & Ba 2015, *Adam: a method for stochastic optimization*; Loshchilov & Hutter 2019, *Decoupled weight decay
    regularization*.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import Linear
    >>> from fastlstm.losses import mse
    >>> from fastlstm.optim import Adam
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> linear = Linear(1, 1, dtype=np.float64, rng=0)
    >>> optimiser = Adam(linear, lr=0.1)
    >>> for _ in range(300):
    ...     loss, d_y = mse(linear(x), 3 * x + 1)
    ...     optimiser.step({"weight": d_y.T @ x, "bias": d_y.sum(axis=0)})
    >>> linear.weight.round(2), linear.bias.round(2)
    (array([[3.]]), array([1.]))
    """

    def __init__(
        self,
        model: Model,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(betas, (tuple, list)):
            raise TypeError(f"`betas` must be two numbers, got {type(betas).__name__}")
        if len(betas) != 2:
            raise ValueError(f"`betas` must be two numbers, got {len(betas)}")
        self._betas = as_number("betas[0]", betas[0], "[0, 1)"), as_number("betas[1]", betas[1], "[0, 1)")
        self._eps = as_number("eps", eps)
        self._weight_decay = as_number("weight_decay", weight_decay)
        super().__init__(model, lr, ("m", "v"))

    def _update(self, name: str, p: Array, g: Array) -> None:
        m, v = self._buffers["m." + name], self._buffers["v." + name]
        beta_1, beta_2 = self._betas
        m *= beta_1
        m += (1 - beta_1) * g
        v *= beta_2
        v += (1 - beta_2) * g * g
        p *= 1 - self._lr * self._weight_decay
        rate = self._lr / (1 - beta_1**self._num_steps)
        p -= rate * (m / (np.sqrt(v) / math.sqrt(1 - beta_2**self._num_steps) + self._eps))

    def __repr__(self) -> str:
        return f"Adam(lr={self._lr}, betas={self._betas}, eps={self._eps}, weight_decay={self._weight_decay})"


class SGD(Optimiser):
    """Gradient descent, with momentum if asked for.

    Parameters
    ----------
    model : LSTM, Linear or Sequential
        Whose weights are trained; not copied.
    lr : float, default 0.001
        Learning rate, at least 0.
    momentum : float, default 0.0
        u, how much of the last step's direction is kept, in [0, 1).
    weight_decay : float, default 0.0
        w, at least 0; applies to every weight, biases included.
    nesterov : bool, default False
        Whether to look ahead along the momentum.

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range, `nesterov` has no momentum, or a layer is in `model`
        twice.

    Notes
    -----
    A step with gradient g, as `torch.optim.SGD` does it, elementwise and in the weights' dtype::

        g = g + w p
        b = u b + g
        p = p - lr b            nesterov: p - lr (g + u b)

    Sutskever et al. 2013, *On the importance of initialization and momentum in deep learning*.

    Examples
    --------
    >>> from fastlstm import Linear
    >>> from fastlstm.optim import SGD
    >>> linear = Linear(1, 1, bias=False)
    >>> linear.load_state_dict({"weight": [[1.0]]})
    >>> optimiser = SGD(linear, lr=0.5, momentum=0.5)
    >>> for _ in range(2):
    ...     optimiser.step({"weight": [[1.0]]})
    >>> linear.weight
    array([[-0.25]], dtype=float32)
    """

    def __init__(
        self,
        model: Model,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self._momentum = as_number("momentum", momentum, "[0, 1)")
        self._weight_decay = as_number("weight_decay", weight_decay)
        self._nesterov = check_flag("nesterov", nesterov)
        if self._nesterov and not self._momentum:
            raise ValueError("`nesterov` must be False where `momentum` is 0, got True")
        super().__init__(model, lr, ("b",) if self._momentum else ())

    def _update(self, name: str, p: Array, g: Array) -> None:
        if self._weight_decay:
            g = g + self._weight_decay * p
        if self._momentum:
            b = self._buffers["b." + name]
            b *= self._momentum
            b += g
            g = g + self._momentum * b if self._nesterov else b
        p -= self._lr * g

    def __repr__(self) -> str:
        return (
            f"SGD(lr={self._lr}, momentum={self._momentum}, weight_decay={self._weight_decay}, "
            f"nesterov={self._nesterov})"
        )


def clip_grad_norm(grads: Gradients | dict[str, Array], max_norm: float, error_if_nonfinite: bool = False) -> float:
    """Scale all gradients by one factor so that their norm is at most `max_norm`.

    Parameters
    ----------
    grads : result of `tape.backward`, or dict of str to ndarray
        Gradients in float32 or float64. Where they are too large, the dict gets new arrays; no array is written.
    max_norm : float
        Above 0; infinity leaves the gradients as they are.
    error_if_nonfinite : bool, default False
        Whether a norm of NaN or infinity raises. Otherwise it goes the way of the equation: NaN makes all gradients
        NaN; infinity makes the infinite ones NaN and the others 0.

    Returns
    -------
    float
        The norm before: the root of the sum of squares over all gradients, summed in float64.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If `max_norm` is not above 0, or the norm is not finite and `error_if_nonfinite` is True. Nothing is changed.

    Notes
    -----
    g = g min(1, max_norm / norm). Pascanu et al. 2013, *On the difficulty of training recurrent neural networks*.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.optim import clip_grad_norm
    >>> grads = {"weight": np.array([[3.0, 0.0]]), "bias": np.array([4.0])}
    >>> clip_grad_norm(grads, 1.0)
    5.0
    >>> grads
    {'weight': array([[0.6, 0. ]]), 'bias': array([0.8])}
    """
    named = _named_gradients(grads)
    for name, g in named.items():
        _check_floats(f"grads[{name!r}]", g)
    max_norm = as_number("max_norm", max_norm, "(0, inf]")
    raises = check_flag("error_if_nonfinite", error_if_nonfinite)
    with np.errstate(all="ignore"):
        norm = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in named.values()))
        if raises and not math.isfinite(norm):
            raise ValueError(f"`grads` must have a finite norm, got {norm}")
        if not norm <= max_norm:
            for name, g in named.items():
                named[name] = g * (max_norm / norm)
    return norm


# Learning rates


def constant_lr(step: int, lr: float, warmup_steps: int = 0) -> float:
    """Return the learning rate of a step: a linear rise, then `lr`.

    Parameters
    ----------
    step : int
        From 0: `optimiser.num_steps` before the step.
    lr : float
        Learning rate after the rise.
    warmup_steps : int, default 0
        Steps below `lr`; step k of them has lr (k + 1) / (warmup_steps + 1).

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or negative.

    Examples
    --------
    >>> from fastlstm.optim import constant_lr
    >>> [constant_lr(step, 1.0, warmup_steps=3) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    step = as_size("step", step, least=0, most=_MOST_STEPS)
    warmup_steps = as_size("warmup_steps", warmup_steps, least=0, most=_MOST_STEPS)
    return as_number("lr", lr) * min(1.0, (step + 1) / (warmup_steps + 1))


def cosine_lr(step: int, lr: float, total_steps: int, warmup_steps: int = 0, final_lr: float = 0.0) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to `final_lr`.

    Parameters
    ----------
    step : int
        From 0: `optimiser.num_steps` before the step.
    lr : float
        Largest learning rate, that of step `warmup_steps`.
    total_steps : int
        The step that would have `final_lr`, as all steps after it have; more than `warmup_steps`.
    warmup_steps : int, default 0
        Steps of the rise; step k of them has lr (k + 1) / (warmup_steps + 1).
    final_lr : float, default 0.0
        Learning rate at the end.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range.

    Notes
    -----
    final_lr + (lr - final_lr) (1 + cos(pi (step - warmup_steps) / (total_steps - warmup_steps))) / 2. Loshchilov &
    Hutter 2017, *SGDR: stochastic gradient descent with warm restarts*.

    Examples
    --------
    >>> from fastlstm.optim import cosine_lr
    >>> [round(cosine_lr(step, 1.0, total_steps=5, warmup_steps=1), 3) for step in range(7)]
    [0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    rising = constant_lr(step, lr, warmup_steps)
    final_lr = as_number("final_lr", final_lr)
    total_steps = as_size("total_steps", total_steps, least=warmup_steps + 1, most=_MOST_STEPS)
    if step < warmup_steps:
        return rising
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


def step_lr(step: int, lr: float, every: int, factor: float = 0.1) -> float:
    """Return the learning rate of a step: `lr`, multiplied by `factor` after every so many steps.

    Parameters
    ----------
    step : int
        From 0: `optimiser.num_steps` before the step.
    lr : float
        Learning rate of the first steps.
    every : int
        Steps that have the same learning rate.
    factor : float, default 0.1
        In [0, 1].

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        Where an argument is of the wrong kind or out of range.

    Examples
    --------
    >>> from fastlstm.optim import step_lr
    >>> [step_lr(step, 1.0, every=2, factor=0.5) for step in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """
    step = as_size("step", step, least=0, most=_MOST_STEPS)
    drops = step // as_size("every", every, most=_MOST_STEPS)
    return as_number("lr", lr) * as_number("factor", factor, "[0, 1]") ** drops


# Checks


def _check_floats(name: str, value: object) -> None:
    """Raise unless the value is an array of float32 or float64."""
    if not isinstance(value, np.ndarray) or value.dtype.type not in (np.float32, np.float64):
        found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"`{name}` must be an array of float32 or float64, got {found}")


def _named_gradients(grads: object) -> dict[str, Array]:
    """Return the gradients by name, of what `tape.backward` returns or of its `params`."""
    named = grads if isinstance(grads, dict) else getattr(grads, "params", None)
    if not isinstance(named, dict):
        raise TypeError(f"`grads` must be the result of `backward` or its `params`, got {type(grads).__name__}")
    return named

"""The weights of a layer: named arrays, checked when they are set and packed for the kernels when they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastlstm.checks import C_CONTIGUOUS, WRITEABLE, as_array, as_generator, check_flag, check_shape, float_dtype

__all__ = ["Layer", "Setting", "check_names", "compare_names"]

Array = NDArray[Any]
Setting = tuple[Callable[[str, Any], Any], Any]
"""How the value of a setting is checked, and its default: `...` where there is none."""
SomeLayer = TypeVar("SomeLayer", bound="Layer")


class Layer(ABC):
    """What LSTM and Linear have in common: settings that are fixed, and weights that may change.

    Weights are held in read-only arrays in one dictionary that is replaced as a whole, so that packed weights are known
    to be stale by its identity.
    """

    _SETTINGS: ClassVar[dict[str, Setting]]
    dtype: np.dtype[Any]
    _config: dict[str, Any]  # the settings
    _params: dict[str, Array]
    _made: dict[str, Any]
    """What is the same for all weights under these settings, made when it is first needed."""
    _fixed: bool  # whether arrays of weights never change, but are replaced

    @abstractmethod
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every weight, in PyTorch's order."""

    @abstractmethod
    def _pack(self, params: Mapping[str, Array]) -> Any:
        """Return the weights packed for the kernels."""

    @abstractmethod
    def _pack_for_training(self, params: Mapping[str, Array]) -> Any:
        """Return the weights packed for recording and backward."""

    @property
    @abstractmethod
    def _ends(self) -> tuple[int, int]:
        """How many numbers go in and come out at each step."""

    def _configure(self, dtype: object, **settings: object) -> None:
        """Check the settings and store them."""
        config = {name: check(name, settings[name]) for name, (check, _) in self._SETTINGS.items()}
        self.__dict__.update(config, _config=config, dtype=float_dtype(dtype), _params={})
        self.__dict__.update(_packed=None, _packed_for_training=None, _made={}, _fixed=True)

    def _randomise(self, bound: float, rng: object) -> None:
        """Draw the weights, uniform in +-bound."""
        random = as_generator(rng)
        shapes = self._shapes()
        self._set_params({name: random.uniform(-bound, bound, shapes[name]).astype(self.dtype) for name in shapes})

    @classmethod
    def _with_weights(
        cls: type[SomeLayer], params: Mapping[str, object], dtype: object, **settings: object
    ) -> SomeLayer:
        """Make a layer with these weights; no more memory is taken than they need, whatever the settings say."""
        layer = cls.__new__(cls)
        layer._configure(dtype, **settings)
        trouble = compare_names(params, layer._shapes())
        if trouble:
            raise ValueError(f"the weights are not those of {layer!r}: {trouble}")
        layer._set_params(layer._merged(params))
        return layer

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._params:
            self.load_state_dict({name: value}, strict=False)
        else:
            raise AttributeError(
                f"cannot set `{name}`: a layer's settings are fixed, its weights are {list(self._params)}"
            )

    def __getattr__(self, name: str) -> Any:
        params = self.__dict__.get("_params", {})
        if name in params:
            return params[name].view()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._params]

    def __repr__(self) -> str:
        shown = []
        for name, (_, default) in self._SETTINGS.items():
            value = self._config[name]
            if default is ...:
                shown.append(str(value))
            elif value != default:
                shown.append(f"{name}={value}")
        if self.dtype != np.float32:
            shown.append(f"dtype={self.dtype}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        return self._config | {"dtype": self.dtype, "params": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._configure(**{name: value for name, value in state.items() if name != "params"})
        params = state["params"].items()  # not where they lie in a buffer of somebody else, who may write to it
        self._set_params({name: array if array.flags.owndata else array.copy() for name, array in params})

    def _set_params(self, params: Mapping[str, Array]) -> None:
        owned = dict(params)
        for name, array in params.items():
            if array.flags.num & (C_CONTIGUOUS | WRITEABLE) != C_CONTIGUOUS:
                array = owned[name] = np.ascontiguousarray(array)
                array.setflags(write=False)
        self.__dict__["_params"] = owned

    def _packed_weights(self) -> Any:
        """Return the packed weights, packed again if they have changed."""
        return self._up_to_date("_packed", self._pack)

    def _training_weights(self) -> Any:
        """Return the weights packed for training, packed again if they have changed."""
        return self._up_to_date("_packed_for_training", self._pack_for_training)

    def _up_to_date(self, name: str, pack: Callable[[Mapping[str, Array]], Any]) -> Any:
        """Return what is packed under a name, packed again if the weights have changed."""
        params, packed = self._params, self.__dict__[name]
        if packed is None or packed[0] is not params:
            packed = self.__dict__[name] = None  # the new ones go where these were
            packed = self.__dict__[name] = params, pack(params)
        return packed[1]

    @property
    def num_parameters(self) -> int:
        """Number of weights.

        Examples
        --------
        >>> from fastlstm import LSTM
        >>> LSTM(3, 5).num_parameters
        200
        """
        return sum(array.size for array in self._params.values())

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the weights under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            Of an LSTM: `weight_ih_l{k}` (4H, I), `weight_hh_l{k}` (4H, P), `bias_ih_l{k}`, `bias_hh_l{k}` (4H,),
            `weight_hr_l{k}` (P, H), and the same with `_reverse`; gates in the order i, f, g, o. Of a Linear: `weight`
            (out_features, in_features), `bias` (out_features,).

        Examples
        --------
        >>> from fastlstm import LSTM
        >>> list(LSTM(3, 5, bias=False).state_dict())
        ['weight_ih_l0', 'weight_hh_l0']
        """
        return {name: array.copy() for name, array in self._params.items()}

    def load_state_dict(self, mapping: Mapping[str, object], strict: bool = True) -> None:
        """Replace weights; from the next call on the new ones are used.

        Parameters
        ----------
        mapping : mapping of str to array_like or tensor
            Weights under PyTorch's names. Arrays are copied, and cast where NumPy's `same_kind` rule allows.
        strict : bool, default True
            Whether every weight must be there and nothing else. Otherwise the names that the layer has are used.

        Raises
        ------
        TypeError
            If `mapping` is not one, or an array has a dtype that does not cast.
        ValueError
            If a name is missing or unknown, or a shape is wrong. The layer is unchanged.

        Examples
        --------
        >>> from fastlstm import LSTM
        >>> a, b = LSTM(3, 5, rng=0), LSTM(3, 5, rng=1)
        >>> b.load_state_dict(a.state_dict())
        >>> bool((a.weight_hh_l0 == b.weight_hh_l0).all())
        True
        """
        check_names(mapping, self._shapes(), strict)
        self._set_params(self._merged(mapping))

    def _merged(self, mapping: Mapping[str, object], prefix: str = "") -> dict[str, Array]:
        """Return the weights with copies of those in the mapping, checked, in their place."""
        params = dict(self._params)
        for name, shape in self._shapes().items():
            if prefix + name in mapping:
                array = np.array(as_array(prefix + name, mapping[prefix + name], self.dtype))
                check_shape(prefix + name, array, shape)
                params[name] = array
        return params


def check_names(mapping: object, shapes: Mapping[str, object], strict: bool) -> None:
    """Raise unless the mapping is one and, if `strict`, its names are those of the weights."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"`mapping` must map names to arrays, got {type(mapping).__name__}")
    if not check_flag("strict", strict):
        return
    trouble = compare_names(mapping, shapes)
    if trouble:
        raise ValueError(f"`mapping` does not fit the layer: {trouble}; `strict=False` takes what fits")


def compare_names(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """Return which names are missing and which do not belong; nothing if they are the same."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    return ", ".join([f"missing {missing}"] * bool(missing) + [f"unexpected {extra}"] * bool(extra))

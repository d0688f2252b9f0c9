"""Forward statistics: mean squares of the inputs of each layer.

`observe` finds the layers of a Flax model, Linen or NNX. `statistics` takes the
inputs of the layers of any model.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import scope
from flax.errors import TraceContextError

from folding import paths

_COLLECTION = "observed"
_LINEN = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed)
_NNX = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed)
_PATCHING = threading.RLock()  # one thread at a time changes the classes of NNX


def observe(
  apply: Callable[..., Any], dense: Sequence[type] = ()
) -> Callable[..., Any]:
  """Returns an `apply` that also returns the mean square of layer inputs.

  The statistic of a kernel with input axes I... is E[a^2], float32[I...], over
  all tokens of the call. That of an embedding, whose input is one-hot, is the
  frequency of each token, float32[V]. That of a convolution is the mean over all
  positions (and feature groups), the same at each tap. A layer that is called
  twice has the mean of both. The statistics are ordinary outputs, so jit, remat
  and sharding work.

  Known layers of Linen are `Dense`, `DenseGeneral`, `Einsum`, `Conv` and `Embed`;
  of NNX `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `Embed`. Layers made of
  these, such as `MultiHeadAttention` and LoRA around a base, are observed, too.
  Layers with batch axes (`batch_dims`, `batch_axis`) and kernels of `Einsum` whose
  inputs are on their last axis have no statistics.

  Layers inside `nn.scan` or `nn.vmap` have statistics if its `variable_axes`
  include `"observed": 0`, and layers inside `nnx.scan` or `nnx.vmap` if their
  axis is 0, as in `nnx.StateAxes({nnx.Param: 1, ...: 0})`. These are
  float32[layers, I...], as `folding.fpp` takes them for `Rule.layers`. Linen
  models with layers inside `nn.cond` or `nn.switch` are unsupported, and so are
  NNX modules that a transform of JAX closes over.

  Args:
    apply: `model.apply` of a Linen module; an NNX module, a method of one, or a
      function that takes one.
    dense: Further classes of layers that multiply their input by a parameter
      `kernel`. Their attribute `axis`, if any, names the axes of the input as in
      `nn.DenseGeneral`; the default is the last axis.

  Returns:
    Function with the arguments of `apply` and an optional keyword `keep`: bool
    array, False at tokens that do not count. It applies to layers whose input
    shape starts with the shape of `keep`. The function returns (output of
    `apply`, {parameter path: statistic}). It raises a `ValueError` if the sizes
    of `keep` are those of no layer.

  Example:
    >>> model = nn.Dense(3)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> variables = model.init(jax.random.key(0), x)
    >>> output, stats = observe(model.apply)(variables, x)
    >>> stats["kernel"].tolist()
    [5.0, 2.0]
    >>> output, stats = observe(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))(x)
    >>> stats["kernel"].tolist()
    [5.0, 2.0]
  """

  def observed(*args, keep=None, **kwargs):
    observer = _Observer(keep, tuple(dense))
    callees = (apply, getattr(apply, "__self__", None), *args)
    module = next((x for x in callees if isinstance(x, nnx.Module)), None)
    if module is None:
      out, calls = observer.call_linen(apply, *args, **kwargs)
    else:
      with observer.observing(module) as calls:
        out = apply(*args, **kwargs)
    if keep is not None:
      _require_fit(keep, observer.shapes)
    stats = jax.tree.map(
      lambda values: sum(values) / len(values),
      calls,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    return out, paths.flatten(stats)

  return observed


def _require_fit(keep: Any, shapes: Sequence[tuple[int, ...]]) -> None:
  """Raises `ValueError` if a mask has other sizes than the tokens of all layers.

  A layer after pooling has the first sizes only. It fits if all layers are such.
  """
  whole = [shape for shape in shapes if len(shape) >= keep.ndim]
  sizes = keep.shape
  fits = (x[: len(sizes)] == sizes[: len(x)] for x in whole or shapes)
  if shapes and not any(fits):
    raise ValueError(
      f"observe: keep has the shape {keep.shape}, and no layer has such tokens; "
      f"the first has {shapes[0]}"
    )


def statistics(
  inputs: Mapping[str, jax.Array], keep: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Returns the mean square of layer inputs, for models of any library.

  Args:
    inputs: {parameter path: input of the layer, [..., I]}. The input of an
      embedding is one-hot (`jax.nn.one_hot`). If a layer is called twice, stack
      both inputs.
    keep: Bool array, False at tokens that do not count. It applies to inputs
      whose shape starts with the shape of `keep`.

  Returns:
    {parameter path: float32[I]}, as `folding.fpp` takes it for `stats`. For
    stacked layers, apply `jax.vmap` to this function.

  Example:
    >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    >>> statistics({"mlp/linear/w": x})["mlp/linear/w"].tolist()
    [5.0, 2.0]
  """
  return {name: _mean_square(x, (-1,), keep) for name, x in inputs.items()}


class _Observed(nnx.Variable):
  """Statistics of each call of an NNX layer: a tuple of arrays."""


@dataclasses.dataclass(frozen=True)
class _Observer:
  """Records statistics of the layers of a model; see `observe`.

  Attributes:
    keep: As for `observe`.
    dense: As for `observe`.
    shapes: Shape of the tokens of each call of a layer.
  """

  keep: jax.Array | None
  dense: tuple[type, ...]
  shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

  def call_linen(self, apply, *args, mutable=False, **kwargs):
    """Returns (output of `apply`, tree of tuples: statistics of each call)."""

    def intercept(next_fun, args_in, kwargs_in, context):
      if context.method_name == "__call__":
        found = self.statistic(context.module, *args_in, **kwargs_in)
        if found is not None:
          context.module.sow(_COLLECTION, _name(context.module), found)
      return next_fun(*args_in, **kwargs_in)

    with nn.intercept_methods(intercept):
      out, mutated = apply(
        *args, mutable=scope.union_filters(mutable, _COLLECTION), **kwargs
      )
    mutated = dict(mutated)
    calls = mutated.pop(_COLLECTION, {})
    has_collections = mutable is not False or mutated  # e.g. intermediates
    return ((out, mutated) if has_collections else out), calls

  @contextlib.contextmanager
  def observing(self, module: nnx.Module) -> Iterator[dict[str, tuple]]:
    """Yields a dict; at the end it has the statistics of each call.

    Each layer has a variable for them in the meantime, so that the transforms of
    NNX carry them, and a class whose calls write it.
    """
    known = (*_NNX, *self.dense)
    layers: dict[str, Any] = {
      "/".join(map(str, (*path, _name(layer)))): layer
      for path, layer in nnx.iter_modules(module)
      if isinstance(layer, known)
    }
    owners = {_owner_of_call(c) for c in known}
    calls = {}
    with _PATCHING:
      methods = {owner: vars(owner)["__call__"] for owner in owners}
      try:
        for owner, method in methods.items():
          owner.__call__ = self.recording(method)
        for layer in layers.values():
          layer.observed = _Observed(())
        yield calls
        values = {n: x.observed.get_value() for n, x in layers.items()}
        calls.update({n: value for n, value in values.items() if value})
      except TraceContextError as error:
        raise ValueError(
          "observe: a transform of JAX closes over a layer. Use that of NNX "
          "(nnx.jit, nnx.remat, nnx.scan, nnx.vmap), or nnx.merge the module "
          "inside, or choose a score without statistics"
        ) from error
      finally:
        for owner, method in methods.items():
          owner.__call__ = method
        for layer in layers.values():
          if hasattr(layer, "observed"):
            del layer.observed

  def recording(self, method: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the method of an NNX layer that also writes its variable."""

    @functools.wraps(method)
    def call(layer, *args, **kwargs):
      observed = getattr(layer, "observed", None)
      if isinstance(observed, _Observed):
        found = self.statistic(layer, *args, **kwargs)
        if found is not None:
          observed.set_value((*observed.get_value(), found))
      return method(layer, *args, **kwargs)

    return call

  def statistic(
    self, layer, inputs=None, einsum_str=None, *args, **kwargs
  ) -> jax.Array | None:
    """Returns the mean square of the input of a call; None if unknown."""
    del args, kwargs
    known = (*_LINEN, *_NNX, *self.dense)
    has_batch_axes = getattr(layer, "batch_dims", ()) != () or getattr(
      layer, "batch_axis", ()
    )
    if inputs is None or not isinstance(layer, known) or has_batch_axes:
      return None
    axes = getattr(layer, "axis", -1)
    axes = (axes,) if isinstance(axes, int) else axes
    is_embedding = isinstance(layer, nn.Embed | nnx.Embed)
    self.shapes.append(inputs.shape[: None if is_embedding else -len(axes)])
    if is_embedding:
      return _frequency(inputs, layer.num_embeddings, self.keep)
    if isinstance(layer, nn.Einsum | nnx.Einsum):
      equation: Any = einsum_str or layer.einsum_str
      shape = (
        layer.shape if isinstance(layer, nn.Einsum) else layer.kernel_shape
      )
      return _einsum_mean_square(equation, inputs, shape, self.keep)
    if isinstance(layer, nn.Conv | nnx.Conv):
      mean_C = _mean_square(inputs, (-1,), self.keep)
      mean_C = mean_C.reshape(layer.feature_group_count, -1).mean(0)
      taps = layer.kernel_size
      taps = (taps,) if isinstance(taps, int) else taps
      return jnp.broadcast_to(mean_C, (*taps, *mean_C.shape))
    axes = sorted(a % inputs.ndim for a in axes)  # as the kernel has them
    return _mean_square(inputs, axes, self.keep)


def _name(layer: Any) -> str:
  """Returns the name of the parameter that a layer multiplies its input by."""
  is_embedding = isinstance(layer, nn.Embed | nnx.Embed)
  return "embedding" if is_embedding else "kernel"


def _owner_of_call(layer_class: type) -> Any:
  """Returns the class, perhaps a base, that defines `__call__`."""
  return next(c for c in layer_class.__mro__ if "__call__" in vars(c))


def _frequency(tokens: Any, size: int, keep: Any) -> jax.Array:
  """Returns how often each token occurs, float32[size]."""
  weight = _token_weight(tokens.shape, keep)
  count_V = jnp.zeros(size, jnp.float32)
  count_V = count_V.at[tokens.reshape(-1)].add(weight.reshape(-1))
  return count_V / jnp.maximum(weight.sum(), 1)


def _einsum_mean_square(
  equation: str, inputs: Any, shape: Sequence[int], keep: Any
) -> jax.Array | None:
  """Returns mean squares with the leading axes of a kernel of this shape.

  None if its last axis is an input: statistics have no place for it.
  """
  operand, kernel = equation.replace(" ", "").split("->")[0].split(",")
  before, _, after = operand.partition("...")
  axes = {c: i for i, c in enumerate(before)}
  axes |= {c: i - len(after) for i, c in enumerate(after)}
  places = [i for i, c in enumerate(kernel) if c in axes]
  leading = range(max(places, default=0) + 1)
  if len(leading) == len(shape):
    return None
  mean = _mean_square(inputs, [axes[kernel[i]] for i in places], keep)
  mean = jnp.expand_dims(mean, sorted(set(leading) - set(places)))
  return jnp.broadcast_to(mean, shape[: len(leading)])


def _mean_square(x: Any, axes: Sequence[int], keep: Any) -> jax.Array:
  """Returns float32, the mean square over all axes but these, in their order."""
  x = jnp.moveaxis(x.astype(jnp.float32), axes, range(-len(axes), 0))
  tokens = x.ndim - len(axes)
  weight = _token_weight(x.shape[:tokens], keep)
  weighted = jnp.expand_dims(weight, range(tokens, x.ndim)) * jnp.square(x)
  # Not a product of matrices, which would store the squares: on 32 TPUs it took
  # 5 GiB of scratch memory per device for a layer of Llama 3 8B.
  total = jnp.sum(weighted, axis=range(tokens))
  return total / jnp.maximum(weight.sum(), 1)


def _token_weight(shape: tuple[int, ...], keep: Any) -> jax.Array:
  """Returns float32, 1 for each token that counts and 0 for padding."""
  weight = jnp.ones(shape, jnp.float32)
  if keep is not None and keep.shape == shape[: keep.ndim]:
    rest = (1,) * (len(shape) - keep.ndim)
    weight *= keep.reshape(keep.shape + rest).astype(jnp.float32)
  return weight

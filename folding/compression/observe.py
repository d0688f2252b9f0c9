"""Forward statistics: mean squares of the inputs of each layer.

This works on any Linen model with `Dense`, `DenseGeneral` and `Embed` layers, and
with custom layers like `DenseGeneral`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import scope

from folding import paths

_COLLECTION = "observed"


def observe(
  apply: Callable[..., Any], dense: Sequence[type[nn.Module]] = ()
) -> Callable[..., Any]:
  """Returns an `apply` that also returns the mean square of layer inputs.

  The statistic of a kernel with input axes I... is E[a^2], float32[I...], over
  all tokens of the call. That of an embedding, whose input is one-hot, is the
  frequency of each token, float32[V]. A layer that is called twice has the mean
  of both. The statistics are ordinary outputs, so jit, remat and sharding work.

  Layers inside `nn.scan` or `nn.vmap` have statistics if its `variable_axes`
  include `"observed": 0`. These are float32[layers, I...], as `folding.fpp` takes
  them for `Rule.layers`. Layers with `batch_dims` have none. Models with layers
  inside `nn.cond` or `nn.switch` are unsupported.

  Args:
    apply: `model.apply` of a Linen module.
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
  """

  def observed(variables, *args, keep=None, mutable=False, **kwargs):
    shapes: list[tuple[int, ...]] = []  # of the tokens of each layer

    def intercept(next_fun, args_in, kwargs_in, context):
      inputs = args_in[0] if args_in else kwargs_in.get("inputs")
      if inputs is not None:
        kinds = (nn.Dense, nn.DenseGeneral, *dense)
        shape = _record(context, inputs, keep, kinds)
        if shape is not None:
          shapes.append(shape)
      return next_fun(*args_in, **kwargs_in)

    with nn.intercept_methods(intercept):
      out, mutated = apply(
        variables,
        *args,
        mutable=scope.union_filters(mutable, _COLLECTION),
        **kwargs,
      )
    if keep is not None:
      _require_fit(keep, shapes)
    mutated = dict(mutated)
    stats = paths.flatten(
      jax.tree.map(
        lambda calls: sum(calls) / len(calls),
        mutated.pop(_COLLECTION, {}),
        is_leaf=lambda x: isinstance(x, tuple),
      )
    )
    has_collections = mutable is not False or mutated  # e.g. intermediates
    return ((out, mutated) if has_collections else out), stats

  return observed


def _record(
  context: Any, inputs: Any, keep: Any, dense: tuple[type[nn.Module], ...]
) -> tuple[int, ...] | None:
  """Sows the mean square of a layer's input under its parameter's name.

  Returns:
    The shape of the input without the axes of the kernel; None: not a layer.
  """
  module = context.module
  if context.method_name != "__call__":
    return None
  if getattr(module, "batch_dims", ()) != ():
    return None
  if isinstance(module, nn.Embed):
    shape = inputs.shape
    weight = _token_weight(shape, keep)
    count_V = jnp.zeros(module.num_embeddings, jnp.float32)
    count_V = count_V.at[inputs.reshape(-1)].add(weight.reshape(-1))
    name, value = "embedding", count_V / jnp.maximum(weight.sum(), 1)
  elif isinstance(module, dense):
    x = inputs.astype(jnp.float32)
    axes = getattr(module, "axis", -1)
    axes = (axes,) if isinstance(axes, int) else axes
    axes = sorted(a % x.ndim for a in axes)  # as the kernel has them
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    tokens = x.ndim - len(axes)
    shape: tuple[int, ...] = x.shape[:tokens]
    weight = _token_weight(shape, keep)
    weighted = jnp.expand_dims(weight, range(tokens, x.ndim)) * jnp.square(x)
    # Not a product of matrices, which would store the squares: on 32 TPUs it
    # took 5 GiB of scratch memory per device for a layer of Llama 3 8B.
    total = jnp.sum(weighted, axis=range(tokens))
    name, value = "kernel", total / jnp.maximum(weight.sum(), 1)
  else:
    return None
  module.sow(_COLLECTION, name, value)
  return shape


def _require_fit(keep: Any, shapes: Sequence[tuple[int, ...]]) -> None:
  """Raises `ValueError` if a mask has other sizes than the tokens of all layers.

  A layer after pooling has the first sizes only.
  """
  for shape in shapes:
    if all(a == b for a, b in zip(keep.shape, shape, strict=False)):
      return
  if shapes:
    raise ValueError(
      f"observe: keep has the shape {keep.shape}, and no layer has such tokens; "
      f"the first has {shapes[0]}"
    )


def _token_weight(shape: tuple[int, ...], keep: Any) -> jax.Array:
  """Returns float32, 1 for each token that counts and 0 for padding."""
  weight = jnp.ones(shape, jnp.float32)
  if keep is not None and keep.shape == shape[: keep.ndim]:
    rest = (1,) * (len(shape) - keep.ndim)
    weight *= keep.reshape(keep.shape + rest).astype(jnp.float32)
  return weight

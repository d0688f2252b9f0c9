"""Products of activations and weights in bfloat16, on CPUs as fast as elsewhere.

XLA has kernels for CPUs that read bfloat16 and sum in float32, with AMX five times
as fast as those in float32. It uses them if the result is float32, and if the
contracted axis is the last of the left operand and the left operand is not a
transposed array. Otherwise it converts the operands to float32 first.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_Dims = tuple[tuple[Any, Any], tuple[Any, Any]]


def project(x: Array, kernel: Any, dims: _Dims, **options: Any) -> Array:
  """Returns `jax.lax.dot_general` of the last axes of x and the first of a kernel.

  Args:
    x: Activations.
    kernel: Weights; perhaps of a library that quantises them.
    dims: Contracted axes of both, and none that they share.
    options: Further arguments of `jax.lax.dot_general`.
  """
  product = functools.partial(
    jax.lax.dot_general, dimension_numbers=dims, **options
  )
  if x.dtype == jnp.bfloat16 and kernel.dtype == jnp.bfloat16:
    return _project(product, x, kernel)
  return product(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(product, x: Array, kernel: Array) -> Array:
  return _forward(product, x, kernel)[0]


def _forward(product, x, kernel):
  """Returns the product, and what `_backward` needs."""

  def on_cpu(x, kernel):
    out_NF = _multiply(*_matrices(product, x, kernel))
    return out_NF.reshape(jax.eval_shape(product, x, kernel).shape)

  out = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=product)
  return out, (x, kernel)


def _backward(product, saved, d_out):
  """Returns the gradients of x and of the kernel."""

  def on_cpu(d_out, x, kernel):
    x_ND, kernel_DF = _matrices(product, x, kernel)
    d_out_NF = d_out.reshape(len(x_ND), -1)
    d_x = jax.lax.dot_general(
      d_out_NF,
      kernel_DF,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    d_kernel = _multiply(_transposed(x_ND), d_out_NF)
    return (
      d_x.astype(x.dtype).reshape(x.shape),
      d_kernel.reshape(kernel.shape),
    )

  def elsewhere(d_out, x, kernel):
    return jax.vjp(product, x, kernel)[1](d_out)

  return jax.lax.platform_dependent(
    d_out, *saved, cpu=on_cpu, default=elsewhere
  )


_project.defvjp(_forward, _backward)


def _matrices(product, x, kernel) -> tuple[Array, Array]:
  """Returns x and the kernel with the contracted axes as one."""
  (_, contracted), _ = product.keywords["dimension_numbers"]
  size = math.prod(kernel.shape[axis] for axis in contracted)
  return x.reshape(-1, size), kernel.reshape(size, -1)


def _multiply(
  a_ND: Float[Array, "N D"], b_DF: Float[Array, "D F"]
) -> Float[Array, "N F"]:
  """Returns a product that is summed in float32."""
  out_NF = jnp.matmul(a_ND, b_DF, preferred_element_type=jnp.float32)
  return out_NF.astype(a_ND.dtype)


def _transposed(x_ND: Float[Array, "N D"]) -> Float[Array, "D N"]:
  """Returns x.T as an array in memory of its own.

  To XLA a transposed array has the memory of x, in another order. A reshaped one
  has its own, and the barriers keep XLA from simplifying the reshapes.
  """
  x_D1N = jax.lax.optimization_barrier(x_ND.T[:, None])
  return jax.lax.optimization_barrier(x_D1N.reshape(x_ND.T.shape))

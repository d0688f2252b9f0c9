"""Products in bfloat16, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding.models import products
from tests.models.layers import normal

# Results are rounded to bfloat16, which has 8 bits; sums in float32 are exact to
# many more.
TOLERANCE = 2**-8


@pytest.mark.parametrize(
  ("x", "kernel", "axes"),
  [
    ((3, 5, 8), (8, 6), 1),
    ((3, 5, 8), (8, 2, 3), 1),
    ((3, 4, 2), (4, 2, 6), 2),
  ],
  ids=["one axis", "into heads", "from heads"],
)
def test_product_and_gradients_of_bfloat16_are_rounded_once(x, kernel, axes):
  x, w = jnp.bfloat16(normal(0, *x)), jnp.bfloat16(normal(1, *kernel))
  contracted = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))

  def project(x, w):
    return products.project(x, w, (contracted, ((), ())))

  out, pull = jax.jit(lambda x, w: jax.vjp(project, x, w))(x, w)
  d_out = jnp.bfloat16(normal(2, *out.shape))
  x64, w64, d64 = (np.asarray(a, np.float64) for a in (x, w, d_out))
  lead, last = range(x.ndim - axes), range(x.ndim - axes, out.ndim)
  expected = [
    np.tensordot(x64, w64, axes),
    np.tensordot(d64, w64, (last, range(axes, w.ndim))),
    np.tensordot(x64, d64, (lead, lead)),
  ]
  for found, aim in zip([out, *pull(d_out)], expected, strict=True):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(found, np.float64), aim, rtol=TOLERANCE, atol=1e-4
    )

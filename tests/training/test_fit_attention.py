"""The fit of attention weights, against weights from NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding.models.shape import shape_of
from folding.models.transformer import Block
from folding.training.fit_attention import fit_attention
from folding.training.stream import Stream, total

D, K, H, L = 16, 8, 2, 10
_SIZES = {"num_layers": 1, "width": D, "num_heads": H, "mlp_width": 8}


def _block(model, groups):
  rope = "pairs" if model.positions == "rope" else "copy"
  fold = c.FoldConfig(groups=groups, values="dense", rope=rope)
  config = c.Config(preset="none", model=model, fold=fold)
  shape = shape_of(dataclasses.replace(config, task="classify"))
  return Block(shape, shape.layers[0])


def _params(block, seed, scale=2.0):
  """Returns parameters whose attention is not uniform."""
  x = jnp.zeros((1, L, D))
  init = jax.jit(lambda key: block.init(key, x, None, True))
  params = init(jax.random.key(seed))["params"]
  params = jax.tree.map(np.asarray, params)
  attn = dict(params["attn"])
  for name in ("q", "k"):
    attn[name] = jax.tree.map(lambda w: scale * w, attn[name])
  return {**params, "attn": attn}


def _texts(seed, count=8, rows=6):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, rows, L, D)).astype(np.float32)
  # Two directions are large, as in trained models.
  x[..., :2] *= 3
  kept = np.arange(L) < rng.integers(4, L + 1, (count, rows, 1))
  return Stream(list(map(jnp.asarray, x)), list(map(jnp.asarray, kept)))


def _weights(attn, x, keep):
  """Returns softmax weights [B, H, L, L] of a post-norm encoder's attention."""
  q, k = (
    np.einsum("BLD,DHg->BLHg", np.asarray(x, np.float64), attn[name]["kernel"])
    + attn[name]["bias"]
    for name in ("q", "k")
  )
  logits = np.einsum("BLHg,BMHg->BHLM", q, k) * K**0.5 / q.shape[-1]
  keep = np.asarray(keep)[:, None, None]
  logits = np.where(keep, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def _divergence(attn, dense, x, kept):
  total = count = 0.0
  for at in zip(x, kept, strict=True):
    aim, ours = _weights(dense, *at), _weights(attn, *at)
    ratio = np.where(aim > 0, aim, 1) / np.where(aim > 0, ours, 1)
    terms = aim * np.log(ratio)
    keep = np.broadcast_to(np.asarray(at[1])[:, None], terms.shape[:-1])
    total += (terms.sum(-1) * keep).sum()
    count += keep.sum()
  return total / count


def _bert():
  model = c.bert(**_SIZES)
  block, dense_block = _block(model, 2), _block(model, 0)
  return block, _params(block, 1), dense_block, _params(dense_block, 0)


def test_divergence_equals_numpy_and_falls_on_new_text():
  block, params, dense_block, dense = _bert()
  x, kept = _texts(0)
  begin, end = (
    fit_attention((block, params), (dense_block, dense), Stream(x, kept), steps)
    for steps in (0, 200)
  )
  # Held-out rows: 1, 3, ... of batches 0, 2, ..., and 0, 2, ... of the others.
  others = [[a[(1 + n) % 2 :: 2] for n, a in enumerate(b)] for b in (x, kept)]
  for fit in (begin, end):
    expected = _divergence(fit.params, dense["attn"], *others)
    assert fit.divergence == pytest.approx(expected, rel=1e-4)
  for name in ("q", "k"):
    np.testing.assert_array_equal(
      begin.params[name]["kernel"], params["attn"][name]["kernel"]
    )
  new = _texts(1)
  before, after = (
    _divergence(fit.params, dense["attn"], *new) for fit in (begin, end)
  )
  assert after < 0.7 * before


def test_total_is_in_float64():
  parts = [np.float32(1), np.float32(2**-30)]
  assert float(total(lambda x: x, parts)) == 1 + 2**-30


def test_fit_changes_only_arrays_behind_the_logits():
  block, params, dense_block, dense = _bert()
  fit = fit_attention((block, params), (dense_block, dense), _texts(0), 5)
  assert set(fit.params) == set(params["attn"])
  for name in ("v", "o"):
    assert fit.params[name] is params["attn"][name]


def test_fit_is_never_worse_than_its_start():
  model = c.bert(**_SIZES)
  block, dense_block = _block(model, K), _block(model, 0)
  dense = _params(dense_block, 0)
  # The start is exact, and the texts to fit are few.
  x, kept = _texts(0, count=1, rows=2)
  fit = fit_attention((block, dense), (dense_block, dense), Stream(x, kept), 30)
  assert fit.divergence <= 1e-6
  block, params, dense_block, dense = _bert()
  begin, end = (
    fit_attention((block, params), (dense_block, dense), Stream(x, kept), steps)
    for steps in (0, 300)
  )
  assert end.divergence <= begin.divergence


def test_fit_ignores_padding():
  block, params, dense_block, dense = _bert()
  x, kept = _texts(0)
  noise = _texts(5)[0]
  noisy = [
    jnp.where(keep[..., None], a, b)
    for a, b, keep in zip(x, noise, kept, strict=True)
  ]
  fits = [
    fit_attention((block, params), (dense_block, dense), Stream(text, kept), 20)
    for text in (x, noisy)
  ]
  assert fits[0].divergence == fits[1].divergence
  for one, other in zip(
    *(jax.tree.leaves(fit.params) for fit in fits), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_fit_recovers_alibi_slopes():
  model = c.ModelConfig(**_SIZES)
  block = _block(model, 0)
  dense = _params(block, 0)
  slopes = dense["attn"]["log_slopes"]
  moved = {**dense, "attn": {**dense["attn"], "log_slopes": slopes + 0.7}}
  fit = fit_attention((block, moved), (block, dense), _texts(0), 400)
  np.testing.assert_allclose(fit.params["log_slopes"], slopes, atol=0.35)


def test_fit_keeps_rotary_frequencies():
  model = c.llama(**_SIZES, rope_base=100.0)
  block, dense_block = _block(model, 2), _block(model, 0)
  params, dense = _params(block, 1), _params(dense_block, 0)
  begin, end = (
    fit_attention((block, params), (dense_block, dense), _texts(0), steps)
    for steps in (0, 200)
  )
  assert end.divergence < 0.9 * begin.divergence
  np.testing.assert_array_equal(
    end.params["frequency"], params["attn"]["frequency"]
  )

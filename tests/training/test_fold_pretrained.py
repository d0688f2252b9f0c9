"""Folding of trained models: small random models of every kind."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding import errors, paths
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes
from folding.training import stream as stream_lib
from folding.training.fold_layer import (
  HeadMoments,
  fold_layer,
  fold_logits,
  target_of,
)
from folding.training.fold_pretrained import fold_pretrained
from folding.typed import edited

N, D, K, V, L = 2, 16, 4, 30, 12
_SIZES = {"num_layers": N, "width": D, "num_heads": D // K, "mlp_width": 24}
MODELS = {
  "bert": c.bert(**_SIZES),
  "gpt2": c.gpt2(**_SIZES),
  "llama": c.llama(**_SIZES, num_kv_heads=2, rope_base=100.0),
  # Qwen2's biases and Gemma's norms.
  "norms": c.llama(
    **_SIZES,
    num_kv_heads=2,
    qkv_bias=True,
    rope_base=100.0,
    norm_position="both",
    qk_norm=True,
  ),
  # GPT-NeoX's blocks.
  "parallel": c.gpt2(**_SIZES, positions="rope", rope_share=0.5, parallel=True),
  "alibi": c.ModelConfig(**_SIZES),
}


def _config(kind, **fold):
  """Returns a resolved config that folds only what `fold` sets."""
  model = MODELS[kind]
  rope = "pairs" if model.positions == "rope" else "copy"
  values = {"groups": 0, "values": "dense", "rope": rope} | fold
  return c.resolve(
    c.Config(
      task="lm" if model.causal else "classify",
      preset="none",
      data=c.DataConfig(length=L),
      model=model,
      fold=c.FoldConfig(**values),
      compress=c.CompressConfig(fit_steps=50),
    )
  )


def _batches(count, seed=0, rows=16):
  """Returns texts of several lengths, as for classification."""
  rng = np.random.default_rng(seed)
  return [
    {
      "tokens": rng.integers(0, V, (rows, L)).astype(np.int32),
      "mask": np.arange(L) < rng.integers(4, L + 1, rows)[:, None],
    }
    for _ in range(count)
  ]


@functools.cache
def _dense(kind):
  """Returns parameters without trivial values such as 0 or 1."""
  model = make_model(shape_of(_config(kind)).dense(), V, num_classes=3)
  rng = np.random.default_rng(0)

  def value(name, w):
    if name.endswith("scale"):
      return rng.uniform(0.5, 1.5, w.shape).astype(np.float32)
    if name.endswith("log_slopes"):
      return -np.log(4) * np.arange(1, w.size + 1, dtype=np.float32)
    size = 1.5 if "/attn/" in name else 1.0
    fan = w.shape[0] if w.ndim > 1 else 4
    scale = size * fan**-0.5 * (4 if "embedding" in name else 1)
    return (scale * rng.normal(size=w.shape)).astype(np.float32)

  return paths.map_named(value, param_shapes(model))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for equal models
def _apply(model, params, tokens, mask):
  return model.apply({"params": params}, tokens, mask)


def _logits(config, params, seed=9):
  """Returns logits of text that is not used for calibration."""
  [batch] = _batches(1, seed, rows=48)
  model = make_model(shape_of(config), V, num_classes=3)
  logits = _apply(model, params, batch["tokens"], batch["mask"])
  return np.asarray(logits[batch["mask"]] if logits.ndim == 3 else logits)


def _error(config, params, kind):
  dense = _logits(_config(kind), _dense(kind))
  return np.square(_logits(config, params) - dense).mean() / dense.var()


def _fold(config, kind, batches=4, **options):
  batches = _batches(batches, **options)
  return fold_pretrained(shape_of(config), _dense(kind), batches)


def _shapes(config):
  """Returns {path: shape} of the model of a config."""
  model = make_model(shape_of(config), V, num_classes=3)
  tokens = jax.ShapeDtypeStruct((1, L), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  return {name: w.shape for name, w in paths.flatten(tree).items()}


def _assert_fits(config, params):
  shapes = {name: w.shape for name, w in paths.flatten(params).items()}
  assert shapes == _shapes(config)
  assert {np.asarray(w).dtype for w in jax.tree.leaves(params)} == {
    np.dtype(np.float32)
  }


@pytest.mark.parametrize(
  "kind",
  [
    "llama",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("bert", "alibi")),
  ],
)
def test_all_channels_of_a_head_lose_nothing(kind):
  config = _config(kind, groups=K)
  params, report = _fold(config, kind)
  _assert_fits(config, params)
  dense = _logits(c.dense_baseline(config), _dense(kind))
  # Folding rounds kernels once more, and each layer some sums.
  np.testing.assert_allclose(
    _logits(config, params), dense, atol=2e-4 * np.abs(dense).max()
  )
  for layer, row in enumerate(report):
    assert row["layer"] == layer
    assert (row["groups"], row["values"]) == (K, "dense")
    for name in ("logits_kept", "attention_r2", "mlp_r2"):
      assert row[name] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "parallel"])
def test_fewer_channels_are_refitted(kind):
  config = _config(kind, groups=2, values="diagonal")
  params, report = _fold(config, kind)
  _assert_fits(config, params)
  unfitted = dict(params)
  for n in range(N):
    name = f"blocks_{n}"
    block = {**params[name], "mlp": _dense(kind)[name]["mlp"]}
    block["attn"] = {**block["attn"], "o": _dense(kind)[name]["attn"]["o"]}
    unfitted[name] = block
  assert _error(config, params, kind) < 0.7 * _error(config, unfitted, kind)
  for row in report:
    assert list(row) == [
      *("layer", "heads", "groups", "values", "logits_kept", "divergence"),
      *("attention_r2", "mlp_r2"),
    ]
    assert row["divergence"] > 0
    assert 0 < row["logits_kept"] < 1
    assert row["attention_r2"] < 1
    assert row["mlp_r2"] < 1


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_heads_that_others_repeat_leave_without_loss(kind, monkeypatch):
  def value(name, w):
    if not re.search(r"_0/attn/[qkv]/", name):
      return w
    half = np.split(w, 2, axis=-2)[0]  # and the other half of the heads
    return np.concatenate([half, half], axis=-2)

  trained = paths.map_named(value, _dense(kind))
  monkeypatch.setattr(f"{__name__}._dense", lambda _: trained)
  config = _config(kind)
  config = edited(config, {"model.heads": ((2, 3), (0, 1, 2, 3))})
  params, report = _fold(config, kind)
  _assert_fits(config, params)
  assert report[0]["heads"] == 2
  assert _error(config, params, kind) < 1e-6


def test_layer_with_fewer_heads_and_a_diagonal_fits_its_model():
  config = _config("bert", values=("diagonal", "dense"))
  config = edited(config, {"model.heads": ((2, 3), (0, 1, 2, 3))})
  params, report = _fold(config, "bert")
  _assert_fits(config, params)
  assert (report[0]["heads"], report[0]["values"]) == (2, "diagonal")


@pytest.mark.parametrize("kind", ["bert", "norms"])
def test_values_lose_nothing_at_the_rank_that_they_have(kind, monkeypatch):
  def value(name, w):
    if not name.endswith("o/kernel"):
      return w
    rng = np.random.default_rng(len(name))
    mixed = np.einsum("kr,hrd->hkd", rng.normal(size=(K, 2)), w[:, :2])
    return mixed.astype(np.float32)

  trained = paths.map_named(value, _dense(kind))
  monkeypatch.setattr(f"{__name__}._dense", lambda _: trained)
  config = _config(kind, value_rank=(2, 0))
  params, report = _fold(config, kind)
  _assert_fits(config, params)
  assert report[0]["values"] == "rank 2"
  assert _error(config, params, kind) < 1e-6


def test_each_layer_is_folded_by_its_own_config():
  config = _config("gpt2", groups=(0, 2), values=("dense", "diagonal"))
  params, report = _fold(config, "gpt2")
  _assert_fits(config, params)
  old = paths.flatten(_dense("gpt2"))
  for name, w in paths.flatten(params).items():
    if not name.startswith("blocks_1/"):
      assert w is old[name], name  # layers below the folded one do not change
  whole = {"logits_kept": 1.0, "divergence": 0.0}
  whole |= {"attention_r2": 1.0, "mlp_r2": 1.0}
  whole |= {"layer": 0, "heads": D // K, "groups": 0, "values": "dense"}
  assert report[0] == whole
  assert (report[1]["groups"], report[1]["values"]) == (2, "diagonal")


@pytest.mark.parametrize(("values", "fits"), [("diagonal", 1), ("dense", 0)])
def test_fold_layer_fits_w_o_beside_folded_values_to_its_own_input(
  values, fits
):
  config = _config("gpt2", groups=0, values=values)
  old = _dense("gpt2")["blocks_0"]
  stream = stream_lib.embed_batches(
    shape_of(config), _dense("gpt2"), _batches(4)
  )
  dense_stream = stream._replace(x=[-2 * x for x in stream.x])
  block, folded = (
    stream_lib.make_block(each, 0)
    for each in (shape_of(config).dense(), shape_of(config))
  )
  kernels = []
  for other in (stream, dense_stream):
    target = target_of(block, old, other)
    new = fold_layer(folded, block, old, stream, target=target).params
    kernels.append(new["attn"]["o"]["kernel"])
  # A dense W_O is fitted to the dense stream, to correct the layers below.
  assert np.array_equal(*kernels) == fits


def test_layer_corrects_the_errors_of_the_layer_below():
  config = _config("gpt2", groups=(1, 0))
  params, report = _fold(config, "gpt2")
  dense = _dense("gpt2")
  # Only W_Q and W_K are folded.
  chex.assert_trees_all_equal(
    *(tree["blocks_0"]["attn"]["v"] for tree in (params, dense))
  )
  left = {**params, "blocks_1": dense["blocks_1"]}
  for role in ("q", "k", "v"):
    for name, w in left["blocks_1"]["attn"][role].items():
      np.testing.assert_array_equal(params["blocks_1"]["attn"][role][name], w)
  assert _error(config, params, "gpt2") < 0.98 * _error(config, left, "gpt2")
  assert report[1]["logits_kept"] == 1
  assert report[1]["mlp_r2"] < 1


def test_identity_values_equal_a_diagonal_of_ones():
  config = _config("gpt2", groups=2, values=("identity", "diagonal"))
  params, _ = _fold(config, "gpt2")
  _assert_fits(config, params)
  assert "v" not in params["blocks_0"]["attn"]
  with_ones = _config("gpt2", groups=2, values="diagonal")
  others, _ = _fold(with_ones, "gpt2")
  _assert_fits(with_ones, others)
  np.testing.assert_array_equal(
    _logits(config, params), _logits(with_ones, others)
  )


def test_input_axis_folds_rows():
  kind = "llama"
  config = _config(kind, groups=D, axis="input", rope="copy")
  params, report = _fold(config, kind)
  _assert_fits(config, params)
  # With one group per row the only error is a ridge of 1e-6 of the variance.
  assert _error(config, params, kind) < 1e-6
  assert [row["logits_kept"] for row in report] == [None, None]
  config = _config(kind, groups=D // 2, axis="input", rope="copy")
  params, _ = _fold(config, kind)
  _assert_fits(config, params)
  assert 1e-3 < _error(config, params, kind) < 0.5


def _streams(config, params, batches):
  """Returns the stream before layer 0, after its attention, and after it."""
  x, kept = stream_lib.embed_batches(shape_of(config), params, batches)
  parts = []
  for at in zip(x, kept, strict=True):
    seen = stream_lib.capture(
      stream_lib.make_block(shape_of(config), 0),
      params["blocks_0"],
      *at,
      names=("norm_mlp",),
      outputs=("out",),
    )
    keep = np.asarray(at[1])
    rows = (at[0], seen["norm_mlp"], seen["out"])
    parts.append([np.asarray(w, np.float64)[keep] for w in rows])
  return [np.concatenate(part) for part in zip(*parts, strict=True)]


def test_refit_is_the_least_error_and_holds_on_new_text():
  config = _config("gpt2", groups=1, values="diagonal")
  params, [report, _] = _fold(config, "gpt2", batches=16)
  dense = c.dense_baseline(config)

  def errors(params, batches):
    """Returns the relative errors after attention and at the end."""
    x, middle, out = _streams(config, params, batches)
    _, dense_middle, dense_out = _streams(dense, _dense("gpt2"), batches)
    return [
      np.square(ours - theirs).sum() / np.square(needed - needed.mean(0)).sum()
      for ours, theirs, needed in (
        (middle, dense_middle, dense_middle - x),
        (out, dense_out, dense_out - middle),
      )
    ]

  seen, other = _batches(16), _batches(16, seed=5)
  least = errors(params, seen)
  told = [1 - report["attention_r2"], 1 - report["mlp_r2"]]
  np.testing.assert_allclose(errors(params, other), told, atol=0.05)
  rng = np.random.default_rng(0)
  for at, path in enumerate(["attn/o", "mlp/down"]):
    for _ in range(3):

      def moved(name, w, path=path):
        if not re.fullmatch(f"blocks_0/{path}/(kernel|bias)", name):
          return w
        return w + 0.05 * rng.normal(size=w.shape).astype(np.float32) * w.std()

      assert errors(paths.map_named(moved, params), seen)[at] > least[at]


def test_fold_ignores_padding():
  config = _config("bert", groups=2, values="diagonal")
  params, report = _fold(config, "bert")
  batches = _batches(4)
  for batch in batches:
    batch["tokens"] = np.where(batch["mask"], batch["tokens"], 7)
  again, told = fold_pretrained(shape_of(config), _dense("bert"), batches)
  assert told == report
  for name, w in paths.flatten(params).items():
    np.testing.assert_array_equal(paths.flatten(again)[name], w, name)


def test_fold_accepts_batches_of_one_text():
  config = _config("gpt2", groups=2)
  texts = [
    {name: w[i : i + 1] for name, w in batch.items()}
    for batch in _batches(4)
    for i in range(16)
  ]
  params, report = fold_pretrained(shape_of(config), _dense("gpt2"), texts)
  together, told = _fold(config, "gpt2")
  for name in ("logits_kept", "attention_r2", "mlp_r2"):
    found, expected = ([row[name] for row in r] for r in (report, told))
    np.testing.assert_allclose(found, expected, atol=0.05)
  errors = [_error(config, p, "gpt2") for p in (params, together)]
  assert errors[0] == pytest.approx(errors[1], rel=0.2)


@pytest.mark.parametrize(
  ("rows", "tokens", "message"),
  [
    (2, 5, "has 10 tokens in 2 texts"),
    (1, 40, "has 40 tokens in 1 texts"),
    (4, 10, "are all equal"),
    (40, 1, "a single token"),
  ],
)
def test_text_that_cannot_be_measured_is_refused(rows, tokens, message):
  batch = {"tokens": np.zeros((rows, tokens), np.int32)}
  if tokens == 1:
    batch["tokens"] += np.arange(rows)[:, None] % V
  with pytest.raises(errors.ConfigError, match=message) as caught:
    fold_pretrained(
      shape_of(_config("alibi", groups=1)), _dense("alibi"), [batch]
    )
  assert "\n" not in str(caught.value)


def test_rotary_heads_are_not_folded_by_centred_moments():
  """The mean of keys turns with the position: softmax does not cancel it."""
  config = _config("llama", groups=2)
  shape = shape_of(config)
  attn = _dense("llama")["blocks_0"]["attn"]
  moments = HeadMoments(np.eye(D), np.full((D, D), np.nan))
  folded, kept = fold_logits(shape, shape.layers[0], attn, moments)
  assert 0 < kept < 1
  assert all(np.isfinite(w).all() for w in jax.tree.leaves(folded))


def test_rotary_heads_need_pairs():
  config = _config("llama", groups=2, rope="copy")
  with pytest.raises(errors.ConfigError, match="use fold.rope='pairs'"):
    _fold(config, "llama")

"""Plans per layer: their sizes, and their errors against equal layers."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from folding import config as c
from folding import errors, paths
from folding.compression import fold, lowrank
from folding.data.tokenizers import train_tokenizer
from folding.model import Model
from folding.models.shape import fold_of, shape_of
from folding.models.transformer import make_model, param_shapes
from folding.training import allocate
from folding.training import sensitivity as sensitivity_lib
from folding.training.compress_trained import compress_sizes
from folding.training.fold_pretrained import fold_pretrained
from folding.training.layer_options import Option, Tried, measure, smallest
from folding.training.sensitivity import sensitivities
from folding.training.stream import embedding_tables, usage_of
from folding.typed import edited
from tests import jaxprs

V, L, D, H, N = 40, 16, 32, 4, 3


def _config(kind="bert", **fpp):
  shape = {"num_layers": N, "width": D, "num_heads": H, "mlp_width": 48}
  model = {"bert": c.bert, "llama": c.llama, "gpt2": c.gpt2}[kind](**shape)
  rope = "pairs" if kind == "llama" else "copy"
  return c.resolve(
    c.Config(
      task="classify" if kind == "bert" else "lm",
      pretrained="RUN",
      data=c.DataConfig(length=L),
      model=model,
      fold=c.FoldConfig(groups=2, values="diagonal", rope=rope),
      fpp=c.FPPConfig(**({"linear": 0.5, "embedding": 0.5} | fpp)),
      compress=c.CompressConfig(plan="auto"),
    )
  )


def _trained(config, flat_layers=()):
  """Returns parameters; the output of layers in `flat_layers` is nearly zero."""
  model = make_model(shape_of(config).dense(), V, num_classes=3)
  rng = np.random.default_rng(0)

  def value(name, w):
    size = 1.0
    if any(name.startswith(f"blocks_{n}/") for n in flat_layers):
      is_last = name.endswith(("o/kernel", "down/kernel"))
      size = 1e-3 if is_last else 1.0
    if len(w.shape) < 2:
      return np.full(w.shape, name.endswith("scale"), np.float32)
    scale = 2.0 * size * w.shape[0] ** -0.5
    return (scale * rng.normal(size=w.shape)).astype(np.float32)

  return paths.map_named(value, param_shapes(model))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for equal models
def _apply(model, params, tokens):
  return model.apply({"params": params}, tokens)


def _measure(config, params):
  asked = shape_of(config)
  sensitivity = sensitivities(asked, params, _batches())
  tried = _tried(config)
  return measure(asked, params, _batches(), sensitivity, tried)


def _tried(config):
  by_neuron = config.fpp.granularity == "neuron"
  return Tried(by_neuron, config.compress.embedding == "errors")


def _allocate(config, params):
  sensitivity = sensitivities(shape_of(config), params, _batches())
  return allocate.allocate(_asked(config), params, _batches(), sensitivity)


def _without_neurons(shape, targets):
  """Returns the shape without the neurons that a plan removes."""
  layers = [
    dataclasses.replace(layer, mlp_width=48 - round(48 * part))
    for layer, part in zip(shape.layers, targets.layers, strict=True)
  ]
  assert all(x.mlp_width % 8 == 0 and x.mlp_width > 0 for x in layers)
  return dataclasses.replace(shape, layers=tuple(layers))


def _compress(config):
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])  # not read
  model = Model.of(config, _trained(config), tokenizer)
  return list(compress_sizes([_asked(config)], model, []))


def _asked(config):
  return allocate.Asked(shape_of(config), config.fpp, config.compress)


@pytest.fixture
def measured(monkeypatch):
  """Measures the options of each kind once for all tests that allocate."""

  def cached(asked, *_, **__):
    return _options("llama" if asked.positions == "rope" else "bert")

  monkeypatch.setattr(allocate, "measure", cached)


@functools.cache
def _options(kind):
  config = _config(kind)
  return _measure(config, _trained(config))


def _batches():
  rng = np.random.default_rng(1)
  return [
    {"tokens": rng.integers(0, V, (16, L)).astype(np.int32)} for _ in range(6)
  ]


def _stored(plan, config, params):
  """Returns the shares of all and of W_Q, W_K, W_V that a plan stores."""
  shape, targets = plan
  model = make_model(shape, V, num_classes=3)
  tree = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, L), jnp.int32)
  )["params"]
  total = qkv = 0.0
  for name, w in paths.flatten(tree).items():
    left = 0.0
    of_tokens = name == "embed/embedding"
    by_weight = config.fpp.embedding_granularity == "weight"
    if name.endswith("embedding") and (of_tokens or by_weight):
      left = targets.embedding
    elif "/mlp/" in name and name.endswith("kernel") or "/o/kernel" in name:
      layer = int(name.split("/")[0].removeprefix("blocks_"))
      left = targets.layers[layer]
    elif name == "head/kernel" and config.task == "lm":
      left = targets.head
    total += (1 - left) * w.size
    if any(f"/attn/{role}/" in name for role in "qkv"):
      qkv += w.size
  dense = sum(w.size for w in jax.tree.leaves(params))
  return total / dense, qkv / (3 * N * D * (D + 1))


@pytest.mark.parametrize(
  ("kind", "fpp"),
  [
    ("bert", {"saving": 0.6}),
    ("llama", {"saving": 0.4}),
    pytest.param(
      "bert",
      {"saving": 0.6, "embedding_granularity": "row"},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_allocation_reaches_the_target_size(kind, fpp, measured):
  config = _config(kind, linear=None, embedding=None, **fpp)
  params = _trained(config)
  stored, _ = _stored(_allocate(config, params), config, params)
  assert stored <= 1 - fpp["saving"] + 1e-6
  # Biases of folded heads are smaller too, but plans do not count them.
  assert stored > 1 - fpp["saving"] - 0.012


def _structured(kind, **fpp):
  fpp = {"granularity": "neuron", "attention": "none", "saving": 0.5} | fpp
  config = _config(kind, linear=None, embedding=None, **fpp)
  config = edited(config, {"fold.values": "dense"})
  return config


def test_structured_plan_makes_the_arrays_as_small_as_asked():
  config = _structured("llama", embedding_share=0.0)
  params = _trained(config)
  shape, targets = _allocate(config, params)
  assert any(layer.value_dim < layer.head_dim for layer in shape.layers)
  shape = _without_neurons(shape, targets)
  tree = param_shapes(make_model(shape, V, num_classes=3))
  kept = sum(w.size for w in jax.tree.leaves(tree))
  dense = sum(w.size for w in jax.tree.leaves(params))
  # Plans do not count biases, and keep neurons in multiples of eight.
  step = 8 * 3 * D * N
  assert 0.5 * dense - step - 8 * D * N < kept <= 0.5 * dense


@pytest.mark.parametrize(
  ("given", "decided", "saving", "rank"),
  [
    (0, "share", 0.4, 8),
    (0, "share", 0.09, 8),  # without the bias, 16 would do
    (12, "share", 0.4, 12),
    (0, "errors", 0.4, 8),
  ],
)
def test_plan_with_a_rank_of_the_embedding_is_as_small_as_asked(
  given, decided, saving, rank
):
  config = edited(
    _structured("bert", embedding_granularity="rank", saving=saving),
    {"fold.embedding_rank": given, "compress.embedding": decided},
  )
  params = _trained(config)
  if decided == "errors":
    params["embed"]["embedding"][:, 8:] = 1.0  # of rank 8 around the mean
  shape, targets = _allocate(config, params)
  # (1 - saving) * 40 * 32 numbers: 72 per rank and a bias of 32.
  assert shape.embedding_rank == rank
  assert not targets.embedding
  shape = _without_neurons(shape, targets)
  tree = param_shapes(make_model(shape, V, num_classes=3))
  kept = sum(w.size for w in jax.tree.leaves(tree))
  dense = sum(w.size for w in jax.tree.leaves(params))
  most = (1 - saving) * dense
  assert most - 8 * 3 * D * N - 8 * D * N < kept <= most


def test_plan_counts_the_trimmed_rows_of_an_embedding_of_low_rank(measured):
  config = _config(
    saving=0.6, linear=None, embedding=None, embedding_granularity="trim"
  )
  config = edited(config, {"fold.embedding_rank": 24})
  params = _trained(config)
  shape, targets = _allocate(config, params)
  # What `trim_vocabulary` removes before.
  assert targets.embedding == allocate.outer_fractions(config.fpp)[1] > 0
  stored, _ = _stored((shape, targets), config, params)
  assert 0.4 - 0.012 < stored <= 0.4 + 1e-6


def test_options_of_the_embedding_predict_the_error_of_a_rank():
  config = _structured("bert", embedding_granularity="rank")
  config = edited(config, {"compress.embedding": "errors"})
  params, batches = _trained(config), _batches()
  options = _measure(config, params)[0, "embed"]
  assert [option.value for option in options] == [0, 32, 24, 16, 8]
  usage_V = usage_of(batches, V)
  sensitivity = sensitivities(shape_of(config), params, batches)["embed"]
  sensitivity = np.asarray(sensitivity)
  whole_VD = params["embed"]["embedding"]
  for rank, stored, error in options[1:]:
    rows = lowrank.fold_embedding(whole_VD, usage_V, rank, sensitivity)
    assert stored == sum(w.size for w in jax.tree.leaves(rows))
    dense = fold.unfold({**params, **rows})["embed"]["embedding"]
    e_VD = np.asarray(dense - whole_VD, np.float64)
    expected = np.sum(usage_V[:, None] * e_VD * (e_VD @ sensitivity))
    assert error == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_options_of_shared_embeddings_predict_the_error_of_a_rank():
  config = _structured("bert", embedding_granularity="rank")
  config = edited(
    config, {"compress.embedding": "errors", "fold.embedding_shared": True}
  )
  params, batches = _trained(config), _batches()
  options = _measure(config, params)[0, "embed"]
  tables = embedding_tables(shape_of(config), params, batches)
  tokens_V, positions_P = (usage / usage.sum() for _, usage in tables.values())
  weight_VP = np.outer(tokens_V, positions_P)
  sensitivity = sensitivities(shape_of(config), params, batches)["embed"]
  sensitivity = np.asarray(sensitivity)

  def sums(params):
    tokens, positions = (
      np.asarray(params[name]["embedding"], np.float64)
      for name in ("embed", "position_embed")
    )
    return tokens[:, None] + positions

  for rank, stored, error in options[1:]:
    rows = lowrank.fold_embeddings(tables, rank, sensitivity)
    assert stored == sum(w.size for w in jax.tree.leaves(rows)) + D
    e_VPD = sums(fold.unfold({**params, **rows})) - sums(params)
    squares_VP = np.sum(e_VPD * (e_VPD @ sensitivity), axis=-1)
    expected = np.sum(weight_VP * squares_VP)
    assert error == pytest.approx(expected, rel=1e-4, abs=1e-9)


@functools.cache
def _structured_options():
  """Returns options of a layer whose last two heads repeat the first two."""
  config = _structured("gpt2")

  def value(name, w):
    if not re.search(r"_0/attn/[qkv]/", name):
      return w
    half = np.split(w, 2, axis=-2)[0]
    return np.concatenate([half, half], axis=-2)

  params = paths.map_named(value, _trained(config))
  return config, _measure(config, params)


def test_options_of_heads_and_ranks_count_the_arrays():
  config, options = _structured_options()
  found = options[1, "attn"]
  assert len({len(option.value.heads) for option in found}) == H
  for value, stored, _ in found[::7]:
    rank = 0 if value.values == "dense" else value.values
    one = dataclasses.replace(
      config,
      fold=c.FoldConfig(groups=value.groups, values="dense", value_rank=rank),
      model=dataclasses.replace(
        config.model, num_layers=1, heads=(value.heads,)
      ),
    )
    attn = param_shapes(make_model(shape_of(one), V))["blocks_0"]["attn"]
    assert stored == sum(attn[role]["kernel"].size for role in "qkvo")


def test_options_of_ranks_and_neurons_lose_more_as_they_store_less():
  _, options = _structured_options()
  whole = tuple(range(H))
  for n in range(N):
    ranks = [o for o in options[n, "attn"] if o.value[::2] == (0, whole)]
    for found in (ranks, options[n, "mlp"]):
      assert len(found) > 4
      for now, then in itertools.pairwise(found):
        assert then.stored < now.stored
        assert then.error > now.error
  for fraction, stored, _ in options[0, "mlp"]:
    assert stored == pytest.approx(2 * D * 48 * (1 - fraction))


def test_heads_that_others_repeat_are_the_first_to_leave():
  _, options = _structured_options()
  whole = {
    len(option.value.heads): option
    for option in options[0, "attn"]
    if option.value[:2] == (0, "dense")
  }
  assert whole[2].error < 1e-3 * whole[1].error
  assert {head % 2 for head in whole[2].value.heads} == {0, 1}


def test_heads_that_share_a_key_leave_together():
  config = edited(
    _structured("llama"), {"model.num_layers": 1, "model.num_kv_heads": 2}
  )
  options = _measure(config, _trained(config))
  found = {option.value.heads for option in options[0, "attn"]}
  assert found in ({tuple(range(H)), pair} for pair in ((0, 1), (2, 3)))


@pytest.mark.parametrize(
  ("name", "task"),
  [
    ("blocks_1/attn/o", "classify"),
    ("blocks_1/mlp/down", "classify"),
    ("blocks_1/mlp/down", "embed"),
    ("blocks_1/mlp/down", "lm"),
    ("embed", "classify"),
  ],
)
def test_sensitivities_predict_the_change_of_the_output(name, task):
  config = _config("gpt2" if task == "lm" else "bert")
  config = edited(config, {"task": task})
  params = _trained(config)
  rng = np.random.default_rng(2)
  batches = [{"tokens": rng.integers(0, V, (400, 1)).astype(np.int32)}]
  sensitivity = sensitivities(shape_of(config), params, batches)[name]
  model = make_model(shape_of(config).dense(), V, num_classes=3)

  def output(error):
    moved = (f"{name}/bias", f"{name}/embedding")
    changed = paths.map_named(
      lambda at, w: w + error if at in moved else w, params
    )
    out = np.asarray(_apply(model, changed, batches[0]["tokens"]), np.float64)
    if task != "lm":
      return out
    # The square of their distance is twice the divergence, to second order.
    return 2 * scipy.special.softmax(out, axis=-1) ** 0.5

  for _ in range(3):
    error = 1e-2 * rng.normal(size=D).astype(np.float32)
    found = np.square(output(error) - output(0 * error))
    found = found.reshape(len(found), -1).sum(1).mean()
    # Directions are sampled, so 400 texts leave an error of some percent.
    assert error @ sensitivity @ error == pytest.approx(found, rel=0.25)


def test_sensitivities_hold_the_logits_of_some_positions(monkeypatch):
  monkeypatch.setattr(sensitivity_lib, "_LOGITS", 16 * L * V // 4)
  config = _config("gpt2")
  params = param_shapes(make_model(shape_of(config).dense(), V))
  model = make_model(shape_of(config).dense(), V)
  x_BLD = jnp.zeros((16, L, D))
  program = jax.make_jaxpr(sensitivity_lib._output_gradient, 0)(
    model, params, x_BLD, jnp.ones((16, L), bool), 0
  )
  found = list(jaxprs.sizes(program.jaxpr))
  assert 16 * L * V // 4 in found
  assert 16 * L * V not in found


def test_options_do_not_depend_on_fit_steps():
  config = _config()
  assert config.compress.fit_steps > 0
  config = edited(config, {"compress.fit_steps": 0})
  found = _measure(config, _trained(config))
  assert found == _options("bert")


@pytest.mark.parametrize(
  ("kind", "asked", "other"),
  [
    ("bert", "values", "groups"),
    ("llama", "groups", "values"),
  ],
)
def test_projections_asked_to_be_dense_stay_dense(kind, asked, other):
  config = _config(kind, saving=0.5, linear=None, embedding=None)
  dense = {"groups": 0, "values": "dense"}
  config = edited(
    config,
    {
      "fold.rope": "copy",  # irrelevant for dense heads
      f"fold.{asked}": dense[asked],
    },
  )
  found = fold_of(_allocate(config, _trained(config))[0])
  assert getattr(found, asked) == dense[asked]
  assert getattr(found, other) not in (dense[other], (dense[other],) * N)


def test_layers_that_matter_least_are_compressed_most():
  config = _config(saving=0.45, linear=None, embedding=None)
  params = _trained(config, flat_layers=[1])
  shape, targets = _allocate(config, params)
  pruned = targets.layers
  assert pruned[1] == max(pruned)
  assert min(pruned[0], pruned[2]) < pruned[1]
  layer = shape.layers[1]
  assert (layer.groups, layer.values) == (1, "diagonal")


def test_options_lose_more_as_they_store_less():
  options = _options("bert")
  assert options.keys() == {
    (n, kind) for n in range(N) for kind in ("attn", "mlp")
  }
  for found in options.values():
    stored = [option.stored for option in found]
    assert stored == sorted(stored, reverse=True)
    assert found[0].error == 0
    assert all(option.error > 0 for option in found[1:])
  for n in range(N):
    # Only up to half: options that are worse than none need no order.
    errors = [option.error for option in options[n, "mlp"][:4]]
    assert errors == sorted(errors)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_options_count_the_arrays_of_a_folded_layer(kind):
  options = _options(kind)
  of_values = {"dense": D * D, "diagonal": D}
  assert {o.value.values for o in options[0, "attn"]} == of_values.keys()
  for (groups, values, heads), stored, _ in options[0, "attn"]:
    assert heads == tuple(range(H))
    # A folded rotary head has its own frequencies, one per pair.
    frequencies = H * groups // 2 if kind == "llama" else 0
    of_logits = 2 * D * H * (groups or D // H) + frequencies
    assert stored == of_logits + of_values[values]


@pytest.mark.slow
def test_allocation_loses_less_than_equal_layers():
  config = _config()
  params, batches = _trained(config, flat_layers=[0]), _batches()

  def error(shape):
    """Returns the error of folding, on other text; nothing is pruned."""
    folded, _ = fold_pretrained(shape, params, batches)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, V, (32, L)))
    ours, dense = (
      np.asarray(make_model(each, V, 3).apply({"params": p}, tokens))
      for each, p in ((shape, folded), (shape.dense(), params))
    )
    return np.square(ours - dense).mean() / dense.var()

  same = dataclasses.replace(
    config,
    compress=c.CompressConfig(),
    fold=c.FoldConfig(groups=2, values="diagonal"),
  )
  shape, _ = _allocate(config, params)
  assert error(shape) < error(shape_of(same))


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_smallest_options_are_those_that_are_measured(kind, granularity):
  config = _config(kind)
  if granularity == "neuron":
    config = _structured(kind, embedding_granularity="rank")
    config = edited(config, {"compress.embedding": "errors"})
  params = _trained(config)
  asked = shape_of(config)
  shapes = param_shapes(make_model(asked.dense(), V, num_classes=3))
  found = smallest(asked, shapes, _tried(config))
  options = _measure(config, params)
  assert found.keys() == options.keys()
  for key, each in options.items():
    assert found[key] == pytest.approx(min(one.stored for one in each)), key


def test_target_out_of_reach_is_refused_before_measuring():
  config = _structured("bert")
  config = edited(config, {"fpp.saving": 0.97})
  with pytest.raises(errors.ConfigError, match="at most") as caught:
    _compress(config)
  [most] = re.findall(r"at most (\d+)%", str(caught.value))
  config = edited(config, {"fpp.saving": int(most) / 100})
  _allocate(config, _trained(config))
  config = edited(config, {"fpp.saving": int(most) / 100 + 0.01})
  with pytest.raises(errors.ConfigError, match=f"at most {most}%"):
    _compress(config)


def test_unreachable_target_is_refused(measured):
  config = _config(saving=0.97, linear=None, embedding=None)
  with pytest.raises(errors.ConfigError, match="no plan reaches"):
    _allocate(config, _trained(config))


def test_cheapest_move_has_the_least_error_per_parameter():
  options = {
    (0, "mlp"): [
      Option(0.0, 20.0, 0.0),
      Option(0.5, 10.0, 1.0),  # 0.1 per parameter
    ],
    (1, "mlp"): [
      Option(0.0, 20.0, 0.0),
      Option(0.1, 18.0, 0.5),  # 0.25 per parameter, but less error
    ],
  }
  begin = dict.fromkeys(options, 0)
  found = allocate.cheapest(options, begin, ("mlp",), 39.0)
  assert found == {(0, "mlp"): 1, (1, "mlp"): 0}

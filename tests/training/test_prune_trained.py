"""Pruning of trained weights: counts, moments, and a run that keeps the zeros."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding import errors, paths
from folding.compression import oneshot
from folding.data.tokenizers import train_tokenizer
from folding.model import Model
from folding.models.shape import shape_of
from folding.models.shrink import shrink
from folding.models.transformer import make_model
from folding.training import loop, prune_trained, run_dir
from folding.training import stream as stream_lib
from folding.training.allocate import Asked
from folding.training.checkpoint import load_run
from folding.training.compress_trained import compress_sizes
from folding.training.fold_pretrained import fold_pretrained
from folding.training.optimizer import make_rules
from folding.typed import edited
from tests.training import tiny
from tests.training.conftest import recovery_config, tiny_config


def _config(method, **fields):
  return tiny.config(
    preset="none",
    pretrained="RUN",
    model=c.ModelConfig(num_layers=2, width=32, num_heads=4, gated=True),
    fpp=c.FPPConfig(linear=0.5, embedding=0.25, attention="all"),
    compress=c.CompressConfig(prune=method),
    **fields,
  )


@pytest.fixture(scope="module")
def trained():
  """Returns (parameters of two layers, batches)."""
  made = tiny.make(_config("magnitude"))
  params = jax.device_get(made.init(1).params)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda w: w + 0.02 * rng.normal(size=w.shape).astype(np.float32), params
  )
  batches = [
    {"tokens": tiny.batch(s)["tokens"], "mask": tiny.batch(s)["weights"] > 0}
    for s in range(3)
  ]
  return params, batches


def _prune(method, trained):
  params, batches = trained
  return _pruned(_config(method), params, batches)


def _pruned(config, params, batches):
  rules = make_rules(shape_of(config), config.fpp, params, params)
  method = config.compress.prune
  shape = shape_of(config)
  return prune_trained.prune_trained(shape, params, batches, rules, method)


def _pruner(config, params):
  rules = make_rules(shape_of(config), config.fpp, params, params)
  return prune_trained.make_pruner(params, rules, config.compress.prune)


def _reads(params, batches):
  """Returns the input of W_Q of the first layer, float64[tokens, D]."""
  rows = []
  for batch in batches:
    x = params["embed"]["embedding"].astype(np.float64)[batch["tokens"]]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    norm = params["blocks_0"]["norm_attn"]
    rows.append((x * norm["scale"] + norm["bias"])[batch["mask"]])
  return np.concatenate(rows)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_each_array_loses_its_target(trained, method):
  pruned = paths.flatten(_prune(method, trained))
  for name, w in paths.flatten(trained[0]).items():
    share = 0.0
    if name.endswith("kernel"):
      share = 0.5 if name.startswith("blocks") else 0.0
    elif name.endswith("embedding"):
      share = 0.25
    zeros = np.count_nonzero(pruned[name] == 0)
    assert zeros == int(share * w.size), name
    if not share:
      np.testing.assert_array_equal(pruned[name], w)


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_kernel_is_pruned_by_the_moment_of_its_input(trained, method, role):
  pruned = _prune(method, trained)
  x = _reads(pruned, trained[1])
  w = trained[0]["blocks_0"]["attn"][role]["kernel"].astype(np.float64)
  oracle = getattr(oneshot, method)(w.reshape(32, -1), x.T @ x / len(x), 0.5)
  found = pruned["blocks_0"]["attn"][role]["kernel"]
  np.testing.assert_array_equal(found.reshape(32, -1) == 0, oracle == 0)
  np.testing.assert_allclose(
    found.reshape(32, -1), oracle, rtol=1e-3, atol=1e-5
  )


def test_dense_layers_are_pruned_without_a_fit(trained):
  params, batches = trained
  config = _config("wanda")  # it changes no remaining weight
  asked = Asked(shape_of(config), config.fpp, config.compress)
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])  # not read
  model = Model.of(config, params, tokenizer)
  [(small, _)] = compress_sizes([asked], model, batches)
  for name, w in paths.flatten(small.params).items():
    old = paths.flatten(params)[name]
    np.testing.assert_array_equal(w, np.where(w == 0, 0, old), name)


def _by_neuron(**model):
  return edited(
    _config("sparsegpt"),
    {"fpp.granularity": "neuron", "fpp.attention": "output"}
    | {f"model.{name}": value for name, value in model.items()},
  )


def _without_biases(params):
  def keep(tree):
    return {
      name: keep(x) if isinstance(x, dict) else x
      for name, x in tree.items()
      if name != "bias"
    }

  blocks = {
    name: {**tree, **{part: keep(tree[part]) for part in ("attn", "mlp")}}
    for name, tree in params.items()
    if name.startswith("blocks_")
  }
  return {**params, **blocks}


def _pruned_layer(config, params, n, layer, stream):
  prune = _pruner(config, params).layer(n)
  block = stream_lib.make_block(shape_of(config), n)
  layer = prune.weights(
    layer, stream_lib.input_moments(block, layer, stream, ("o",))
  )
  [moments] = stream_lib.input_moments(block, layer, stream, ("down",)).values()
  return prune.neurons(layer, moments)


@pytest.mark.parametrize("use_bias", [True, False])
def test_remaining_neurons_replace_the_removed_ones(trained, use_bias):
  params, batches = trained
  config = _by_neuron(use_bias=use_bias, qkv_bias=use_bias)
  if not use_bias:
    params = _without_biases(params)
  layer = params["blocks_0"]
  stream = stream_lib.embed_batches(shape_of(config), params, batches)
  pruned = _pruned_layer(config, params, 0, layer, stream)
  old, new = layer["mlp"], pruned["mlp"]
  below = {**layer, "attn": pruned["attn"]}

  block = stream_lib.make_block(shape_of(config), 0)
  seen = [
    stream_lib.capture(block, below, *at, ("down",))["down"][at[1]]
    for at in zip(*stream, strict=True)
  ]
  a = np.concatenate(seen).astype(np.float64)
  w, found = old["down"]["kernel"].astype(np.float64), new["down"]["kernel"]
  stays = found.any(axis=1)
  assert (~stays).sum() == len(w) // 2
  for role in ("up", "gate"):
    for part, value in new[role].items():
      assert not value[..., ~stays].any()
      expected = old[role][part][..., stays]
      np.testing.assert_array_equal(value[..., stays], expected)
  # A ridge of a tenth of the median variance, as additional rows.
  mean = a.mean(0) if use_bias else 0.0
  centred = a - mean
  ridge = 0.1 * np.median(np.square(centred).sum(0))
  rows = np.vstack([centred, ridge**0.5 * np.eye(len(w))])
  oracle = np.linalg.lstsq(rows[:, stays], rows @ w, rcond=None)[0]
  np.testing.assert_allclose(found[stays], oracle, rtol=1e-3, atol=1e-4)
  if use_bias:
    bias = old["down"]["bias"] + mean @ (w - found)
    np.testing.assert_allclose(new["down"]["bias"], bias, rtol=1e-4, atol=1e-5)


def test_pruned_layers_are_refitted_to_the_dense_stream(trained):
  params, _ = trained
  batches = [{"tokens": tiny.batch(seed)["tokens"]} for seed in range(30)]
  config = _by_neuron()
  prune = _pruner(config, params)
  fitted, _ = fold_pretrained(shape_of(config), params, batches, prune=prune)
  found = paths.flatten(fitted)
  for n in range(2):
    down = found[f"blocks_{n}/mlp/down/kernel"]
    gone = ~down.any(axis=1)
    assert gone.sum() == len(down) // 2
    assert not found[f"blocks_{n}/mlp/up/kernel"][:, gone].any()

  def stream(prunes, weights):
    """Returns the output of the last layer, perhaps with each layer pruned."""
    stream = stream_lib.embed_batches(shape_of(config), params, batches)
    for n in range(2):
      layer = weights[f"blocks_{n}"]
      if prunes:
        layer = _pruned_layer(config, params, n, layer, stream)
      block = stream_lib.make_block(shape_of(config), n)
      stream = stream_lib.advance(block, layer, stream)
    pairs = zip(*stream, strict=True)
    return np.concatenate([np.asarray(w)[keep] for w, keep in pairs])

  dense = stream(False, params)
  wrong = np.square(stream(False, fitted) - dense).sum()
  assert wrong < 0.95 * np.square(stream(True, params) - dense).sum()


def test_folding_corrects_the_weights_pruned_below(trained):
  params, _ = trained
  batches = [{"tokens": tiny.batch(seed)["tokens"]} for seed in range(30)]
  config = _config("sparsegpt")
  prune = _pruner(config, params)
  fitted, _ = fold_pretrained(shape_of(config), params, batches, prune=prune)
  alone = _pruned(config, params, batches)
  zeros, expected = (
    {name: np.sum(w == 0) for name, w in paths.flatten(tree).items()}
    for tree in (fitted, alone)
  )
  assert zeros == expected

  def stream(weights):
    """Returns the output of the last layer."""
    stream = stream_lib.embed_batches(shape_of(config), weights, batches)
    for n in range(2):
      block = stream_lib.make_block(shape_of(config), n)
      stream = stream_lib.advance(block, weights[f"blocks_{n}"], stream)
    pairs = zip(*stream, strict=True)
    return np.concatenate([np.asarray(w)[keep] for w, keep in pairs])

  dense = stream(params)
  wrong = np.square(stream(fitted) - dense).sum()
  assert wrong < 0.95 * np.square(stream(alone) - dense).sum()


def test_layer_is_pruned_on_the_stream_of_pruned_layers(trained):
  params, batches = trained
  pruned = _prune("sparsegpt", trained)
  # With the first layer already pruned and kept as it is, the second must become
  # the same.
  mixed = {**params, "blocks_0": pruned["blocks_0"]}
  mixed["embed"] = pruned["embed"]
  config = _config("sparsegpt")
  config = edited(config, {"fpp.embedding": 0.0})
  config = edited(config, {"fpp.linear_layers": (0.0, config.fpp.linear)})
  again = _pruned(config, mixed, batches)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    again["blocks_1"],
    pruned["blocks_1"],
  )
  alone = {**mixed, "blocks_0": params["blocks_0"]}
  other = _pruned(config, alone, batches)
  gap = np.abs(
    other["blocks_1"]["mlp"]["up"]["kernel"]
    - pruned["blocks_1"]["mlp"]["up"]["kernel"]
  )
  assert gap.max() > 0.01  # a dense layer below gives another result


@pytest.mark.slow
def test_run_keeps_its_initial_zeros(text_file, tmp_path):
  dense = dataclasses.replace(
    tiny_config(text_file, steps=4, eval_every=4), dense=True
  )
  loop.run(dense, str(tmp_path / "dense"))
  config = tiny_config(text_file, steps=6, eval_every=6)
  config = dataclasses.replace(
    config,
    fpp=c.FPPConfig(saving=0.6, attention="all"),
    compress=c.CompressConfig(prune="sparsegpt", calibration=64),
  )
  config = edited(
    config, {"preset": "none", "pretrained": str(tmp_path / "dense")}
  )
  result = loop.run(config, str(tmp_path / "pruned"))
  found = result["parameters"]["overall"]
  assert found["stored"] / found["dense"] == pytest.approx(0.4, abs=2e-3)

  start = load_run(str(tmp_path / "dense")).params
  end = load_run(str(tmp_path / "pruned")).params
  moved = paths.flatten(end)
  for name, w in paths.flatten(start).items():
    assert (moved[name] != w).any(), name  # the remaining weights train
  lines = (tmp_path / "pruned" / "metrics.jsonl").read_text().splitlines()
  records = [r for r in map(json.loads, lines) if r["split"] == "train"]
  # From the first step on, and constant.
  assert len({r["sparsity"] for r in records}) == 1
  assert {r["frozen"] for r in records} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "overall"), [("same", 0.7), ("auto", 0.4)])
def test_neurons_are_removed_before_the_first_step(
  dense_run, topics, tmp_path, plan, overall
):
  config = recovery_config(dense_run, topics, compress__plan=plan)
  workdir = tmp_path / "run"
  config = edited(
    config,
    {
      "compress.prune": "sparsegpt",
      "fpp.granularity": "neuron",
      "fpp.saving": overall,
      "compress.fit_steps": 0,
    },
  )
  if plan == "auto":
    config = edited(config, {"fpp.attention": "none", "fold.values": "dense"})
  result = loop.run(config, str(workdir))
  found = result["parameters"]["overall"]
  saved = 1 - found["stored"] / found["dense"]
  # A plan keeps multiples of 8 of the 24 neurons.
  assert overall - 0.02 < saved < overall + (0.08 if plan == "auto" else 0.02)
  began = run_dir.load_model(str(workdir), config)
  layers = began.shape.layers
  assert {layer.whole_mlp_width for layer in layers} == {24}
  has_all_heads = all(len(x.heads) == began.shape.num_heads for x in layers)
  assert has_all_heads == (plan == "same")
  widths = [layer.mlp_width for layer in layers]
  assert sum(widths) < 2 * 24
  params = load_run(str(workdir)).params
  for n, width in enumerate(widths):
    kernel = params[f"blocks_{n}"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (16, width)
    # Arrays keep multiples of 8 neurons, with fewer than 8 held at zero.
    zero = ~kernel.any(axis=0)
    assert zero.sum() < 8
  # A run that stopped before its first checkpoint starts again, by the same config
  # or by the one that is saved.
  for again in (config, c.load(str(workdir / "config.json"))):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "result.json").unlink()
    loop.run(again, str(workdir))
    jax.tree.map(
      np.testing.assert_array_equal, load_run(str(workdir)).params, params
    )
  if plan == "same":
    return
  # The plan is saved, beside the config that was given.
  assert c.load(str(workdir / "config.json")).compress.plan == "auto"
  assert began.targets is not None
  before = (workdir / "metrics.jsonl").stat().st_mtime_ns
  loop.run(config, str(workdir))  # the same config is finished
  assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before
  config = edited(config, {"compress.plan": "same"})
  with pytest.raises(errors.ConfigError, match="another config"):
    loop.run(config, str(workdir))


def test_removing_zero_neurons_keeps_the_function(trained):
  config, (params, batches) = _by_neuron(), trained
  config = edited(config, {"fpp.linear_layers": (0.0, config.fpp.linear)})
  prune = _pruner(config, params)
  whole, _ = fold_pretrained(shape_of(config), params, batches, prune=prune)
  zeros = prune_trained.zero_neurons(whole)
  shape = shape_of(config)
  small, less, _ = shrink(shape, whole, absorb=False, is_zero=zeros)
  width = config.model.mlp_width
  assert [layer.mlp_width for layer in small.layers] == [width, width // 2]
  size = less["blocks_1"]["mlp"]["gate"]["kernel"].shape
  assert size == (32, width // 2)
  tokens = jnp.asarray(batches[0]["tokens"])
  outputs = [
    jax.jit(make_model(each, params["embed"]["embedding"].shape[0]).apply)(
      {"params": tree}, tokens
    )
    for each, tree in ((shape, whole), (small, less))
  ]
  np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)

"""Training continues after a shrink as it would without one."""

import functools
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

from folding import cli, errors, files, paths
from folding import config as c
from folding.compression.fpp import fpp_counts
from folding.compression.sites import make_sites
from folding.data.tokenizers import load_tokenizer
from folding.models.shape import shape_of, with_shape
from folding.models.transformer import make_model
from folding.training import loop, optimizer, run_dir, shrink_run
from folding.typed import edited
from tests.training import tiny
from tests.training.conftest import tiny_config

STEPS = 12  # mask updates at 0, 3, 6, 9; the first zeros at 6, the last at 9


@pytest.fixture(scope="module")
def run():
  # A bias of keys adds the same to all logits, so what moves it is rounding.
  model = c.ModelConfig(num_layers=1, width=32, num_heads=4, qkv_bias=False)
  fpp = c.FPPConfig(begin=0.0, end=0.75, checks=3, granularity="neuron")
  train = c.TrainConfig(steps=STEPS, learning_rate=1e-2, warmup=0.0)
  return tiny.make(tiny.config(model=model, fpp=fpp, train=train))


@pytest.fixture(scope="module")
def train(run):
  """Returns a function from a state and its step to states and losses."""
  return _trainer(run)


@pytest.fixture(scope="module")
def trained(run, train):
  """Returns the states before each step, and the losses of the steps."""
  return train(run.init(), 0)


def _trainer(run):
  steps = {is_update: run.step(is_update) for is_update in (False, True)}

  def train(state, first):
    states, losses = {first: state}, []
    for step in range(first, STEPS):
      is_update = step in optimizer.mask_updates(run.config)
      state, metrics = steps[is_update](state, tiny.batch(step))
      states[step + 1] = state
      losses.append(float(metrics["loss"]))
    return states, losses

  return train


def _shrink(run, state, multiple=1):
  is_over = shrink_run.is_pruning_over(
    optimizer.mask_updates(run.config), int(state.step)
  )
  held = jax.jit(
    functools.partial(shrink_run.held_zero, run.rules, is_over=is_over)
  )
  is_zero = held(state)
  shape, state, cut = shrink_run.shrink_state(
    shape_of(run.config), run.rules, state, is_zero, multiple=multiple
  )
  return with_shape(run.config, shape), state, cut


def _smaller(run, config, params):
  """Returns the run of shrunk parameters."""
  removed = optimizer.removed_units(run.rules, tiny.shapes(run.config), params)
  layers = shape_of(config).layers
  tx = optimizer.make_optimizer(config, layers, run.rules, removed)
  model = make_model(shape_of(config), tiny.VOCAB)
  return tiny.Tiny(config, model, run.rules, tx)


def _counts(rules, state, removed=None):
  """Returns `fpp_counts` on the host."""
  count = jax.jit(functools.partial(fpp_counts, rules, removed=removed or {}))
  return jax.device_get(count(state.opt_state, state.params))


def _assert_same(run, cut, before, after):
  """Asserts that a state equals another one cut, up to rounding."""
  cut_params = paths.flatten(cut(jax.device_get(before.params)))
  for name, w in cut_params.items():
    found = paths.flatten(after.params)[name]
    np.testing.assert_array_equal(found == 0, w == 0, err_msg=name)
    np.testing.assert_allclose(found, w, rtol=1e-3, atol=1e-5, err_msg=name)
  sites = make_sites(run.rules, before.params)
  cut_state = jax.jit(lambda x: cut.fpp_state(x, sites))(before.opt_state)
  chex.assert_trees_all_equal(
    (after.opt_state.suspected, after.opt_state.zeroed),
    (cut_state.suspected, cut_state.zeroed),
  )
  assert _counts(run.rules, after)["undone"] == 0


@pytest.mark.parametrize(
  ("at", "multiple"),
  [
    pytest.param(7, 1, id="between_checks", marks=pytest.mark.slow),
    pytest.param(10, 16, id="healing"),
  ],
)
def test_training_continues_as_without_a_shrink(run, trained, at, multiple):
  states, losses = trained
  config, state, cut = _shrink(run, states[at], multiple)
  down = np.asarray(states[at].params["blocks_0"]["mlp"]["down"]["kernel"])
  dead = (down == 0).all(1)
  width = 128 - int(dead.sum())
  assert 10 < width < 128 - 10
  assert config.model.mlp_width == -(-width // multiple) * multiple
  # Units that have left count as selected and zero.
  gone = optimizer.removed_units(run.rules, states[at].params, state.params)
  assert _counts(run.rules, states[at]) == _counts(run.rules, state, gone)
  small = _smaller(run, config, state.params)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    state, jax.eval_shape(lambda: small.init())
  )
  after, found = _trainer(small)(state, at)
  # Sums of other lengths differ by rounding, which Adam carries on.
  np.testing.assert_allclose(found, losses[at:], rtol=1e-4)
  _assert_same(run, cut, states[STEPS], after[STEPS])


def test_shrink_removes_only_held_units(run, trained):
  state = trained[0][10]
  params = jax.tree.map(np.array, state.params)
  down = params["blocks_0"]["mlp"]["down"]["kernel"]
  down[np.argmax((down != 0).any(1))] = 0.0  # an alive neuron
  config, _, _ = _shrink(run, state)
  again, _, _ = _shrink(run, state._replace(params=params))
  assert again.model == config.model


@pytest.mark.parametrize(("at", "heads"), [(9, None), (10, ((0, 2, 3),))])
def test_head_leaves_after_the_last_mask_update(run, train, trained, at, heads):
  state = trained[0][at]
  name = "blocks_0/attn/o/kernel"
  params = jax.tree.map(np.array, state.params)
  params["blocks_0"]["attn"]["o"]["kernel"][1] = 0.0
  bits = np.array(state.opt_state.suspected[name])
  bits[:, 1] = 255
  suspected = {**state.opt_state.suspected, name: bits}
  held = state._replace(
    params=params, opt_state=state.opt_state._replace(suspected=suspected)
  )
  config, small, cut = _shrink(run, held)
  assert config.model.heads == heads
  if heads is None:
    return
  states, losses = train(held, at)
  after, found = _trainer(_smaller(run, config, small.params))(small, at)
  np.testing.assert_allclose(found, losses, rtol=1e-4)
  _assert_same(run, cut, states[STEPS], after[STEPS])


# ---------------------------------------------------------------------------
# Run directories.


def _config(labelled, **train):
  """Returns the config of a run with mask updates at 2, 4, 6 that zero at once."""
  return edited(
    tiny_config(labelled, **train),
    {
      "task": "classify",
      "model.causal": False,
      "model.qkv_bias": False,  # see above
      "fpp.granularity": "neuron",
      "fpp.embedding_granularity": "row",
      "fpp.patience": 0,
    },
  )


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory):
  """Returns a finished run."""
  workdir = str(tmp_path_factory.mktemp("shrinking") / "whole")
  loop.run(_config(labelled), workdir)
  return workdir


@pytest.fixture(scope="module")
def shrunk(whole, tmp_path_factory):
  """Returns the result of `shrink_run`, and the smaller run."""
  output = str(tmp_path_factory.mktemp("shrunk") / "small")
  return shrink_run.shrink_run(whole, output, multiple=4), output


def _read(workdir, name):
  with open(f"{workdir}/{name}", encoding="utf-8") as file:
    return (
      [json.loads(line) for line in file]
      if name[-1] == "l"
      else json.load(file)
    )


def _losses(workdir):
  return {
    (r["split"], r["step"]): r["loss"] for r in _read(workdir, "metrics.jsonl")
  }


@pytest.mark.slow
def test_finished_run_is_smaller_with_equal_test(whole, shrunk, tmp_path):
  done, output = shrunk
  before, after = run_dir.read_result(whole), run_dir.read_result(output)
  assert after["is_at_target"] is before["is_at_target"] is not None
  assert done["step"] == done["steps"] == 10
  this, _ = loop.open_run(whole)
  that, _ = loop.open_run(output)
  assert (done["before"], done["after"]) == (
    this.num_parameters,
    that.num_parameters,
  )
  # Of 32 neurons 22 are zero, of 258 tokens 180.
  assert that.model.shape.layers[0].mlp_width == 12
  embedding = that.like.params["embed"]["embedding"]
  assert embedding.shape == (258 - 180 + 1, 16)
  assert that.model.shape.layers[0].values == "identity"
  # Both are measured against the same dense baseline and store the same
  # parameters, except the 16 of the diagonal of W_V.
  for group, counts in before["parameters"].items():
    gone = 16 if group in ("qkv", "overall") else 0
    found = after["parameters"][group]
    assert found["dense"] == counts["dense"], group
    assert found["stored"] == counts["stored"] - gone, group
  assert after["test"]["loss"] == pytest.approx(
    before["test"]["loss"], rel=1e-5
  )
  assert loop.evaluate_run(output)["loss"] == after["test"]["loss"]
  assert loop.resume_run(output) == after  # nothing is left to train
  with pytest.raises(errors.ConfigError, match="nothing to remove at step 10"):
    shrink_run.shrink_run(output, str(tmp_path / "smaller"), multiple=4)


def _latest(workdir):
  """Returns a run, the step of its latest checkpoint and the state there."""
  this, checkpoints = loop.open_run(workdir)
  with checkpoints:
    step, state = checkpoints.restore_latest(this.like)
  return this, step, state


def test_compacted_state_has_smaller_arrays_and_the_same_loss(whole):
  this, step, state = _latest(whole)
  this.order = edited(this.order, {"train.compact": 0.1})
  small, compacted = this.compacted(state, step)
  # Of 32 neurons 10 are not zero, rounded up to a multiple of 8.
  assert small.model.shape.layers[0].mlp_width == 16
  chex.assert_trees_all_equal_shapes_and_dtypes(compacted, small.like)
  before, after = (
    run.evaluate(each.params, "valid")
    for run, each in ((this, state), (small, compacted))
  )
  assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_arrays_leave_once_the_cut_removes_the_share_asked_for(whole):
  this, step, state = _latest(whole)
  layers = {
    name: w
    for name, w in paths.flatten(state.params).items()
    if name.startswith("blocks_")
  }
  # 16 of the 32 neurons leave.
  gone = sum(
    w.size // 2 for name, w in layers.items() if "mlp" in name and 32 in w.shape
  )
  share = gone / sum(w.size for w in layers.values())
  assert 0.2 < share < 0.8

  def leaves(least, step):
    this.order = edited(this.order, {"train.compact": least})
    return this.compacted(state, step) is not None

  earlier = max(this.mask_updates)  # a mask update is still to come
  assert leaves(share - 1e-6, earlier)
  assert not leaves(share + 1e-6, earlier)
  assert leaves(0.9, step)  # nothing is removed later


@pytest.mark.slow
def test_run_that_compacts_trains_as_one_whose_arrays_stay(
  whole, labelled, tmp_path
):
  workdir = str(tmp_path / "compact")
  result = loop.run(_config(labelled, compact=0.1), workdir)
  assert _read(workdir, "checkpoints/10/model.json")["mlp_width"] == 16
  assert result["parameters"] == run_dir.read_result(whole)["parameters"]
  losses, found = _losses(whole), _losses(workdir)
  assert found.keys() == losses.keys()
  np.testing.assert_allclose(
    list(found.values()), list(losses.values()), rtol=1e-4
  )


@pytest.mark.slow
def test_best_checkpoint_loses_only_its_own_zeros(whole, tmp_path):
  other, output = str(tmp_path / "other"), str(tmp_path / "small")
  shutil.copytree(whole, other)
  # Makes the one at step 5 the best, which has a part of the zeros of the last.
  path = tmp_path / "other" / "checkpoints" / "5"
  (path / "metrics" / "metrics").write_text('{"loss": 0.01}')
  names = [name for name in files.read_checksums(str(path)) or () if name]
  files.write_checksums(str(path), names)
  shrink_run.shrink_run(other, output)
  assert loop.evaluate_run(output)["checkpoint_step"] == 5
  before, after = loop.evaluate_run(other), loop.evaluate_run(output)
  assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
  widths = [
    loop.open_run(w)[0].model.shape.layers[0].mlp_width for w in (other, output)
  ]
  assert 12 < widths[1] < widths[0] == 32


@pytest.mark.slow
def test_unfinished_run_continues_as_without_a_shrink(whole, tmp_path, capsys):
  stopped, output = str(tmp_path / "stopped"), str(tmp_path / "small")
  shutil.copytree(whole, stopped)
  shutil.rmtree(f"{stopped}/checkpoints/10")
  assert cli.main(["shrink", stopped, f"--output={output}"]) == 0
  last_line = capsys.readouterr().out.splitlines()[-1]
  assert last_line == f"Its training goes on with: folding resume {output}"
  text = [
    (pathlib.Path(w) / "text.sha256").read_text() for w in (whole, output)
  ]
  assert text[0] == text[1]
  this, that = loop.open_run(stopped)[0], loop.open_run(output)[0]
  assert that.num_parameters < 0.8 * this.num_parameters
  assert that.model.shape.layers[0].values == "diagonal"
  assert cli.main(["resume", output]) == 0
  assert (tmp_path / "small" / "report.md").is_file()
  losses, found = _losses(whole), _losses(output)
  assert found.keys() == losses.keys()
  np.testing.assert_allclose(
    list(found.values()), list(losses.values()), rtol=1e-4
  )
  # The mask update at step 6 has zeroed the same number, those removed
  # included.
  result, expected = run_dir.read_result(output), run_dir.read_result(whole)
  assert result["parameters"] == expected["parameters"]
  assert result["test"]["loss"] == pytest.approx(
    expected["test"]["loss"], rel=1e-4
  )


def test_removed_tokens_share_one_row(whole, shrunk):
  _, output = shrunk
  plain = load_tokenizer(f"{whole}/tokenizer.json")
  mapped = load_tokenizer(f"{output}/tokenizer.json")
  assert (mapped.plain_size, mapped.vocab_size) == (258, 79)
  text = "the cat Zq%"
  [old], [new] = plain.encode_batch([text]), mapped.encode_batch([text])
  before, after = (_latest(w)[2].params["embed"] for w in (whole, output))
  np.testing.assert_array_equal(
    np.asarray(after["embedding"])[new], np.asarray(before["embedding"])[old]
  )
  (shared,) = np.flatnonzero((np.asarray(after["embedding"]) == 0).all(1))
  kept = [letter for letter, i in zip(text, new, strict=True) if i != shared]
  assert 0 < len(kept) < len(text)
  assert mapped.decode(new) == "".join(kept)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("taken", "not an empty folder"),
    ("bare", "has no checkpoint yet"),
    ("empty", "it has no config.json"),
    ("multiple", "at least 1"),
    ("address", "gs://b/small is an address"),
    ("wildcard", r"because of the \["),
  ],
)
def test_mistake_is_reported_and_nothing_written(
  whole, tmp_path, change, message
):
  workdir, output = whole, tmp_path / "out"
  if change == "taken":
    output = tmp_path
  if change == "address":
    output = "gs://b/small"
  if change == "wildcard":
    output = tmp_path / "[1]"
  if change in ("bare", "empty"):
    workdir = str(tmp_path / "run")
    shutil.copytree(whole, workdir)
    shutil.rmtree(f"{workdir}/checkpoints")
  if change == "empty":
    (tmp_path / "run" / "config.json").unlink()
  (tmp_path / "there").write_text("")
  before = sorted(tmp_path.iterdir())
  with pytest.raises(errors.ConfigError, match=message):
    shrink_run.shrink_run(
      workdir, str(output), 0 if change == "multiple" else 1
    )
  assert sorted(tmp_path.iterdir()) == before

"""Runs that start from a checkpoint or a run, and learn from a teacher."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

import folding
from configs import pretrained as pretrained_config
from folding import cli, errors, paths
from folding import config as c
from folding.data.batches import make_data
from folding.data.trim import token_usage
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.serving.export import export_hf
from folding.serving.predict import predict
from folding.tasks import task_of
from folding.training import compress_trained, loop, run_dir, sharding
from folding.training.checkpoint import load_run
from folding.training.loop import Run
from folding.training.optimizer import embedding_fraction
from folding.training.run_dir import read_metrics
from folding.training.trained import dense_start, read_source, teacher_of
from folding.typed import edited
from tests.serving import models
from tests.training.conftest import CLASS_WORDS, recovery_config, tiny_config


def config_shapes(config, shape=None):
  """Returns {path: shape} of the parameters of a run."""
  data = make_data(config)
  model = make_model(
    shape or shape_of(config), data.tokenizer.vocab_size, data.num_classes
  )
  tokens = jax.ShapeDtypeStruct((1, config.data.length), np.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  return {name: w.shape for name, w in paths.flatten(tree).items()}


def _read(path, data, config):
  return read_source(str(path), data, task_of(config), segments=False)


def _dense(data, config):
  """Returns the dense model that a run would start from."""
  source = _read(config.pretrained, data, config)
  return dense_start(
    source, shape_of(config), data, task_of(config), config.seed
  )


def _compressed(data, config):
  """Returns the model that a run would start from."""
  source = _read(config.pretrained, data, config)
  return compress_trained.compress_trained(
    source, shape_of(config), data, config
  )


def _trimmed(data, config):
  """Returns the data without the tokens that a run would remove."""
  rules = Run(shape_of(config), data, config).rules
  return compress_trained.trim_vocabulary(
    embedding_fraction(rules), data, config
  )


def test_checkpoint_replaces_drawn_parameters(checkpoint, topics):
  folder, written = checkpoint
  config = c.resolve(recovery_config(folder, topics, dense=True))
  start, report = _compressed(make_data(config), config)
  params = start.params
  found, expected = paths.flatten(params), paths.flatten(written)
  assert report == []
  assert {name: w.shape for name, w in found.items()} == config_shapes(config)
  # Rows past the tokenizer's ids belong to no token.
  known = make_data(config).tokenizer.plain_size
  for name, w in found.items():
    if name.startswith(("head/", "pooler/")):
      assert name not in expected  # drawn by the seed
      continue
    theirs = expected[name]
    if name == "embed/embedding":
      theirs = theirs[:known]
    if name == "position_embed/embedding":
      theirs = theirs[: config.data.length]
    np.testing.assert_array_equal(w, theirs, err_msg=name)
  drawn = c.resolve(recovery_config(folder, topics, dense=True, seed=1))
  other = _compressed(make_data(drawn), drawn)[0].params
  assert (other["head"]["kernel"] != params["head"]["kernel"]).any()


@pytest.mark.slow
def test_load_run_splits_parameters_over_a_mesh(dense_run, monkeypatch):
  monkeypatch.setattr(sharding, "_SMALLEST", 1)  # small arrays are split, too
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=4))
  found = load_run(str(dense_run), mesh).params
  chex.assert_trees_all_equal(found, load_run(str(dense_run)).params)
  kernel = found["blocks_0"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


def test_head_follows_the_class_names_of_a_checkpoint(
  dense_run, topics, tmp_path
):
  config = c.resolve(recovery_config(dense_run, topics))
  data = make_data(config)
  names = data.label_names
  head = load_run(str(dense_run)).params["head"]["kernel"]
  export_hf(tmp_path / "hf", folding.load(dense_run))
  path = tmp_path / "hf" / "config.json"
  values = json.loads(path.read_text())
  turned = [*names[1:], names[0]]
  for labels, expected in (
    (names, head),
    ([name.upper() for name in turned], np.roll(head, 1, axis=1)),
    ([f"LABEL_{i}" for i in range(len(names))], head),
    ([f"theme {i}" for i in range(len(names))], None),
  ):
    values["id2label"] = {str(i): name for i, name in enumerate(labels)}
    values["label2id"] = {name: i for i, name in enumerate(labels)}
    path.write_text(json.dumps(values))
    (tmp_path / "hf" / "checksums.json").unlink(missing_ok=True)  # on purpose
    read = _read(tmp_path / "hf", data, config).params
    if expected is None:
      assert "head" not in read
    else:
      np.testing.assert_array_equal(read["head"]["kernel"], expected)


@pytest.mark.parametrize(("second", "kept"), [("A", True), ("d", False)])
def test_class_names_that_differ_by_case_are_two(
  dense_run, topics, tmp_path, second, kept
):
  config = c.resolve(recovery_config(dense_run, topics))
  names = ("a", "A", "b", "c")
  data = dataclasses.replace(make_data(config), label_names=names)
  workdir = shutil.copytree(dense_run, tmp_path / "run")
  (workdir / "labels.json").write_text(json.dumps(["a", second, "b", "c"]))
  (workdir / "checksums.json").unlink()
  found = _read(workdir, data, config).params
  assert ("head" in found) == kept


def test_weights_that_are_not_finite_are_refused(checkpoint, topics, tmp_path):
  shutil.copytree(checkpoint[0], tmp_path / "nan")
  path = tmp_path / "nan" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  for name, w in tensors.items():
    if "query.weight" in name:
      w[:] = np.nan
  safetensors.numpy.save_file(tensors, path)
  config = c.resolve(recovery_config(tmp_path / "nan", topics))
  with pytest.raises(errors.ConfigError, match="nan: "):
    _compressed(make_data(config), config)


def test_head_for_other_classes_is_left_out(
  dense_run, topics, tmp_path, capsys
):
  for split in ("train", "valid", "test"):
    text = (topics / f"{split}.tsv").read_text().replace("topic", "theme")
    (tmp_path / f"{split}.tsv").write_text(text)
  for folder, has_head in ((topics, True), (tmp_path, False)):
    config = c.resolve(recovery_config(dense_run, folder))
    found = _read(dense_run, make_data(config), config).params
    assert ("head" in found) == has_head
  with pytest.raises(errors.ConfigError, match="so it cannot teach these"):
    teacher_of(shape_of(config), make_data(config), config)
  for folder, has_head in ((topics, True), (tmp_path, False)):
    config = c.resolve(recovery_config(dense_run, folder))
    _dense(make_data(config), config)
    told = capsys.readouterr().out
    assert ("theme 0" in told and "from scratch" in told) != has_head
  # Its hidden states can teach.
  config = edited(config, {"distill.logits": 0.0})
  assert teacher_of(shape_of(config), make_data(config), config) is not None


@pytest.fixture(scope="module")
def folded_run(dense_run, topics, tmp_path_factory):
  """Returns (run directory, result) of the dense run, folded and recovered."""
  workdir = tmp_path_factory.mktemp("runs") / "folded"
  return workdir, loop.run(recovery_config(dense_run, topics), str(workdir))


def _saved(result, group):
  counts = result["parameters"][group]
  return 1 - counts["stored"] / counts["dense"]


@pytest.mark.slow
def test_run_folds_recovers_and_loads(folded_run):
  workdir, result = folded_run
  assert result["finished"]
  assert _saved(result, "qkv") > 0.3
  # Rounding to whole rows and elements matters at this size.
  assert _saved(result, "overall") == pytest.approx(0.5, abs=0.05)
  linear = _saved(result, "linear")
  assert 0.4 < linear < 0.8
  layers = json.loads((workdir / "fold.json").read_text())
  assert [row["layer"] for row in layers] == [0, 1]
  assert all(0 < row["logits_kept"] <= 1 for row in layers)
  found = load_run(str(workdir))
  params, tokenizer = found.params, found.tokenizer
  shapes = {n: w.shape for n, w in paths.flatten(params).items()}
  order = run_dir.load_order(str(workdir))
  began = run_dir.load_model(str(workdir), order)
  expected = config_shapes(order, began.shape)
  rows, width = expected.pop("embed/embedding")
  assert shapes.pop("embed/embedding") == (tokenizer.vocab_size, width)
  assert shapes == expected
  assert tokenizer.plain_size == rows > tokenizer.vocab_size
  alive = (params["embed"]["embedding"] != 0).any(1).sum()
  assert 1 - alive / rows == pytest.approx(linear, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("first_batch", [0, 5])
def test_calibration_has_no_text_twice(dense_run, topics, first_batch):
  config = recovery_config(dense_run, topics)
  config = edited(config, {"data.first_batch": first_batch})
  data = make_data(config)
  size = config.data.batch_size
  epoch = data.num_examples["train"] // size
  for count, batches in ((10_000, epoch), (size * 2, 2), (size + 1, 2)):
    config = edited(config, {"compress.calibration": count})
    found = compress_trained.calibration(config.compress.calibration, data)
    assert len(found) == batches
    # From one epoch, not from the rest of one and the start of the next.
    for batch, first in zip(found, data.first_epoch(), strict=False):
      np.testing.assert_array_equal(batch["tokens"], first["tokens"])


@pytest.mark.slow
def test_resumed_fold_equals_an_uninterrupted_one(
  folded_run, dense_run, topics, tmp_path, monkeypatch
):
  config = recovery_config(dense_run, topics)
  with monkeypatch.context() as patch:
    step = loop.StepLog.step

    def cut(self, number, *args):
      if number == 5:
        raise KeyboardInterrupt
      step(self, number, *args)

    patch.setattr(loop.StepLog, "step", cut)
    with pytest.raises(KeyboardInterrupt):
      loop.run(config, str(tmp_path))
  loop.run(config, str(tmp_path))
  for a, b in zip(
    jax.tree.leaves(load_run(str(folded_run[0])).params),
    jax.tree.leaves(load_run(str(tmp_path)).params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_run_killed_in_its_first_step_is_not_compressed_again(
  folded_run, dense_run, topics, tmp_path, monkeypatch
):
  def kill(*_):
    raise KeyboardInterrupt

  config = recovery_config(dense_run, topics)
  monkeypatch.setattr(loop.StepLog, "step", kill)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      loop.run(config, str(tmp_path))
    monkeypatch.setattr(loop, "compress_trained", None)  # not called
  [found] = read_metrics(str(tmp_path / "metrics.jsonl"))
  records = read_metrics(str(folded_run[0] / "metrics.jsonl"))
  [expected] = [x for x in records if x["split"] == "valid" and x["step"] == 0]
  assert (found["split"], found["step"]) == ("valid", 0)
  assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.slow
def test_default_recipe_makes_arrays_small(dense_run, topics, capsys):
  config = pretrained_config.get_config(f"{dense_run},0.4")
  config = edited(
    config,
    {
      "data.path": str(topics),
      "compress.fit_steps": 5,
      "compress.calibration": 96,
    },
  )
  config = c.resolve(config)
  data = make_data(config)
  small, report = _compressed(data, config)
  params = small.params
  assert " on 96 training texts" in capsys.readouterr().out
  kept = sum(w.size for w in jax.tree.leaves(params))
  dense = _dense(data, config)[0].params
  assert kept <= 0.6 * sum(w.size for w in jax.tree.leaves(dense))
  assert any(row["values"].startswith("rank") for row in report)
  for name, w in paths.flatten(params).items():
    if name.endswith("kernel"):
      assert np.count_nonzero(w) == w.size, name
  run = Run(small.shape, data, config, small.targets)
  theirs = run.evaluate(run.init(params).params, "valid")
  assert theirs["accuracy"] > 0.5  # as the dense run has it


@pytest.mark.slow
def test_verb_writes_a_smaller_model_and_says_what_was_lost(
  dense_run, topics, tmp_path, capsys
):
  texts = tmp_path / "texts"
  texts.mkdir()
  for split, rows in (("train", 65), ("valid", 33)):  # and a header
    lines = (topics / f"{split}.tsv").read_text().splitlines()[:rows]
    (texts / f"{split}.tsv").write_text("\n".join(lines) + "\n")
  output = tmp_path / "small"
  argv = ["compress", str(dense_run), f"--texts={texts}", "--saving=0.4"]
  assert cli.main([*argv, f"--output={output}"]) == 0
  out = capsys.readouterr().out
  small, dense = map(folding.load, (output, dense_run))
  sizes = [
    sum(w.size for w in jax.tree.leaves(x.params)) for x in (small, dense)
  ]
  assert sizes[0] <= 0.6 * sizes[1]
  assert f"stores {sizes[0]:,} parameters" in out
  assert f"dense model has {sizes[1]:,}" in out
  assert small.config.fold.value_rank
  for name, w in paths.flatten(small.params).items():
    if name.endswith("kernel"):
      assert np.count_nonzero(w) == w.size, name
  held = [line.partition("\t")[2] for line in lines[1:]]
  answers = [
    [found.label for found in predict(x, held)] for x in (small, dense)
  ]
  same = np.mean([a == b for a, b in zip(*answers, strict=True)])
  assert same > 0.6
  assert f"{same:.1%} of the predictions" in out
  assert cli.main([*argv, f"--output={output}"]) == 2
  assert "not an empty folder" in capsys.readouterr().err
  argv[1] = str(output)
  assert cli.main([*argv, f"--output={tmp_path / 'smaller'}"]) == 2
  assert "folded or shrunk" in capsys.readouterr().err


@pytest.mark.slow
def test_one_call_counts_each_token_once(dense_run, monkeypatch):
  def compress_sizes(sizes, model, batches, usage_V, **_):
    del batches
    nonlocal found_V
    found_V = usage_V
    return [(dataclasses.replace(model, shape=sizes[0].shape), [])]

  found_V, dense = None, folding.load(dense_run)
  monkeypatch.setattr(compress_trained, "compress_sizes", compress_sizes)
  texts = ["good film", "bad film"]
  folding.compress(dense, texts, saving=np.float64(0.5))
  ids = np.concatenate(dense.tokenizer.encode_batch(texts, 99))
  expected_V = token_usage(np.bincount(ids), dense.num_rows)
  np.testing.assert_array_equal(found_V, expected_V)


def test_one_call_with_a_small_saving_folds_without_pruning():
  shape = c.ModelConfig(**models.SHAPE, causal=False)
  dense = models.make("classify", shape, c.FoldConfig(groups=0, values="dense"))
  small = folding.compress(dense, models.random_texts(64), saving=1e-3)
  assert small.config.compress.prune == "none"
  assert small.config.fold.embedding_rank


@pytest.mark.parametrize(
  "wrong",
  [{"saving": 1.0}, {"saving": "0.5"}, {"max_texts": -3}, {"max_texts": "3"}],
)
def test_one_call_refuses_numbers_out_of_range(wrong):
  with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
    folding.compress("never-read", ["a text", "another"], **wrong)


def test_one_call_without_texts_is_refused():
  shape = c.ModelConfig(**models.SHAPE, causal=False)
  dense = models.make("classify", shape, c.FoldConfig(groups=0, values="dense"))
  with pytest.raises(errors.ConfigError, match="give texts"):
    folding.compress(dense, [])


@pytest.mark.slow
def test_teacher_is_the_dense_run_in_bfloat16(dense_run, topics):
  config = c.resolve(recovery_config(dense_run, topics))
  found = teacher_of(shape_of(config), make_data(config), config)
  assert found is not None
  assert found.shape.is_dense
  theirs = paths.flatten(load_run(str(dense_run)).params)
  for name, w in paths.flatten(found.params).items():
    assert w.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(
      np.asarray(w, np.float32), theirs[name], rtol=2**-8
    )
  config = dataclasses.replace(config, distill=c.DistillConfig())
  assert teacher_of(shape_of(config), make_data(config), config) is None


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model__num_layers": 3}, "has num_layers 2, and model.num_layers is 3"),
    ({"data__tokenizer": "bytes"}, "has another tokenizer"),
    ({"distill__logits": 0.5}, "cannot teach these classes"),
    ({"model__norm_epsilon": 0.5}, "has norm_epsilon 1e-12, and model"),
    (
      {"compress__calibration": 1, "data__batch_size": 2},
      "the moments of 16 channels",
    ),
    ({"model__dense_mlp_width": 4096}, "shrunk model"),
    ({"data__path": None}, "set data.path"),
  ],
)
def test_source_that_does_not_fit_is_refused(
  checkpoint, topics, tmp_path, fields, message
):
  config = recovery_config(checkpoint[0], topics, **fields)
  with pytest.raises(errors.ConfigError, match=message) as error:
    loop.run(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_teacher_with_other_pooling_is_refused(dense_run, topics):
  config = c.resolve(recovery_config(dense_run, topics))
  config = edited(config, {"model.pooling": "mean"})
  with pytest.raises(
    errors.ConfigError, match="has pooling 'first', and model"
  ):
    teacher_of(shape_of(config), make_data(config), config)


@pytest.mark.slow
def test_run_without_its_tokens_is_refused_as_a_start(
  folded_run, dense_run, topics, tmp_path
):
  config = recovery_config(dense_run, topics, pretrained=str(folded_run[0]))
  with pytest.raises(errors.ConfigError, match="an earlier dense run"):
    loop.run(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_finished_run_needs_no_source_or_teacher(folded_run, tmp_path):
  workdir, result = folded_run
  copy = shutil.copytree(workdir, tmp_path / "copy")
  config = c.load(str(copy / "config.json"))
  config = edited(config, {"pretrained": str(tmp_path / "gone")})
  c.save(config, str(copy / "config.json"))
  (copy / "checksums.json").unlink()
  assert loop.resume_run(str(copy)) == result
  shutil.rmtree(copy / "checkpoints")
  assert loop.resume_run(str(copy)) == result


@pytest.mark.slow
def test_language_model_is_folded_and_taught(text_file, tmp_path):
  dense = dataclasses.replace(
    tiny_config(text_file, steps=2, eval_every=2), dense=True
  )
  loop.run(dense, str(tmp_path / "dense"))
  config = pretrained_config.get_config(str(tmp_path / "dense"))
  assert config.distill.logits > 0  # the dense run is the teacher
  config = edited(
    config,
    {"train.steps": 6, "train.eval_every": 3, "train.tensorboard": False},
  )
  result = loop.run(config, str(tmp_path / "run"))
  assert _saved(result, "qkv") > 0.5


# ---------------------------------------------------------------------------
# Tokens that leave the tokenizer before the first step.


def test_last_of_the_unused_tokens_ranks_lowest(checkpoint, tmp_path):
  # Different texts of the words a, b and c.
  words = [
    ["abc"[i % 3], *("ab"[int(bit)] for bit in f"{i:08b}")] for i in range(160)
  ]
  rows = [f"topic {text[0]}\t{' '.join(text)}" for text in words]
  (tmp_path / "rows.tsv").write_text("\n".join(rows) + "\n")
  config = c.resolve(recovery_config(checkpoint[0], tmp_path / "rows.tsv"))
  data = make_data(config)
  usage = np.asarray(Run(shape_of(config), data, config).usage())
  size = data.num_examples["train"] // 8
  epoch = [data.train_batch(i) for i in range(size)]
  used = np.unique(np.concatenate([b["tokens"][b["mask"]] for b in epoch]))
  unused = np.setdiff1d(np.arange(len(usage)), used)
  assert len(unused) > 3
  assert (np.diff(usage[unused]) < 0).all()
  assert usage[unused].max() < usage[used].min()
  assert usage.sum() == pytest.approx(1)


def test_vocabulary_that_need_not_be_trimmed_stays(checkpoint, topics):
  config = recovery_config(checkpoint[0], topics, fpp__saving=None)
  config = edited(config, {"fpp.linear": 0.5, "fpp.embedding": 0.0})
  data = make_data(config := c.resolve(config))
  assert _trimmed(data, config) is data


@pytest.mark.slow
def test_trim_removes_the_asked_number_of_tokens(dense_run, topics, tmp_path):
  folder = shutil.copytree(topics, tmp_path / "topics")
  config = recovery_config(dense_run, folder, fpp__saving=None)
  config = edited(config, {"fpp.linear": 0.5, "fpp.embedding": 0.4})
  data = make_data(config := c.resolve(config))
  shutil.rmtree(folder)  # the text is read once
  found = _trimmed(data, config)
  sizes = data.tokenizer.vocab_size, found.tokenizer.vocab_size
  assert sizes == (10, 6)
  assert found.texts is None


def test_usage_of_a_trimmed_vocabulary_has_the_ids_of_the_source(
  checkpoint, topics, monkeypatch
):
  config = recovery_config(checkpoint[0], topics, fpp__saving=None)
  config = edited(
    config, {"fpp.linear": 0.5, "fpp.embedding": 0.4, "fold.embedding_rank": 4}
  )
  config = c.resolve(config)
  data = _trimmed(make_data(config), config)
  given = []

  def compress_sizes(sizes, model, batches, usage_V, **_):
    given.append((usage_V, batches))
    return [(dataclasses.replace(model, shape=sizes[0].shape), [])]

  monkeypatch.setattr(compress_trained, "compress_sizes", compress_sizes)
  _compressed(data, config)
  [(usage_V, batches)] = given
  used = np.unique(np.concatenate([b["tokens"][b["mask"]] for b in batches]))
  is_removed_V = data.tokenizer.token_map < 0
  assert len(usage_V) == len(is_removed_V)
  assert usage_V[is_removed_V].max() < usage_V[used].min()


def _logits(model, params, data, text):
  tokens = data.tokenizer.encode_batch([text], 12)[0]
  return np.asarray(jax.jit(model.apply)({"params": params}, tokens[None]))


@pytest.mark.slow
def test_trimmed_model_reads_kept_tokens_as_before(dense_run, topics):
  unfolded = {"fold__groups": 0, "fold__values": "dense"}
  config = recovery_config(dense_run, topics, fpp__saving=None, **unfolded)
  config = edited(config, {"fpp.linear": 0.5, "fpp.embedding": 0.4})
  config = c.resolve(config)
  plain = make_data(config)
  data = _trimmed(plain, config)
  known = json.loads(data.tokenizer.to_json())["model"]["vocab"]
  assert 0 < len(set(CLASS_WORDS) & set(known)) < len(CLASS_WORDS)
  params = _compressed(data, config)[0].params
  dense, _ = _dense(plain, config)
  model = make_model(
    shape_of(config), data.tokenizer.vocab_size, data.num_classes
  )
  taught = teacher_of(shape_of(config), data, config)
  assert taught is not None
  text = " ".join(word for word in CLASS_WORDS if word in known)
  before = _logits(dense.module, dense.params, plain, text)
  after = _logits(model, params, data, text)
  np.testing.assert_array_equal(after, before)
  batch = compress_trained.calibration(config.compress.calibration, data)[0]
  ours = next(data.first_epoch())
  for old, new in zip(batch["tokens"], ours["tokens"], strict=True):
    assert plain.tokenizer.decode(old) == data.tokenizer.decode(new)
  half = jax.tree.map(lambda w: w.astype(np.float32), taught.params)
  of_teacher = _logits(taught.module, half, data, text)
  np.testing.assert_allclose(of_teacher, before, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_teacher_in_memory_reads_the_ids_of_a_trimmed_student(
  dense_run, topics, tmp_path
):
  config = recovery_config(dense_run, topics, fpp__saving=None)
  config = edited(
    config,
    {"fpp.linear": 0.5, "fpp.embedding": 0.4, "train.steps": 2}
    | {"distill.logits": 1.0, "distill.teacher": str(dense_run)},
  )
  config = c.resolve(config)
  data = _trimmed(make_data(config), config)
  model = dataclasses.replace(
    _compressed(data, config)[0],
    tokenizer=data.tokenizer,
    labels=data.label_names,
  )
  teacher = load_run(str(dense_run))
  half = jax.tree.map(lambda w: w.astype("bfloat16"), teacher.params)
  losses = []
  for given in (None, dataclasses.replace(teacher, params=half)):
    folder = tmp_path / f"{len(losses)}"
    loop.train(model, data, config, str(folder), teacher=given)
    losses.append(
      [x["loss"] for x in read_metrics(str(folder / "metrics.jsonl"))]
    )
  assert losses[0] == losses[1]
  other = dataclasses.replace(teacher, labels=teacher.labels[::-1])
  with pytest.raises(errors.ConfigError, match="classes of the teacher"):
    loop.train(model, data, config, str(tmp_path / "new"), teacher=other)

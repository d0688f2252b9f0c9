"""The verb `folding compress`; tests/training/test_compress_trained has a classifier."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest

import folding
from folding import cli
from folding import config as c
from folding.data import trim
from folding.data.batches import make_data
from folding.data.padding import windows
from folding.serving import compress_file
from folding.serving.compress import compress_sizes
from folding.serving.export import export
from folding.tasks import task_of
from folding.training import run_dir
from folding.training.trained import read_source, without_trimmed
from tests.models import checkpoints
from tests.serving import models


def _written(path, task, **shape):
  """Writes a dense model; returns it."""
  shape = c.ModelConfig(**models.SHAPE, causal=task == "lm", **shape)
  dense = c.FoldConfig(groups=0, values="dense")
  model = models.make(task, shape, dense, length=8)
  export(path, model)
  return model


def _texts(tmp_path, count=400):
  path = tmp_path / "texts.txt"
  path.write_text("\n".join(models.random_texts(count)))
  return path


@pytest.mark.slow
def test_language_model_reports_its_perplexity(tmp_path, capsys):
  model = _written(tmp_path / "dense", "lm")
  argv = ["compress", str(tmp_path / "dense"), f"--texts={_texts(tmp_path)}"]
  argv += ["--saving=0.1,0.2", f"--output={tmp_path / 'small'}"]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  _, [held] = compress_file._texts(str(tmp_path / "texts.txt"), model)
  ids = np.concatenate([*model.tokenizer.stream([held])])
  rows = ids[: len(ids) // 9 * 9].reshape(-1, 9)
  assert len(rows) < 256  # so all are used

  def perplexity(model):
    logits = jax.jit(model.module.apply)({"params": model.params}, rows[:, :-1])
    z = np.asarray(logits, np.float64)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    right = np.take_along_axis(z, rows[:, 1:, None], axis=-1)
    return np.exp(-right.mean())

  before = perplexity(model)
  for percent in ("10", "20"):
    small = folding.load(tmp_path / "small" / percent)
    found = f"{before:.2f} is now {perplexity(small):.2f}"
    assert f"perplexity {found}" in out
    stored = sum((w != 0).sum() for w in jax.tree.leaves(small.params))
    size = sum(w.size for w in jax.tree.leaves(model.params))
    assert 1 - stored / size == pytest.approx(int(percent) / 100, abs=0.02)
    assert f"stores {stored:,} parameters" in out
    allocated = sum(w.size for w in jax.tree.leaves(small.params))
    assert f"arrays hold {allocated:,} parameters, zeros included" in out


def test_structured_language_model_has_smaller_arrays(tmp_path, capsys):
  model = _written(tmp_path / "dense", "lm")
  argv = ["compress", str(tmp_path / "dense"), f"--texts={_texts(tmp_path)}"]
  argv += ["--saving=0.3", "--structured", f"--output={tmp_path / 'small'}"]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert "to prune" in out  # the plan
  assert "zeros included" not in out
  small = folding.load(tmp_path / "small")
  sizes = [
    sum(w.size for w in jax.tree.leaves(x.params)) for x in (small, model)
  ]
  assert sizes[0] <= 0.7 * sizes[1]
  embedding = model.params["embed"]["embedding"]
  assert small.params["embed"]["embedding"].shape == embedding.shape


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False])
def test_smaller_vocabulary_leaves_arrays_and_tokenizer(
  tmp_path, is_tied, capsys
):
  model = _written(tmp_path / "dense", "lm", tie_embeddings=is_tied)
  argv = ["compress", str(tmp_path / "dense"), f"--texts={_texts(tmp_path)}"]
  argv += ["--saving=0.2", "--structured", "--vocabulary=18"]
  assert cli.main([*argv, f"--output={tmp_path / 'small'}"]) == 0
  small = folding.load(tmp_path / "small")
  rows = {small.num_rows, small.module.vocab_size, small.tokenizer.vocab_size}
  assert rows == {18}
  old = small.tokenizer.plain_ids
  sizes = [
    sum(w.size for w in jax.tree.leaves(x.params)) for x in (small, model)
  ]
  assert 0.7 < sizes[0] / sizes[1] <= 0.8
  before = model.params["embed"]["embedding"]
  np.testing.assert_array_equal(small.params["embed"]["embedding"], before[old])
  if not is_tied:
    kernel = model.params["head"]["kernel"][:, old]
    np.testing.assert_array_equal(small.params["head"]["kernel"], kernel)
  texts = (tmp_path / "texts.txt").read_text()
  [ids] = model.tokenizer.encode_batch([texts])
  uses = np.bincount(ids, minlength=21)
  assert uses[old].sum() >= np.sort(uses)[3:].sum()


def test_perplexity_of_another_vocabulary_is_per_token_of_the_first():
  model = models.make("lm", length=8)
  keep = np.ones(21, bool)
  keep[[5, 9]] = False  # "cat" and "mat" become three pieces and unknown
  tokenizer = trim.trimmed(model.tokenizer, keep)
  small = without_trimmed(dataclasses.replace(model, tokenizer=tokenizer))
  text = " ".join(models.random_texts(20))
  _, found = compress_file._perplexities(model, small, [text])
  rows = compress_file._held_out(model, [text])
  apply, lost = jax.jit(small.module.apply), 0.0
  for row in rows:
    words = model.tokenizer.decode(row)
    [ids] = tokenizer.encode_batch([words])
    assert len(ids) <= 40
    for part in ids[:9], ids[8:17], ids[16:25], ids[24:33], ids[32:41]:
      if len(part) > 1:
        # No token sees the padding after it.
        tokens = np.pad(part[:-1], (0, 9 - len(part)))
        z = np.asarray(
          apply({"params": small.params}, tokens[None])[0], np.float64
        )
        z = z[: len(part) - 1]
        z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
        lost -= z[np.arange(len(part) - 1), part[1:]].sum()
  assert found == pytest.approx(
    np.exp(lost / (rows.size - len(rows))), rel=1e-5
  )


def test_uniform_flag_gives_all_layers_one_size(tmp_path):
  _written(tmp_path / "dense", "lm")
  argv = ["compress", str(tmp_path / "dense"), f"--texts={_texts(tmp_path)}"]
  argv += ["--saving=0.1", "--uniform", f"--output={tmp_path / 'small'}"]
  assert cli.main(argv) == 0
  config = folding.load(tmp_path / "small").config
  assert config.model.mlp_width == 16
  assert config.fold.groups == 0


def test_rows_past_the_vocabulary_are_left_out():
  shape = c.ModelConfig(**models.SHAPE)
  dense = c.FoldConfig(groups=0, values="dense")
  model = models.make("lm", shape, dense, length=8)
  before = np.asarray(model.params["embed"]["embedding"])
  padded = np.concatenate([before, before[:4]])  # as in checkpoints of Qwen
  params = {**model.params, "embed": {"embedding": padded}}
  small = folding.compress(
    dataclasses.replace(model, params=params),
    models.random_texts(400),
    saving=0.2,
    structured=True,
    vocabulary=18,
  )
  found = small.params["embed"]["embedding"]
  np.testing.assert_array_equal(found, before[small.tokenizer.plain_ids])


@pytest.mark.slow
def test_size_that_is_not_measured_again_equals_a_single_call():
  shape = c.ModelConfig(**models.SHAPE, causal=False)
  dense = c.FoldConfig(groups=0, values="dense")
  model = models.make("embed", shape, dense, length=8)
  texts, savings = models.random_texts(200), [0.2, 0.4]
  first, last = compress_sizes(model, texts, savings)
  alone = folding.compress(model, texts, saving=savings[-1])
  assert last.shape == alone.shape != first.shape
  jax.tree.map(np.testing.assert_array_equal, last.params, alone.params)


def test_windows_are_spread_over_the_stream():
  tokenizer = models.make("lm").tokenizer
  texts = models.random_texts(30)
  ids = np.concatenate([*tokenizer.stream(texts)])
  whole = windows(tokenizer, texts, 7, 10**6)
  np.testing.assert_array_equal(whole.ravel(), ids[: len(ids) // 7 * 7])
  few = windows(tokenizer, texts, 7, 5)
  expected = [len(whole) * i // 5 for i in range(5)]
  np.testing.assert_array_equal(few, whole[expected])
  assert windows(tokenizer, texts, 10**6, 2).shape == (0, 10**6)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--saving=30%",), "such as --saving=0.5"),
    (("--saving=1.5",), "saving is a fraction"),
    (("--saving=0.5,1", "--steps=5"), "saving is a fraction"),
    (("--saving=()",), "give one saving"),
    (("--saving=0.3,0.5,0.3",), "or different ones"),
    (("--saving=0.3,0.5,0.3", "--steps=5"), "or different ones"),
    (("--saving=0.3,0.5", "--steps=5", "--vocabulary=9"), "one --saving"),
    (("--saving=0.3,0.5", "--steps=-5"), "steps must be positive"),
    (("--texts=nowhere.txt",), "nowhere.txt"),
  ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message, capsys):
  _written(tmp_path / "dense", "embed")
  argv = ["compress", str(tmp_path / "dense"), f"--texts={_texts(tmp_path)}"]
  output = tmp_path / "small"
  assert cli.main([*argv, f"--output={output}", *flags]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1
  assert not output.exists()


@pytest.mark.parametrize(
  ("saving", "folder"), [("0.5", "."), ("0.3,0.5", "50")]
)
def test_training_in_a_folder_of_other_files_is_refused(
  tmp_path, saving, folder, capsys
):
  argv = ["compress", "nowhere", "--texts=nowhere", "--steps=1"]
  output = tmp_path / "small"
  (output / folder).mkdir(parents=True)
  (output / folder / "notes.txt").write_text("notes")
  assert cli.main([*argv, f"--saving={saving}", f"--output={output}"]) == 2
  assert "is there already and not an empty folder" in capsys.readouterr().err


def _training(tmp_path, *flags):
  """Returns a command that trains smaller encoders in tmp_path / "small"."""
  checkpoints.write(tmp_path / "bert", "bert")
  rng = np.random.default_rng(0)
  sizes = rng.integers(3, 9, size=300)
  texts = {" ".join(rng.choice([*"abcdef"], size)): None for size in sizes}
  (tmp_path / "texts.txt").write_text("\n".join(texts))
  argv = ["compress", str(tmp_path / "bert"), f"--output={tmp_path / 'small'}"]
  return [*argv, f"--texts={tmp_path / 'texts.txt'}", *flags]


def test_size_out_of_reach_is_refused_before_any_training(tmp_path, capsys):
  argv = _training(tmp_path, "--saving=0.1,0.99", "--steps=2")
  assert cli.main(argv) == 2
  assert "no plan saves 99% of this model" in capsys.readouterr().err
  assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_checkpoint_of_pairs_is_fitted_to_pairs(tmp_path, capsys):
  shape = c.bert(**models.SHAPE, pooler=True, segments=2)
  model = dataclasses.replace(models.make("classify", shape), pair=("a", "b"))
  model.save(tmp_path / "dense", "hf")
  texts = list(filter(None, models.random_texts(300)))
  pairs = zip(texts[:110], texts[110:220], strict=True)
  lines = ["\t".join(pair) for pair in pairs]
  (tmp_path / "texts.txt").write_text("\n".join(lines))
  argv = ["compress", str(tmp_path / "dense"), "--pairs", "--saving=0.2"]
  argv += [f"--texts={tmp_path / 'texts.txt'}"]
  assert cli.main([*argv, f"--output={tmp_path / 'small'}"]) == 0
  small = folding.load(tmp_path / "small")
  assert small.shape.segments == 2
  held = [tuple(line.split("\t")) for line in lines[::10]]
  assert compress_file._texts(argv[-1].partition("=")[2], model)[1] == held
  same = np.mean(
    [
      a.label == b.label
      for a, b in zip(model.predict(held), small.predict(held), strict=True)
    ]
  )
  assert f"{same:.1%} of the predictions" in capsys.readouterr().out


def test_classifier_of_other_classes_cannot_teach(tmp_path, capsys):
  checkpoints.write(tmp_path / "bert", "bert", "classify")
  texts = [text for text in models.random_texts(300) if text]
  rows = [f"{text}\tkind {n % 3}" for n, text in enumerate(texts)]
  (tmp_path / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]))
  argv = ["compress", str(tmp_path / "bert"), "--saving=0.3", "--steps=2"]
  argv += [f"--texts={tmp_path / 'texts.tsv'}"]
  assert cli.main([*argv, f"--output={tmp_path / 'small'}"]) == 2
  assert "cannot teach these classes" in capsys.readouterr().err
  assert not (tmp_path / "small").exists()


def test_smaller_run_is_read_in_its_dense_form(run):
  order = run_dir.load_order(str(run))
  data = make_data(order, run_dir.load_tokenizer(str(run)))
  read = read_source(str(run), data, task_of(order), segments=False)
  folded, text = folding.load(run), "the saw file dog"
  assert read.shape.is_dense
  assert not folded.shape.is_dense
  np.testing.assert_allclose(
    models.logits(read, text), models.logits(folded, text), atol=1e-5
  )


@pytest.mark.slow
def test_sizes_are_cut_from_each_other_and_resumed_after_a_kill(tmp_path):
  argv = _training(tmp_path, "--saving=0.3,0.1", "--steps=4")
  source, large, small = (
    str(tmp_path / name) for name in ("bert", "small/10", "small/30")
  )
  sizes = compress_file.train_sizes(
    source,
    str(tmp_path / "texts.txt"),
    [0.3, 0.1],
    str(tmp_path / "small"),
    steps=4,
  )
  assert next(sizes) == large
  sizes.close()  # killed before the next size, or while that is measured
  os.makedirs(small)
  files = {path: path.stat() for path in pathlib.Path(large).rglob("*")}
  assert cli.main(argv) == 0
  for path, before in files.items():
    assert path.stat().st_mtime_ns == before.st_mtime_ns, path

  order = run_dir.load_order(small)
  assert (order.pretrained, order.distill.teacher) == (large, source)
  assert order.data.first_batch == order.train.steps == 3  # 1.5 * 4 / 2
  dense, *smaller = map(folding.load, (source, large, small))
  whole, *counts = (
    sum(w.size for w in jax.tree.leaves(x.params)) for x in (dense, *smaller)
  )
  assert 0.8 < counts[0] / whole <= 0.9
  assert 0.55 < counts[1] / whole <= 0.7
  first, second = (x.shape.layers for x in smaller)
  for a, b in zip(first, second, strict=True):
    assert {*b.heads} <= {*a.heads}
    assert b.value_dim <= a.value_dim
    assert b.mlp_width <= a.mlp_width


@pytest.mark.parametrize(
  ("task", "texts", "message"),
  [
    ("embed", ["a text", "another"], "give ten or more"),
    ("embed", ["a text"] * 50, "too few different texts"),
    ("lm", ["a text of few tokens"], "give more text"),
  ],
)
def test_texts_that_leave_none_to_hold_out_are_refused(
  tmp_path, task, texts, message, capsys
):
  _written(tmp_path / "dense", task)
  (tmp_path / "texts.txt").write_text("\n".join(texts))
  argv = ["compress", str(tmp_path / "dense"), f"--output={tmp_path / 'small'}"]
  assert cli.main([*argv, f"--texts={tmp_path / 'texts.txt'}"]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1
  assert not (tmp_path / "small").exists()

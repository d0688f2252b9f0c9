"""Whole runs of pairs, scores, several labels, and a task of this file."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.stats

import folding
from folding import cli, tasks
from folding import config as config_lib
from folding.data import sources
from folding.data.batches import make_data
from folding.errors import ConfigError
from folding.models import hf_config
from folding.models.shape import shape_of
from folding.reporting import report
from folding.serving import predict
from folding.tasks import task_of
from folding.training import compress_trained, loop, run_dir, step
from folding.training.sensitivity import sensitivities
from folding.training.stream import embed_batches
from folding.training.trained import dense_start, read_source
from folding.typed import edited
from tests.models import checkpoints
from tests.training.conftest import recovery_config, tiny_config

WORDS = np.array("a b c d e f".split())


@pytest.fixture(scope="module")
def similar(tmp_path_factory):
  """Returns a folder of pairs, scored by the words that they share."""
  folder = tmp_path_factory.mktemp("similar")
  rng = np.random.default_rng(0)
  for split, rows in (("train", 96), ("valid", 16), ("test", 16)):
    lines = ["score\tlabel\tsentence1\tsentence2"]
    for _ in range(rows):
      pair = rng.choice(WORDS, (2, 4))
      score = np.isin(*pair).mean()
      texts = "\t".join(" ".join(words) for words in pair)
      lines.append(f"{score}\t{'same' if score > 0.5 else 'other'}\t{texts}")
    (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
  return folder


@pytest.fixture(scope="module")
def two_segments(checkpoint, tmp_path_factory):
  """Returns the tiny BERT with a segment embedding, and that embedding."""
  folder = shutil.copytree(checkpoint[0], tmp_path_factory.mktemp("hf") / "two")
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  [name] = (name for name in tensors if "token_type" in name)
  shape = tensors[name].shape
  segments = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  tensors[name] = segments
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return folder, segments


@pytest.fixture(scope="module")
def scored(two_segments, similar, tmp_path_factory):
  """Returns (config, directory, result) of a dense run on scores of pairs."""
  workdir = str(tmp_path_factory.mktemp("runs") / "scored")
  options = {"task": "regress", "dense": True, "train__learning_rate": 3e-3}
  options["model__dropout"] = 0.0
  config = recovery_config(two_segments[0], similar, **options)
  return config, workdir, loop.run(config, workdir)


@pytest.mark.slow
def test_scores_of_pairs_are_trained_from_a_checkpoint(scored):
  config, workdir, result = scored
  assert result["test"].keys() == {
    *("loss", "pearson", "spearman", "num_examples", "checkpoint_step")
  }
  began = run_dir.load_model(workdir, run_dir.load_order(workdir))
  assert began.pair == ("sentence1", "sentence2")
  assert began.shape.segments == 2
  assert run_dir.load_labels(workdir) == ("score",)
  assert loop.run(config, workdir) == result  # the same run, by its config
  assert "A regression model" in report.describe(report.load_run(workdir))


@pytest.mark.slow
def test_segments_reach_every_program(scored, checkpoint, two_segments):
  _, workdir, result = scored
  saved = run_dir.load_order(workdir)
  data = make_data(saved, run_dir.load_tokenizer(workdir))
  source = read_source(
    saved.pretrained, data, task_of(saved), segments=data.has_segments
  )
  shape = run_dir.load_model(workdir, saved).shape
  start = compress_trained.compress_trained(source, shape, data, saved)[
    0
  ].params
  segments = start["segment_embed"]["embedding"]
  np.testing.assert_array_equal(segments, two_segments[1])
  np.testing.assert_array_equal(
    start["position_embed"]["embedding"],
    checkpoint[1]["position_embed"]["embedding"],
  )
  run = loop.Run(shape, data, saved)
  batch = data.train_batch(0)
  assert batch["segments"].sum(axis=1).min() > 0
  apply = jax.jit(run.model.apply, static_argnums=3)

  def error(segments):
    scores = apply(
      {"params": start}, batch["tokens"], batch["mask"], True, segments
    )[:, 0]
    return float(np.square(scores - batch["labels"]).mean())

  # The first training step has the start's loss (dropout is off).
  first = run_dir.read_metrics(f"{workdir}/metrics.jsonl")[0]
  assert (first["split"], first["step"]) == ("train", 1)
  assert first["loss"] == pytest.approx(error(batch["segments"]), rel=1e-5)
  assert abs(error(None) / first["loss"] - 1) > 1e-4

  # Evaluation and prediction agree.
  lines = (ln.split("\t") for ln in _lines(saved.data.path, "test"))
  pairs = [(one, other) for _, _, one, other in lines]
  labels = [float(ln.split("\t")[0]) for ln in _lines(saved.data.path, "test")]
  found = [x.label for x in predict.predict(folding.load(workdir), pairs)]
  loss = np.square(np.subtract(found, labels)).mean()
  assert result["test"]["loss"] == pytest.approx(loss, rel=1e-5)
  rank = scipy.stats.spearmanr(found, labels).statistic
  assert result["test"]["spearman"] == pytest.approx(rank)

  # Calibration and the plan read segments; a teacher that equals the student has no
  # loss.
  [x] = embed_batches(shape, start, [batch] * 2).x[:1]
  expected = jax.jit(run.model.apply, static_argnames="method")(
    {"params": start},
    batch["tokens"],
    segments_BL=batch["segments"],
    method="embed_tokens",
  )
  np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
  bare = {name: w for name, w in batch.items() if name != "segments"}
  one, other = (
    sensitivities(shape, start, [each])["blocks_0/attn/o"]
    for each in (batch, bare)
  )
  assert np.abs(one / other - 1).max() > 1e-3
  options = dataclasses.replace(
    run.options(),
    mesh=None,
    teacher=run.model,
    distill=config_lib.DistillConfig(logits=1.0, hidden=1.0, temperature=2.0),
  )
  totals = step._Totals(np.float32(8), np.float32(100))
  loss, _ = jax.jit(
    lambda params, batch: step._loss(
      params,
      batch,
      jax.random.key(0),
      totals=totals,
      options=options,
      teacher_params=params,
    )
  )(start, batch)
  assert abs(loss) < 1e-9


def _lines(folder, split):
  return (pathlib.Path(folder) / f"{split}.tsv").read_text().splitlines()[1:]


@pytest.mark.slow
def test_a_run_on_scores_is_folded_with_itself_as_teacher(
  scored, similar, tmp_path
):
  config = recovery_config(scored[1], similar, train__steps=2)
  assert (config.task, config.distill.logits) == ("regress", 0.7)
  result = loop.run(config, str(tmp_path / "run"))
  assert result["test"]["num_examples"] == 16
  allocated = sum(np.prod(layer["shape"]) for layer in result["layers"])
  dense = sum(np.prod(layer["shape"]) for layer in scored[2]["layers"])
  assert allocated < dense


def test_head_of_another_task_is_named(scored, similar, tmp_path, capsys):
  config = recovery_config(scored[1], similar, task="classify")
  with pytest.raises(
    ConfigError, match="is for task 'regress': score"
  ) as error:
    loop.run(config, str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  config = dataclasses.replace(config, distill=config_lib.DistillConfig())
  config = config_lib.resolve(config)
  data = make_data(config)
  source = read_source(scored[1], data, task_of(config), segments=True)
  shape = dataclasses.replace(shape_of(config), segments=2)
  dense_start(source, shape, data, task_of(config), config.seed)
  assert "is for task 'regress': score)" in capsys.readouterr().out


def test_scores_are_printed(scored, tmp_path, capsys):
  file = tmp_path / "pairs.tsv"
  file.write_text("a b\ta b\nc\td e\n")
  assert cli.main(["predict", scored[1], str(file)]) == 0
  header, *lines = capsys.readouterr().out.splitlines()
  assert header == "score"
  assert cli.main(["predict", scored[1], str(file), "--format=jsonl"]) == 0
  rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
  assert [row["sentence2"] for row in rows] == ["a b", "d e"]
  assert [row["score"] for row in rows] == [float(line) for line in lines]
  loaded = folding.load(scored[1])
  assert (loaded.config.task, loaded.labels) == ("regress", ("score",))
  file.write_text("a b\n")
  assert cli.main(["predict", scored[1], str(file)]) == 2
  assert "sentence1<TAB>sentence2" in capsys.readouterr().err


def test_several_labels_are_trained_from_scratch(text_file, tmp_path):
  rows = [
    {"text": " ".join(WORDS[i % 6 :]), "labels": [*WORDS[i % 6 : i % 6 + 2]]}
    for i in range(96)
  ]
  file = tmp_path / "rows.jsonl"
  file.write_text("\n".join(map(json.dumps, rows)))
  config = tiny_config(text_file, steps=4, eval_every=2, metric="accuracy")
  config = edited(
    config,
    {
      "task": "multilabel",
      "data.path": str(file),
      "dense": True,
      "model.causal": False,
    },
  )
  result = loop.run(config, str(tmp_path / "run"))
  assert result["test"].keys() >= {"accuracy", "macro_f1"}
  assert run_dir.load_labels(str(tmp_path / "run")) == tuple(WORDS)


def _read_count(label, place):
  count = tasks.read_score(label, place)
  if count < 0 or count % 1:
    raise ConfigError(f"{place}: the label {label!r} is not a count")
  return count


COUNT = tasks.Task(
  name="count",
  words="counter",
  # Poisson: the output is the logarithm of the rate.
  loss=lambda out, count: jnp.exp(out[..., 0]) - count * out[..., 0],
  activate=jnp.exp,
  metrics=("spearman", "loss"),
  labels=tasks.Labels(
    kind="score",
    columns=("count",),
    read=_read_count,
    measure=tasks.measure_score,
    answer=lambda outputs, names: float(outputs[0]),
    problem_type="regression",
  ),
)


@pytest.mark.slow
def test_row_of_a_new_task_is_trained_and_predicts(
  text_file, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(tasks.TASKS, "count", COUNT)
  rng, rows = np.random.default_rng(0), {}
  for split, size in (("train", 96), ("valid", 16), ("test", 16)):
    words = rng.choice(WORDS, (size, 6))
    rows[split] = [(" ".join(x), int((x == "a").sum())) for x in words]
    lines = (json.dumps({"text": x, "count": n}) for x, n in rows[split])
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
  config = edited(
    tiny_config(text_file, steps=4, eval_every=2),
    {
      "task": "count",
      "data.path": str(tmp_path),
      "dense": True,
      "model.causal": False,
    },
  )
  dense, small = str(tmp_path / "dense"), str(tmp_path / "small")
  loop.run(config, dense)
  config = edited(
    config, {"dense": False, "pretrained": dense, "distill.logits": 0.5}
  )
  result = loop.run(config, small)

  texts, counts = zip(*rows["test"], strict=True)
  rates = [x.label for x in predict.predict(folding.load(small), texts)]
  nats = np.mean(rates - np.array(counts) * np.log(rates))
  assert result["test"]["loss"] == pytest.approx(nats, rel=1e-5)
  rank = scipy.stats.spearmanr(rates, counts).statistic
  assert result["test"]["spearman"] == pytest.approx(rank)
  assert "A counter with 1 layer" in report.describe(report.load_run(small))
  capsys.readouterr()
  (tmp_path / "text.txt").write_text(texts[0])
  assert cli.main(["predict", small, str(tmp_path / "text.txt")]) == 0
  assert capsys.readouterr().out == f"count\n{rates[0]:.6f}\n"


def test_row_with_the_problem_type_of_another_leaves_it_its_checkpoints(
  monkeypatch,
):
  monkeypatch.setitem(tasks.TASKS, "count", COUNT)
  values = hf_config.to_hf(checkpoints.description("bert", "classify"))
  values |= {"problem_type": "regression", "id2label": {"0": "x"}}
  assert hf_config.describe(values).task == "regress"


def test_row_of_a_new_task_reads_its_labels(tmp_path, monkeypatch):
  monkeypatch.setitem(tasks.TASKS, "count", COUNT)
  data = config_lib.DataConfig(path=str(tmp_path))
  (tmp_path / "train.tsv").write_text("count\ttext\n2\ta a\n-1\tb\n")
  with pytest.raises(ConfigError, match="train.tsv:3: .*-1.* is not a count"):
    sources.load_texts(data, "count")


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "loss"])
def test_metric_ranks_checkpoints(metric):
  found = {"loss": 2.0, "accuracy": 0.75, "matthews": -0.5}
  expected = {"accuracy": 0.25, "matthews": 1.5, "loss": 2.0}[metric]
  rank = loop._rank(found, metric)
  tie_break = 0 if metric == "loss" else 1e-6 * 2 / 3
  assert rank == pytest.approx(expected + tie_break, rel=1e-9)


def test_rank_prefers_the_metric_then_the_loss():
  ranked = [(0.9, 4e6), (0.8, 2.0), (0.8, 3.0), (0.8, 1e6)]
  ranks = [
    loop._rank({"spearman": score, "loss": loss}, "spearman")
    for score, loss in ranked
  ]
  assert ranks == sorted(set(ranks))

import dataclasses
import fcntl
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError
from folding.model import Targets
from folding.models.shape import shape_of, with_shape
from folding.training import run_dir
from folding.typed import edited
from folding.version import __version__
from tests.training import tiny
from tests.training.conftest import save_run

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])


def save(workdir, config, labels=(), **fields):
  save_run(workdir, config, TOKENIZER, labels=labels, **fields)


def began(workdir, order):
  """Returns what a run directory says of its model."""
  model = run_dir.load_model(str(workdir), order)
  return model.shape, model.targets, model.pair


def test_saved_files_are_read_back(tmp_path):
  config, labels = tiny.config(), ("a\nb", "é", "c d")
  save(tmp_path, config, labels)
  assert run_dir.load_order(str(tmp_path)) == config
  tokenizer = run_dir.load_tokenizer(str(tmp_path))
  assert tokenizer.to_json() == TOKENIZER.to_json()
  assert run_dir.load_labels(str(tmp_path)) == labels


def test_language_model_has_no_labels(tmp_path):
  save(tmp_path, tiny.config())
  assert run_dir.load_labels(str(tmp_path)) == ()


def test_is_begun_ignores_how_a_run_is_computed(tmp_path):
  saved = tiny.config()
  assert not run_dir.is_begun(str(tmp_path / "new"), saved)
  save(tmp_path, saved)
  now = edited(
    tiny.config(mesh=c.MeshConfig(data=2, fsdp=4)),
    {
      "train.accumulate": 2,
      "train.energy": "SWE",
      "train.compact": 0.5,
      "distributed": "auto",
    },
  )
  assert run_dir.is_begun(str(tmp_path), now)
  now = edited(now, {"train.steps": saved.train.steps + 1})
  with pytest.raises(ConfigError, match=r"train\.steps: 8 -> 9"):
    run_dir.is_begun(str(tmp_path), now)


@pytest.mark.parametrize(
  ("field", "other"),
  [
    ("pretrained", None),
    ("data.path", None),
    ("data.tokenizer", "bytes"),
    ("data.sts", None),
    ("distill.teacher", "b"),
  ],
)
def test_is_begun_compares_paths_in_any_spelling(tmp_path, field, other):
  def config(path):
    return edited(tiny.config(), {field: path})

  save(tmp_path, config("a"))
  for path in ("./a", os.path.abspath("a")):
    assert run_dir.is_begun(str(tmp_path), config(path))
  with pytest.raises(ConfigError, match=f"{field}: 'a' -> {other!r}"):
    run_dir.is_begun(str(tmp_path), config(other))


def test_is_begun_refuses_a_file_called_as_a_tokenizer(tmp_path):
  save(tmp_path, edited(tiny.config(), {"data.tokenizer": "bytes"}))
  now = edited(tiny.config(), {"data.tokenizer": "./bytes"})
  with pytest.raises(ConfigError, match="'bytes' -> './bytes'"):
    run_dir.is_begun(str(tmp_path), now)


def test_run_is_continued_by_its_order_with_the_model_as_it_became(tmp_path):
  order = edited(tiny.config(), {"data.text_field": None})
  shape = shape_of(order)
  layers = [
    dataclasses.replace(layer, mlp_width=8 + n, groups=0)
    for n, layer in enumerate(shape.layers)
  ]
  shape = dataclasses.replace(shape, layers=tuple(layers))
  targets = Targets((0.5,) * shape.num_layers, 0.25, 0.125)
  pair = ("a", "b")
  save(tmp_path, order, shape=shape, targets=targets, pair=pair)
  assert run_dir.is_begun(str(tmp_path), order)
  assert run_dir.load_order(str(tmp_path)) == order
  assert began(tmp_path, order) == (shape, targets, pair)
  config = with_shape(order, shape)
  with pytest.raises(ConfigError, match="another config"):
    run_dir.is_begun(str(tmp_path), config)


def test_run_of_an_earlier_version_keeps_its_order_beside_its_config(tmp_path):
  asked, other = tiny.config(), tiny.config(seed=1)
  shape, targets = shape_of(asked), Targets((0.5,), 0.25, 0.125)
  shape = dataclasses.replace(shape, segments=2)
  planned = {
    "fpp.saving": None,
    "fpp.linear": targets.head,
    "fpp.embedding": targets.embedding,
    "fpp.linear_layers": targets.layers,
  }
  save(tmp_path, edited(with_shape(asked, shape), planned))
  (tmp_path / "model.json").unlink()
  (tmp_path / "checksums.json").unlink()
  c.save(asked, str(tmp_path / "asked.json"))
  assert run_dir.is_begun(str(tmp_path), asked)
  assert began(tmp_path, asked) == (shape, targets, None)
  with pytest.raises(ConfigError, match="another config"):
    run_dir.is_begun(str(tmp_path), other)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (None, "not a run"),
    ({"model_type": "bert"}, "another library"),
    ({"format": "folding"}, "export"),
    ({"trian": {}}, "c6086e3"),
  ],
  ids=["nothing", "hugging-face", "export", "old"],
)
def test_load_order_refuses_other_folders(tmp_path, values, message):
  if values is not None:
    (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(ConfigError, match=message):
    run_dir.load_order(str(tmp_path))


def change(path, text):
  """Writes a text to a file, or removes it if the text is None."""
  if text is None:
    path.unlink()
  else:
    path.write_bytes(text)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("labels.json", b'["b", "a"]'),
    ("labels.json", None),
    ("tokenizer.json", b"{}"),
    ("special_tokens.json", b"{}"),
    ("text.sha256", b"\xff"),
    ("text.sha256", None),
    ("checksums.json", b'{"labels.json": "00000000"}'),
    ("checksums.json", b"["),
    ("config.json", b"edited"),
    ("model.json", b"edited"),
  ],
)
def test_load_order_refuses_a_changed_file_by_its_name(tmp_path, name, text):
  save(tmp_path, tiny.config(), ("a", "b"))
  assert run_dir.load_order(str(tmp_path)) == tiny.config()
  if text == b"edited":
    values = json.loads((tmp_path / name).read_text())
    values["seed" if name == "config.json" else "pair"] = 5
    text = json.dumps(values).encode()
  change(tmp_path / name, text)
  state = " is missing" if text is None else ""
  with pytest.raises(ConfigError, match=re.escape(name) + state):
    run_dir.load_order(str(tmp_path))


def test_load_order_reads_a_run_of_an_earlier_version(tmp_path):
  save(tmp_path, tiny.config())
  (tmp_path / "checksums.json").unlink()
  assert run_dir.load_order(str(tmp_path)) == tiny.config()


@pytest.mark.parametrize(
  "labels", ['["a", "a"]', "[1, 2]", '{"a": 1}', "[" * 9999]
)
def test_load_labels_refuses_what_are_not_different_names(tmp_path, labels):
  (tmp_path / "labels.json").write_text(labels)
  with pytest.raises(ConfigError, match=r"labels\.json is damaged"):
    run_dir.load_labels(str(tmp_path))


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ('"seconds": 2.5', '"seconds": 3.5'),
    ("seconds", "second"),
    ("checksum", "cxecksum"),  # one bit of its name
  ],
)
def test_read_result_refuses_a_changed_file(tmp_path, old, new):
  result = {"seconds": 2.5, "shape": (1, 2), "test": None}
  run_dir.write_result(str(tmp_path), result)
  path = tmp_path / "result.json"
  assert run_dir.read_result(str(tmp_path))["shape"] == [1, 2]
  path.write_text(path.read_text().replace(old, new))
  with pytest.raises(ConfigError, match="checksum"):
    run_dir.read_result(str(tmp_path))


def test_read_result_of_an_earlier_version_needs_seconds(tmp_path):
  (tmp_path / "result.json").write_text('{"seconds": "x"}')
  with pytest.raises(ConfigError, match="seconds"):
    run_dir.read_result(str(tmp_path))


def test_held_refuses_a_second_process(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  handle = os.open(workdir, os.O_RDONLY)
  # Locks are per handle, so this one is like that of another process.
  fcntl.flock(handle, fcntl.LOCK_EX)
  with (
    pytest.raises(ConfigError, match="another process"),
    run_dir.held(str(workdir)),
  ):
    pass
  assert workdir.is_dir()  # the directory of the other process
  os.close(handle)
  with run_dir.held(str(workdir)):
    (workdir / "file").touch()
    with (
      pytest.raises(ConfigError, match="another process"),
      run_dir.held(str(workdir)),
    ):
      pass
  with run_dir.held(str(workdir)):  # released
    (workdir / "file").unlink()
  assert not workdir.exists()  # nothing was written


def test_result_is_read_back_with_its_provenance(tmp_path):
  assert not run_dir.finished_result(str(tmp_path))
  result = {"finished": False, "test": {"loss": 1.5}, "layers": [{"path": "a"}]}
  run_dir.write_result(str(tmp_path), result)
  assert not run_dir.finished_result(str(tmp_path))
  run_dir.write_result(str(tmp_path), result | {"finished": True})
  assert run_dir.finished_result(str(tmp_path))
  found = run_dir.read_result(str(tmp_path))
  assert {name: found[name] for name in ("test", "layers")} == {
    name: result[name] for name in ("test", "layers")
  }
  assert found["schema"] == 2
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"]["folding"] == __version__
  assert re.fullmatch(r"cpu x8 \(.+, \d+ cores\)", found["device"])
  assert os.listdir(tmp_path) == ["result.json"]


def test_result_is_written_whole_or_not_at_all(tmp_path):
  run_dir.write_result(str(tmp_path), {"steps": 1})
  before = (tmp_path / "result.json").read_bytes()
  with pytest.raises(TypeError, match="not JSON serializable"):
    run_dir.write_result(str(tmp_path), {"steps": 2, "bad": object()})
  assert (tmp_path / "result.json").read_bytes() == before


def test_commit_is_that_of_the_source():
  head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
  found = subprocess.run(head, capture_output=True, text=True, check=False)
  commit = run_dir.source_commit()
  if found.returncode:
    assert commit is None
  else:
    assert len(commit) == 12
    assert found.stdout.startswith(commit)


@pytest.mark.slow
def test_commit_of_an_installed_copy_is_not_that_around_it(tmp_path):
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
  for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
    subprocess.run([*git, *words], check=True, capture_output=True)
  shutil.copytree(ROOT / "folding", tmp_path / "site" / "folding")
  code = "from folding.training import run_dir; print(run_dir.source_commit())"
  found = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path / "site",
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout.strip() == "None"


RECORDS = [
  {"split": "train", "step": 1, "loss": 2.5},
  {"split": "valid", "step": 2, "loss": math.inf},
]


@pytest.mark.parametrize("torn", ["", "{", '{"split": "valid", "st'])
def test_read_metrics_ends_at_a_half_written_line(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  assert run_dir.read_metrics(str(path)) == []
  path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + torn)
  assert run_dir.read_metrics(str(path)) == RECORDS


@pytest.mark.parametrize(
  "line", ["{", "1", "null", '{"step": 3, "loss": 1}', "{}"]
)
def test_read_metrics_refuses_a_damaged_line(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f"{json.dumps(RECORDS[0])}\n{line}\n")
  with pytest.raises(ConfigError, match="line 2"):
    run_dir.read_metrics(str(path))

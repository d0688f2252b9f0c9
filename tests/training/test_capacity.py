"""What `folding plan` says, against what is really allocated."""

import json
import math
import operator

import jax
import pytest

from folding import cli, files, schema
from folding import config as c
from folding.training import capacity, plan_verb, sharding
from tests.models import checkpoints
from tests.training import tiny

CONFIG_FILE = """
from folding import config as c

def get_config(width="32"):
  return c.Config(
    data=c.DataConfig(vocab_size=128, length=8, batch_size=16),
    model=c.ModelConfig(num_layers=3, width=int(width), num_heads=4),
    fpp=c.FPPConfig(linear=0.7, embedding=0.7, begin=0.0, end=0.75, checks=3),
    train=c.TrainConfig(steps=8),
  )
"""


@pytest.fixture
def config_file(tmp_path):
  file = tmp_path / "small.py"
  file.write_text(CONFIG_FILE, encoding="utf-8")
  return str(file)


def on_device(tree):
  """Returns the bytes of a tree that lie on the first device."""
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "mesh", [c.MeshConfig(1, 8), c.MeshConfig(2, 2, 2)], ids=str
)
def test_bytes_are_those_that_are_allocated(mesh, config_file):
  config = c.resolve(files.call_in_file(config_file, "get_config"))
  config.mesh = mesh
  devices = capacity.Devices("cpu", 8, 1.0)
  found = capacity.plan(config, devices)["compressed"]["bytes"]
  run = tiny.make(config)
  state = run.init()
  real = sharding.make_mesh(mesh)
  state = jax.device_put(state, sharding.tree_shardings(real, state))
  now = state.opt_state
  assert found["parameters"] == on_device(state.params)
  assert found["gradients"] == found["parameters"]
  assert found["optimizer"] == on_device(now.inner)
  assert found["fpp bits"] == on_device(now.suspected)
  assert found["fpp averages"] == on_device(now.averages)
  assert found["parameters"] < sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_teacher_takes_two_bytes_a_dense_parameter(config_file):
  config = c.resolve(files.call_in_file(config_file, "get_config"))
  alone = capacity.plan(config, capacity.Devices("cpu", 1, 1.0))
  config.pretrained, config.distill.logits = "DENSE", 0.5
  taught = capacity.plan(config, capacity.Devices("cpu", 1, 1.0))
  assert taught["dense"] == alone["dense"]  # which learns from no other
  assert "\nteacher" in plan_verb.table(taught)
  teacher = taught["compressed"]["bytes"].pop("teacher")
  assert teacher == 2 * alone["dense"]["parameters"]
  assert taught["compressed"]["bytes"] == alone["compressed"]["bytes"]
  total = alone["compressed"]["total"] + teacher
  assert taught["compressed"]["total"] == total


@pytest.mark.slow
def test_the_first_layers_stand_for_a_model_that_differs_by_layer(config_file):
  config = files.call_in_file(config_file, "get_config")
  config.model.mlp_width = (128, 128, 64)
  config.fold.groups = (4, 2, 1)
  config.fpp = c.FPPConfig(overall=0.5, embedding_share=0.0)
  # Which the first layers do not have.
  config.fpp.exclude = "blocks_2/mlp/.*"
  config.mesh.rules = "blocks_2/mlp/up/kernel=-,-"
  config = c.resolve(config)
  found = capacity.plan(config, capacity.Devices("cpu", 1, 1.0), compiles=True)
  for kind in ("dense", "compressed"):
    parts = found[kind]["bytes"]
    held = parts["parameters"] + parts["optimizer"]
    held += parts["fpp bits"] + parts["fpp averages"]
    # The narrower third layer is taken to be as the second.
    assert held <= found[kind]["xla"]["state"] <= 1.3 * held


def test_what_is_stored_in_the_end_is_counted(config_file):
  config = c.resolve(files.call_in_file(config_file, "get_config"))
  total, kept = capacity.stored(config)
  shapes = jax.tree.leaves(tiny.shapes(config))
  assert total == sum(math.prod(x.shape) for x in shapes)
  pruned = [128 * 32, *3 * [32 * 32, 32 * 128, 128 * 32]]
  assert kept == total - sum(int(0.7 * size) for size in pruned)


def test_activations_of_a_model_in_closed_form():
  # One layer without attention to speak of: keep the widths far apart.
  model = c.ModelConfig(num_layers=1, width=8, num_heads=1, mlp_width=4096)
  data = c.DataConfig(vocab_size=16, length=4, batch_size=64)
  config = c.resolve(c.Config(data=data, model=model, preset="none"))
  found = {
    count: capacity.plan(config, capacity.Devices("x", count, 1.0))["dense"]
    for count in (1, 8)
  }
  kept = {n: found[n]["bytes"]["activations"] for n in found}
  assert kept[1] == pytest.approx(8 * kept[8], rel=0.01)
  hidden = 4 * 64 * 4 * 4096  # bytes of one array of the MLP's width
  assert hidden <= kept[1] <= 8 * hidden
  # Parts of 4 rows, which 8 devices do not divide: each has all of a part.
  config.train.accumulate = 16
  parts = capacity.plan(config, capacity.Devices("x", 8, 1.0))
  assert "4 rows of a batch do not divide" in parts["unsplit"][-1]
  part = parts["dense"]["bytes"]["activations"]
  assert part == pytest.approx(kept[1] / 16, rel=0.01)
  config.train.accumulate, config.model.remat = 1, True
  remat = capacity.plan(config, capacity.Devices("x", 1, 1.0))["dense"]
  assert remat["bytes"]["activations"] < 0.2 * hidden


@pytest.mark.parametrize(
  ("text", "count", "gib"),
  [
    ("v5p-64", 32, 95),
    ("v5e-8", 8, 16),
    ("h100-8", 8, 80),
    ("my-x:3x1.5", 3, 1.5),
  ],
)
def test_devices_by_name(text, count, gib):
  found = capacity.parse_devices(text)
  assert (found.count, found.gib) == (count, gib)


def test_cpus_share_the_memory_of_the_machine():
  one, eight = (capacity.parse_devices(f"cpu-{n}").gib for n in (1, 8))
  assert one == pytest.approx(8 * eight)


@pytest.mark.parametrize(
  "text", ["", "h100", "h100-0", "x-8", "v5p-3", "a:0x4"]
)
def test_devices_that_are_none_are_refused(text):
  with pytest.raises(schema.ConfigError, match="--devices is one of v4, "):
    capacity.parse_devices(text)


def test_the_verb_prints_a_table_and_a_verdict(config_file, capsys):
  where = [f"--config={config_file}:64", "--devices=tiny:4x0.001"]
  edits = ["--set=mesh.tensor=2", "--set=mesh.data=-1", "--set=fpp.linear=0.5"]
  assert cli.main(["plan", *where, *edits, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2}
  for column in ("dense", "compressed"):
    total = found[column]["total"]
    assert total == sum(found[column]["bytes"].values())
    assert found[column]["fits"] == (total <= 0.001 * 2**30)
  text = plan_verb.table(found)
  assert "4 x tiny, mesh data=2, fsdp=1, tensor=2" in text
  assert "does not fit" in text
  assert f"{found['dense']['parameters']:,} parameters dense" in text


@pytest.mark.parametrize(
  ("edit", "expected"),
  [
    ("fold.groups=4,2", (4, 2)),
    ("fold.groups=[4, 2]", (4, 2)),
    ("fold.groups=2", 2),
    ("dense=True", True),
    ("dense=true", True),
    ("train.eval_batches=None", None),
    ("data.name=a,b", "a,b"),
    ("train.learning_rate=1e-3", 1e-3),
  ],
)
def test_values_are_written_as_for_train_or_in_json(edit, expected):
  config = c.Config(model=c.ModelConfig(num_layers=2))
  name = edit.partition("=")[0]
  found = operator.attrgetter(name)(plan_verb.edited(config, [edit]))
  assert found == expected


def test_the_vocabulary_is_that_of_the_tokenizer(config_file, tmp_path):
  path = tmp_path / "t" / "tokenizer.json"
  path.parent.mkdir()
  words = [f"w{i}" for i in range(300)]
  checkpoints.write_tokenizer(path, [*checkpoints.WORDS, *words])
  config = files.call_in_file(config_file, "get_config")
  of = {"bytes": 258, "bpe": 128, str(path): 310}
  for name, rows in of.items():
    given = plan_verb.edited(config, [f"data.tokenizer={name}"])
    found = capacity.plan(given, capacity.Devices("cpu", 1, 1.0))["dense"]
    width = given.model.width
    of[name] = found["parameters"] - rows * width
  assert len(set(of.values())) == 1


def test_a_config_file_may_have_dataclasses_of_its_own(tmp_path):
  file = tmp_path / "own.py"
  file.write_text(
    "from __future__ import annotations\n"
    "import dataclasses\n\n"
    "@dataclasses.dataclass\nclass Own:\n  size: int = 3\n\n"
    "def get_config():\n  return Own()\n"
  )
  assert files.call_in_file(str(file), "get_config").size == 3


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--config=nowhere.py", "--devices=cpu-1"],
      "there is no file 'nowhere.py'",
    ),
    (["--config={file}", "--devices=one"], "--devices is one of"),
    (["--config={file}", "--devices=cpu-1", "--set=a.b=1"], "no field 'a.b'"),
    (["--config={file}", "--devices=cpu-1", "--set=seed=x"], "must be int"),
    (
      [
        *("--config={file}", "--devices=cpu-1"),
        *("--set=fpp.overall=0.5", "--set=fpp.linear=0.5"),
      ],
      "set that or fpp.linear, not both",
    ),
  ],
)
def test_mistakes_are_one_line(flags, message, config_file, capsys):
  flags = [flag.format(file=config_file) for flag in flags]
  assert cli.main(["plan", *flags]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert message in err


@pytest.mark.slow
def test_xla_holds_the_state_and_grows_by_layers(config_file):
  config = c.resolve(files.call_in_file(config_file, "get_config"))
  config.mesh = c.MeshConfig(1, 8)
  devices = capacity.Devices("cpu", 8, 1.0)
  found = capacity.plan(config, devices, compiles=True)["compressed"]
  parts = found["bytes"]
  held = parts["optimizer"] + parts["fpp bits"] + parts["fpp averages"]
  held += parts["parameters"]
  batch = 3 * 4 * 16 * 8 // 8  # three arrays of 16 texts of 8 tokens
  # The counters of steps, and room to align arrays.
  assert held + batch <= found["xla"]["state"] <= 1.1 * (held + batch)
  assert found["xla"]["scratch"] > 0


@pytest.mark.slow
def test_xla_compiles_one_layer_with_values_by_layer(config_file):
  config = c.resolve(files.call_in_file(config_file, "get_config"))
  config.model.num_layers, config.model.mlp_width = 1, (64,)
  config.fold.groups, config.fold.v_block = (1,), (1,)
  found = capacity.plan(config, capacity.Devices("cpu", 1, 1.0), compiles=True)
  parts = found["compressed"]["bytes"]
  held = parts["optimizer"] + parts["fpp bits"] + parts["fpp averages"]
  assert found["compressed"]["xla"]["state"] > held + parts["parameters"]

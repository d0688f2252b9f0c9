"""Resolved configs, their dense twins and files, and the families of models."""

import dataclasses
import json

import pytest

from folding import config as c
from folding import schema
from tests.config_cases import make_config

# (groups, v_block, linear, embedding, overall) that each preset decides.
PRESETS = {
  "none": (0, 0, 0.0, 0.0, None),
  "moderate": (0, 1, 0.0, 0.0, 0.3),
  "paper": (1, 1, 0.7, 0.7, 0.7),
}


def _decided(config):
  f, p = config.fold, config.fpp
  return (f.groups, f.v_block, p.linear, p.embedding, p.overall)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_decide_what_is_left_open(preset):
  assert _decided(c.resolve(c.Config(preset=preset))) == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_nothing_else(preset):
  config = make_config(
    preset=preset, model__num_kv_heads=4, model__mlp_width=99
  )
  changed = schema.differences(config, c.resolve(config))
  names = {line.split(":")[0] for line in changed}
  assert names <= {
    *("fold.groups", "fold.v_block", "model.head_dim", "model.qkv_bias"),
    *("fpp.linear", "fpp.embedding", "fpp.overall", "fpp.embedding_share"),
  }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"fold__groups": 2}, {"fold.groups": 2}),
    ({"fold__groups": 0}, {"fold.groups": 0}),
    ({"fold__v_block": 8}, {"fold.v_block": 8}),
    ({"fpp__overall": 0.5}, {"fpp.overall": 0.5}),
    # `overall` would replace the fractions, so it is not filled in.
    ({"fpp__linear": 0.5}, {"fpp.linear": 0.5, "fpp.overall": None}),
    ({"fpp__embedding": 0.4}, {"fpp.embedding": 0.4, "fpp.overall": None}),
    ({"fpp__linear_layers": (0.5,) * 4}, {"fpp.overall": None}),
  ],
  ids=[
    *("groups", "no_groups", "v_block", "overall", "linear", "embedding"),
    "linear_layers",
  ],
)
def test_what_is_set_wins_over_the_preset(preset, fields, expected):
  resolved = c.to_dict(c.resolve(make_config(preset=preset, **fields)))
  for dotted, value in expected.items():
    section, name = dotted.split(".")
    assert resolved[section][name] == value


def test_shapes_left_open_follow_the_others():
  model = c.resolve(make_config(model__width=48, model__num_heads=6)).model
  assert (model.num_kv_heads, model.mlp_width, model.head_dim) == (6, 192, 8)


def test_shapes_that_are_set_stay():
  config = make_config(model__num_kv_heads=4, model__mlp_width=72)
  model = c.resolve(config).model
  assert (model.num_kv_heads, model.mlp_width) == (4, 72)


VARIANTS = {
  "default": {},
  "moderate": {"preset": "moderate"},
  "moderate_linear": {"preset": "moderate", "fpp__linear": 0.5},
  "dense": {"dense": True, "fold__groups": 1},
  "classify": {
    "task": "classify",
    "model": c.bert(num_layers=2),
    "data__path": "a/b",
  },
}
each_variant = pytest.mark.parametrize(
  "fields", VARIANTS.values(), ids=VARIANTS
)


@each_variant
def test_resolve_twice_is_resolve_once(fields):
  once = c.resolve(make_config(**fields))
  assert c.resolve(once) == once


@each_variant
def test_resolve_leaves_its_argument_alone(fields):
  config, untouched = make_config(**fields), make_config(**fields)
  resolved = c.resolve(config)
  assert config == untouched
  assert resolved.model is not config.model


@pytest.mark.parametrize("preset", PRESETS)
def test_the_dense_twin_folds_and_prunes_nothing(preset):
  config = make_config(
    preset=preset,
    seed=5,
    fold__groups=2,
    fold__axis="input",
    fold__first_dense=True,
    fpp__overall=0.4,
    fpp__score="movement",
    model__mlp_width=72,
  )
  twin = c.dense_twin(config)
  assert _decided(twin) == PRESETS["none"]
  assert twin.fold == c.FoldConfig(groups=0, v_block=0)
  # Statistics are of the same kind, all else is the same run.
  assert twin.fpp.score == "movement"
  resolved = c.resolve(config)
  assert (twin.seed, twin.task) == (resolved.seed, resolved.task)
  for section in ("data", "model", "train", "mesh"):
    assert getattr(twin, section) == getattr(resolved, section)


def test_a_dense_run_learns_from_no_model_that_is_not_named():
  distill = c.DistillConfig(logits=0.7, hidden=10.0)
  config = c.Config(dense=True, pretrained="CHECKPOINT", distill=distill)
  assert c.resolve(config).distill == c.DistillConfig()
  named = dataclasses.replace(distill, teacher="RUN")
  found = c.resolve(dataclasses.replace(config, distill=named)).distill
  assert found == named
  folded = c.resolve(dataclasses.replace(config, dense=False))
  assert folded.distill == distill


def test_the_dense_twin_of_the_dense_twin_and_of_the_resolved_config():
  config = make_config(fold__groups=2)
  twin = c.dense_twin(config)
  assert c.dense_twin(twin) == twin
  assert c.dense_twin(c.resolve(config)) == twin


@each_variant
def test_dicts_and_files_give_the_config_back(fields, tmp_path):
  for config in (make_config(**fields), c.resolve(make_config(**fields))):
    assert c.from_dict(c.to_dict(config)) == config
    path = str(tmp_path / "config.json")
    c.save(config, path)
    assert c.load(path) == config
    with open(path, encoding="utf-8") as file:
      assert json.load(file) == c.to_dict(config)


def test_differences_of_two_runs():
  a = make_config(seed=1, model__width=256)
  b = dataclasses.replace(a, dense=True)
  b.train = dataclasses.replace(a.train, steps=5)
  assert schema.differences(a, b) == [
    "dense: False -> True",
    "train.steps: 1000 -> 5",
  ]


# What each name stands for, by the papers of the three models.
FAMILIES = {
  "gpt2": (
    c.gpt2,
    {"causal": True, "norm": "layernorm", "norm_position": "pre"}
    | {"positions": "learned", "activation": "gelu_tanh", "gated": False}
    | {"use_bias": True, "tie_embeddings": True},
  ),
  "bert": (
    c.bert,
    {"causal": False, "norm": "layernorm", "norm_position": "post"}
    | {"positions": "learned", "activation": "gelu", "gated": False}
    | {"use_bias": True, "pooling": "first", "norm_epsilon": 1e-12},
  ),
  "llama": (
    c.llama,
    {"causal": True, "norm": "rmsnorm", "norm_position": "pre"}
    | {"positions": "rope", "activation": "silu", "gated": True}
    | {"use_bias": False, "tie_embeddings": False},
  ),
}


@pytest.mark.parametrize(("build", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_model_families(build, expected):
  model = dataclasses.asdict(build())
  assert {name: model[name] for name in expected} == expected


@pytest.mark.parametrize("build", [c.gpt2, c.bert, c.llama])
def test_model_families_take_every_field(build):
  model = build(width=64, positions="none", norm="rmsnorm")
  assert (model.width, model.positions, model.norm) == (64, "none", "rmsnorm")


def test_no_name_beside_a_path_is_no_other_config():
  config = c.Config(data=c.DataConfig(name="", path="x.txt"))
  assert c.resolve(config) == c.resolve(
    c.Config(data=c.DataConfig(path="x.txt"))
  )
  assert c.resolve(c.Config(data=c.DataConfig(name=""))).data.name == ""


@pytest.mark.parametrize("section", ["train", "model", "fold"])
def test_a_field_that_a_config_file_misspells_is_told_of(section):
  with pytest.raises(AttributeError, match="no attribute 'widht'"):
    getattr(c.Config(), section).widht = 64

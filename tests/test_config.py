import dataclasses
import json

import pytest

from folding import config as c
from folding import schema


def _config(**fields):
  """Returns a config from dotted names: `_config(model__width=32)`."""
  config = c.Config()
  for dotted, value in fields.items():
    *sections, name = dotted.split("__")
    holder = config
    for section in sections:
      holder = getattr(holder, section)
    assert hasattr(holder, name), dotted
    setattr(holder, name, value)
  return config


# (groups, v_block, linear, embedding, overall) that each preset decides.
PRESETS = {
  "none": (0, 0, 0.0, 0.0, None),
  "moderate": (0, 1, 0.0, 0.0, 0.3),
  "paper": (1, 1, 0.7, 0.7, None),
}


def _decided(config):
  f, p = config.fold, config.fpp
  return (f.groups, f.v_block, p.linear, p.embedding, p.overall)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_decide_what_is_left_open(preset):
  assert _decided(c.resolve(c.Config(preset=preset))) == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_nothing_else(preset):
  config = _config(preset=preset, model__num_kv_heads=4, model__mlp_width=99)
  changed = schema.differences(config, c.resolve(config))
  names = {line.split(":")[0] for line in changed}
  assert names <= {
    *("fold.groups", "fold.v_block", "model.head_dim", "model.qkv_bias"),
    *("fpp.linear", "fpp.embedding", "fpp.overall"),
  }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"fold__groups": 2}, {"fold.groups": 2}),
    ({"fold__groups": 0}, {"fold.groups": 0}),
    ({"fold__v_block": 8}, {"fold.v_block": 8}),
    ({"fpp__overall": 0.5}, {"fpp.overall": 0.5}),
    # `overall` would replace the two fractions, so it is not filled in.
    ({"fpp__linear": 0.5}, {"fpp.linear": 0.5, "fpp.overall": None}),
    ({"fpp__embedding": 0.4}, {"fpp.embedding": 0.4, "fpp.overall": None}),
  ],
  ids=["groups", "no_groups", "v_block", "overall", "linear", "embedding"],
)
def test_what_is_set_wins_over_the_preset(preset, fields, expected):
  resolved = c.to_dict(c.resolve(_config(preset=preset, **fields)))
  for dotted, value in expected.items():
    section, name = dotted.split(".")
    assert resolved[section][name] == value


def test_shapes_left_open_follow_the_others():
  model = c.resolve(_config(model__width=48, model__num_heads=6)).model
  assert (model.num_kv_heads, model.mlp_width, model.head_dim) == (6, 192, 8)


def test_shapes_that_are_set_stay():
  config = _config(model__num_kv_heads=4, model__mlp_width=72)
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
  once = c.resolve(_config(**fields))
  assert c.resolve(once) == once


@each_variant
def test_resolve_leaves_its_argument_alone(fields):
  config, untouched = _config(**fields), _config(**fields)
  resolved = c.resolve(config)
  assert config == untouched
  assert resolved.model is not config.model


@pytest.mark.parametrize("preset", PRESETS)
def test_the_dense_twin_folds_and_prunes_nothing(preset):
  config = _config(
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


def test_the_dense_twin_of_the_dense_twin_and_of_the_resolved_config():
  config = _config(fold__groups=2)
  twin = c.dense_twin(config)
  assert c.dense_twin(twin) == twin
  assert c.dense_twin(c.resolve(config)) == twin


AT_LEAST_1 = (
  "data.length data.batch_size data.eval_batch_size data.vocab_size "
  "model.num_layers model.width model.num_heads model.num_kv_heads "
  "model.mlp_width train.steps train.log_every train.eval_every fpp.checks "
  "train.accumulate"
).split()
FRACTIONS = ("data.valid_fraction", "data.test_fraction", "model.dropout")
REMOVED = ("fpp.linear", "fpp.embedding", "fpp.overall")


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    *((name, 0, "must be at least 1; it is 0") for name in AT_LEAST_1),
    *((name, 1.0, r"must be in \[0, 1\); it is 1\.0") for name in FRACTIONS),
    *((name, -0.1, r"must be in \[0, 1\); it is -0") for name in FRACTIONS),
    *((name, 1.0, r"a fraction to remove, .* it is 1\.0") for name in REMOVED),
    *((name, -0.1, r"a fraction to remove, .* it is -0") for name in REMOVED),
    ("fpp.patience", -1, "must be 0 or more"),
    ("fpp.decay", 1.0, r"must be in \[0, 1\)"),
    ("fpp.decay", -0.1, r"must be in \[0, 1\)"),
    ("fold.groups", -1, "must be 0 or more; it is -1"),
    ("fold.v_block", -1, "must be 0 or more; it is -1"),
  ],
)
def test_a_value_out_of_range_is_named(name, value, message):
  config = _config(**{name.replace(".", "__"): value})
  with pytest.raises(schema.ConfigError, match=f"^{name} .*{message}"):
    c.resolve(config)


COMBINATIONS = {
  "no_text_left": (
    {"data__valid_fraction": 0.5, "data__test_fraction": 0.5},
    r"valid_fraction \+ data\.test_fraction must leave text to train on",
  ),
  "fpp_backwards": (
    {"fpp__begin": 0.7, "fpp__end": 0.2},
    r"begin < end; they are 0\.7 and 0\.2",
  ),
  "fpp_empty": (
    {"fpp__begin": 0.7, "fpp__end": 0.7},
    r"they are 0\.7 and 0\.7",
  ),
  "fpp_before_start": (
    {"fpp__begin": -0.1, "fpp__end": 0.7},
    r"they are -0\.1 and 0\.7",
  ),
  "fpp_past_the_end": (
    {"fpp__begin": 0.1, "fpp__end": 1.1},
    r"they are 0\.1 and 1\.1",
  ),
  "heads": (
    {"model__width": 100},
    r"model\.width 100 is not divisible by model\.num_heads 16",
  ),
  "kv_heads": (
    {"model__num_kv_heads": 3},
    r"num_heads 16 is not divisible by model\.num_kv_heads 3",
  ),
  "rope_scaling": (
    {"model__rope_scaling": (8.0, 4.0, 1.0, 8192.0)},
    r"model\.rope_scaling is \(factor,\) or .* low < high; it is \(8\.0, 4",
  ),
  "rope_scaling_of_two": (
    {"model__rope_scaling": (8.0, 4.0)},
    r"model\.rope_scaling is \(factor,\) or \(factor, low, high, length\)",
  ),
  "narrower_twin": (
    {"model__mlp_width": (9, 9, 9, 9), "model__dense_mlp_width": 8},
    r"dense_mlp_width 8 is the width before .*\.mlp_width \(9, 9, 9, 9\) is",
  ),
  "odd_rope": (
    {"model__width": 48, "model__positions": "rope"},
    "rotary positions need an even head size; it is 3",
  ),
  "lm_both_ways": (
    {"model__causal": False},
    r"task 'lm' predicts the next token and needs model\.causal=True",
  ),
  "lm_of_one_token": ({"data__length": 1}, r"'lm' needs data\.length above 1"),
  "groups_output": (
    {"fold__groups": 3},
    r"fold\.groups 3 does not divide the head size 8 \(axis 'output'\)",
  ),
  "groups_input": (
    {"fold__groups": 3, "fold__axis": "input"},
    r"groups 3 does not divide the model\.width 128 \(axis 'input'\)",
  ),
  "v_block": (
    {"fold__v_block": 3},
    r"v_block 3 does not divide model\.width 128.* 1 \(diagonal\) or 0",
  ),
  "parts": (
    {"data__batch_size": 30, "train__accumulate": 4},
    r"batch_size 30 does not divide into train\.accumulate=4 parts",
  ),
  "parts_and_whole_batches": (
    {"train__accumulate": 2, "distill__hidden": 1.0, "distill__teacher": "x"},
    r"distill\.hidden compares whole batches; use train\.accumulate=1",
  ),
  "noise": (
    {"distill__noise": 1.0},
    r"distill\.noise is a share of the tokens, 0 to below 1; it is 1\.0",
  ),
  "sum_of_a_layernorm": (
    {"fold__axis": "input", "fold__groups": 1},
    r"sums the channels of a LayerNorm.*use model\.norm='rmsnorm', more gr",
  ),
}


@pytest.mark.parametrize(
  ("fields", "message"), COMBINATIONS.values(), ids=COMBINATIONS
)
def test_values_that_do_not_fit_each_other_are_explained(fields, message):
  with pytest.raises(schema.ConfigError, match=message) as caught:
    c.resolve(_config(**fields))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "fields",
  [
    {"task": "classify", "model__causal": False, "data__length": 1},
    {"fold__axis": "input", "fold__groups": 1, "model__norm": "rmsnorm"},
    {"fold__axis": "input", "fold__groups": 2},
    {"fold__groups": 0, "fold__v_block": 128},
    {"fold__groups": 8, "model__num_kv_heads": 1},
    {"fpp__begin": 0.0, "fpp__end": 1.0, "fpp__patience": 0},
    {"model__width": 48, "model__num_heads": 16},
  ],
  ids=lambda fields: ",".join(fields),
)
def test_what_the_messages_advise_is_accepted(fields):
  config = _config(**fields)
  assert c.resolve(config).fold.groups is not None


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"modle": {}}, "config has no field 'modle'; its fields are task, seed, "),
    ({"model": {"widht": 1}}, r"config\.model has no field 'widht'.* width, "),
    ({"preset": "big"}, "one of 'none', 'moderate', 'paper'; it is 'big'"),
    ({"task": "translate"}, "one of 'lm', 'classify'; it is 'translate'"),
    ({"fold": {"axis": "row"}}, "one of 'output', 'input'; it is 'row'"),
    ({"fpp": {"score": "l2"}}, "one of .*'magnitude', .* it is 'l2'"),
    ({"model": {"width": 1.5}}, r"config\.model\.width must be int"),
    (
      {"fold": {"groups": "1"}},
      r"fold\.groups must be int or one int a layer or None; it is '1'",
    ),
  ],
  ids=lambda x: None if isinstance(x, str) else str(x),
)
def test_an_unknown_name_or_value_lists_those_there_are(values, message):
  with pytest.raises(schema.ConfigError, match=message):
    c.from_dict(values)


def test_resolve_also_checks_what_was_set_on_the_object():
  config = _config(model__norm="batchnorm")
  with pytest.raises(schema.ConfigError, match="'layernorm', 'rmsnorm'; it is"):
    c.resolve(config)


@each_variant
def test_dicts_and_files_give_the_config_back(fields, tmp_path):
  for config in (_config(**fields), c.resolve(_config(**fields))):
    assert c.from_dict(c.to_dict(config)) == config
    path = str(tmp_path / "config.json")
    c.save(config, path)
    assert c.load(path) == config
    with open(path, encoding="utf-8") as file:
      assert json.load(file) == c.to_dict(config)


def test_differences_of_two_runs():
  a = _config(seed=1, model__width=256)
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

"""Configs that are refused, with messages whose advice is accepted."""

import functools

import pytest

from folding import checks, schema
from folding import config as c
from tests.config_cases import make_config

AT_LEAST_1 = (
  "data.length data.batch_size data.eval_batch_size data.vocab_size "
  "model.num_layers model.width model.num_heads "
  "train.steps train.log_every train.eval_every fpp.checks "
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
    ("model.window", 2**31, "below 2\\^31; it is 2147483648"),
    ("train.steps", 10**10, "must be below 2\\^31; it is 10000000000"),
    ("fpp.patience", -1, "must be 0 or more"),
    ("compress.fit_steps", -1, "must be 0 or more"),
    ("fpp.decay", 1.0, r"must be in \[0, 1\)"),
    ("fpp.decay", -0.1, r"must be in \[0, 1\)"),
    ("fold.groups", -1, "must be 0 or more; it is -1"),
    ("fold.v_block", -1, "must be 0 or more; it is -1"),
  ],
)
def test_a_value_out_of_range_is_named(name, value, message):
  config = make_config(**{name.replace(".", "__"): value})
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
  "no_head_left": (
    {"model__heads": ((),) * 4},
    r"model\.heads lists the heads of a layer in order.*; it is \(\)",
  ),
  "blocks_join_heads": (
    {"model__heads": ((0, 1),) * 4, "fold__v_block": 16},
    r"fold\.v_block 16 joins heads of 8, so none can be left out",
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
  "tokens_of_no_trained_model": (
    {"task": "classify", "fpp__embedding_granularity": "trim"},
    r"tokenizer of a trained classifier; give pretrained=PATH, or use 'row'",
  ),
  "tokens_that_are_predicted": (
    {"fpp__embedding_granularity": "trim", "pretrained": "x"},
    r"'trim' takes tokens out of the tokenizer of a trained classifier",
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
    c.resolve(make_config(**fields))
  assert "\n" not in str(caught.value)


# As `folding shrink` leaves a head less in the first of two layers.
_SHRUNK = {
  **{"model__num_layers": 2, "model__width": 64, "model__num_heads": 8},
  "model__heads": (tuple(range(1, 8)), tuple(range(8))),
}


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
    _SHRUNK | {"fold__v_block": (1, 16)},
    _SHRUNK | {"fold__v_block": 16, "fold__first_dense": True},
  ],
  ids=lambda fields: ",".join(fields),
)
def test_what_the_messages_advise_is_accepted(fields):
  config = c.resolve(make_config(**fields))
  for name, value in fields.items():
    found = functools.reduce(getattr, name.split("__"), config)
    assert found == value


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"modle": {}}, "config has no field 'modle'; did you mean model"),
    ({"model": {"widht": 1}}, r"config\.model has no field 'widht'.* width"),
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
  config = make_config(model__norm="batchnorm")
  with pytest.raises(schema.ConfigError, match="'layernorm', 'rmsnorm'; it is"):
    c.resolve(config)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"preset": "none"}, "prunes what fpp says, which is nothing"),
    ({"dense": True}, "leave compress.prune out of a dense run"),
    ({"fpp__tolerance": 0.1}, "fpp.tolerance"),
  ],
  ids=["nothing", "dense", "tolerance"],
)
def test_pruning_at_once_passes_nothing_over(fields, message):
  common = {"pretrained": "x", "compress__prune": "magnitude"}
  fine = make_config(**common)
  checks.check_used(c.resolve(fine), fine)
  config = make_config(**common, **fields)
  with pytest.raises(schema.ConfigError, match=message):
    checks.check_used(c.resolve(config), config)


@pytest.mark.parametrize(
  ("fields", "use", "message"),
  [
    (
      {"fold__v_identity": True},
      {"fold__v_identity": False, "fold__v_block": 1},
      "fold.v_identity is what removing .* use fold.v_block=1",
    ),
    (
      {"model__dense_mlp_width": 4096, "model__mlp_width": 8},
      {"pretrained": None},
      "are what a shrink leaves, .* leave them out with pretrained",
    ),
    (
      {"model__heads": ((0, 2),) * 4, "fold__v_block": 0},
      {"model__heads": None},
      "are what a shrink leaves, .* leave them out with pretrained",
    ),
    (
      {"model__rope_scaling": (2.0,)},
      {"model__rope_scaling": None},
      "are of rotary positions; leave them out",
    ),
    (
      {"fold__rope": "pairs"},
      {"fold__rope": "copy"},
      "are of rotary positions; leave them out",
    ),
  ],
  ids=["identity", "neurons", "heads", "scaling", "pairs"],
)
def test_what_a_run_would_pass_over_is_refused(fields, use, message):
  common = {"pretrained": "x"}
  config, fine = (
    make_config(**common, **fields),
    make_config(**(common | fields | use)),
  )
  with pytest.raises(schema.ConfigError, match=message):
    checks.check_used(c.resolve(config), config)
  checks.check_used(c.resolve(fine), fine)

"""The configuration: values in and out, presets, checks, and configs/."""

import dataclasses
import inspect
import json
import pathlib
import typing

import pytest

from configs import pretrained
from folding import config as c
from folding import typed
from folding.errors import ConfigError
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.typed import edited
from tests.config_cases import make_config
from tests.models import checkpoints

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Inner:
  size: typing.Annotated[int, typed.Range(1, 9)] = 3
  rate: float = 0.5  # beside
  # above
  kind: typing.Literal["a", "b"] = "a"


@dataclasses.dataclass
class Outer:
  name: str = "x"
  limit: int | None = None
  on: bool = False
  widths: int | tuple[int, ...] = 1
  # Above, and
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # beside.
  inner: Inner = dataclasses.field(default_factory=Inner)
  shares: tuple[float, ...] = ()
  rows: typing.Literal[0, 2] = 0


def test_build_inverts_json():
  outer = Outer("y", 4, True, (1, 2), (("a/b", (None, "x")),), Inner(7, 2, "b"))
  values = json.loads(json.dumps(dataclasses.asdict(outer)))
  built = typed.build(Outer, values, "config")
  assert built == outer
  assert type(built.inner.rate) is float
  assert typed.build(Outer, {"inner": {"size": 8}}, "c").inner == Inner(8)


def test_model_does_not_change_with_the_config_that_made_it():
  config = c.resolve(c.Config())
  shape = make_model(shape_of(config), vocab_size=9).shape
  sections = (getattr(config, x.name) for x in dataclasses.fields(config))
  for value in (config, *filter(dataclasses.is_dataclass, sections), shape):
    for field in dataclasses.fields(value):
      with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field.name, None)
      hash(getattr(value, field.name))  # so no list or dict in it changes
  with pytest.raises(dataclasses.FrozenInstanceError):
    shape.layers[0].groups = 2


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([], "must have fields"),
    ({"nam": "x"}, r"did you mean name\?"),
    ({"inner": {"sise": 1}}, r"config\.inner has no field 'sise'"),
    ({"name": None}, r"config\.name must be str; it is None"),
    ({"limit": 1.0}, r"must be int or None; it is 1\.0"),
    ({"limit": True}, "it is True"),
    ({"on": 1}, "must be bool"),
    ({"widths": [1, 2.0]}, "int or a tuple of int"),
    ({"rules": [["a"]]}, r"rules must be"),
    ({"rules": [["a", [""]]]}, r"rules must be"),
    ({"inner": {"rate": float("nan")}}, "it is nan"),
    ({"inner": {"rate": 10**400}}, "must be float"),
    ({"inner": {"rate": "1"}}, "it is '1'"),
    ({"inner": {"size": 0}}, r"config\.inner\.size must be int in \[1, 9\)"),
    ({"inner": {"size": 9}}, "it is 9"),
    ({"rows": 2.0}, r"one of 0, 2; it is 2\.0"),
    ({"rows": False}, "it is False"),
    ({"inner": {"kind": "c"}}, "one of 'a', 'b'; it is 'c'"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_build_refuses_in_one_line(values, message):
  with pytest.raises(ConfigError, match=message) as caught:
    typed.build(Outer, values, "config")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{"compress": "none"}, {"fpp": 3}])
def test_saved_config_refuses_a_section_without_fields(values):
  with pytest.raises(ConfigError, match="must have fields"):
    c.from_saved(values)


def test_range_holds_its_closed_ends():
  for ends, inside in (("[)", [0, 1]), ("[]", [0, 1, 2]), ("()", [1])):
    found = typed.Range(0, 2, ends)
    assert [x for x in (-1, 0, 1, 2, 3) if x in found] == inside


@pytest.mark.parametrize(
  ("field", "text", "value"),
  [
    ("name", "3", "3"),
    ("name", "None", "None"),
    ("limit", "None", None),
    ("limit", "-3", -3),
    ("on", "True", True),
    ("on", "false", False),
    ("widths", "4", 4),
    ("widths", "4,2,1", (4, 2, 1)),
    ("widths", "(4,)", (4,)),
    ("shares", "8", (8.0,)),
    ("rules", "('a/b', (None, 'x')),", (("a/b", (None, "x")),)),
    ("inner.rate", "1e-3", 0.001),
    ("rows", "2", 2),
    ("inner.kind", "b", "b"),
  ],
)
def test_parse_reads_the_text_of_a_flag(field, text, value):
  found = typed.parse(typed.fields(Outer)[field], text, field)
  assert found == value
  assert type(found) is type(value)


@pytest.mark.parametrize(
  ("field", "text"),
  [
    ("limit", "x"),
    ("on", "1"),
    ("widths", "4,x"),
    ("inner.size", "9"),
    ("inner.rate", "1e999"),
    ("inner.kind", "[[["),
    ("inner.kind", "-" * 100_000 + "1"),
  ],
)
def test_parse_refuses_what_does_not_fit(field, text):
  with pytest.raises(ConfigError, match="must be") as caught:
    typed.parse(typed.fields(Outer)[field], text, field)
  assert f"it is {text[:200]}" in str(caught.value)


def test_edited_and_differences_are_by_dotted_name():
  edits = {"name": "z", "inner.rate": 2}
  edited = typed.edited(Outer(), edits)
  assert edited == Outer(name="z", inner=Inner(rate=2.0))
  assert typed.differences(Outer(), edited) == [
    "name: 'x' -> 'z'",
    "inner.rate: 0.5 -> 2.0",
  ]
  with pytest.raises(ConfigError, match=r"did you mean inner\.rate\?"):
    typed.edited(Outer(), {"rate": 1.0})


def test_earlier_name_of_a_field_is_answered_with_its_name():
  with pytest.raises(ConfigError, match=r"did you mean fpp\.saving\?"):
    c.edited(c.Config(), {"fpp.overall": 0.5})


@pytest.mark.parametrize(
  ("rate", "shares", "expected"),
  [
    (1 / 3, (2 / 3, 1.0), ["0.333333 -> 0.25", "(0.666667, 1.0) -> ()"]),
    (0.25000001, (), ["0.25000001 -> 0.25"]),
  ],
)
def test_differences_show_more_digits_if_six_are_equal(rate, shares, expected):
  a = Outer(inner=Inner(rate=rate), shares=shares)
  found = typed.differences(a, Outer(inner=Inner(rate=0.25)))
  assert [line.partition(": ")[2] for line in found] == expected


def test_comments_stand_beside_and_above_a_field():
  found = typed.comments(inspect.getsource(Outer).splitlines())
  assert found["rules"] == "Above, and beside."
  found = typed.comments(inspect.getsource(Inner).splitlines())
  assert (found["rate"], found["kind"], found["size"]) == (
    ("beside", "above", "")
  )
  found = typed.comments(["# above", "a: int", "b: int"])
  assert found == {"a": "above", "b": ""}


@pytest.mark.parametrize(
  ("text", "values"),
  [("identity", "identity"), ("dense,diagonal", ("dense", "diagonal"))],
)
def test_parse_reads_kinds_of_values_per_layer(text, values):
  hint = typed.fields(c.Config)["fold.values"]
  assert typed.parse(hint, text, "fold.values") == values


@pytest.mark.parametrize(
  ("name", "text", "value"),
  [
    ("data.text_field", "a", "a"),
    ("data.text_field", "a,b", ("a", "b")),
    ("data.text_field", "('a', 'b')", ("a", "b")),
    ("data.path", "a,b", "a,b"),
  ],
)
def test_parse_reads_one_name_or_two(name, text, value):
  assert typed.parse(typed.fields(c.Config)[name], text, name) == value


# What each preset decides.
PRESETS = {
  "none": (0, "dense", 0.0, 0.0, None),
  "moderate": (0, "diagonal", None, None, 0.3),
  "paper": (1, "diagonal", None, None, 0.7),
}


def _decided(config):
  f, p = config.fold, config.fpp
  return (f.groups, f.values, p.linear, p.embedding, p.saving)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_decides_only_fields_that_are_none(preset):
  resolved = c.resolve(c.Config(preset=preset))
  assert _decided(resolved) == PRESETS[preset]
  changed = typed.differences(c.Config(preset=preset), resolved)
  assert {line.split(":")[0] for line in changed} <= {
    *("fold.groups", "fold.values", "fpp.linear", "fpp.embedding"),
    *("fpp.saving", "fpp.embedding_share", "model.num_kv_heads"),
    *("model.head_dim", "model.mlp_width", "model.qkv_bias"),
  }


@pytest.mark.parametrize(
  ("fields", "decided"),
  [
    (
      {"fold__groups": 2, "fold__values": "dense"},
      (2, "dense", None, None, 0.7),
    ),
    ({"fpp__saving": 0.5}, (1, "diagonal", None, None, 0.5)),
    ({"fpp__linear": 0.5}, (1, "diagonal", 0.5, 0.7, None)),
    ({"fpp__embedding": 0.0}, (1, "diagonal", 0.7, 0.0, None)),
    ({"fpp__linear_layers": (0.5,) * 4}, (1, "diagonal", 0.7, 0.7, None)),
  ],
  ids=str,
)
def test_field_that_is_set_overrides_the_preset(fields, decided):
  assert _decided(c.resolve(make_config(**fields))) == decided


def test_sizes_that_are_0_follow_from_others():
  model = c.resolve(make_config(model__width=48, model__num_heads=6)).model
  assert (model.num_kv_heads, model.mlp_width, model.head_dim) == (6, 192, 8)
  config = make_config(
    preset="none",
    model__num_kv_heads=4,
    model__mlp_width=72,
    model__head_dim=4,
  )
  model = c.resolve(config).model
  assert (model.num_kv_heads, model.mlp_width, model.head_dim) == (4, 72, 4)


def test_layers_have_their_own_shapes():
  config = make_config(
    model__num_layers=2,
    model__num_kv_heads=8,
    model__heads=((0, 1), tuple(range(16))),
    model__mlp_width=(3, 4),
    model__dense_mlp_width=4,
    fold__groups=(0, 2),
    fold__values="dense",
  )
  first, last = shape_of(config).layers
  assert (first.heads, first.num_kv_heads, last.num_kv_heads) == ((0, 1), 1, 8)
  assert [(x.mlp_width, x.groups) for x in (first, last)] == [(3, 0), (4, 2)]
  assert hash(first) != hash(last)


VARIANTS = {
  "default": {},
  "moderate": {"preset": "moderate"},
  "linear": {"preset": "moderate", "fpp__linear": 0.5},
  "dense": {"dense": True, "fold__groups": 1},
  "classify": {"task": "classify", "model": c.bert(num_layers=2)},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_resolve_is_idempotent_and_copies(fields):
  config = make_config(**fields)
  once = c.resolve(config)
  assert c.resolve(once) == once
  assert config == make_config(**fields)
  assert once.model is not config.model


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_config_survives_its_file(fields, tmp_path):
  path = str(tmp_path / "config.json")
  for config in (make_config(**fields), c.resolve(make_config(**fields))):
    c.save(config, path)
    assert c.load(path) == config
    assert c.read(path, {"seed": "7"}) == dataclasses.replace(config, seed=7)


def test_config_of_an_old_run_names_the_commit_that_reads_it(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"fold": {"v_block": 1}}')
  with pytest.raises(ConfigError, match="c6086e3"):
    c.load(str(path))


def test_dense_baseline_is_the_same_run_without_compression():
  config = make_config(
    seed=5,
    pretrained="x",
    fold__groups=2,
    fold__axis="input",
    fpp__score="movement",
    compress__prune="magnitude",
    model__mlp_width=72,
  )
  dense = c.dense_baseline(config)
  assert _decided(dense) == PRESETS["none"]
  assert dense.fpp.score == "movement"  # statistics of the same kind
  resolved = c.resolve(config)
  for section in ("seed", "task", "data", "model", "train", "mesh"):
    assert getattr(dense, section) == getattr(resolved, section)
  assert c.dense_baseline(dense) == dense == c.dense_baseline(resolved)


def test_dense_run_has_a_teacher_only_if_it_is_named():
  distill = c.DistillConfig(logits=0.7, hidden=10.0)
  config = c.Config(dense=True, pretrained="CHECKPOINT", distill=distill)
  assert c.resolve(config).distill == c.DistillConfig()
  named = dataclasses.replace(distill, teacher="RUN")
  found = c.resolve(dataclasses.replace(config, distill=named)).distill
  assert found == named
  folded = dataclasses.replace(config, dense=False)
  assert c.resolve(folded).distill == distill


SHRUNK = {
  "model__num_layers": 2,
  "model__heads": ((0, 1), tuple(range(16))),
}
TRAINED = {"pretrained": "x"}
# What is refused by a key word of the message, and the change that it advises.
REFUSED = {
  "no_text": (
    {"data__valid_fraction": 0.9},
    "text",
    {"data__test_fraction": 0},
  ),
  "tokens": (
    {"data__eval_batch_size": 10**8},
    r"2\^28",
    {"data__length": 2},
  ),
  "fpp_backwards": ({"fpp__begin": 0.9}, "begin < end", {"fpp__end": 1.0}),
  "heads": ({"model__width": 100}, "divisible", {"model__num_heads": 20}),
  "kv_heads": (
    {"model__num_kv_heads": 3},
    "num_kv",
    {"model__num_kv_heads": 4},
  ),
  "no_head": (
    {"model__heads": ((),) * 4},
    r"model\.heads",
    {"model__heads": ((1,),) * 4},
  ),
  "half_a_key": (
    {
      "model__heads": ((0,),) * 4,
      "model__num_kv_heads": 8,
      "fold__values": "dense",
    },
    "whole groups of 2",
    {"model__heads": ((0, 1),) * 4},
  ),
  "per_layer": (
    {"model__mlp_width": (1, 2)},
    "2 values for 4 layers",
    {"model__num_layers": 2},
  ),
  "no_neuron": (
    {"model__mlp_width": (0,) * 4},
    "1 or more",
    {"model__mlp_width": (1,) * 4},
  ),
  "narrower_baseline": (
    {"model__mlp_width": (9,) * 4, "model__dense_mlp_width": 8},
    "exceeds",
    {"model__dense_mlp_width": 9},
  ),
  "scaling": (
    {"model__positions": "rope", "model__rope_scaling": (8.0, 4.0, 1.0, 9.0)},
    "low < high",
    {"model__rope_scaling": (8.0, 1.0, 4.0, 9.0)},
  ),
  "scaling_of_two": (
    {"model__positions": "rope", "model__rope_scaling": (8.0, 4.0)},
    "rope_scaling is",
    {"model__rope_scaling": (8.0,)},
  ),
  "share_of_no_pair": (
    {"model__positions": "rope", "model__rope_share": 0.13},
    "rotates 1 of 8",
    {"model__rope_share": 0.25},
  ),
  "parallel_after_norms": (
    {"model__parallel": True, "model__norm_position": "post"},
    "parallel needs",
    {"model__norm_position": "pre"},
  ),
  "scaling_without_rope": (
    {"model__rope_scaling": (8.0,)},
    "needs",
    {"model__positions": "rope"},
  ),
  "pairs_without_rope": (
    {"fold__rope": "pairs", "fold__groups": 2},
    "needs",
    {"model__positions": "rope"},
  ),
  "odd_pairs": (
    {"fold__rope": "pairs", "model__positions": "rope"},
    "even number",
    {"fold__groups": 2},
  ),
  "more_pairs_than_channels": (
    {"fold__rope": "pairs", "model__positions": "rope", "fold__groups": 10},
    "even number",
    {"fold__groups": 8},
  ),
  "odd_rope": (
    {"model__width": 48, "model__positions": "rope"},
    "even head size",
    {"model__head_dim": 4, "fold__values": "dense"},
  ),
  "lm_both_ways": (
    {"model__causal": False},
    r"causal",
    {"model__causal": True},
  ),
  "lm_of_one_token": ({"data__length": 1}, "above 1", {"data__length": 2}),
  "first_of_causal": (
    {"task": "classify", "model__pooling": "first"},
    "first token",
    {"model__causal": False},
  ),
  "groups": ({"fold__groups": 3}, "head size 8", {"fold__groups": 8}),
  "input_groups": (
    {"fold__groups": 3, "fold__axis": "input"},
    r"model\.width 128",
    {"fold__groups": 2},
  ),
  "sum_of_a_layernorm": (
    {"fold__groups": 1, "fold__axis": "input"},
    "LayerNorm",
    {"model__norm": "rmsnorm"},
  ),
  "values_of_shared_width": (
    {"model__head_dim": 4, "fold__groups": 2},
    "share out",
    {"fold__values": "dense"},
  ),
  "qk_norm": (
    {"model__qk_norm": True, "fold__values": "dense"},
    "norms all channels",
    {"fold__groups": 0},
  ),
  "linear_attention": (
    {"model__attention": "linear", "fold__groups": 2},
    "linear",
    {"fold__groups": (1, 2, 2, 2)},
  ),
  "linear_window": (
    {"model__attention": "linear", "model__window": 8},
    "window",
    {"model__window": None},
  ),
  "micro_batches": (
    {"data__batch_size": 30, "train__accumulate": 4},
    "micro-batches",
    {"train__accumulate": 3},
  ),
  "hidden_of_micro_batches": (
    TRAINED | {"train__accumulate": 2, "distill__hidden": 1.0},
    "whole batches",
    {"train__accumulate": 1},
  ),
  "no_teacher": ({"distill__logits": 0.5}, "teacher", TRAINED),
  "idle_teacher": (
    {"distill__teacher": "RUN"},
    "does nothing",
    {"distill__hidden": 1.0},
  ),
  "idle_teacher_of_classes": (
    {"task": "classify", "distill__teacher": "RUN"},
    "does nothing",
    {"task": "embed"},  # which compares with it
  ),
  "metric": (
    {"task": "classify", "train__metric": "spearman"},
    "use accuracy or macro_f1",
    {"train__metric": "accuracy"},
  ),
  "processes": (
    {"distributed": "10.0.0.1:1234,2,2"},
    "PROCESS below COUNT",
    {"distributed": "10.0.0.1:1234,1,2"},
  ),
  "overall_and_linear": (
    {"fpp__saving": 0.5, "fpp__linear": 0.0},
    "not both",
    {"fpp__linear": None},
  ),
  "overall_and_layers": (
    {"fpp__saving": 0.5, "fpp__linear_layers": (0.5,) * 4},
    "not both",
    {"fpp__saving": None},
  ),
  "layers": (
    {"fpp__linear_layers": (0.5,)},
    "1 values for 4 layers",
    {"fpp__linear_layers": (0.5,) * 4},
  ),
  "heads_of_a_diagonal": (
    {"fpp__attention": "heads"},
    "keys and values",
    {"fold__values": "dense"},
  ),
  "rank_above_the_head": (
    {"fold__values": "dense", "fold__value_rank": 9},
    "head size 8",
    {"fold__value_rank": 8},
  ),
  "rank_of_a_diagonal": (
    {"fold__value_rank": 4},
    "set one",
    {"fold__values": "dense"},
  ),
  "rank_above_the_embedding": (
    {"model__tie_embeddings": False, "fold__embedding_rank": 129},
    "the width 128",
    {"fold__embedding_rank": 128},
  ),
  "rank_of_an_output_layer": (
    {"fold__embedding_rank": 8},
    "tie_embeddings=False",
    {"model__tie_embeddings": False},
  ),
  "open_rank_without_a_plan": (
    TRAINED | {"task": "classify", "fpp__embedding_granularity": "rank"},
    "or fold.embedding_rank",
    {"fold__embedding_rank": 8},
  ),
  "decision_without_a_budget": (
    TRAINED
    | {
      "task": "classify",
      "fpp__embedding_granularity": "rank",
      "fpp__embedding": 0.5,
      "compress__plan": "auto",
      "compress__embedding": "errors",
    },
    "compress.embedding='errors'",
    {"compress__embedding": "share"},
  ),
  "heads_that_share": (
    {
      "fpp__attention": "heads",
      "fold__values": "dense",
      "model__num_kv_heads": 4,
    },
    "keys and values",
    {"model__num_kv_heads": 0},
  ),
  "trim_of_no_model": (
    {"task": "classify", "fpp__embedding_granularity": "trim"},
    "trained model",
    TRAINED,
  ),
  "plan_of_no_model": ({"compress__plan": "auto"}, "pretrained", TRAINED),
  "pruned_beside_a_plan": (
    TRAINED | {"compress__plan": "auto", "fpp__attention": "all"},
    "decides how W_O",
    {"fpp__attention": "output"},
  ),
  "positions_of_no_rank": (
    {"fold__embedding_shared": True},
    "fold.embedding_shared needs model.positions='learned'",
    {"model__positions": "learned"},
  ),
  "one_rank_for_all": (
    {
      "model__positions": "learned",
      "fold__embedding_shared": True,
      "fold__embedding_rank": 1,
      "model__tie_embeddings": False,
    },
    "embedding_rank of at least 2",
    {"fold__embedding_rank": 2},
  ),
  "uniform_without_plan": (
    TRAINED | {"compress__uniform": True},
    "compress.plan='auto'",
    {"compress__uniform": False},
  ),
  "uniform_and_folded": (
    TRAINED
    | {"compress__plan": "auto", "compress__uniform": True}
    | {"fpp__granularity": "neuron", "fpp__attention": "none"},
    "keeps projections dense",
    {"fold__groups": 0, "fold__values": "dense"},
  ),
  "prune_no_model": ({"compress__prune": "wanda"}, "pretrained", TRAINED),
  "prune_nothing": (
    TRAINED | {"compress__prune": "wanda", "preset": "none"},
    "prunes nothing",
    {"fpp__linear": 0.5},
  ),
  "prune_and_verify": (
    TRAINED | {"compress__prune": "wanda", "fpp__tolerance": 0.1},
    "while training",
    {"fpp__tolerance": None},
  ),
  "prune_by_neuron": (
    TRAINED | {"compress__prune": "wanda", "fpp__granularity": "neuron"},
    "by weight",
    {"compress__prune": "sparsegpt"},
  ),
  "prune_sums": (
    TRAINED
    | {"compress__prune": "wanda", "fpp__attention": "all"}
    | {"fold__axis": "input", "fold__groups": 2},
    "moments",
    {"fold__axis": "output"},
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_resolve_refuses_and_accepts_what_it_advises(name):
  fields, message, advice = REFUSED[name]
  with pytest.raises(ConfigError, match=message) as caught:
    c.resolve(make_config(**fields))
  assert "\n" not in str(caught.value)
  c.resolve(make_config(**(fields | advice)))


def test_a_config_file_that_assigns_to_a_field_is_told_how_to_edit(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from folding.config import Config\n"
    "def get_config():\n"
    "  config = Config()\n"
    "  config.model.width = 64\n"
    "  return config\n"
  )
  with pytest.raises(ConfigError, match=r"'width'.*edited\(config"):
    c.read(str(file))


def test_read_reports_a_file_that_gives_no_config(tmp_path):
  file = tmp_path / "other.py"
  file.write_text("def get_config():\n  return 1\n")
  with pytest.raises(ConfigError, match="does not return a Config"):
    c.read(str(file))
  file.write_text("def get_config():\n  return 1 / 0\n")
  with pytest.raises(ConfigError, match="ZeroDivisionError"):
    c.read(str(file))


CONFIG_FILES = [
  path
  for path in sorted(ROOT.glob("configs/**/*.py"))
  if "def get_config" in path.read_text()
  and path.stem not in ("pretrained", "embed")
]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.stem)
def test_config_file_resolves_and_survives_its_json(path):
  config = c.resolve(c.read(str(path)))
  assert config.fpp.prunes or not shape_of(config).is_dense
  assert c.from_dict(json.loads(json.dumps(c.to_dict(config)))) == config


def test_config_file_takes_a_path_as_its_argument(tmp_path):
  file = tmp_path / "text.tsv"
  file.write_text("0\ttext\n")
  for name in ("lm", "classify"):
    where = str(ROOT / "configs" / f"{name}.py")
    assert c.read(f"{where}:{file}").data.path == str(file)
    assert c.read(f"{where}:trec").data.path is None


def _recovery(folder, argument=""):
  config = pretrained.get_config(f"{folder}{argument}")
  config = edited(config, {"data.path": "a.txt"})
  return c.resolve(config)


@pytest.mark.parametrize(
  ("family", "K", "groups"),
  [
    *(("bert", 32, 8), ("bert", 26, 2), ("bert", 25, 5), ("bert", 3, 1)),
    *(("llama", 64, 16), ("llama", 20, 4), ("llama", 6, 2)),  # whole pairs
  ],
)
def test_pretrained_folds_a_head_to_about_a_quarter(
  tmp_path, family, K, groups
):
  spec = checkpoints.FAMILIES[family] | {"hidden_size": K * checkpoints.H}
  (tmp_path / "config.json").write_text(json.dumps(spec))
  checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  config = _recovery(tmp_path)
  assert (config.fold.groups, config.model.head_dim) == (groups, K)


@pytest.mark.parametrize("level", [".5", "0.80"])
def test_pretrained_takes_the_level_behind_the_path(tmp_path, level):
  checkpoints.write(tmp_path / "a,b", "llama", "lm")
  config = _recovery(tmp_path / "a,b", f",{level}")
  assert config.pretrained == f"{tmp_path}/a,b"
  assert config.fpp.saving == float(level)


@pytest.mark.parametrize(
  ("family", "task"), [("llama", "lm"), ("gpt2", "classify")]
)
def test_pretrained_follows_the_checkpoint(tmp_path, family, task):
  checkpoints.write(tmp_path / "model", family, task)
  config = _recovery(tmp_path / "model")
  assert config.task == task
  assert (config.distill.logits > 0) == (task == "lm")


def test_pretrained_without_a_tokenizer_is_refused(tmp_path):
  checkpoints.write(tmp_path / "model", "llama", "lm")
  (tmp_path / "model" / "tokenizer.json").unlink()
  with pytest.raises(ConfigError, match="save_pretrained"):
    pretrained.get_config(str(tmp_path / "model"))


@pytest.mark.parametrize("where", ["x,0", "x,1", "x,30", "x,30%", ""])
def test_pretrained_refuses_no_path_and_no_fraction(where):
  with pytest.raises(ConfigError, match="fraction|give"):
    pretrained.get_config(where)

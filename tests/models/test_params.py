"""The table of parameters, against the parameters of real models."""

import re

import pytest

from folding import config as c
from folding import paths
from folding.models import families, params
from folding.models.shape import shape_of
from folding.models.transformer import make_model, param_shapes

# All sizes differ, so that a wrong letter shows.
SHAPE = {"num_layers": 1, "width": 20, "num_heads": 4, "mlp_width": 28}
SIZES = {
  "D": 20,
  "E": 20,
  "H": 4,
  "J": 4,
  "K": 5,
  "F": 28,
  "P": 9,
  "HK": 20,
  "R": 32,
}
MODELS = {
  "gpt2": (c.gpt2(**SHAPE), {}, "lm", 11),
  "llama": (c.llama(**SHAPE, num_kv_heads=2, head_dim=6), {}, "lm", 11),
  "bert": (c.bert(**SHAPE, pooler=True, embed_width=6), {}, "classify", 3),
  "relative": (
    c.bert(**SHAPE, relative_buckets=32),
    {"groups": 1},
    "classify",
    3,
  ),
  "modernbert": (
    c.ModelConfig(
      **SHAPE, embed_norm=True, embed_width=6, pooler=True, pooler_norm=True
    ),
    {},
    "classify",
    3,
  ),
  "qk_norm": (
    c.llama(**SHAPE, head_dim=6, qk_norm=True, norm_position="both"),
    {},
    "lm",
    11,
  ),
  "folded": (
    c.ModelConfig(**SHAPE, tie_embeddings=False),
    {"groups": 1, "values": "diagonal", "embedding_rank": 5},
    "lm",
    11,
  ),
  "pairs": (
    c.llama(**SHAPE, num_kv_heads=2, head_dim=6),
    {"groups": 2, "rope": "pairs"},
    "lm",
    11,
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_row_with_its_axes(name):
  model, fold, task, num_outputs = MODELS[name]
  fold = {"groups": 0, "values": "dense"} | fold
  config = c.resolve(
    c.Config(
      task=task,
      preset="none",
      data=c.DataConfig(length=9),
      model=model,
      fold=c.FoldConfig(**fold),
    )
  )
  sizes = SIZES | {"J": config.model.num_kv_heads, "K": config.model.head_dim}
  sizes["e"] = config.model.embed_width or config.model.width
  sizes |= {"r": config.fold.embedding_rank, "V": 11, "C": num_outputs}
  leaves = paths.flatten(param_shapes(make_model(shape_of(config), 11, 3)))
  for path, leaf in leaves.items():
    rows = [x for x in params.TABLE if re.fullmatch(f"(.*/)?{x.path}", path)]
    assert [params.find(path)] == rows
    axes = rows[0].axes.split()
    assert len(axes) == len(leaf.shape)
    for letter, size in zip(axes, leaf.shape, strict=True):
      is_folded = letter == "K" and fold["groups"]
      is_folded |= path == "embed/embedding" and letter == "e"
      if letter != "1" and not is_folded:
        assert sizes[letter] == size, path


@pytest.mark.parametrize("family", families.FAMILIES)
def test_modules_of_hugging_face_layouts_have_rows(family):
  layout = families.FAMILIES[family].layout
  for modules in (layout.outer | layout.block | layout.classifier).keys():
    for module in modules.split():
      leaves = ("embedding", "kernel", "scale")
      assert sum(params.find(f"{module}/{x}") is not None for x in leaves) == 1


@pytest.mark.parametrize(
  ("path", "kind", "split"),
  [
    ("blocks_0/attn/q/kernel", "qkv", 1),
    ("blocks_11/attn/v/diagonal", "qkv", None),
    ("mu/blocks_0/attn/k/kernel", "qkv", 1),
    ("blocks_0/attn/q/bias", "other", None),
    ("blocks_0/attn/o/kernel", "linear", 0),
    ("blocks_0/mlp/gate/kernel", "linear", 1),
    ("blocks_0/mlp/down/kernel", "linear", 0),
    ("head/kernel", "linear", 1),
    ("pooler/kernel", "other", None),
    ("embed/embedding", "embedding", 0),
    ("embed_expand/kernel", "embedding", None),
    ("position_embed/embedding", "embedding", None),
    ("blocks_0/attn/log_slopes", "other", None),
    ("seq/kernel", "other", None),
  ],
)
def test_kind_and_split_axis(path, kind, split):
  assert params.kind_of(path) == kind
  assert params.split_axis(path) == split
  if kind != "other":
    assert re.fullmatch(params.KINDS[kind], path)
  else:
    assert not any(re.fullmatch(x, path) for x in params.KINDS.values())

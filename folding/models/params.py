"""The parameters of our models: one table of paths, kinds and axes.

Letters as in `folding.models`, and: P positions, S segments, R buckets of
distances, E width again, e width of the embeddings (D unless these are projected),
r rank of the embedding of tokens. Outputs of the head are C, also if they are the
vocabulary; key/value heads are J, also if J = H. Paths are those of an array in its
layer ("attn/q/kernel"); a full path has "blocks_<n>/" before it. The modules of
Hugging Face checkpoints are in `families.FAMILIES`.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["qkv", "linear", "embedding", "other"]


class Param(NamedTuple):
  """A row of the table.

  Attributes:
    path: Pattern of the end of its path.
    kind: Kind under which `compression.accounting` counts it.
    axes: Letters of its dense shape. Folding makes some of them smaller.
    split: Letter of the axis that the mesh axis "tensor" splits; "": none.
  """

  path: str
  kind: Kind
  axes: str
  split: str = ""


TABLE: tuple[Param, ...] = (
  Param("embed/embedding", "embedding", "V e", "V"),
  Param("embed_expand/kernel", "embedding", "r e"),
  Param("embed_expand/bias", "other", "e"),
  Param("position_embed/embedding", "embedding", "P e"),
  Param("segment_embed/embedding", "embedding", "S e"),
  Param("embed_project/kernel", "other", "e D"),
  Param("embed_project/bias", "other", "D"),
  Param("attn/q/kernel", "qkv", "D H K", "H"),
  Param("attn/[kv]/kernel", "qkv", "D J K", "J"),
  Param("attn/v/diagonal", "qkv", "HK 1 1"),
  Param("attn/o/kernel", "linear", "H K D", "H"),
  Param("attn/q/bias", "other", "H K"),
  Param("attn/[kv]/bias", "other", "J K"),
  Param("attn/o/bias", "other", "D"),
  Param("attn/[qk]_norm/scale", "other", "K"),
  Param("attn/log_slopes", "other", "H"),
  Param("attn/relative_bias", "other", "R H"),
  Param("attn/frequency", "other", "J K"),
  Param("mlp/(up|gate)/kernel", "linear", "D F", "F"),
  Param("mlp/down/kernel", "linear", "F D", "F"),
  Param("mlp/(up|gate)/bias", "other", "F"),
  Param("mlp/down/bias", "other", "D"),
  Param("head/kernel", "linear", "D C", "C"),
  Param("head/bias", "other", "C"),
  Param("pooler/kernel", "other", "D E"),
  Param("pooler/bias", "other", "E"),
  Param("norm_embed/(scale|bias)", "other", "e"),
  Param("norm_(attn|mlp)_out/(scale|bias)", "other", "D"),
  Param("norm_(attn|mlp|final|pooler)/(scale|bias)", "other", "D"),
)
# {kind: pattern of full paths}, for `compression.accounting`.
KINDS = {
  kind: "|".join(rf"(?:.*/)?{x.path}" for x in TABLE if x.kind == kind)
  for kind in ("qkv", "linear", "embedding")
}


def find(path: str) -> Param | None:
  """Returns the row of a path, None if it is not one of our parameters.

  Args:
    path: Path of a parameter, or of an array that belongs to one, such as a
      moment.

  Example:
    >>> find("blocks_0/attn/q/kernel").axes
    'D H K'
  """
  for row in TABLE:
    if re.fullmatch(rf"(.*/)?{row.path}", path):
      return row
  return None


def kind_of(path: str) -> Kind:
  """Returns the kind of a parameter; "other" if it is not in the table."""
  row = find(path)
  return "other" if row is None else row.kind


def axis_of(path: str, letters: str) -> int | None:
  """Returns the first axis of a parameter that has one of these letters.

  Example:
    >>> axis_of("blocks_0/mlp/down/kernel", "F"), axis_of("embed/embedding", "F")
    (0, None)
  """
  row = find(path)
  axes = row.axes.split() if row else []
  return next((n for n, axis in enumerate(axes) if axis in letters), None)


def split_axis(path: str) -> int | None:
  """Returns the axis that the mesh axis "tensor" splits; None: none."""
  row = find(path)
  return axis_of(path, row.split) if row and row.split else None

"""Measures what a rank keeps of each layer: `python docs/ranks.py MODEL TEXTS`.

MODEL is a sentence encoder or classifier that `folding.load` reads, TEXTS a file
with one text per line, of which the first 512 are read. The shares go to
docs/diagrams/ranks.json, and `python docs/diagrams.py` draws them. They are those
of `fold_pretrained` before any fit:

    logits: share of the variance of the logits that G channels of W_Q and W_K keep
    values: share of the variance of the output of attention that rank r of W_V and
            W_O keeps, on texts that they were not fitted to
"""

import json
import pathlib
import sys

import numpy as np

import folding
from folding.compression import lowrank
from folding.data.padding import encode_rows, padded
from folding.models.shape import Shape
from folding.training.fold_layer import head_moments, logit_terms
from folding.training.stream import (
  Stream,
  advance,
  embed_batches,
  input_moments,
  make_block,
)

SHARES = pathlib.Path(__file__).parent / "diagrams" / "ranks.json"
TEXTS, LENGTH, BATCH = 512, 64, 64


def main(source: str, path: str) -> None:
  """Writes the shares of each layer."""
  model = folding.load(source)
  texts = pathlib.Path(path).read_text(encoding="utf-8").splitlines()[:TEXTS]
  rows = encode_rows(model.tokenizer, texts, LENGTH).ids
  batches = []
  for start in range(0, len(rows), BATCH):
    some = rows[start : start + BATCH]
    pad_id = model.tokenizer.pad_id
    tokens, mask = padded(some, (len(some), LENGTH), pad_id)
    batches.append({"tokens": tokens, "mask": mask})
  stream = embed_batches(model.shape, model.params, batches)
  found = {"logits": [], "values": []}
  for n in range(model.shape.num_layers):
    params = model.params[f"blocks_{n}"]
    for name, shares in _shares(model.shape, n, params, stream).items():
      found[name].append([round(float(share), 4) for share in shares])
    stream = advance(make_block(model.shape, n), params, stream)
  SHARES.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _shares(shape: Shape, n: int, params, stream: Stream) -> dict[str, list]:
  """Returns the shares that 1, 2, ... of the K channels of a layer keep."""
  block, attn = make_block(shape, n), params["attn"]
  terms = logit_terms(
    shape, block.layer, attn, head_moments(block, params, stream)
  )
  kept = terms.variance_JK.sum(axis=0).cumsum()
  fitted, held_out = (
    input_moments(block, params, Stream(*half), ("o",))["o"]
    for half in ((part[k::2] for part in stream) for k in range(2))
  )
  o = np.asarray(attn["o"]["kernel"]).reshape(-1, shape.width)

  def variance(projection):
    moment = held_out.around(attn["o"])
    return np.einsum("FD,FE,ED->", projection, moment, projection)

  ranks = range(1, shape.head_dim + 1)
  folded = lowrank.fold_values(attn["v"], attn["o"], fitted, ranks)
  return {
    "logits": list(kept / kept[-1]),
    "values": [1 - variance(low.wrong) / variance(o) for low in folded],
  }


if __name__ == "__main__":
  main(*sys.argv[1:])

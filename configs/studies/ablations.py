r"""Ours at 70%, one choice changed at a time.

Axis and G, positions, number of heads, DWC, the score, granularity, patience,
verification, begin and end of FPP, and distillation. Positions and heads change
the dense model too: its twins are there under their own names.

Run:     folding study \
           configs/studies/ablations.py:FOLDER,trec,tiny_shakespeare --workdir=DIR
"""

import dataclasses
from typing import Any

from configs.studies import from_scratch
from folding.studies import methods
from folding.studies.methods import Method
from folding.studies.study import Study


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  return Study(
    datasets=from_scratch.datasets(where), methods=_methods(), levels=(0.7,)
  )


def _methods() -> dict[str, Method]:
  found = methods.pick("dense", "ours")
  for groups in (2, 4):
    found[f"groups-{groups}"] = _ours(f"G = {groups}", fold__groups=groups)
  for groups in (16, 64):
    found[f"rows-{groups}"] = _ours(
      f"rows of inputs are identical, G = {groups}",
      fold__axis="input",
      fold__groups=groups,
    )
  for positions in ("learned", "rope", "none"):
    changed = {"model__positions": positions}
    found[f"dense-{positions}"] = _dense(f"positions: {positions}", **changed)
    found[positions] = _ours(f"positions: {positions}", **changed)
    found[f"{positions}-groups-4"] = _ours(
      f"positions: {positions}, G = 4", fold__groups=4, **changed
    )
    found[f"{positions}-v-dense"] = _ours(
      f"positions: {positions}, W_V dense", fold__values="dense", **changed
    )
  for heads in (4, 8, 32):
    changed = {"model__num_heads": heads}
    found[f"dense-heads-{heads}"] = _dense(f"{heads} heads", **changed)
    found[f"heads-{heads}"] = _ours(f"{heads} heads", **changed)
  found |= {
    "v-dense": _ours("W_V dense", fold__values="dense"),
    "qk-dense": _ours("W_Q and W_K dense", fold__groups=0),
  }
  for score in (
    *("activation", "magnitude", "relative", "movement", "random"),
  ):
    found[f"score-{score}"] = _ours(f"score: {score}", fpp__score=score)
  found |= {
    "weights": _ours("single weights", fpp__granularity="weight"),
    "token-rows": _ours(
      "whole rows of embeddings", fpp__embedding_granularity="row"
    ),
    "patience-0": _ours("zeroed without freezing first", fpp__patience=0),
    "patience-3": _ours("frozen for three checks", fpp__patience=3),
    "verified": _ours(
      "a check may add 1% to the loss; may end above its size",
      fpp__tolerance=0.01,
    ),
    "begin-10": _ours("from 10% of the steps", fpp__begin=0.1),
    "begin-70": _ours("from 70% of the steps", fpp__begin=0.7),
    "end-60": _ours("until 60% of the steps, so longer healing", fpp__end=0.6),
    "end-100": _ours("until the end, no healing", fpp__end=1.0),
  }
  recovery = {"fpp__begin": 0.05, "fpp__end": 0.5}
  found["from-dense"] = _ours(
    "a trained dense model, folded, then recovered", **recovery
  )
  found["from-dense-distilled"] = _ours(
    "the same, which learns from the dense model's logits",
    distill__logits=0.7,
    **recovery,
  )
  for name in ("from-dense", "from-dense-distilled"):
    found[name] = dataclasses.replace(found[name], after=True)
  return found


def _ours(about: str, **edits: Any) -> Method:
  return Method(f"ours; {about}", {**methods.FOLDED, **_dotted(edits)})


def _dense(about: str, **edits: Any) -> Method:
  return Method(f"dense; {about}", {"dense": True, **_dotted(edits)}, "fixed")


def _dotted(edits: dict[str, Any]) -> dict[str, Any]:
  return {name.replace("__", "."): value for name, value in edits.items()}

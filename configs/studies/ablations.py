r"""Ours at 70% with one choice changed at a time, with three seeds.

Axis and G, positions, number of heads, the score, granularity, patience,
verification, begin and end of FPP, and distillation. Positions and heads change
the dense model too; `dense-NAME` is the baseline of such a change. ARGUMENT is
as in from_scratch.py.

Command: folding study \
           configs/studies/ablations.py:FOLDER,trec,tiny_shakespeare --workdir=DIR
Time:    120 runs per data set, about a minute each on two cores
Expect:  the tables of docs/experiments.md, "One choice at a time"
"""

import dataclasses
from typing import Any

from configs.studies import from_scratch
from folding.studies import methods
from folding.studies.grid import Study
from folding.studies.methods import Method


def get_study(where: str = "") -> Study:
  """Returns the study; see `from_scratch.datasets` for `where`."""
  return Study(
    datasets=from_scratch.datasets(where), methods=_methods(), savings=(0.7,)
  )


def _methods() -> dict[str, Method]:
  found = methods.pick("dense", "ours")
  for groups in (2, 4):
    found[f"groups-{groups}"] = _ours(f"G = {groups}", fold__groups=groups)
  for groups in (16, 64):
    found[f"rows-{groups}"] = _ours(
      f"identical rows of inputs, G = {groups}",
      fold__axis="input",
      fold__groups=groups,
    )
  for positions in ("learned", "rope", "none"):
    changed = {"model__positions": positions}
    found[f"dense-{positions}"] = _dense(f"positions: {positions}", **changed)
    found[positions] = _ours(f"positions: {positions}", **changed)
    found[f"{positions}-v-dense"] = _ours(
      f"positions: {positions}, W_V dense", fold__values="dense", **changed
    )
  for heads in (4, 8, 32):
    changed = {"model__num_heads": heads}
    found[f"dense-heads-{heads}"] = _dense(f"{heads} heads", **changed)
    found[f"heads-{heads}"] = _ours(f"{heads} heads", **changed)
  for score in ("activation", "magnitude", "relative", "movement", "random"):
    found[f"score-{score}"] = _ours(f"score: {score}", fpp__score=score)
  found |= {
    "v-dense": _ours("W_V dense", fold__values="dense"),
    "qk-dense": _ours("W_Q and W_K dense", fold__groups=0),
    "weights": _ours("single weights", fpp__granularity="weight"),
    "token-rows": _ours(
      "whole rows of embeddings", fpp__embedding_granularity="row"
    ),
    "patience-0": _ours("zeroed without freezing", fpp__patience=0),
    "patience-3": _ours("frozen for three updates", fpp__patience=3),
    "verified": _ours(
      "a mask update may add 1% to the loss; may miss its size",
      fpp__tolerance=0.01,
    ),
    "begin-10": _ours("from 10% of the steps", fpp__begin=0.1),
    "begin-70": _ours("from 70% of the steps", fpp__begin=0.7),
    "end-60": _ours("until 60% of the steps: longer healing", fpp__end=0.6),
    "end-100": _ours("until the end: no healing", fpp__end=1.0),
  }
  recovery = {"fpp__begin": 0.05, "fpp__end": 0.5}
  started = {
    "from-dense": _ours("folded after training, then recovered", **recovery),
    "from-dense-distilled": _ours(
      "the same, with the dense model as teacher",
      distill__logits=0.7,
      **recovery,
    ),
  }
  return found | {
    name: dataclasses.replace(method, after=True)
    for name, method in started.items()
  }


def _ours(about: str, **changed: Any) -> Method:
  return Method(
    f"ours; {about}",
    lambda base, saving: methods.folded(saving) | _dotted(changed),
  )


def _dense(about: str, **changed: Any) -> Method:
  return Method(
    f"dense; {about}",
    lambda base, saving: {"dense": True} | _dotted(changed),
    has_savings=False,
  )


def _dotted(changed: dict[str, Any]) -> dict[str, Any]:
  return {name.replace("__", "."): value for name, value in changed.items()}

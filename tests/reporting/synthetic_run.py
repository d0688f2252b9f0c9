"""A made-up run directory."""

import json
import math
import pathlib
from typing import Any

from folding import config as config_lib

KINDS = ("qkv", "linear", "embedding", "other")
LM_TEST = {
  "loss": 2.9012,
  "bits_per_byte": 1.9034,
  "perplexity": 18.1961,
  "num_tokens": 123456,
  "checkpoint_step": 500,
}
CLASSIFY_TEST = {
  "loss": 0.412,
  "accuracy": 0.868,
  "num_examples": 500,
  "checkpoint_step": None,
}


def config(**fields: Any) -> config_lib.Config:
  """Returns a resolved config of 600 steps; fields of `Config` override."""
  base: dict[str, Any] = {
    "train": config_lib.TrainConfig(steps=600),
    "fpp": config_lib.FPPConfig(begin=0.1, end=0.7),
  }
  return config_lib.resolve(config_lib.Config(**(base | fields)))


def write(
  workdir: pathlib.Path,
  run_config: config_lib.Config | None = None,
  steps: int | None = None,
  **changes: Any,
) -> str:
  """Writes a run and returns its directory.

  Args:
    workdir: The directory; it is made.
    run_config: The resolved config; None: `config()`.
    steps: Number of steps of an unfinished run; None: a finished run.
    **changes: Fields of `result.json` to replace.
  """
  c = config() if run_config is None else run_config
  workdir.mkdir(parents=True)
  config_lib.save(c, str(workdir / "config.json"))
  records = metrics(c, c.train.steps if steps is None else steps)
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(record) + "\n" for record in records)
  )
  values = result(c, steps) | changes
  (workdir / "result.json").write_text(json.dumps(values))
  return str(workdir)


def result(c: config_lib.Config, steps: int | None = None) -> dict[str, Any]:
  """Returns the content of `result.json`."""
  arrays = layers(c)
  counts = {
    kind: {
      name: sum(a[name] for a in arrays if a["group"] == kind)
      for name in ("dense", "stored")
    }
    for kind in KINDS
  }
  counts["overall"] = {
    name: sum(count[name] for count in counts.values())
    for name in ("dense", "stored")
  }
  sizes = {
    kind: {name: 4 * n for name, n in count.items()}
    | {"masks": 0 if c.dense else count["dense"] // 8}
    for kind, count in counts.items()
  }
  total = c.train.steps
  done = total if steps is None else steps
  test = LM_TEST if c.task == "lm" else CLASSIFY_TEST
  return {
    "schema": 1,
    "finished": done == total,
    "steps": done,
    "total_steps": total,
    "seconds": 231.2 * done / total,
    "tokens_per_second": 10234.4,
    "device": "cpu x1 (AMD EPYC)",
    "versions": {"folding": "0.1.0", "jax": "0.10.2"},
    "commit": "3f2a9c1",
    "test": dict(test) if done == total else None,
    "parameters": counts,
    "bytes": sizes,
    "layers": arrays,
  }


def layers(c: config_lib.Config) -> list[dict[str, Any]]:
  """Returns arrays of a model; without `dense`, 70% of two are zero."""
  d, f, zeros = c.model.width, 4 * c.model.width, 0.0 if c.dense else 0.7

  def array(path, group, shape, dense=None, zeros=0.0):
    size = math.prod(shape)
    return {
      "path": path,
      "group": group,
      "shape": shape,
      "dense": size if dense is None else dense,
      "stored": size - round(size * zeros),
      "zeros": zeros,
    }

  arrays = [array("embedding/embedding", "embedding", [64, d], zeros=zeros)]
  for n in range(c.model.num_layers):
    path = f"blocks_{n}"
    v = [d, d] if c.dense else [d]
    arrays += [
      array(f"{path}/attn/v/kernel", "qkv", v, dense=d * d),
      array(f"{path}/mlp/up/kernel", "linear", [d, f], zeros=zeros),
      array(f"{path}/mlp/up/bias", "other", [f]),
    ]
  return arrays


def metrics(c: config_lib.Config, steps: int) -> list[dict[str, Any]]:
  """Returns the records up to a step."""
  records = []
  for step in range(20, steps + 1, 20):
    share = step / c.train.steps
    record = {"split": "train", "step": step, "loss": 5 - share + c.seed}
    if not c.dense:
      record |= {
        "sparsity": 0.7 * share,
        "frozen": 0.1 * (1 - share),
        "trainable": round(9000 * (1 - share)),
      }
    records.append(record)
    if step % 100 == 0:
      valid = {"split": "valid", "step": step, "loss": 5.1 - share + c.seed}
      if c.task == "lm":
        valid["bits_per_byte"] = 0.6 * valid["loss"]
      else:
        valid["accuracy"] = share
      records.append(valid)
  return records

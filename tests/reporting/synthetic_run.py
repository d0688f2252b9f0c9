"""A made-up run directory with figures like those of a real run."""

import json
import math
import pathlib
import random
from typing import Any

from folding import config as config_lib

GROUPS = ("qkv", "linear", "embedding", "other")
VERSIONS = {
  "folding": "0.1.0",
  "python": "3.12.3",
  "jax": "0.10.2",
  "flax": "0.12.1",
  "optax": "0.2.6",
}
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
    workdir: Made here.
    run_config: Resolved; None: the paper preset on the standard library.
    steps: How far it came; None: to the end.
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
  """Returns what `result.json` holds."""
  arrays = layers(c)
  counts = {
    group: {
      "dense": sum(a["dense"] for a in arrays if a["group"] == group),
      "stored": sum(a["stored"] for a in arrays if a["group"] == group),
    }
    for group in GROUPS
  }
  counts["overall"] = {
    name: sum(counts[group][name] for group in GROUPS)
    for name in ("dense", "stored")
  }
  sizes = {
    group: {
      "dense": 4 * count["dense"],
      "stored": 4 * count["stored"],
      # One bit an element, where anything was pruned.
      "masks": count["dense"] // 8
      if group in ("linear", "embedding") and _pruned(c)
      else 0,
    }
    for group, count in counts.items()
  }
  sizes["overall"]["masks"] = sum(sizes[group]["masks"] for group in GROUPS)
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
    "versions": VERSIONS,
    "commit": "3f2a9c1",
    "test": dict(test) if done == total else None,
    "parameters": counts,
    "bytes": sizes,
    "layers": arrays,
  }


def layers(c: config_lib.Config) -> list[dict[str, Any]]:
  """Returns the arrays of the model, pruned and folded as asked for."""
  rng = random.Random(c.seed)
  d, f, h = c.model.width, c.model.mlp_width, c.model.num_heads
  prune = 0.7 if _pruned(c) else 0.0
  arrays: list[dict[str, Any]] = []

  def add(path, group, shape, dense, zeros=0.0):
    size = math.prod(shape)
    stored = size - round(size * zeros)
    arrays.append(
      {
        "path": path,
        "group": group,
        "shape": shape,
        "dense": dense,
        "stored": stored,
        "zeros": 1 - stored / size,
      }
    )

  def spread():
    return min(0.98, max(0.0, prune + rng.uniform(-0.12, 0.12))) * (prune > 0)

  add("embedding/embedding", "embedding", [1024, d], 1024 * d, spread())
  folded = bool(c.fold.groups)
  for n in range(c.model.num_layers):
    block = f"blocks_{n}"
    for name in "qk":
      shape = [d, h, c.fold.groups] if folded else [d, h, d // h]
      add(f"{block}/attn/{name}/kernel", "qkv", shape, d * d)
    add(f"{block}/attn/v/kernel", "qkv", [d] if folded else [d, d], d * d)
    add(f"{block}/attn/o/kernel", "linear", [h, d // h, d], d * d, spread())
    add(f"{block}/mlp/up/kernel", "linear", [d, f], d * f, spread())
    add(f"{block}/mlp/down/kernel", "linear", [f, d], d * f, spread())
    add(f"{block}/mlp/up/bias", "other", [f], f)
    add(f"{block}/norm_attn/scale", "other", [d], d)
    add(f"{block}/norm_mlp/scale", "other", [d], d)
  add("norm_out/scale", "other", [d], d)
  return arrays


def metrics(c: config_lib.Config, steps: int) -> list[dict[str, Any]]:
  """Returns the records up to a step."""
  rng = random.Random(f"{c.seed} {c.fpp.score} {c.model.num_layers}")
  floor = 2.75 + rng.uniform(-0.08, 0.08)
  total = c.train.steps
  begin, end = c.fpp.begin * total, c.fpp.end * total
  records = []
  for step in range(20, steps + 1, 20):
    loss = floor + 4.1 * math.exp(-step / (0.17 * total))
    ramp = min(1.0, max(0.0, (step - begin) / (end - begin)))
    if _pruned(c):
      loss += 0.25 * ramp * math.exp(-max(0.0, step - end) / (0.15 * total))
    if c.task == "classify":
      loss /= 6.5
    record = {
      "split": "train",
      "step": step,
      "loss": loss * (1 + rng.gauss(0, 0.012)),
      "learning_rate": 0.003,
      "tokens_per_second": 10234.4,
      "seconds": 0.385 * step,
    }
    if _pruned(c):
      # Cubic schedule, as in Zhu and Gupta, 2017.
      zero = 0.7 * (1 - (1 - ramp) ** 3)
      frozen = 0.06 * (1 - ramp) * (ramp > 0)
      record |= {
        "sparsity": zero,
        "frozen": frozen,
        "trainable": round(120000 + 720000 * (1 - zero - frozen)),
      }
    records.append(record)
    if step % 100 == 0:
      valid = {"split": "valid", "step": step, "loss": loss * 1.03}
      if c.task == "lm":
        valid |= {
          "bits_per_byte": loss * 1.03 * 0.656,
          "perplexity": math.exp(loss * 1.03),
        }
      else:
        valid["accuracy"] = 0.9 - 0.5 * math.exp(-step / (0.2 * total))
      records.append(valid)
  return records


def _pruned(c: config_lib.Config) -> bool:
  return any((c.fpp.linear, c.fpp.embedding, c.fpp.overall))

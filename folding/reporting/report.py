"""The page about one run: `report.json`, `report.md` and its plots.

Every figure on the page was measured; what was only asked for stands under
"Settings" and is called a target.
"""

import dataclasses
import json
import os
from typing import Any

from folding import config as config_lib
from folding import files, schema
from folding.reporting import pages, runs

load_run = runs.load_run


def write_report(workdir: str) -> dict[str, Any]:
  """Writes the report of a run into its directory, and returns it.

  `report.json` is what is returned; `report.md` is the same for a reader,
  with `curves.png`, `layers.png`, `parameters.png` and, where FPP ran,
  `sparsity.png`.

  Args:
    workdir: The directory of a run, finished or not.

  Returns:
    The figures: `parameters` and `bytes` by group, each with `dense`,
    `stored` and `compression`; `test`, None before the end; and how the run
    was made.

  Raises:
    schema.ConfigError: the folder is not a run, or a file of it is damaged.
  """
  # Drawing is slow to import, and `load_run` and `summarize` do not need it.
  from folding.reporting import heatmap, plots

  run = load_run(workdir)
  summary = summarize(run)
  drawings = {
    "curves.png": plots.curves,
    "layers.png": heatmap.layers,
    "parameters.png": plots.parameters,
  }
  if run.prunes:
    drawings["sparsity.png"] = plots.sparsity
  for name, draw in drawings.items():
    plots.save(draw(run), os.path.join(workdir, name))
  text = json.dumps(summary, indent=2) + "\n"
  files.write_file(os.path.join(workdir, "report.json"), text)
  page = pages.markdown(run, settings(run.config))
  # Last, so that a page never embeds a plot that is not there.
  files.write_file(os.path.join(workdir, "report.md"), page)
  return summary


def summarize(run: runs.Run) -> dict[str, Any]:
  """Returns the figures of a run, as `report.json` holds them."""
  result, config = run.result, run.config
  measured = [r for r in run.train if "sparsity" in r]
  return {
    "schema": runs.SCHEMA,
    "run": run.name,
    "task": config.task,
    "data": pages.data_name(config),
    "preset": config.preset,
    "dense": config.dense,
    "seed": config.seed,
    "finished": result.finished,
    "steps": result.steps,
    "total_steps": result.total_steps,
    "seconds": result.seconds,
    "tokens_per_second": result.tokens_per_second,
    "device": result.device,
    "versions": result.versions,
    "commit": result.commit,
    "parameters": {g: _parameters(run, g) for g in runs.GROUPS},
    "bytes": {g: _bytes(run, g) for g in runs.GROUPS},
    "sparsity": measured[-1]["sparsity"] if measured else None,
    "test": _test(run.test),
    "energy": run.energy,
    "settings": settings(config),
  }


def settings(config: config_lib.Config) -> list[str]:
  """Returns "name: default -> value" for each setting the run chose.

  What the preset or the other settings imply is left out, so that these
  settings alone give the same run again.
  """
  chosen = _without_implied(config, config_lib.Config())
  try:
    implied = config_lib.resolve(chosen)
  except schema.ConfigError:
    # The implied values would not fit; then every value was chosen.
    return schema.differences(config_lib.Config(), config)
  return [
    *schema.differences(config_lib.Config(), chosen),
    *schema.differences(implied, config),
  ]


def _without_implied(config: Any, default: Any) -> Any:
  """Returns a copy in which every field that may be implied is None."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    standard = getattr(default, field.name)
    if dataclasses.is_dataclass(value):
      values[field.name] = _without_implied(value, standard)
    else:
      values[field.name] = None if standard is None else value
  return dataclasses.replace(config, **values)


def _parameters(run: runs.Run, group: str) -> dict[str, Any]:
  c = getattr(run.result.parameters, group)
  return {"dense": c.dense, "stored": c.stored, "compression": c.compression}


def _bytes(run: runs.Run, group: str) -> dict[str, Any]:
  c = getattr(run.result.bytes, group)
  return {
    "dense": c.dense,
    "stored": c.stored,
    "masks": c.masks,
    "compression": c.compression,
    "compression_with_masks": c.compression_with_masks,
  }


def _test(
  test: runs.LmTest | runs.ClassifyTest | None,
) -> dict[str, Any] | None:
  if test is None:
    return None
  figures = dataclasses.asdict(test)
  if isinstance(test, runs.ClassifyTest):
    low, high = runs.wilson(test.accuracy, test.num_examples)
    figures |= {"accuracy_low": low, "accuracy_high": high}
  return figures

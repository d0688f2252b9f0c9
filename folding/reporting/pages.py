"""The text of `report.md`: what was trained, what came of it, how to repeat."""

import os

from folding import config as config_lib
from folding.reporting import runs, words

_POSITIONS = {
  "alibi": "ALiBi positions",
  "learned": "learned positions",
  "rope": "rotary positions",
  "none": "no positions",
}


def markdown(run: runs.Run, settings: list[str]) -> str:
  """Returns the page.

  Args:
    run: The run.
    settings: "name: default -> value" for each setting the run chose.
  """
  parts = [f"# {run.name}", summary(run)]
  if not run.result.finished:
    parts.append(
      f"> **Unfinished:** step {words.count(run.result.steps)} of "
      f"{words.count(run.result.total_steps)}. The sizes are those of the last "
      "checkpoint, and there is no test figure yet."
    )
  parts += ["## Size", _size(run), "## Quality", _quality(run)]
  if run.prunes:
    parts += ["## Pruning", _pruning(run)]
  parts += ["## Layers", _layers(run)]
  parts += ["## How to reproduce", _reproduce(run, settings)]
  return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(run: runs.Run) -> str:
  """Returns the run in one paragraph, with the measured figures."""
  m, c, r = run.config.model, run.config, run.result
  kind = "language model" if c.task == "lm" else "classifier"
  overall = r.parameters.overall
  done = "was trained" if r.finished else "has been trained so far"
  speed = ""
  if r.tokens_per_second:
    speed = f" at {words.count(r.tokens_per_second)} tokens per second"
  sentences = [
    f"A {kind} of {words.counted(m.num_layers, 'layer')} (width {m.width}, "
    f"{words.counted(m.num_heads, 'head')}, {_POSITIONS[m.positions]}) {done} "
    f"on {data_name(c)} for {words.counted(r.steps, 'step')}, in "
    f"{words.duration(r.seconds)}{speed}, on {r.device}."
  ]
  if overall.stored < overall.dense:
    sentences.append(
      f"{_method(run)} It stores {words.count(overall.stored)} of the "
      f"{words.count(overall.dense)} parameters of its dense twin: "
      f"**{words.percent(overall.compression)} smaller**."
    )
  else:
    sentences.append(
      f"{_method(run)} It stores {words.count(overall.stored)} parameters."
    )
  if run.test:
    sentences.append(f"On the test split it reaches {test_figure(run)}.")
  elif r.finished:
    sentences.append("It was not evaluated on a test split.")
  return " ".join(sentences)


def data_name(config: config_lib.Config) -> str:
  """Returns what the run was trained on, without the folders before it."""
  path = config.data.path
  if path is None:
    return config.data.name
  return os.path.basename(os.path.normpath(path))


def test_figure(run: runs.Run) -> str:
  """Returns the test figure in words, with its uncertainty where known."""
  test = run.test
  if isinstance(test, runs.LmTest):
    return (
      f"**{test.bits_per_byte:.3f} bits per byte** (perplexity "
      f"{test.perplexity:,.2f} over {words.count(test.num_tokens)} tokens)"
    )
  if isinstance(test, runs.ClassifyTest):
    low, high = runs.wilson(test.accuracy, test.num_examples)
    return (
      f"**{words.percent(test.accuracy)} accuracy** (95% interval "
      f"{words.percent(low)} to {words.percent(high)}, "
      f"{words.count(test.num_examples)} examples)"
    )
  return words.NOTHING


def _method(run: runs.Run) -> str:
  """Returns which of the two ways to save were used, as a sentence."""
  if run.config.dense:
    return "It is the dense twin: nothing is folded, nothing pruned."
  ways = []
  if run.folds:
    ways.append("attention weights are folded")
  if run.prunes:
    how = "by FPP while training"
    if run.prunes_at_once:
      how = f"by {run.config.compress.prune} before the first step"
    ways.append(f"{'other ' if run.folds else ''}weights are pruned {how}")
  if not ways:
    return "Nothing is folded and nothing pruned."
  text = words.listing(ways)
  return f"{text[0].upper()}{text[1:]}."


def _size(run: runs.Run) -> str:
  rows = []
  for group in runs.GROUPS:
    p = getattr(run.result.parameters, group)
    b = getattr(run.result.bytes, group)
    row = [
      group,
      words.count(p.dense),
      words.count(p.stored),
      words.percent(p.compression),
      words.count(b.dense),
      words.count(b.stored),
      words.count(b.masks),
      words.percent(b.compression_with_masks),
    ]
    if group == "overall":
      row = [f"**{cell}**" for cell in row]
    rows.append(row)
  header = (
    "Group",
    "Parameters, dense",
    "stored",
    "compression",
    "Bytes, dense",
    "stored",
    "masks",
    "compression with masks",
  )
  return (
    words.table(header, rows)
    + "\nDense is the same model with nothing folded or pruned. Stored counts "
    "the values kept; masks are the bytes that say where those belong. "
    "Compression is 1 - stored / dense, measured.\n"
    "\n![Parameters of the dense twin and those stored, by group]"
    "(parameters.png)"
  )


def _quality(run: runs.Run) -> str:
  lines = []
  if run.test:
    unit = "token" if run.config.task == "lm" else "example"
    line = f"Test: {test_figure(run)}; loss {run.test.loss:.3f} nats per {unit}"
    step = run.test.checkpoint_step
    if step is not None:
      line += f"; measured on the checkpoint of step {words.count(step)}"
    lines.append(f"{line}.")
  else:
    lines.append("There is no test figure.")
  if run.valid:
    last = run.valid[-1]
    lines.append(
      f"Last validation, at step {words.count(last['step'])}: loss "
      f"{last['loss']:.3f}{_valid_figure(last)}."
    )
  lines.append("\n![Loss over steps](curves.png)")
  return "\n".join(lines)


def _valid_figure(record: dict) -> str:
  if "bits_per_byte" in record:
    return f", {record['bits_per_byte']:.3f} bits per byte"
  if "accuracy" in record:
    return f", {words.percent(record['accuracy'])} accuracy"
  return ""


def _pruning(run: runs.Run) -> str:
  f, total = run.config.fpp, run.result.total_steps
  lines = []
  measured = [r for r in run.train if "sparsity" in r]
  if measured:
    last = measured[-1]
    line = (
      f"At step {words.count(last['step'])}, "
      f"{words.percent(last['sparsity'])} of the parameters that FPP may prune "
      "were zero"
    )
    if last.get("frozen"):
      line += f" and {words.percent(last['frozen'])} frozen"
    if "trainable" in last:
      line += f"; {words.count(last['trainable'])} parameters were training"
    lines.append(f"Measured: {line[0].lower()}{line[1:]}.\n")
  targets = [
    ("target of linear", f.linear),
    ("target of embedding", f.embedding),
  ]
  if f.overall is not None:
    targets = [("target of the whole model", f.overall)]
  rows = [(name, words.percent(value)) for name, value in targets]
  if f.linear_layers is not None:
    by_layer = ", ".join(map(words.percent, f.linear_layers))
    rows[0] = ("target of linear, by layer", by_layer)
  if run.prunes_at_once:
    rows.append(("pruned before the first step by", run.config.compress.prune))
  else:
    # As `optimizer.check_steps`, which would import jax.
    begin = int(f.begin * total)
    rows += [
      ("score", f.score),
      (
        "granularity",
        f"{f.granularity}, of embeddings {f.embedding_granularity}",
      ),
      ("begins at step", words.count(begin)),
      (
        "ends at step",
        words.count(max(begin, min(int(f.end * total), total - 1))),
      ),
      ("checks", f"{f.checks}, patience {f.patience}"),
      ("decay of averages", f"{f.decay:g}"),
    ]
    if f.tolerance is not None:
      rows.append(("tolerance", words.percent(f.tolerance)))
  lines.append(words.table(("Setting", "Asked for"), rows, num_text=2))
  lines.append("![Zero, frozen and trainable parameters](sparsity.png)")
  return "\n".join(lines)


def _layers(run: runs.Run) -> str:
  rows = [
    (
      f"`{layer.path}`",
      layer.group,
      " × ".join(map(str, layer.shape)) or "scalar",
      words.count(layer.dense),
      words.count(layer.stored),
      words.percent(layer.compression),
      words.percent(layer.zeros),
    )
    for layer in run.result.layers
  ]
  header = (
    "Array",
    "Group",
    "Shape",
    "Dense",
    "Stored",
    "Compression",
    "Zeros",
  )
  return (
    "![Compression of each projection in each block](layers.png)\n\n"
    f"<details>\n<summary>All {len(rows)} arrays</summary>\n\n"
    + words.table(header, rows, num_text=3)
    + "\n</details>"
  )


def _energy(used: dict) -> list[tuple[str, str]]:
  by = f"estimated by {used['by']}; {used['country']}"
  return [
    ("electricity", f"{used['kwh']:.3g} kWh ({by})"),
    ("emissions", f"{used['kg_co2e']:.3g} kg CO2e ({by})"),
  ]


def _reproduce(run: runs.Run, settings: list[str]) -> str:
  r = run.result
  lines = ["`config.json` beside this page is the whole configuration."]
  if settings:
    lines.append("It differs from the defaults in:\n")
    rows = []
    for line in settings:
      name, _, change = line.partition(": ")
      default, _, value = change.partition(" -> ")
      rows.append((f"`{name}`", f"`{default}`", f"`{value}`"))
    lines.append(words.table(("Setting", "Default", "Here"), rows, num_text=3))
  else:
    lines.append("It is the default one.\n")
  rows = [
    (
      "preset",
      "none: the dense twin" if run.config.dense else run.config.preset,
    ),
    ("seed", str(run.config.seed)),
    ("device", r.device),
    ("commit", f"`{r.commit}`" if r.commit else "not known"),
    *(_energy(run.energy) if run.energy else ()),
    *((name, str(version)) for name, version in r.versions.items()),
  ]
  lines.append(words.table(("", "This run"), rows, num_text=2))
  return "\n".join(lines)

"""The tasks: what a model learns, from the labels of a file to words of a report.

A task is a row of `TASKS`, and code asks the row, not its name. `config` reads the
rows, so the functions of a row import what is slow to import.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from folding.errors import ConfigError

Output = Literal["tokens", "scores", "vector"]  # of a model

Array: TypeAlias = Any  # of JAX in a training step, of NumPy elsewhere
Label: TypeAlias = str | float | tuple[str, ...]  # a class, a score, classes

_LARGEST = (2 - 2**-23) * 2.0**127  # of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
  """The labels of a task, and how the outputs of its head read.

  Attributes:
    kind: "class": one of the classes of the data. "classes": any number of them.
      "score": a number; the head has one output.
    columns: Usual names of the column of labels. The first is also the name of a
      prediction.
    read: (label as a file has it, place for messages) -> label of a row. Raises
      `ConfigError`.
    measure: (float[rows, C] logits, labels as `labels.to_array` returns them) ->
      {metric: value}.
    answer: (float[C] outputs of a text, names of the outputs) -> predicted label.
    problem_type: Name of the task in a config.json of transformers. If several
      rows share it, a checkpoint of that name is read as the first of them.
  """

  kind: Literal["class", "classes", "score"]
  columns: tuple[str, ...]
  read: Callable[[Any, str], Label]
  measure: Callable[[Array, Array], dict[str, float]]
  answer: Callable[[Array, Sequence[str]], Label]
  problem_type: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A row of `TASKS`.

  Attributes:
    name: Value of `Config.task`.
    words: The model, in reports.
    verb: The verb of the command line that uses the model.
    output: Type of the model's output, in the description of an export.
    aim: Entry of a batch that the output is compared with. "targets": the next
      tokens. "labels": labels of texts. "taught": the vectors of a teacher.
    loss: (float32 output, aim) -> loss per token or text.
    loss_unit: Its unit, in reports.
    soft_loss: (float32 logits, the teacher's) -> distance per token or text. Both
      are divided by the temperature of distillation before. None: the squared
      error of a score, at no temperature.
    activate: Logits -> what a prediction is read from.
    metrics: Those that may choose the best checkpoint; the first is the default.
    labels: None if texts have none.
  """

  name: str
  words: str
  verb: str = "predict"
  output: str = "float32[b, C]: logits"
  aim: Literal["targets", "labels", "taught"] = "labels"
  loss: Callable[[Array, Array], Array]
  loss_unit: str = "nats per example"
  soft_loss: Callable[[Array, Array], Array] | None = None
  activate: Callable[[Array], Array] = lambda logits: logits
  metrics: tuple[str, ...]
  labels: Labels | None = None

  @property
  def predicts_tokens(self) -> bool:
    """Whether the model predicts each next token of a text."""
    return self.aim == "targets"

  @property
  def makes_vectors(self) -> bool:
    """Whether the output is the vector of a text, learned from a teacher."""
    return self.aim == "taught"

  @property
  def output_kind(self) -> Output:
    """Next-token logits, the vector of a text, or its scores."""
    outputs: dict[str, Output] = {"targets": "tokens", "taught": "vector"}
    return outputs.get(self.aim, "scores")


class Metric(NamedTuple):
  """How a metric is shown: in the line of an evaluation, and in reports."""

  line: str
  words: str


METRICS = {
  "loss": Metric("loss {:.4f}", "loss"),
  "accuracy": Metric("accuracy {:.2%}", "accuracy"),
  "macro_f1": Metric("macro F1 {:.4f}", "macro F1"),
  "matthews": Metric("Matthews {:.4f}", "Matthews correlation"),
  "pearson": Metric("Pearson {:.4f}", "Pearson correlation"),
  "spearman": Metric("Spearman {:.4f}", "Spearman correlation"),
  "cosine": Metric("cosine {:.4f}", "cosine to the teacher"),
  "similarity": Metric(
    "similarity {:.4f}", "correlation of similarities with the teacher's"
  ),
  "perplexity": Metric("perplexity {:.2f}", "perplexity"),
  "bits_per_byte": Metric("bits per byte {:.4f}", "bits per byte"),
}


def task_of(config: Any) -> Task:
  """Returns the row of a config."""
  return TASKS[config.task]


# Labels of files.


def read_class(label: Any, place: str) -> str:
  """Returns the name of a class: a text or a whole number."""
  _require(label, place)
  return _class(label, place)


def read_classes(label: Any, place: str) -> tuple[str, ...]:
  """Returns the classes of a list, or of a text with commas; it may be empty."""
  if not isinstance(label, str | list):
    return (read_class(label, place),)
  # pandas writes lists to .csv like this.
  if isinstance(label, str) and re.fullmatch(
    r"\[(['\"\d].*)?\]", label.strip()
  ):
    raise ConfigError(
      f"{place}: the labels {label!r} are a list as text; write the classes "
      "with commas between them, or lists in a .jsonl"
    )
  names = label if isinstance(label, list) else label.split(",")
  classes = [_class(x, place) for x in names if x != "" or len(names) > 1]
  if len(classes) > len({*classes}) and {*classes} <= {"0", "1"}:
    raise ConfigError(
      f"{place}: the labels {label!r} look like a 0 or 1 for each class; list "
      "the classes that apply instead, such as [2, 5]"
    )
  return tuple(dict.fromkeys(classes))


def read_score(label: Any, place: str) -> float:
  """Returns a number that fits float32."""
  _require(label, place)
  if _is_plain_number(label) and not isinstance(label, bool):
    score = float(label)
    if abs(score) <= _LARGEST:
      return score
  raise ConfigError(
    f"{place}: the label {label!r} is not a number that fits float32, which task "
    "'regress' needs"
  )


def _require(label: Any, place: str) -> None:
  """Raises `ConfigError` if a row has no label."""
  if label is None or not str(label).strip():
    raise ConfigError(
      f"{place}: the row has no label (in a .tsv without a header it is before a "
      "tab, otherwise in the column 'label' or that of data.label_field)"
    )


def _class(label: Any, place: str) -> str:
  name = str(label).strip()
  is_whole = name.lstrip("+-").isdecimal()
  if (
    type(label) not in (int, str)
    or not any(map(is_visible, name))
    or (_is_plain_number(name) and not is_whole)
  ):
    raise ConfigError(
      f"{place}: the label {label!r} is neither a text nor a whole number; a "
      "score needs task 'regress'"
    )
  return require_utf8(name, place)


def is_visible(character: str) -> bool:
  """Returns whether a character is not of those that only format others."""
  return unicodedata.category(character) not in ("Cf", "Cc")


def _is_plain_number(label: Any) -> bool:
  """Returns whether a label is a number; not 1_0, which is 10 for Python."""
  return is_number(label) and "_" not in str(label)


def is_number(value: Any) -> bool:
  """Returns whether a value is a number that fits a float, or its text."""
  try:
    float(value)
  except (OverflowError, TypeError, ValueError):
    return False
  return True


def require_utf8(text: str, place: str) -> str:
  """Returns a text that can be encoded.

  Raises:
    ConfigError: it cannot: JSON allows half of a surrogate pair.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(
      f"{place}: half a character, which UTF-8 cannot encode ({error.reason})"
    ) from error
  return text


# Losses, in nats where they are logarithms.


def cross_entropy(logits: Array, labels: Array) -> Array:
  """Returns -log softmax(logits)[label]."""
  import optax

  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def divergence(student: Array, teacher: Array) -> Array:
  """Returns KL(softmax of the teacher || softmax of the student)."""
  import jax
  import jax.numpy as jnp

  student, teacher = (jax.nn.log_softmax(x) for x in (student, teacher))
  return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def cross_entropies(logits: Array, labels: Array) -> Array:
  """Returns the sum of the cross-entropies of C labels, yes (1) or no (0)."""
  import optax

  return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1)


def divergences(student: Array, teacher: Array) -> Array:
  """Returns the sum of the divergences of C labels, yes or no."""
  import jax
  import optax

  share = jax.nn.sigmoid(teacher)
  each = optax.sigmoid_binary_cross_entropy(student, share)
  each -= optax.sigmoid_binary_cross_entropy(teacher, share)
  return each.sum(axis=-1)


def squared_error(output: Array, score: Array) -> Array:
  """Returns (output - score)^2 of the only output."""
  return (output[..., 0] - score) ** 2


def relative_distance(vectors: Array, taught: Array) -> Array:
  """Returns |vector - taught|^2 / |taught|^2."""
  import jax.numpy as jnp

  size = jnp.maximum((taught**2).sum(axis=-1), 1e-12)
  return ((vectors - taught) ** 2).sum(axis=-1) / size


# Probabilities.


def softmax(logits: Array) -> Array:
  """Returns the probabilities of classes that exclude each other."""
  import jax

  return jax.nn.softmax(logits, axis=-1)


def sigmoid(logits: Array) -> Array:
  """Returns the probability of each class."""
  import jax

  return jax.nn.sigmoid(logits)


# Metrics of labels.


def measure_class(logits: Array, labels: Array) -> dict[str, float]:
  """Returns {"accuracy", "macro_f1", "matthews"}."""
  from sklearn import metrics

  found = logits.argmax(axis=-1)
  matthews = float(metrics.matthews_corrcoef(labels, found))
  return _of_classes(labels, found) | {"matthews": matthews}


def measure_classes(logits: Array, labels: Array) -> dict[str, float]:
  """Returns {"accuracy": of all labels of a row, "macro_f1"}."""
  return _of_classes(labels, logits > 0)


def _of_classes(labels: Array, found: Array) -> dict[str, float]:
  from sklearn import metrics

  options: dict[str, Any] = {"average": "macro", "zero_division": 0}
  return {
    "accuracy": float(metrics.accuracy_score(labels, found)),
    "macro_f1": float(metrics.f1_score(labels, found, **options)),
  }


def measure_score(outputs: Array, labels: Array) -> dict[str, float]:
  """Returns {"pearson", "spearman"}."""
  from scipy import stats

  scores = outputs[:, 0].astype("float64")
  return {
    "pearson": correlation(stats.pearsonr, scores, labels),
    "spearman": correlation(stats.spearmanr, scores, labels),
  }


def correlation(of: Callable[..., Any], x: Array, y: Array) -> float:
  """Returns a correlation of `scipy.stats`; 0 if all x or all y are the same."""
  if not x.size or x.max() == x.min() or y.max() == y.min():
    return 0.0
  return float(of(x, y).statistic)


_ROWS = (
  Task(
    name="lm",
    words="language model",
    verb="generate",
    output="float32[b, l, V]: logits",
    aim="targets",
    loss=cross_entropy,
    loss_unit="nats per token",
    soft_loss=divergence,
    metrics=("loss",),
  ),
  Task(
    name="embed",
    words="sentence encoder",
    verb="encode",
    output="float32[b, D]: vectors",
    aim="taught",
    loss=relative_distance,
    loss_unit="distance to the teacher",
    metrics=("cosine", "similarity", "spearman", "loss"),
  ),
  Task(
    name="classify",
    words="classifier",
    loss=cross_entropy,
    soft_loss=divergence,
    activate=softmax,
    metrics=("accuracy", "macro_f1", "matthews", "loss"),
    labels=Labels(
      kind="class",
      columns=("label",),
      read=read_class,
      measure=measure_class,
      answer=lambda outputs, names: names[int(outputs.argmax())],
      problem_type="single_label_classification",
    ),
  ),
  Task(
    name="regress",
    words="regression model",
    loss=squared_error,
    loss_unit="squared error",
    metrics=("spearman", "pearson", "loss"),
    labels=Labels(
      kind="score",
      columns=("score", "label"),
      read=read_score,
      measure=measure_score,
      answer=lambda outputs, names: float(outputs[0]),
      problem_type="regression",
    ),
  ),
  Task(
    name="multilabel",
    words="classifier of several labels",
    loss=cross_entropies,
    soft_loss=divergences,
    activate=sigmoid,
    metrics=("macro_f1", "accuracy", "loss"),
    labels=Labels(
      kind="classes",
      columns=("labels", "label"),
      read=read_classes,
      measure=measure_classes,
      answer=lambda outputs, names: tuple(
        name for name, p in zip(names, outputs, strict=True) if p > 0.5
      ),
      problem_type="multi_label_classification",
    ),
  ),
)
TASKS = {row.name: row for row in _ROWS}

"""The configuration of a run: every field, default, preset and check.

A config file returns a `Config`, flags override single fields, and `resolve`
fills in what a preset or another field decides. This module imports no JAX.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from folding import files, typed
from folding.errors import ConfigError
from folding.tasks import TASKS, task_of
from folding.typed import OneOf, Range
from folding.typed import edited as edited

# Endings of the local files that are read.
TEXT_ENDINGS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet", ".arrow")
# `pretrained` of a model that has no path.
IN_MEMORY = "a model in memory"

Values = Literal["dense", "diagonal", "identity"]  # kinds of W_V
Pooling = Literal["mean", "first", "last"]
Preset = Literal["none", "moderate", "paper"]
Score = Literal[
  "relative",
  "activation",
  "magnitude",
  "saliency",
  "movement",
  "random",
]

# Rows of `tasks`, and the metrics that may choose a checkpoint of some task.
TaskName = Annotated[str, OneOf(lambda: TASKS)]
Metric = Annotated[
  str,
  OneOf(lambda: dict.fromkeys(m for t in TASKS.values() for m in t.metrics)),
]
_AnOrder = TypeVar("_AnOrder", bound="Order")
# Numbers with their ranges. `resolve` checks every field.
Count = Annotated[int, Range(1, 2**31)]
Natural = Annotated[int, Range(0, 2**31)]
Few = Annotated[int, Range(1, 2**10)]  # each is listed or compiled
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, "[]")]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, ends="()")]
PerLayer = Natural | tuple[Natural, ...]  # for all layers, or one per layer


@dataclasses.dataclass(frozen=True, slots=True)
class DataConfig:
  """Where text comes from and how it becomes batches."""

  name: str = "python_stdlib"  # "python_stdlib" or a TFDS name ("glue/sst2")
  path: str | None = None  # a local file or folder; overrides `name`
  # Folder for prepared TFDS data and for the tokens of large text. None: the
  # default of TFDS, and the folder of the text.
  dir: str | None = None
  # Column of the text, or the two columns of pairs. None: "text", a usual pair
  # such as ("sentence1", "sentence2"), "sentence", or the only column of text.
  text_field: str | tuple[str, str] | None = None
  # Column of the labels. None: "label" ("score" for task "regress", "labels" for
  # "multilabel"), or the only TFDS class label.
  label_field: str | None = None
  valid_fraction: Fraction = 0.1  # for sources without a validation split
  test_fraction: Fraction = 0.1  # for sources without a test split
  tokenizer: str = "bpe"  # "bytes", "bpe", or the path of a tokenizer.json
  # Tokens of a newly trained BPE tokenizer.
  vocab_size: Annotated[int, Range(1, 2**24)] = 1024
  # L, tokens per example of training and tests; longer texts are cut or packed.
  length: Count = 128
  batch_size: Count = 32  # B, examples over all processes
  eval_batch_size: Count = 64
  # Most bytes of training text; valid and test get an eighth each. None: all.
  max_bytes: Natural | None = None
  # Scored pairs for a further evaluation of task "embed": a .tsv with the columns
  # "score", "sentence1" and "sentence2".
  sts: str | None = None
  first_batch: Natural = 0  # batches to skip, e.g. those of an earlier run

  def check(self) -> None:
    """Raises `ConfigError` if two fields do not fit each other."""
    if self.valid_fraction + self.test_fraction >= 1:
      raise ConfigError(
        "data.valid_fraction + data.test_fraction must leave text to train on"
      )
    for name in ("batch_size", "eval_batch_size"):
      size = getattr(self, name)
      if size * self.length > 2**28:
        raise ConfigError(
          f"data.{name} {size:,} of data.length {self.length:,} is more than "
          "the 2^28 tokens that a batch may have"
        )


def data_at(name: str, **fields: Any) -> DataConfig:
  """Returns the configuration of a local path or of a data set's name.

  A path exists, or starts with "." or "/", or has the ending of a text file.
  """
  is_path = name.startswith((".", "/")) or name.endswith(TEXT_ENDINGS)
  if is_path or os.path.exists(name):
    return DataConfig(path=name, **fields)
  return DataConfig(name=name, **fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Design:
  """What all layers of a transformer share; `models.shape.Shape` has the rest."""

  width: Count = 128  # D, channels per token
  # Width of embeddings that are projected to D; 0: D, without a projection.
  embed_width: Natural = 0
  # Project them before their norm and without a bias, as in DeBERTa-v2.
  project_first: bool = False
  causal: bool = True
  norm: Literal["layernorm", "rmsnorm"] = "layernorm"
  # Where the norms are: before each branch, after each sum, or before and after
  # each branch.
  norm_position: Literal["pre", "post", "both"] = "pre"
  # With "pre": attention and the MLP of a layer read the same stream.
  parallel: bool = False
  # With "pre": norm the embeddings, in place of the input of the first attention.
  embed_norm: bool = False
  norm_epsilon: Positive = 1e-5
  positions: Literal["alibi", "learned", "rope", "none"] = "alibi"
  # Slows rotations. (factor,): all of them. (factor, low, high, length), as in
  # Llama 3: those with fewer than `low` turns in `length` tokens, and in proportion
  # those between `low` and `high`. None: no scaling.
  rope_scaling: tuple[Positive, ...] | None = None
  rope_share: Share = 1.0  # fraction of a head's channels that rotate
  # Number of buckets of distances, each with a bias per head, as in T5 and MPNet.
  # The bias starts at 0 and is not trained, so that the layers of a checkpoint
  # keep sharing one. 0: no bias.
  relative_buckets: Literal[0, 32] = 0
  qk_norm: bool = False  # RMSNorm of the queries and keys of each head
  # c: attention logits x become c tanh(x / c), as in Gemma 2. None: no cap.
  attention_cap: Positive | None = None
  logit_cap: Positive | None = None  # the same for next-token logits
  # "linear": in linear time, approximate; needs fold.groups=1.
  attention: Literal["dense", "linear"] = "dense"
  activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
  gated: bool = False  # multiply the MLP's hidden state by a gate
  use_bias: bool = True
  scale_embeddings: bool = False  # multiply token embeddings by sqrt(D)
  tie_embeddings: bool = True  # the output layer is the embedding, transposed
  segments: Literal[0, 2] = 0  # rows of a segment embedding; pairs set it
  pooling: Pooling = "mean"  # of tokens into a vector; unused by task "lm"
  normalize: bool = False  # vectors of task "embed" have length 1
  pooler: bool = False  # a dense layer and activation between pooling and head
  pooler_activation: Literal["tanh", "relu", "gelu"] = "tanh"
  # A norm between pooler and head, as in ModernBERT; the pooler has no bias then.
  pooler_norm: bool = False
  dropout: Fraction = 0.0
  remat: bool = False  # recompute blocks in the backward pass
  # Compile consecutive layers of one shape once, as a loop. Dropout then draws
  # other masks.
  scan_layers: bool = False
  # dtype of the computation; parameters are float32.
  dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig(Design):
  """A transformer to draw or to read. Letters as in `folding.models`."""

  num_layers: Few = 4  # N, layers
  num_heads: Few = 16  # H, attention heads
  num_kv_heads: Natural = 0  # J, heads of keys and values; 0: as many as H
  head_dim: Natural = 0  # K, channels per head; 0: width / num_heads
  mlp_width: PerLayer = 0  # F, neurons of the MLP; 0: 4 D
  # F before a shrink; None: mlp_width.
  dense_mlp_width: PerLayer | None = None
  # Heads that a shrink has kept, per layer; None: all.
  heads: tuple[tuple[Natural, ...], ...] | None = None
  # Base of the rotations; for all layers, or one per layer.
  rope_base: Positive | tuple[Positive, ...] = 10000.0
  # Number of last tokens to attend to; None: all. Per layer, 0 is all.
  window: Count | tuple[Natural, ...] | None = None
  qkv_bias: bool | None = None  # biases of W_Q, W_K, W_V; None: as use_bias
  # Most tokens that the model reads, and rows of learned positions. At least
  # data.length, for which 0 stands.
  max_length: Natural = 0

  def check(self) -> None:
    """Raises `ConfigError` if two fields of a resolved config do not fit."""
    H, J = self.num_heads, self.num_kv_heads
    if self.width % H and self.head_dim == self.width // H:
      raise ConfigError(
        f"model.width {self.width} is not divisible by model.num_heads {H}"
      )
    if H % J:
      raise ConfigError(
        f"model.num_heads {H} is not divisible by model.num_kv_heads {J}"
      )
    for name in ("embed_norm", "parallel"):
      if getattr(self, name) and self.norm_position != "pre":
        raise ConfigError(f"model.{name} needs model.norm_position='pre'")
    if self.positions == "alibi" and self.relative_buckets:
      raise ConfigError(
        "model.relative_buckets does not go with model.positions='alibi'; use "
        "another one"
      )
    self._check_rotations()
    self.by_layer(self.window, "model.window")
    self.by_layer(self.rope_base, "model.rope_base")
    self._check_heads()
    widths = self.by_layer(self.mlp_width, "model.mlp_width")
    if min(widths) < 1:
      raise ConfigError(f"model.mlp_width must be 1 or more; it is {widths}")
    if self.dense_mlp_width is not None:
      before = self.by_layer(self.dense_mlp_width, "model.dense_mlp_width")
      if any(now > then for now, then in zip(widths, before, strict=True)):
        raise ConfigError(
          f"model.dense_mlp_width {before} is the width before a shrink; "
          f"model.mlp_width {widths} exceeds it"
        )

  def by_layer(self, value: Any, name: str) -> tuple[Any, ...]:
    """Returns one value per layer.

    Raises:
      ConfigError: there are too many or too few values.
    """
    values = value if isinstance(value, tuple) else (value,) * self.num_layers
    if len(values) != self.num_layers:
      raise ConfigError(
        f"{name} has {len(values)} values for {self.num_layers} layers; give "
        "one, or one per layer"
      )
    return values

  def _check_rotations(self) -> None:
    if self.positions != "rope":
      for name, value in (("rope_scaling", None), ("rope_share", 1.0)):
        if getattr(self, name) != value:
          raise ConfigError(f"model.{name} needs model.positions='rope'")
      return
    scaling = self.rope_scaling
    if scaling is not None and len(scaling) != 1:
      if len(scaling) != 4 or scaling[1] >= scaling[2]:
        raise ConfigError(
          "model.rope_scaling is (factor,) or (factor, low, high, length) with "
          f"low < high; it is {scaling}"
        )
    if self.head_dim % 2:
      raise ConfigError(
        f"rotary positions need an even head size; it is {self.head_dim}"
      )
    turning = int(self.head_dim * self.rope_share)
    if turning < 2 or turning % 2:
      raise ConfigError(
        f"model.rope_share={self.rope_share} rotates {turning} of "
        f"{self.head_dim} channels, which come in pairs"
      )

  def _check_heads(self) -> None:
    if self.heads is None:
      return
    shared = self.num_heads // self.num_kv_heads
    for heads in self.by_layer(self.heads, "model.heads"):
      keys = {h // shared for h in heads}
      whole = tuple(h for h in range(self.num_heads) if h // shared in keys)
      if not heads or heads != whole:
        raise ConfigError(
          "model.heads lists the heads of a layer in order, out of "
          f"{self.num_heads} and by whole groups of {shared} that share a key; "
          f"it is {heads}"
        )


# Fields of `ModelConfig` that describe a classifier.
HEAD = ("pooling", "pooler", "pooler_activation", "pooler_norm")
# Fields that do not change the meaning of the arrays. Widths and biases follow
# from their shapes.
_FREE = (
  "mlp_width",
  "dense_mlp_width",
  "heads",
  "attention",
  "use_bias",
  "qkv_bias",
  "tie_embeddings",
  "segments",
  "normalize",
  "dropout",
  "remat",
  "scan_layers",
  "dtype",
  "max_length",
)
# The others, which models must share if one takes the arrays of the other.
SHAPE = tuple(
  name for name in typed.fields(ModelConfig) if name not in (*_FREE, *HEAD)
)


@dataclasses.dataclass(frozen=True, slots=True)
class FoldConfig:
  """How W_Q, W_K, W_V and the embedding are folded. None: the preset decides."""

  groups: PerLayer | None = None  # G, row groups of W_Q and W_K; 0: dense
  axis: Literal["output", "input"] = "output"  # which axis the groups run over
  # With RoPE: G numbers are copied to K channels, or G/2 pairs rotate.
  rope: Literal["copy", "pairs"] = "copy"
  # W_V: "dense", "diagonal" (DWC), or "identity", a diagonal that W_O has
  # absorbed; for all layers, or one per layer.
  values: Values | tuple[Values, ...] | None = None
  # r, rank of W_V W_O per head, if W_V is dense; 0: K, the full rank.
  value_rank: PerLayer = 0
  # r, rank of the embedding, which a matrix expands to the width of the model; 0:
  # the full rank.
  embedding_rank: Natural = 0
  # Positions and segments have that rank too, and are expanded by the same matrix.
  embedding_shared: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class FPPConfig:
  """Forward Propagation Pruning. None: the preset decides.

  `saving` replaces `linear`: linear layers keep a fraction k of their weights and
  embeddings k**embedding_share, or what `embedding` leaves, with the k that saves
  `saving` of the whole model.
  """

  # Fraction of W_O, MLP and output head to zero.
  linear: Fraction | None = None
  # Fraction of W_O and MLP to zero, per layer.
  linear_layers: tuple[Fraction, ...] | None = None
  embedding: Fraction | None = None  # fraction of embeddings to zero
  saving: Fraction | None = None  # fraction of the whole model to save
  # If linear layers keep k of their weights, embeddings keep k**embedding_share.
  # None: 0.2 for task "lm", 1 for the others.
  embedding_share: NonNegative | None = None
  score: Score = "relative"  # of units; the lowest are pruned
  granularity: Literal["weight", "neuron"] = "weight"  # units of the MLP
  # What to prune of attention: W_O, all four matrices (by weight), whole heads,
  # or nothing.
  attention: Literal["output", "all", "heads", "none"] = "output"
  # How an embedding shrinks. "trim": tokens leave the tokenizer of a trained model,
  # which splits their words further. "row": rows of tokens become zero. "rank": all
  # tokens stay, and the embedding gets a low rank. Rows and ranks are for an embedding
  # that is not tied to the output layer.
  embedding_granularity: Literal["weight", "row", "trim", "rank"] = "weight"
  begin: Fraction = 0.45  # first mask update, as a fraction of the steps
  end: Share = 0.9  # last mask update, as a fraction of the steps
  checks: Count = 30  # most mask updates after the first one at `begin`
  patience: Natural = 1  # mask updates between freezing and zeroing a weight
  decay: Fraction = 0.9  # decay of the moving averages of the scores
  # Largest relative increase of the loss at a mask update; None: not measured.
  tolerance: NonNegative | None = None

  @property
  def prunes(self) -> bool:
    """Whether anything is zeroed."""
    parts = self.saving, self.linear, self.embedding
    return any(parts) or any(self.linear_layers or ())

  def leaves_open(self, embedding_rank: int) -> bool:
    """Whether a plan has yet to choose the rank of the embedding."""
    return self.embedding_granularity == "rank" and not embedding_rank

  def check(self) -> None:
    """Raises `ConfigError` if two fields do not fit each other."""
    if self.begin >= self.end:
      raise ConfigError(
        "fpp.begin and fpp.end are fractions of the steps, begin < end; they are "
        f"{self.begin} and {self.end}"
      )
    parts = (self.linear, self.linear_layers)
    if self.saving is not None and any(p is not None for p in parts):
      raise ConfigError(
        "fpp.saving sets the sparsity of linear layers; set fpp.saving, or "
        "fpp.linear or fpp.linear_layers, not both"
      )


@dataclasses.dataclass(frozen=True, slots=True)
class CompressConfig:
  """How trained weights are folded; only for a run with `pretrained`."""

  # "same": as `fold` and `fpp` say. "auto": chosen per layer by measured error.
  plan: Literal["same", "auto"] = "same"
  # One size for all layers, by neurons and heads alone, so that a plain Hugging Face
  # folder holds the model; needs plan="auto".
  uniform: bool = False
  # How a plan chooses the rank of an embedding. "share": the highest that saves the
  # embedding's share. "errors": by measured error, like ranks of layers.
  embedding: Literal["share", "errors"] = "share"
  # Prune by `fpp` before the first step, then train the remaining weights.
  prune: Literal["none", "magnitude", "wanda", "sparsegpt"] = "none"
  calibration: Count = 512  # calibration texts (or windows)
  fit_steps: Natural = 100  # steps per layer to fit folded attention to dense

  @property
  def prunes(self) -> bool:
    """Whether training starts from pruned weights."""
    return self.prune != "none"


@dataclasses.dataclass(frozen=True, slots=True)
class DistillConfig:
  """Distillation from a dense teacher. A weight of 0 leaves its term out."""

  # A run or a checkpoint. None: the model of `pretrained`, or none if `dense`.
  # Task "embed": of any shape and tokenizer; `pairs` needs no equal width.
  teacher: str | None = None
  logits: Share = 0.0  # share of the teacher's logits in the loss
  temperature: Positive = 2.0  # temperature of both softmaxes
  hidden: NonNegative = 0.0  # weight of the distance between layer outputs
  # Task "embed": weight of the similarities between the texts of a batch.
  pairs: NonNegative = 0.0

  @property
  def is_used(self) -> bool:
    """Whether the loss has a term of the teacher."""
    return bool(self.logits or self.hidden or self.pairs)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
  """Optimizer, schedule, logs and checkpoints."""

  steps: Count = 1000
  # "muon" updates the kernels of the layers, and Adam all other arrays.
  optimizer: Literal["adamw", "muon"] = "adamw"
  accumulate: Count = 1  # micro-batches per step
  learning_rate: Positive = 3e-3  # peak of the schedule
  warmup: Fraction = 0.05  # of the learning rate, as a fraction of the steps
  # Fraction of the peak that is left after the cosine.
  final_learning_rate: NonNegative = 0.05
  # Relative learning rate of W_Q and W_K if folded; see docs/method.md.
  qk_rate: Positive = 1.0
  v_rate: Positive = 1.0  # relative learning rate of W_V if diagonal
  slope_rate: Positive = 1.0  # relative learning rate of ALiBi's slopes
  weight_decay: NonNegative = 0.05
  b1: Fraction = 0.9
  b2: Fraction = 0.98
  clip_norm: Positive = 1.0
  log_every: Count = 20
  eval_every: Count = 200  # steps between evaluations, which save a checkpoint
  # Batches of valid per evaluation while training; None: all.
  eval_batches: Count | None = None
  metric: Metric | None = None  # chooses the best checkpoint; None: by task
  # Remove zero neurons and heads from the arrays while training: after a mask
  # update if they have this fraction of the parameters of the layers, after the
  # last one if they have a tenth. Each time the step is compiled again. 0: never.
  compact: Fraction = 0.0
  tensorboard: bool = True
  energy: str = ""  # estimate energy in this country (ISO 3166, such as DEU)


@dataclasses.dataclass(frozen=True, slots=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes the remaining ones."""

  data: int = -1  # splits batches
  fsdp: int = 1  # splits batches, parameters and optimizer state
  tensor: int = 1  # splits heads, neurons and the vocabulary
  # Whether TPUs and GPUs attend in long sequences by a kernel, if one has the bias.
  attention_kernel: bool = True
  # Pairs (pattern of parameter paths, mesh axis or None for each array axis). The
  # first match counts; other parameters are placed by default.
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
  """What a run asks for, apart from the shape of its model."""

  # "lm" predicts the next token, "embed" makes the vector of a sentence. The others
  # read a text or a pair of texts: "classify" chooses one class, "multilabel" any
  # number of classes, and "regress" predicts a score.
  task: TaskName = "lm"
  seed: Annotated[int, Range(0, 2**32)] = 0
  # Processes that train together: "auto" (a TPU pod, SLURM, Open MPI), or
  # "HOST:PORT,PROCESS,COUNT" with the address of process 0.
  distributed: str = "none"
  preset: Preset = "paper"
  dense: bool = False  # the dense baseline: nothing folded, nothing pruned
  # Checkpoint folder, hub id or run to start from.
  pretrained: str | None = None
  data: DataConfig = DataConfig()
  fpp: FPPConfig = FPPConfig()
  compress: CompressConfig = CompressConfig()
  distill: DistillConfig = DistillConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def uncompressed(self: _AnOrder) -> _AnOrder:
    """Returns the order of the dense baseline."""
    return dataclasses.replace(
      self,
      dense=True,
      preset="none",
      fpp=FPPConfig(score=self.fpp.score),
      compress=CompressConfig(),
      # The teacher of `pretrained` would be the untrained model.
      distill=self.distill if self.distill.teacher else DistillConfig(),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Config(Order):
  """A run: its order and the shape of its model. `resolve` it before use."""

  model: ModelConfig = ModelConfig()
  fold: FoldConfig = FoldConfig()

  def check(self) -> None:
    """Raises `ConfigError` if values of a resolved config do not fit."""
    self.data.check()
    self.model.check()
    self.fpp.check()
    self._check_task()
    self._check_run()
    self._check_fold()
    self._check_fpp()
    self._check_plan()
    self._check_prune()

  def _check_task(self) -> None:
    m, task = self.model, task_of(self)
    is_tied = task.predicts_tokens and m.tie_embeddings
    if task.predicts_tokens and not m.causal:
      raise ConfigError(
        f"task {task.name!r} predicts the next token and needs model.causal=True"
      )
    if is_tied and m.embed_width:
      raise ConfigError(
        "model.embed_width makes the embedding narrower than the output layer; "
        "use model.tie_embeddings=False"
      )
    if is_tied and self.fold.embedding_rank:
      raise ConfigError(
        "fold.embedding_rank cannot make the output layer smaller; use "
        "model.tie_embeddings=False"
      )
    if task.predicts_tokens and self.data.length < 2:
      raise ConfigError(f"task {task.name!r} needs data.length above 1")
    if not task.predicts_tokens and m.causal and m.pooling == "first":
      raise ConfigError(
        "model.pooling='first' with model.causal=True would see only the first "
        "token; use model.causal=False, or model.pooling='mean' or 'last'"
      )
    d = self.distill
    if task.makes_vectors and d.logits:
      raise ConfigError(
        f"distill.logits weighs a loss on labels, which task {task.name!r} does "
        "not have; use distill.pairs and distill.hidden"
      )
    if not task.makes_vectors and (d.pairs or self.data.sts):
      raise ConfigError("distill.pairs and data.sts are for task 'embed'")
    if d.teacher and not d.is_used and not task.makes_vectors:
      raise ConfigError(
        "distill.teacher does nothing while distill.logits and distill.hidden "
        "are 0"
      )
    if self.train.metric == "spearman" and task.makes_vectors:
      if self.data.sts is None:
        raise ConfigError("train.metric 'spearman' needs data.sts=FILE.tsv")
    if self.train.metric not in (None, *task.metrics):
      raise ConfigError(
        f"train.metric {self.train.metric!r} is not a metric of task "
        f"{task.name!r}; use {' or '.join(task.metrics)}"
      )

  def _check_run(self) -> None:
    count = self.train.accumulate
    if self.data.batch_size % count:
      raise ConfigError(
        f"data.batch_size {self.data.batch_size} does not divide into "
        f"train.accumulate={count} micro-batches"
      )
    if count > 1 and (self.distill.hidden or self.distill.pairs):
      raise ConfigError(
        "distill.hidden and distill.pairs compare whole batches; use "
        "train.accumulate=1"
      )
    if self.distill.is_used and not (self.distill.teacher or self.pretrained):
      raise ConfigError("distill needs distill.teacher (a run) or pretrained")
    found = re.fullmatch(r"[^,\s]+:\d+,(\d+),(\d+)", self.distributed)
    is_address = found is not None and int(found[1]) < int(found[2])
    if self.distributed not in ("none", "auto") and not is_address:
      raise ConfigError(
        "distributed is 'none', 'auto' or 'HOST:PORT,PROCESS,COUNT', such as "
        "'10.0.0.1:1234,0,2', with PROCESS below COUNT; it is "
        f"{self.distributed!r}"
      )

  def _check_fold(self) -> None:
    m, f = self.model, self.fold
    if m.positions != "rope" and f.rope != "copy":
      raise ConfigError("fold.rope='pairs' needs model.positions='rope'")
    all_groups = m.by_layer(f.groups, "fold.groups")
    for groups in all_groups:
      if groups:
        self._check_groups(groups)
    if m.qk_norm and f.axis == "output" and any(all_groups):
      raise ConfigError(
        "model.qk_norm norms all channels of a head, which folding W_Q and W_K "
        "on the output axis would not keep; use fold.groups=0 (fold.value_rank "
        "still folds W_V and W_O) or fold.axis='input'"
      )
    is_rank_1 = 1 in all_groups and f.axis == "output"
    is_plain = m.positions != "rope" and not (
      m.window or m.relative_buckets or m.attention_cap
    )
    if m.attention == "linear" and not (self.dense or is_rank_1 and is_plain):
      raise ConfigError(
        "model.attention='linear' needs a layer with fold.groups=1 on the output "
        "axis, and no rotary positions, model.window, model.relative_buckets or "
        "model.attention_cap; use 'dense'"
      )
    self._check_embedding()
    self._check_values()

  def _check_embedding(self) -> None:
    m, f = self.model, self.fold
    size = m.embed_width or m.width
    if f.embedding_rank > size:
      raise ConfigError(
        f"fold.embedding_rank {f.embedding_rank} exceeds the width {size} of the "
        "embedding; use 0 for all of it"
      )
    if f.embedding_shared and f.embedding_rank == 1:
      raise ConfigError(
        "fold.embedding_shared needs fold.embedding_rank of at least 2, as one "
        "channel has the mean"
      )
    if f.embedding_shared and (m.positions != "learned" or m.embed_width):
      raise ConfigError(
        "fold.embedding_shared needs model.positions='learned' and "
        "model.embed_width=0"
      )

  def _check_values(self) -> None:
    m, f = self.model, self.fold
    values = m.by_layer(f.values, "fold.values")
    if set(values) != {"dense"} and m.num_heads * m.head_dim != m.width:
      raise ConfigError(
        "a diagonal W_V needs heads that share out model.width "
        f"{m.width}; there are {m.num_heads} of {m.head_dim}; use "
        "fold.values='dense'"
      )
    ranks = m.by_layer(f.value_rank, "fold.value_rank")
    for rank, kind in zip(ranks, values, strict=True):
      if rank > m.head_dim:
        raise ConfigError(
          f"fold.value_rank {rank} exceeds the head size {m.head_dim}; use 0 for "
          "all of it"
        )
      if rank and kind != "dense":
        raise ConfigError(
          f"fold.value_rank {rank} needs a dense W_V, and fold.values is "
          f"{kind!r} in that layer; set one of them"
        )

  def _check_groups(self, groups: int) -> None:
    m, f = self.model, self.fold
    if m.positions == "rope" and f.rope == "pairs":
      if f.axis == "input" or groups % 2 or groups > m.head_dim:
        raise ConfigError(
          "fold.rope='pairs' keeps an even number of channels per head, at most "
          f"{m.head_dim}, on the output axis; fold.groups is {groups}"
        )
      return
    name, size = "head size", m.head_dim
    if f.axis == "input":
      name, size = "model.width", m.width
    if size % groups:
      raise ConfigError(
        f"fold.groups {groups} does not divide the {name} {size} "
        f"(axis {f.axis!r})"
      )
    if f.axis == "input" and groups == 1 and m.norm == "layernorm":
      raise ConfigError(
        "fold.axis='input' with fold.groups=1 sums the channels of a LayerNorm, "
        "which is 0 at the start, so attention would be uniform and never learn; "
        "use model.norm='rmsnorm', more groups, or fold.axis='output'"
      )

  def _check_fpp(self) -> None:
    f = self.fpp
    if f.linear_layers is not None:
      self.model.by_layer(f.linear_layers, "fpp.linear_layers")
    values = self.model.by_layer(self.fold.values, "fold.values")
    is_diagonal = set(values) != {"dense"}
    is_shared = self.model.num_kv_heads != self.model.num_heads
    if f.attention == "heads" and (is_diagonal or is_shared):
      raise ConfigError(
        "fpp.attention='heads' needs heads with keys and values of their own; "
        "use fold.values='dense' and model.num_kv_heads=0"
      )
    is_trained = self.pretrained is not None
    if f.embedding_granularity == "trim" and not is_trained:
      raise ConfigError(
        "fpp.embedding_granularity='trim' removes tokens from the tokenizer of a "
        "trained model; set pretrained=PATH, or use 'row' or 'weight'"
      )

  def _check_plan(self) -> None:
    f, compress = self.fpp, self.compress
    is_open = f.leaves_open(self.fold.embedding_rank)
    if compress.plan == "same":
      if is_open:
        raise ConfigError(
          "fpp.embedding_granularity='rank' needs compress.plan='auto', which "
          "chooses the rank, or fold.embedding_rank; 'trim' and 'weight' need "
          "neither"
        )
      if compress.uniform:
        raise ConfigError("compress.uniform needs compress.plan='auto'")
      return
    if self.pretrained is None:
      raise ConfigError(
        "compress.plan='auto' measures a trained model; set pretrained=PATH"
      )
    by_errors = is_open and compress.embedding == "errors"
    if by_errors and f.saving is None:
      raise ConfigError(
        "compress.embedding='errors' needs fpp.saving; use 'share' beside "
        "fpp.linear and fpp.embedding"
      )
    attention = "none" if f.granularity == "neuron" else "output"
    if f.attention != attention or f.linear_layers:
      raise ConfigError(
        "compress.plan='auto' decides how W_O and the MLP are pruned; use "
        f"fpp.attention={attention!r} beside fpp.granularity={f.granularity!r}, "
        "and leave out fpp.linear_layers"
      )
    is_dense = {self.fold.groups, self.fold.values, self.fold.value_rank} <= {
      0,
      "dense",
    }
    if compress.uniform and not (f.granularity == "neuron" and is_dense):
      raise ConfigError(
        "compress.uniform keeps projections dense; use fpp.granularity='neuron', "
        "fold.groups=0 and fold.values='dense'"
      )

  def _check_prune(self) -> None:
    f, prune = self.fpp, self.compress.prune
    if prune == "none":
      return
    if self.pretrained is None:
      raise ConfigError(
        f"compress.prune={prune!r} prunes a trained model; set pretrained=PATH"
      )
    if not f.prunes:
      raise ConfigError(
        "compress.prune prunes by fpp, which prunes nothing here; set "
        "fpp.saving"
      )
    if f.tolerance is not None:
      raise ConfigError(
        "fpp.tolerance is for pruning while training; leave it out with "
        "compress.prune"
      )
    is_by_neuron = f.granularity == "neuron" and prune != "sparsegpt"
    is_by_row = f.embedding_granularity == "row"
    if is_by_neuron or is_by_row or f.attention == "heads":
      raise ConfigError(
        "compress.prune goes by weight, and 'sparsegpt' by neuron too; "
        "use 'sparsegpt' or fpp.granularity='weight', with "
        "fpp.embedding_granularity='weight', 'trim' or 'rank', and without "
        "fpp.attention='heads'"
      )
    is_input = self.fold.axis == "input" and f.attention == "all"
    if prune in ("wanda", "sparsegpt") and is_input:
      raise ConfigError(
        f"compress.prune={prune!r} has no moments of the sums that "
        "fold.axis='input' makes; use fpp.attention='output'"
      )


def gpt2(**fields: Any) -> ModelConfig:
  """Returns a GPT-2 style decoder: pre-norm, learned positions, GELU."""
  model = ModelConfig(positions="learned", activation="gelu_tanh")
  return dataclasses.replace(model, **fields)


def bert(**fields: Any) -> ModelConfig:
  """Returns a BERT style encoder: post-norm, learned positions, GELU."""
  model = ModelConfig(
    causal=False,
    norm_position="post",
    norm_epsilon=1e-12,
    positions="learned",
    pooling="first",
  )
  return dataclasses.replace(model, **fields)


def llama(**fields: Any) -> ModelConfig:
  """Returns a Llama style decoder: RMSNorm, RoPE, gated SiLU, no biases."""
  model = ModelConfig(
    norm="rmsnorm",
    positions="rope",
    activation="silu",
    gated=True,
    use_bias=False,
    tie_embeddings=False,
  )
  return dataclasses.replace(model, **fields)


# What a preset decides for fields of `fold` and `fpp` that are None. `saving`
# does not apply if `linear`, `linear_layers` or `embedding` is set; `linear` and
# `embedding` do if it is None.
_DECIDED = "groups", "values", "saving", "linear", "embedding"
PRESETS: dict[Preset, tuple[Any, ...]] = {
  "none": (0, "dense", None, 0.0, 0.0),
  "moderate": (0, "diagonal", 0.3, 0.0, 0.0),
  "paper": (1, "diagonal", 0.7, 0.7, 0.7),
}


def resolve(config: Config) -> Config:
  """Returns a copy with presets and shapes filled in, after checking it.

  Raises:
    ConfigError: a value is of the wrong type or range, or two do not fit.
  """
  found = filled(from_dict(to_dict(config)))
  found.check()
  return found


def filled(config: Config) -> Config:
  """Returns a copy with presets and shapes filled in."""
  c = config
  if c.dense:
    c = dataclasses.replace(c.uncompressed(), fold=FoldConfig())
  m, f = c.model, c.fpp
  preset = dict(zip(_DECIDED, PRESETS[c.preset], strict=True))

  def filled(section, *names):
    missing = [name for name in names if getattr(section, name) is None]
    return dataclasses.replace(section, **{n: preset[n] for n in missing})

  if f.linear is None and f.linear_layers is None and f.embedding is None:
    f = filled(f, "saving")
  if f.saving is None:
    f = filled(f, "linear", "embedding")
  if f.embedding_share is None:
    share = 0.2 if task_of(c).predicts_tokens else 1.0
    f = dataclasses.replace(f, embedding_share=share)
  m = dataclasses.replace(
    m,
    num_kv_heads=m.num_kv_heads or m.num_heads,
    head_dim=m.head_dim or max(1, m.width // m.num_heads),
    mlp_width=m.mlp_width or 4 * m.width,
    qkv_bias=m.use_bias if m.qkv_bias is None else m.qkv_bias,
    window=joined(m.window) or None,
    rope_base=joined(m.rope_base),
    max_length=m.max_length if m.max_length > c.data.length else 0,
  )
  fold = filled(c.fold, "groups", "values")
  return dataclasses.replace(c, model=m, fold=fold, fpp=f)


def joined(value: Any) -> Any:
  """Returns one value if a tuple holds equal ones, otherwise the value itself."""
  is_equal = isinstance(value, tuple) and len(set(value)) == 1
  return value[0] if is_equal else value


def dense_baseline(config: Config) -> Config:
  """Returns the resolved config of the dense baseline of a run."""
  return resolve(dataclasses.replace(config, dense=True))


def quality(order: Order) -> str:
  """Returns the test metric that a run is judged by: "bits_per_byte", ..."""
  task, chosen = task_of(order), order.train.metric
  if task.predicts_tokens:
    return "bits_per_byte"
  return task.metrics[0] if chosen in (None, "loss") else chosen


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the config as nested plain dicts, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Builds a `Config` from nested dicts, checking names, types and ranges.

  Raises:
    ConfigError: a name is unknown, or a value is of the wrong type or range.
  """
  return typed.build(Config, values, "config")


def from_saved(values: dict[str, Any]) -> Config:
  """Builds the `Config` that a run or an export saved, also of earlier versions.

  Raises:
    ConfigError: see `from_dict`.
  """
  compress, fpp = (values.get(name, {}) for name in ("compress", "fpp"))
  if not (isinstance(compress, dict) and isinstance(fpp, dict)):
    return from_dict(values)  # refuses them
  # Fields of earlier versions.
  compress = dict(compress)
  compress.pop("qkv", None)
  fpp = {typed.RENAMED.get(name, name): x for name, x in fpp.items()}
  return from_dict({**values, "compress": compress, "fpp": fpp})


def load(path: str) -> Config:
  """Reads a config that `save` wrote.

  Raises:
    ConfigError: it is damaged, or of an older version of this library.
  """
  values = files.read_json(path, dict)
  try:
    return from_saved(values)
  except ConfigError as error:
    raise ConfigError(
      f"{path} is not a config of this version: {error}; commit c6086e3 reads "
      "older runs"
    ) from None


def to_json(config: Config) -> str:
  """Returns the text of a config.json."""
  return json.dumps(to_dict(config), indent=2) + "\n"


def save(config: Config, path: str) -> None:
  """Writes a config as JSON, whole or not at all."""
  files.write_file(path, to_json(config))


def read(where: str, texts: Mapping[str, str] | None = None) -> Config:
  """Returns the config that the flags of a command line ask for.

  Args:
    where: FILE.py or FILE.py:ARGUMENT, a file with `get_config`; or the
      config.json of a run.
    texts: {"section.field": text of the flag} to override fields.

  Raises:
    ConfigError: there is no such file or field, or a value does not fit.
  """
  known = typed.fields(Config)
  edits = {}
  for name, text in (texts or {}).items():
    if name not in known:
      raise ConfigError(typed.unknown_field("config", name, known))
    edits[name] = typed.parse(known[name], text, f"config.{name}")
  if where.endswith(".json"):
    config = load(where)
  else:
    config = files.call_in_file(where, "get_config")
  if not isinstance(config, Config):
    raise ConfigError(f"get_config() of {where} does not return a Config")
  return typed.edited(config, edits)

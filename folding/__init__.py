"""Small transformers in JAX: folded attention, forward propagation pruning.

The names here are for other people's training loops, and are imported when
they are first used. A whole run is `folding.training.loop.run(config, workdir)`;
its configuration is `folding.config.Config`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from folding.version import __version__ as __version__

if TYPE_CHECKING:
  from folding.compression.accounting import account as account
  from folding.compression.fold import fold as fold
  from folding.compression.fold import unfold as unfold
  from folding.compression.fpp import FPPState as FPPState
  from folding.compression.fpp import fpp as fpp
  from folding.compression.fpp import fpp_counts as fpp_counts
  from folding.compression.observe import observe as observe
  from folding.compression.observe import statistics as statistics
  from folding.compression.sites import Rule as Rule
  from folding.model import Model as Model
  from folding.models.shape import shape_of as shape_of
  from folding.models.shrink import shrink as shrink
  from folding.models.transformer import Transformer as Transformer
  from folding.models.transformer import make_model as make_model
  from folding.serving.compress import compress as compress
  from folding.serving.formats import save as save
  from folding.serving.generate import generate as generate
  from folding.serving.loaded import load as load
  from folding.serving.predict import encode as encode
  from folding.serving.predict import predict as predict
  from folding.serving.sampling import Sampling as Sampling
  from folding.training.fold_pretrained import (
    fold_pretrained as fold_pretrained,
  )

_MODULES = {
  "FPPState": "folding.compression.fpp",
  "Model": "folding.model",
  "Rule": "folding.compression.sites",
  "Sampling": "folding.serving.sampling",
  "Transformer": "folding.models.transformer",
  "account": "folding.compression.accounting",
  "compress": "folding.serving.compress",
  "encode": "folding.serving.predict",
  "fold": "folding.compression.fold",
  "fold_pretrained": "folding.training.fold_pretrained",
  "fpp": "folding.compression.fpp",
  "fpp_counts": "folding.compression.fpp",
  "generate": "folding.serving.generate",
  "load": "folding.serving.loaded",
  "make_model": "folding.models.transformer",
  "observe": "folding.compression.observe",
  "predict": "folding.serving.predict",
  "save": "folding.serving.formats",
  "shape_of": "folding.models.shape",
  "shrink": "folding.models.shrink",
  "statistics": "folding.compression.observe",
  "unfold": "folding.compression.fold",
}


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f"module 'folding' has no attribute {name!r}")
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_MODULES])

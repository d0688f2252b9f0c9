"""Small transformers in JAX: folded attention, forward propagation pruning.

The names here are the library for other people's training loops. A whole run
is `folding.training.loop.run(config, workdir)`, its configuration
`folding.config.Config`.
"""

from folding.compression.accounting import account as account
from folding.compression.fold import fold as fold
from folding.compression.fold import unfold as unfold
from folding.compression.fpp import FPPState as FPPState
from folding.compression.fpp import fpp as fpp
from folding.compression.fpp import fpp_counts as fpp_counts
from folding.compression.observe import observe as observe
from folding.compression.shrink import shrink as shrink
from folding.compression.sites import Rule as Rule
from folding.models.transformer import Transformer as Transformer
from folding.models.transformer import make_model as make_model
from folding.serving.export import load as load
from folding.training.fold_pretrained import fold_pretrained as fold_pretrained
from folding.version import __version__ as __version__

"""Settings for every test: strict JAX, eight simulated devices, shared data."""

import gc
import os
import pathlib

# Before jax starts: eight CPU devices, so that a mesh can be tested anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# Small programs take longer to compile than to run: this code is emitted in a
# third of the time. The quickstart in .ci/run has the production flags.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1",
)

# Compiled programs are kept between runs, and shared by the workers and by the
# processes that tests start.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import orbax.checkpoint as ocp
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# A save splits replicated arrays between their devices, by one compiled program
# for each device and shape. This excludes arrays that are small even for a test.
ocp.type_handlers.get_type_handler(
  jax.Array
)._min_slice_bytes_for_replica_parallel = 1 << 20

# Compiled programs stay reachable, and are too many objects to search often.
gc.set_threshold(20_000, 20, 20)

SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser):
  parser.addoption(
    "--first-cases",
    action="store_true",
    help="run only the first case of each parametrized test",
  )


@pytest.hookimpl(trylast=True)  # `-m` may have left out some cases before
def pytest_collection_modifyitems(config, items):
  if config.getoption("first_cases"):
    first = {}
    for item in items:
      first.setdefault(item.nodeid.partition("[")[0], item)
    items[:] = first.values()


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Returns the folder of real data, or skips where it is not laid out."""
  if not SHARED_DATA.is_dir():
    pytest.skip("needs the shared data folder, which is not on this machine")
  return SHARED_DATA

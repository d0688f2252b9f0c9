"""Devices to compile for, which need not exist.

CPU devices that XLA simulates, a TPU slice that the compiler in libtpu knows, or
GPUs that XLA's compiler for CUDA has a description of.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from folding.errors import ConfigError, first_line

GIB = 2**30


class _Tpu(NamedTuple):
  """A generation of TPUs.

  Attributes:
    gib: GiB of memory per chip.
    axes: Axes of a topology.
    cores: Cores per chip that the name of a slice counts: Google names a v5p
      slice of 32 chips v5p-64.
    hertz: Cycles per second.
    peak: FLOP per second of products of bfloat16 matrices.
  """

  gib: int
  axes: int
  cores: int
  hertz: float
  peak: float


# The clock is peak FLOP/s over FLOP per cycle of the matrix units.
_TPUS = {
  "v5e": _Tpu(16, 2, 1, 1.5e9, 197e12),
  "v5p": _Tpu(95, 3, 2, 1.75e9, 459e12),
  "v6e": _Tpu(32, 2, 1, 1.75e9, 918e12),
}


class _Gpu(NamedTuple):
  """A kind of GPU, in the terms of XLA's `GpuTargetConfigProto`.

  Attributes:
    name: Its full name.
    memory: Bytes of memory.
    bandwidth: Bytes per second.
    cores: Streaming multiprocessors.
    lanes: float32 units per core.
    clock: GHz.
    cache: Bytes of the L2 cache.
    shared: Bytes of shared memory per core.
    capability: Major compute capability.
  """

  name: str
  memory: int
  bandwidth: int
  cores: int
  lanes: int
  clock: float
  cache: int
  shared: int
  capability: int


# From the specifications that XLA publishes.
_A100 = _Gpu(
  "NVIDIA A100-SXM4-80GB",
  memory=85_100_068_864,
  bandwidth=2_039_040_000_000,
  cores=108,
  lanes=64,
  clock=1.41,
  cache=41_943_040,
  shared=167_936,
  capability=8,
)
_H100 = _Gpu(
  "NVIDIA H100 80GB HBM3",
  memory=84_942_979_072,
  bandwidth=3_352_320_000_000,
  cores=132,
  lanes=128,
  clock=1.98,
  cache=52_428_800,
  shared=233_472,
  capability=9,
)
_GPUS = {
  "a100": _A100,
  "a100_40gb": _A100._replace(
    name="NVIDIA A100-SXM4-40GB",
    memory=42_331_013_120,
    bandwidth=1_555_200_000_000,
  ),
  "h100": _H100,
  "h200": _H100._replace(
    name="NVIDIA H200 141GB HBM3e",
    memory=151_397_597_184,
    bandwidth=4_800_000_000_000,
  ),
}

# libtpu without a TPU: it asks no metadata server, and several may run at once.
_OFFLINE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Devices(NamedTuple):
  """Devices to compile for.

  Attributes:
    name: As the user gave it, such as "cpu-8" or "v5p:4x4x2".
    devices: JAX devices; those of a TPU topology cannot run anything.
    gib: Memory of each device in GiB.
    hertz: Cycles per second; None: the compiler counts none.
    peak: FLOP per second of TPUs, in bfloat16.
  """

  name: str
  devices: Sequence[Any]
  gib: float
  hertz: float | None = None
  peak: float | None = None


def find_devices(text: str) -> Devices:
  """Returns the devices of a name, such as "cpu-8", "v5e:2x2" or "h100:4x8".

  Raises:
    ConfigError: the name is not valid, the compiler for these devices is not
      installed, or JAX has started with fewer CPU devices.
  """
  if found := re.fullmatch(r"cpu-([1-9]\d{0,3})", text):
    return _cpus(text, int(found[1]))
  if found := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", text):
    generation, shape = found[1], [int(size) for size in found[2].split("x")]
  elif found := re.fullmatch(r"(\w+)-([1-9]\d*)", text):
    generation, shape = found[1], topology_of(found[1], int(found[2]))
  else:
    generation, shape = "", None
  if generation in _GPUS and shape and len(shape) <= 2:
    return _gpus(text, generation, shape)
  if generation not in _TPUS or shape is None:
    raise ConfigError(
      f"--devices={text} is not valid; use cpu-N, a TPU topology such as "
      f"v5p:4x4x2 or v5e:2x2, a slice such as v5p-64 ({', '.join(_TPUS)}), or "
      f"GPUs: h100:8, or h100:4x8 of four hosts ({', '.join(_GPUS)})"
    )
  return _tpus(text, generation, shape)


def _gpus(name: str, kind: str, shape: Sequence[int]) -> Devices:
  """Returns GPUs of one host, shape (N,), or of several, (hosts, N)."""
  gpu = _GPUS[kind]
  # The compiler asks for no driver, and has no GPU to time kernels on.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_gpu_autotune_level" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
  _start_on_cpus(math.prod(shape))
  hosts = (1, *shape)[-2]
  try:
    found = topologies.get_topology_desc(
      platform="cuda",
      target_config=_target(gpu),
      topology=f"1x{hosts}x{shape[-1]}",
    )
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise ConfigError(
      "the compiler for GPUs is not installed; pip install "
      "'folding-jax[gpu-estimate]', or use --devices=cpu-N for an estimate "
      f"({first_line(error)})"
    ) from error
  return Devices(name, found.devices, gpu.memory / GIB)


def _target(gpu: _Gpu) -> str:
  """Returns the description of a GPU as a text proto."""
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: 2048 core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.name}"
"""


def _start_on_cpus(count: int) -> None:
  """Starts no real device, for programs of several devices or of one.

  FPP looks for thresholds in another way if `jax.device_count()` is 1.
  """
  jax.config.update("jax_platforms", "cpu")
  if count > 1:
    try:
      jax.config.update("jax_num_cpu_devices", 8)
    except RuntimeError:
      pass  # JAX has started


def _cpus(name: str, count: int) -> Devices:
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # JAX has started
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise ConfigError(
      f"--devices={name}: JAX has started with {len(devices)} CPU devices"
    )
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return Devices(name, devices[:count], memory / GIB / count)


def topology_of(generation: str, number: int) -> list[int] | None:
  """Returns the topology of a slice such as v5p-64; None: there is none.

  It is the most even one, in Google's order: 2 x 4 x 4, but 2 x 2 x 1.
  """
  if generation not in _TPUS:
    return None
  _, axes, cores, *_ = _TPUS[generation]
  power = (number // cores).bit_length() - 1
  if power < 0 or number != 2**power * cores:
    return None
  sizes = [2 ** ((power + axis) // axes) for axis in range(axes)]
  return sorted(sizes, key=lambda size: (size == 1, size))


def _wraps(generation: str, shape: Sequence[int]) -> list[bool]:
  """Returns whether the chips along x, y and z form rings.

  They do along all axes of a v5p slice of whole cubes of 4 x 4 x 4 chips, and along
  an axis of all 16 chips of a v5e or v6e pod.
  """
  if _TPUS[generation].axes == 3:
    return [all(size % 4 == 0 for size in shape)] * 3
  return [*(size == 16 for size in shape), False]


def _tpus(name: str, generation: str, shape: Sequence[int]) -> Devices:
  for variable, value in _OFFLINE.items():
    os.environ.setdefault(variable, value)
  _start_on_cpus(math.prod(shape))
  topology = f"{generation}:{'x'.join(map(str, shape))}"
  options: dict[str, Any] = {"wrap": _wraps(generation, shape)}
  if math.prod(shape) < 4:  # by default a host has 2 x 2 chips
    options["chips_per_host_bounds"] = [*shape, *(1,) * (3 - len(shape))]
  try:
    found = topologies.get_topology_desc(topology, "tpu", **options)
  except RuntimeError as error:
    if "not installed" in str(error):
      raise ConfigError(
        "the compiler for TPUs is not installed; pip install "
        "'folding-jax[tpu]', or use --devices=cpu-N for an estimate"
      ) from error
    raise ConfigError(f"--devices={name} is not valid: {error}") from error
  tpu = _TPUS[generation]
  gib = tpu.gib * math.prod(shape) / len(found.devices)
  return Devices(name, found.devices, gib, tpu.hertz, tpu.peak)

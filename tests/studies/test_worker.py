"""A worker ends with what started it, and while that is suspended."""

import contextlib
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import pytest

from folding import schema
from folding.studies import worker

_WATCH = """
from folding.studies import worker
worker.STALE_SECONDS = 8.0
print("ready", flush=True)
worker._end_with_parent()
"""


@contextlib.contextmanager
def watching():
  pipe = subprocess.PIPE
  command = [sys.executable, "-c", _WATCH]
  with subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) as process:
    assert process.stdout.readline() == b"ready\n"
    yield process


def test_a_reason_is_one_line_of_what_happened():
  with pytest.raises(TypeError) as caught:
    jax.jit(lambda x: jnp.reshape(x, (2, 2)))(jnp.zeros(3))
  printed = "".join(traceback.format_exception(caught.value))
  assert "JAX" in printed.splitlines()[-1]  # a note, and not what happened
  line = schema.reason(caught.value)
  assert line.startswith("TypeError: cannot reshape array of shape (3,)")
  assert "\n" not in line and "JAX has removed" not in line
  assert schema.reason(AssertionError()) == "AssertionError"


def test_it_ends_when_its_parent_closes_the_pipe():
  with watching() as process:
    process.stdin.close()
    assert process.wait(timeout=60) == worker.ABANDONED


def test_it_goes_on_while_it_is_beaten_and_ends_when_it_is_not():
  with watching() as process:
    for _ in range(25):  # longer than it would wait
      process.stdin.write(b".")
      time.sleep(0.2)
    assert process.poll() is None
    assert process.wait(timeout=60) == worker.ABANDONED  # the pipe is open

import math
import os
import signal
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding import schema
from folding.training import optimizer
from folding.training.metrics import MetricsWriter, read_metrics
from folding.training.progress import Clock, StepLog, stop_signal
from folding.training.result import write_result

CONFIG = c.Config(train=c.TrainConfig(steps=20, log_every=4, tensorboard=False))
BATCH = {"tokens": np.zeros((2, 8), np.int32)}


def test_clock_goes_on_after_a_resume(tmp_path):
  fresh = Clock(str(tmp_path), 0)
  assert 0 <= fresh.seconds() < 60
  write_result(str(tmp_path), {"seconds": 1000.0})
  assert 1000 <= Clock(str(tmp_path), 5).seconds() < 1060


@pytest.mark.parametrize(
  ("first_step", "has_result"),
  [(0, True), (5, False)],
  ids=["from-the-start", "killed-early"],
)
def test_clock_starts_at_zero(tmp_path, first_step, has_result):
  if has_result:
    write_result(str(tmp_path), {"seconds": 1000.0})
  assert Clock(str(tmp_path), first_step).seconds() < 60


def losses(*values):
  return [{"loss": jnp.float32(x)} for x in values]


def run(workdir, metrics, size=100):
  """Logs steps from 1 on; returns the log, and the records in the file."""
  clock = Clock(str(workdir), 0)
  with MetricsWriter(str(workdir), CONFIG, 0) as writer:
    log = StepLog(CONFIG, size, writer, clock)
    for step, values in enumerate(metrics, 1):
      log.step(step, values, BATCH)
    log.flush()
  return log, read_metrics(str(workdir / "metrics.jsonl"))


def test_records_at_the_first_step_and_each_log_every(tmp_path):
  log, records = run(tmp_path, losses(*range(10)))
  assert [(r["step"], r["loss"]) for r in records] == [
    (1, 0.0),
    (4, 3.0),
    (8, 7.0),
  ]
  assert {r["split"] for r in records} == {"train"}
  assert "sparsity" not in records[0]
  schedule = optimizer.make_schedule(CONFIG)
  # Of the update that led to the step.
  assert [r["learning_rate"] for r in records] == [
    float(schedule(step)) for step in (0, 3, 7)
  ]
  seconds = [r["seconds"] for r in records]
  assert seconds == sorted(seconds)
  speeds = [r["tokens_per_second"] for r in records]
  assert log.speed() == sorted(speeds)[1]


def test_checks_are_recorded_and_their_counts_remembered(tmp_path):
  metrics = losses(*range(8))
  counts = {"selected": 80.0, "frozen": 10.0, "zero": 30.0}
  metrics[1] |= {name: jnp.float32(x) for name, x in counts.items()}
  _, records = run(tmp_path, metrics)
  assert [r["step"] for r in records] == [1, 2, 4, 8]
  for record in records[1:]:
    assert record["sparsity"] == 30 / 80
    assert record["frozen"] == 10 / 80
    assert record["trainable"] == 100 - 40


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, value):
  # Step 3 is none to be recorded: it is looked at all the same.
  with pytest.raises(
    schema.TrainingError, match=rf"the loss is {value} at step 3$"
  ):
    run(tmp_path, losses(1, 2, value, 4))


def test_the_speed_is_that_of_the_records_before_a_resume_too(tmp_path):
  log, records = run(tmp_path, losses(*range(10)))
  with MetricsWriter(str(tmp_path), CONFIG, 10) as writer:
    again = StepLog(CONFIG, 1, writer, Clock(str(tmp_path), 10))
  assert again.speed() == log.speed()
  first = records[0]["step"]
  with MetricsWriter(str(tmp_path), CONFIG, first) as writer:
    again = StepLog(CONFIG, 1, writer, Clock(str(tmp_path), first))
  assert again.speed() == records[0]["tokens_per_second"]


def test_tokens_per_second_count_all_steps_since_the_last_record(tmp_path):
  clock = Clock(str(tmp_path), 0)
  with MetricsWriter(str(tmp_path), CONFIG, 0) as writer:
    log = StepLog(CONFIG, 1, writer, clock)
    for step in range(1, 9):
      if step == 5:
        log.flush()
        begin = clock.seconds()
        log.restart()
      log.step(step, losses(1)[0], BATCH)
    time.sleep(0.2)
    log.flush()
    elapsed = clock.seconds() - begin
  record = read_metrics(str(tmp_path / "metrics.jsonl"))[-1]
  # Four batches of 16 tokens, in no less than the sleep and no more than the
  # time around them.
  assert record["step"] == 8
  assert 4 * 16 / elapsed <= record["tokens_per_second"] <= 4 * 16 / 0.2


def test_sigterm_is_noticed_and_its_handler_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with stop_signal() as stopped:
    assert not stopped(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopped(0)
    assert stopped(0)
  assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_ctrl_c_asks_and_the_second_ends(request):
  # A shell that starts tests in the background has them ignore Ctrl-C.
  before = signal.default_int_handler
  found = signal.signal(signal.SIGINT, before)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
  with pytest.raises(KeyboardInterrupt), stop_signal() as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped(0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
  assert signal.getsignal(signal.SIGINT) == before


def test_handler_is_put_back_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError, match="in between"), stop_signal():
    raise RuntimeError("in between")
  assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_there_is_no_signal():
  found = []

  def work():
    with stop_signal() as stopped:
      found.append(stopped(0))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]

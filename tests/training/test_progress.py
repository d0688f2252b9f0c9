"""Metrics, clock, log of steps and the stop signal."""

import json
import math
import os
import re
import signal
import struct
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from folding import config as c
from folding.errors import TrainingError
from folding.training import optimizer, progress
from folding.training.progress import (
  Clock,
  MetricsWriter,
  StepLog,
  stop_signal,
)
from folding.training.run_dir import read_metrics, write_result

CONFIG = c.TrainConfig(steps=20, log_every=4, tensorboard=False)
BATCH = {"tokens": np.zeros((2, 8), np.int32)}
RECORDS = [
  {"split": "train", "step": 1, "loss": 2.5, "tokens_per_second": 10.0},
  {"split": "train", "step": 2, "loss": 2.0, "tokens_per_second": 11.0},
  {"split": "valid", "step": 2, "loss": 2.25, "perplexity": 9.5},
  {"split": "train", "step": 3, "loss": 1.5, "tokens_per_second": 12.0},
]


def write(workdir, records, first_step=0, tensorboard=False):
  config = c.TrainConfig(tensorboard=tensorboard)
  with MetricsWriter(str(workdir), config, first_step) as writer:
    for record in records:
      writer.write(record)


def read(workdir):
  """Returns the records, every line of which must be whole."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_writer_flushes_each_record(tmp_path):
  with MetricsWriter(str(tmp_path), CONFIG, 0) as writer:
    for count, record in enumerate(RECORDS, 1):
      writer.write(record)
      assert read(tmp_path) == RECORDS[:count]


@pytest.mark.parametrize(
  ("first_step", "kept"), [(0, 0), (1, 1), (2, 3), (9, 4)]
)
def test_writer_drops_records_after_the_restored_step(
  tmp_path, first_step, kept
):
  write(tmp_path, RECORDS)
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"split": "va')  # by a process that was killed
  new = {"split": "valid", "step": 9, "loss": 1.0}
  write(tmp_path, [new], first_step)
  assert read(tmp_path) == [*RECORDS[:kept], new]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(path):
  """Yields the events of a file: TFRecord framing, read by hand."""
  data = path.read_bytes()
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    yield event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


def test_tensorboard_has_the_records_after_the_restored_step(tmp_path):
  write(tmp_path, RECORDS, first_step=2, tensorboard=True)
  [file] = (tmp_path / "tensorboard").iterdir()
  scalars = {
    (value.tag, event.step): value.simple_value
    for event in events(file)
    for value in event.summary.value
  }
  assert scalars == {
    (f"{r['split']}/{name}", r["step"]): value
    for r in RECORDS
    for name, value in r.items()
    if name not in ("split", "step")
  }
  # It hides events of this step and later in earlier files.
  assert [e.step for e in events(file) if e.HasField("session_log")] == [3]


def test_say_prints_the_message_as_it_is(tmp_path, capsys):
  message = "step 5  [bold] loss 1.5" + " " * 100 + "end"
  with MetricsWriter(str(tmp_path), CONFIG, 0) as writer:
    writer.say(message)
  assert capsys.readouterr().out == message + "\n"


def test_clock_continues_after_a_resumption(tmp_path):
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
  """Logs steps from 1 on; returns the log and the written records."""
  clock = Clock(str(workdir), 0)
  with MetricsWriter(str(workdir), CONFIG, 0) as writer:
    log = StepLog(CONFIG, size, writer, clock, {})
    for step, values in enumerate(metrics, 1):
      log.step(step, values, BATCH)
    log.flush()
  return log, read_metrics(str(workdir / "metrics.jsonl"))


def test_log_records_the_first_step_and_every_log_every(tmp_path):
  log, records = run(tmp_path, losses(*range(10)))
  assert [(r["step"], r["loss"]) for r in records] == [
    (1, 0.0),
    (4, 3.0),
    (8, 7.0),
  ]
  assert {r["split"] for r in records} == {"train"}
  assert "sparsity" not in records[0]
  schedule = optimizer.make_schedule(CONFIG)
  # The rate of the update that led to the step.
  rates = [float(schedule(step)) for step in (0, 3, 7)]
  assert [r["learning_rate"] for r in records] == pytest.approx(rates)
  seconds = [r["seconds"] for r in records]
  assert seconds == sorted(seconds)
  speeds = [r["tokens_per_second"] for r in records]
  assert log.speed() == sorted(speeds)[1]


def test_log_records_mask_updates_and_keeps_their_counts(tmp_path):
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
def test_log_raises_if_a_loss_is_not_finite(tmp_path, value):
  # Step 3 has no record.
  with pytest.raises(TrainingError, match=rf"the loss is {value} at step 3$"):
    run(tmp_path, losses(1, 2, value, 4))


def test_speed_includes_the_records_before_a_resumption(tmp_path):
  log, records = run(tmp_path, losses(*range(10)))
  with MetricsWriter(str(tmp_path), CONFIG, 10) as writer:
    again = StepLog(CONFIG, 1, writer, Clock(str(tmp_path), 10), {})
  assert again.speed() == log.speed()
  first = records[0]["step"]
  with MetricsWriter(str(tmp_path), CONFIG, first) as writer:
    again = StepLog(CONFIG, 1, writer, Clock(str(tmp_path), first), {})
  assert again.speed() == records[0]["tokens_per_second"]


def test_tokens_per_second_count_all_steps_since_the_last_record(tmp_path):
  clock = Clock(str(tmp_path), 0)
  with MetricsWriter(str(tmp_path), CONFIG, 0) as writer:
    log = StepLog(CONFIG, 1, writer, clock, {})
    for step in range(1, 9):
      if step == 5:
        log.flush()
        begin = clock.seconds()
        log.restart()
      log.step(step, losses(1)[0], BATCH)
    time.sleep(0.2)  # the time that the record counts
    log.flush()
    elapsed = clock.seconds() - begin
  record = read_metrics(str(tmp_path / "metrics.jsonl"))[-1]
  # Four batches of 16 tokens, in at least the sleep and at most the elapsed time.
  assert record["step"] == 8
  assert 4 * 16 / elapsed <= record["tokens_per_second"] <= 4 * 16 / 0.2


def test_stop_signal_notices_sigterm_and_restores_the_handler(request):
  def before(*_):
    raise AssertionError("the handler before got SIGTERM")

  found = signal.signal(signal.SIGTERM, before)
  request.addfinalizer(lambda: signal.signal(signal.SIGTERM, found))
  with stop_signal() as stopped:
    assert not stopped(0)
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGTERM)
      assert stopped(0)
  assert signal.getsignal(signal.SIGTERM) == before


def test_stop_signal_second_ctrl_c_interrupts(request):
  # Tests that a shell starts in the background ignore Ctrl-C.
  before = signal.default_int_handler
  found = signal.signal(signal.SIGINT, before)
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
  with pytest.raises(KeyboardInterrupt), stop_signal() as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped(0)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # the second signal interrupts it
  assert signal.getsignal(signal.SIGINT) == before


def test_stop_signal_outside_the_main_thread_is_never_set():
  found = []

  def work():
    with stop_signal() as stopped:
      found.append(stopped(0))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]


def test_track_counts_the_items_in_a_log(monkeypatch, capsys):
  monkeypatch.setattr(progress, "_LOG_SECONDS", -1)
  assert list(progress.track("abc", "reading")) == ["a", "b", "c"]
  lines = capsys.readouterr().err.splitlines()
  assert [re.findall(r"\d+ of 3", line) for line in lines] == [
    ["0 of 3"],
    ["1 of 3"],
    ["2 of 3"],
  ]

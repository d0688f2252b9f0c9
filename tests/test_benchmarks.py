"""What benchmarks compare. `.ci/run` runs them at reduced size."""

from benchmarks import fpp_step


def test_baseline_of_the_fpp_step_prunes_nothing():
  bare, pruned = (fpp_step.get_config(1, prunes=x) for x in (False, True))
  assert not bare.fpp.prunes
  assert pruned.fpp.prunes
  assert bare.fold == pruned.fold

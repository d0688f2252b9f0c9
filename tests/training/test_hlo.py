"""Reading of compiled programs: loops count once per iteration."""

import pytest

from folding.training import hlo

# Output of the TPU compiler, shortened.
COMPUTATIONS = """HloModule jit_step

%fused (p: f32[8]) -> f32[64] {
  %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9"}
  ROOT %gather.1 = f32[64]{0} all-gather(%c), dimensions={0}
}

%keys (p: (s32[], s32[])) -> (s32[], s32[]) {
  %a = f32[4]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"3"}
}

%more_keys (p: (s32[], s32[])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%i, %end), direction=LT
}

%unlike_keys (p: (s32[], s32[])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(4)
  ROOT %ne.1 = pred[] compare(%i, %constant.2), direction=NE
}

%some_keys (p: f32[]) -> f32[] {
  %w = (s32[]) while(%t), condition=%more_keys, body=%keys
}

%queries (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%more_keys, body=%keys
  %r = (bf16[2]{0}, bf16[2]{0}, u32[]{:S(2)}) collective-permute-start(%x)
}

%some_queries (p: (s32[])) -> (s32[]) {
  %c = f32[] conditional(%p, %x, %y), branch_computations={%cheap, %some_keys}
}

%more_queries (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %lt.2 = pred[] compare(%i, %constant.1), direction=LT
}

%cheap (p: f32[]) -> f32[] {
  %r = f32[1024]{0} all-reduce(%x), to_apply=%add
}

%dear (p: f32[]) -> f32[] {
  %a = f32[4]{0} copy(%p), backend_config={"estimated_cycles":"50"}
}
"""
PROGRAM = (
  COMPUTATIONS
  + """
ENTRY %main (p: f32[8]) -> f32[64] {
  %f = f32[64]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
  %w = (s32[]) while(%t), condition=%more_queries, body=%queries
  %c = f32[] conditional(%p, %x, %y), branch_computations={%cheap, %dear}
  %r = (f32[3]{0}, f32[]) all-reduce(%x, %y), to_apply=%add
}
"""
)
BLOCKS = 7 * (7 + 1) / 2  # of keys: 1, 2, ... 7 of them


def test_loops_count_once_per_turn():
  work = hlo.read(PROGRAM)
  assert work.cycles == 10 + 3 * BLOCKS + 50
  assert work.moved == {
    "all-gather": (1, 64 * 4),
    "collective-permute": (7, 7 * 2 * 2),
    "all-reduce": (1, 4 * (3 + 1)),
  }


@pytest.mark.parametrize(
  ("instruction", "cycles", "moved"),
  [
    (
      'while(%t), condition=%unlike_keys, body=%keys, backend_config={"known_'
      'trip_count":{"n":"5"}}',
      *(5 * 3, {}),
    ),
    ("while(%t), condition=%unlike_keys, body=%keys", 3, {}),
    (
      "while(%t), condition=%more_queries, body=%some_queries",
      *(3 * BLOCKS, {}),
    ),
    (
      "conditional(%i), branch_computations={%dear, %cheap, %keys}",
      *(0, {"all-reduce": (1, 4096)}),
    ),
    (
      "conditional(%p), true_computation=%cheap, false_computation=%dear",
      *(50, {}),
    ),
    (
      "conditional(%p), true_computation=%dear, false_computation=%cheap",
      *(50, {}),
    ),
    ("call(%p), to_apply=%dear", 50, {}),
    ("async-start(%p), calls=%fused", 0, {"all-gather": (1, 256)}),
    ("all-gather(%p), dimensions={0}", 0, {"all-gather": (1, 5)}),
  ],
)
def test_instruction_counts_what_it_calls(instruction, cycles, moved):
  entry = (
    f"ENTRY %main (p: f32[8]) -> f32[64] {{\n  %x = pred[5] {instruction}\n}}"
  )
  assert hlo.read(f"{COMPUTATIONS}\n{entry}\n") == (cycles, moved, 0)


KERNEL = """
%body (p: (s32[])) -> (s32[]) {
  %k = (bf16[2]{0}) custom-call(%q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(f)/transpose(jvp(products_8_2))/shard_map/\
splash_mha_KIND_residuals/pallas_call"}
  %g = bf16[2]{0} copy(%k), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="products_8_2/splash_mha_KIND_residuals"}, \
backend_config={"estimated_cycles":"3"}
}

ENTRY %main (p: f32[8]) -> f32[64] {
  %w = (s32[]) while(%t), condition=%more_queries, body=%body
}
"""


@pytest.mark.parametrize(
  ("kind", "flops"), [("fwd", 8 + 2), ("dq", 16 + 2), ("dkv", 16 + 4)]
)
def test_kernel_counts_its_products(kind, flops):
  text = COMPUTATIONS + KERNEL.replace("KIND", kind)
  assert hlo.read(text) == (7 * 3, {}, 7 * flops)

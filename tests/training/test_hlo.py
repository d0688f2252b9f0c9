"""Reading of compiled programs: loops count once per turn."""

from folding.training import hlo

# As the TPU compiler writes it, shortened.
PROGRAM = """HloModule jit_step

%fused (p: f32[8]) -> f32[64] {
  ROOT %gather.1 = f32[64]{0} all-gather(%p), dimensions={0}
}

%keys (p: (s32[], s32[])) -> (s32[], s32[]) {
  %a = f32[4]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"3"}
}

%more_keys (p: (s32[], s32[])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%i, %end), direction=LT
}

%queries (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%more_keys, body=%keys
  %r = (bf16[2]{0}, bf16[2]{0}, u32[]{:S(2)}) collective-permute-start(%x)
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

ENTRY %main (p: f32[8]) -> f32[64] {
  %f = f32[64]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
  %w = (s32[]) while(%t), condition=%more_queries, body=%queries
  %c = f32[] conditional(%p, %x, %y), branch_computations={%cheap, %dear}
  %r = (f32[3]{0}, f32[]) all-reduce(%x, %y), to_apply=%add
}
"""


def test_loops_count_once_per_turn():
  work = hlo.read(PROGRAM)
  blocks = 7 * (7 + 1) / 2  # of keys: 1, 2, ... 7 of them
  assert work.cycles == 10 + 3 * blocks + 50
  assert work.moved == {
    "all-gather": (1, 64 * 4),
    "collective-permute": (7, 7 * 2 * 2),
    "all-reduce": (1, 4 * (3 + 1)),
  }

"""Spellings of programs that no compiler here writes, and of TPU programs: read from hand-written HLO.

The TPU forms are cut down from programs that the compiler wrote for a described v5e and v5p (`test_hlo_tpu.py` compiles
such programs where the compiler is installed).
"""

import pytest

from irope_jax.plan import hlo

HAND_WRITTEN = """HloModule hand, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (p: f32[6,8]) -> f32[12,8] {
  %p = f32[6,8]{1,0} parameter(0)
  ROOT %ag = f32[12,8]{1,0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}
}

ENTRY %main (x: f32[6,8], y: f32[8,10]) -> (f32[6,10], f32[12,8]) {
  %x = f32[6,8]{1,0:T(8,128)} parameter(0), metadata={op_name="a \\"quoted\\" } name, calls=%add"}
  %y = f32[8,10]{1,0:T(8,128)} parameter(1)
  %gemm = (f32[6,10]{1,0}, s8[1024]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %shapes = f32[6,10]{1,0} custom-call(%x, %y), custom_call_target="__onednn$matmul", backend_config={"onednn_matmul_config":{}}
  %kernel = f32[6,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %start = (f32[6,8]{1,0}, f32[6,8]{1,0}, u32[], u32[]) collective-permute-start(%kernel), source_target_pairs={{0,1},{1,0},{2,2}}
  %done = f32[6,8]{1,0} collective-permute-done(%start)
  %astart = ((f32[6,8]{1,0}), f32[12,8]{1,0}, /*index=2*/u32[]) async-start(%done), calls=%wrapped
  %adone = f32[12,8]{1,0} async-done(%astart)
  %conv = f32[6,10]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  %sum = bf16[6,8]{1,0} all-reduce(%small), replica_groups={}, to_apply=%add
  %small = bf16[6,8]{1,0} convert(%done)
  ROOT %out = (f32[6,10]{1,0}, f32[12,8]{1,0}) tuple(%conv, %adone)
}
"""  # noqa: E501


def test_forms_of_other_compilers():
    """Library calls, products written as convolutions, asynchronous collectives, tiled layouts, opaque kernels."""
    cost = hlo.analyse(HAND_WRITTEN)
    assert cost.matmul_flops_max == cost.matmul_flops_min == 3 * 2 * 6 * 10 * 8
    assert cost.opaque_calls == {"tpu_custom_call": 1}
    assert cost.collective_bytes == {
        "collective-permute": 6 * 8 * 4 * 2 / 4,
        "all-gather": 6 * 8 * 4 * 1,
        "all-reduce": 2 * 6 * 8 * 2 * 3 / 4,
    }
    assert cost.instructions == 18


@pytest.mark.parametrize(
    "groups, n",
    [
        ("{{0,2},{1,3}}", 2),
        ("[1,4]<=[4]", 4),
        ("mesh['x'=2,'y'=2] {'y'}", 2),
        ("mesh['x'=2,'y'=2] {'x','y'}", 4),
        ("mesh['x'=4] {'x':(1)2}", 2),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", 2),
    ],
)
def test_spellings_of_device_groups(groups, n):
    program = HAND_WRITTEN.replace("replica_groups={}", f"replica_groups={groups}")
    assert hlo.analyse(program).collective_bytes["all-reduce"] == 2 * 6 * 8 * 2 * (n - 1) / n


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyse("not a program")
    with pytest.raises(ValueError, match="replica_groups"):
        hlo.analyse(HAND_WRITTEN.replace("replica_groups={}", "replica_groups=whatever"))


SPREAD = """HloModule spread, num_partitions=8

%start (p: bf16[1,2048,1024]) -> (bf16[1,2048,1024], bf16[1,2048,2048], u32[]) {
  %p = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={2}, metadata={op_name="jit(f)/layer_1/convert"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c = (bf16[1,2048,1024]{2,1,0}, bf16[1,2048,2048]{2,1,0}, u32[]{:S(2)}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%beside (a: bf16[1,2048,1024], b: bf16[1,2048,2048], u: u32[], x: bf16[4096,2048], w: bf16[2048,2048]) -> bf16[4096,2048] {
  %a = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %x = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(3)
  %w = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(4)
  %ag = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={2}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %product = bf16[4096,2048]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
}

%done (a: bf16[1,2048,1024], b: bf16[1,2048,2048], u: u32[]) -> bf16[1,2048,2048] {
  %a = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %u = u32[]{:S(2)} parameter(2)
  %ag = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)} all-gather(%a), channel_id=15, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={2}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %c = bf16[1,2048,2048]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%a, %b, %ag, %u), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[1,2048,1024], x: bf16[4096,2048], w: bf16[2048,2048]) -> bf16[4096,2048] {
  %p = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %s = (bf16[1,2048,1024]{2,1,0}, bf16[1,2048,2048]{2,1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %g0 = bf16[1,2048,1024]{2,1,0} get-tuple-element(%s), index=0
  %g1 = bf16[1,2048,2048]{2,1,0} get-tuple-element(%s), index=1
  %g2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %d = bf16[1,2048,2048]{2,1,0} fusion(%g0, %g1, %g2), kind=kCustom, calls=%done
  ROOT %y = bf16[4096,2048]{1,0} fusion(%g0, %g1, %g2, %x, %w), kind=kOutput, calls=%beside, metadata={op_name="jit(f)/layer_0/dot"}
}
"""  # noqa: E501


def test_a_collective_spread_over_fusions_is_sent_once():
    """It stands in the fusion that starts it, in the product it runs beside, and in the one that waits for it."""
    cost = hlo.analyse(SPREAD)
    assert [(s.kind, s.times, s.bytes, s.layer) for s in cost.collectives] == [
        ("all-gather", 1, 2048 * 1024 * 2, "layer_1")
    ]
    assert cost.flops_by("layer") == {"layer_0": 2 * 4096 * 2048 * 2048}  # the scope of the fusion, having none itself
    assert cost.opaque_calls == {}  # markers, no kernels


LOOPED = """HloModule looped, num_partitions=4

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %s = bf16[]{:T(256)} add(%a, %b)
}

%sum_and_slice (p: bf16[64,8], q: bf16[32,8]) -> (bf16[16,8], bf16[8,8]) {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(1)
  %ar = (bf16[64,8]{1,0}, bf16[32,8]{1,0}) all-reduce(%p, %q), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add, frontend_attributes={from-cross-replica-sharding="true"}
  %r0 = bf16[64,8]{1,0} get-tuple-element(%ar), index=0
  %r1 = bf16[32,8]{1,0} get-tuple-element(%ar), index=1
  %c = u32[] constant(0)
  %s0 = bf16[16,8]{1,0} dynamic-slice(%r0, %c, %c), dynamic_slice_sizes={16,8}
  %s1 = bf16[8,8]{1,0} dynamic-slice(%r1, %c, %c), dynamic_slice_sizes={8,8}
  ROOT %t = (bf16[16,8]{1,0}, bf16[8,8]{1,0}) tuple(%s0, %s1)
}

%body (carry: (s32[], bf16[64,8], bf16[32,8], s32[])) -> (s32[], bf16[64,8], bf16[32,8], s32[]) {
  %carry = (s32[]{:T(128)}, bf16[64,8]{1,0}, bf16[32,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[64,8]{1,0} get-tuple-element(%carry), index=1
  %y = bf16[32,8]{1,0} get-tuple-element(%carry), index=2
  %n = s32[]{:T(128)} get-tuple-element(%carry), index=3
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step)
  %k = bf16[64,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(Decoder))/layer_3/attention/splash"}
  %g = bf16[32,8]{1,0} copy(%y), metadata={op_name="jit(f)/transpose(jvp(Decoder))/layer_2/dot"}
  %rs = (bf16[16,8]{1,0}, bf16[8,8]{1,0}) fusion(%k, %g), kind=kCustom, calls=%sum_and_slice, metadata={op_name="jit(f)/transpose(jvp(Decoder))/layer_0/dot"}
  ROOT %t = (s32[]{:T(128)}, bf16[64,8]{1,0}, bf16[32,8]{1,0}, s32[]{:T(128)}) tuple(%next, %x, %y, %n)
}

%condition (carry: (s32[], bf16[64,8], bf16[32,8], s32[])) -> pred[] {
  %carry = (s32[]{:T(128)}, bf16[64,8]{1,0}, bf16[32,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %n = s32[]{:T(128)} get-tuple-element(%carry), index=3
  ROOT %test = pred[]{:T(512)} compare(OPERANDS), direction=DIRECTION
}

ENTRY %main (x: bf16[64,8], y: bf16[32,8]) -> bf16[64,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = bf16[32,8]{1,0} parameter(1)
  %first = s32[]{:T(128)} constant(FIRST)
  %last = s32[]{:T(128)} constant(LAST)
  %moved = (s32[]{:T(128)S(1)}, s32[]{:T(128)}, u32[]{:S(2)}) copy-start(%last)
  %there = s32[]{:T(128)S(1)} copy-done(%moved)
  %t = (s32[]{:T(128)}, bf16[64,8]{1,0}, bf16[32,8]{1,0}, s32[]{:T(128)}) tuple(%first, %x, %y, %there)
  %w = (s32[]{:T(128)}, bf16[64,8]{1,0}, bf16[32,8]{1,0}, s32[]{:T(128)}) while(%t), condition=%condition, body=%body
  ROOT %out = bf16[64,8]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def looped(first, last, step, direction, operands="%i, %n"):
    words = dict(FIRST=first, LAST=last, STEP=step, DIRECTION=direction, OPERANDS=operands)
    program = LOOPED
    for word, value in words.items():
        program = program.replace(word, str(value))
    return program


@pytest.mark.parametrize(
    ("loop", "rounds"),
    [
        ((0, 7, 1, "LT"), 7),
        ((0, 7, 2, "LT"), 4),
        ((0, 7, 1, "LE"), 8),
        ((6, -1, -1, "GT"), 7),
        ((6, 0, -2, "GE"), 4),
        ((0, 8, 2, "NE"), 4),
        ((0, 7, 1, "GT", "%n, %i"), 7),  # written as last > i
        ((9, 7, 1, "LT"), 0),
    ],
)
def test_rounds_are_read_where_the_compiler_notes_none(loop, rounds):
    """TPU programs: start, step and bound are constants, the bound perhaps moved to another memory."""
    cost = hlo.analyse(looped(*loop))
    assert cost.unknown_trips == 0
    assert cost.opaque_calls == ({"tpu_custom_call": rounds} if rounds else {})


@pytest.mark.parametrize("loop", [(0, 7, -1, "LT"), (0, 7, 2, "NE"), (7, 0, 1, "GT")])
def test_a_loop_that_would_not_end_as_counted_is_unknown(loop):
    assert hlo.analyse(looped(*loop)).unknown_trips == 1


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter_and_each_operand_goes_to_its_layer():
    cost = hlo.analyse(looped(0, 5, 1, "LT"))
    assert cost.collective_bytes == {"reduce-scatter": 5 * (64 + 32) * 8 * 2 * 3 / 4}
    assert cost.bytes_by("layer", "phase") == {
        ("layer_3", "backward"): 5 * 64 * 8 * 2 * 3 / 4,
        ("layer_2", "backward"): 5 * 32 * 8 * 2 * 3 / 4,
    }
    assert [(k.target, k.layer, k.times) for k in cost.kernels] == [("tpu_custom_call", "layer_3", 5)]
    kept = looped(0, 5, 1, "LT").replace("tuple(%s0, %s1)", "tuple(%s0, %r1)")  # the whole sum leaves: it is one
    assert hlo.analyse(kept).collective_bytes == {"all-reduce": 2 * 5 * (64 + 32) * 8 * 2 * 3 / 4}


STARTS = {
    "all-gather": (
        "(bf16[6,8]{1,0}, bf16[24,8]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]",
        6 * 8 * 2 * 3,
    ),
    "all-reduce": ("bf16[6,8]{1,0} all-reduce-start(%x), replica_groups=[2,2]<=[4], to_apply=%add", 6 * 8 * 2),
    "reduce-scatter": (
        "((bf16[6,8]{1,0}), bf16[3,8]{1,0}) reduce-scatter-start(%x), replica_groups=[2,2]<=[4], calls=%wrapped",
        6 * 8 * 2 / 2,
    ),
    "all-to-all": ("((bf16[6,8]{1,0}), bf16[6,8]{1,0}) async-start(%x), calls=%wrapped", 6 * 8 * 2 / 2),
    "collective-permute": (
        "(bf16[6,8]{1,0}, bf16[6,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,3}}",
        6 * 8 * 2 * 3 / 4,
    ),
    "collective-permute in place": (
        "(bf16[6,8], bf16[6,8], u32[], u32[]) collective-permute-start(%x, %x, %o, %o), "
        "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, slice_sizes={{2,8}}",
        2 * 8 * 2,
    ),
    "collective-permute as send": (
        "(bf16[6,8]{1,0}, u32[], token[]) send(%x, %k), channel_id=1, "
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,2}}"}',
        6 * 8 * 2 * 2 / 4,
    ),
    "ragged-all-to-all": ("bf16[9,8]{1,0} ragged-all-to-all(%x, %big, %o, %o), replica_groups=[1,4]<=[4]", 6 * 8 * 2),
}


@pytest.mark.parametrize("form", STARTS)
def test_asynchronous_forms(form):
    """The start counts, whatever waits for it does not; bfloat16 has two bytes."""
    line, sent = STARTS[form]
    program = f"""HloModule forms, num_partitions=4

%wrapped (p: bf16[6,8]) -> bf16[6,8] {{
  %p = bf16[6,8]{{1,0}} parameter(0)
  ROOT %r = bf16[6,8]{{1,0}} all-to-all(%p), replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
}}

ENTRY %main (x: bf16[6,8], big: bf16[9,8], o: u32[]) -> bf16[6,8] {{
  %x = bf16[6,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  %big = bf16[9,8]{{1,0}} parameter(1)
  %o = u32[] parameter(2)
  %k = token[] after-all()
  %s = {line}
  ROOT %d = bf16[6,8]{{1,0}} {form.split()[0]}-done(%s)
}}
"""
    cost = hlo.analyse(program)
    assert cost.collective_bytes == {form.split()[0]: sent} and cost.unknown_trips == 0


def test_rounds_are_read_through_fusions():
    """The counter is one of several results of a fusion, the test a fusion of its own."""
    fused = """%bump (i: s32[], by: s32[]) -> (s32[], s32[]) {
  %i = s32[] parameter(0)
  %by = s32[] parameter(1)
  %sum = s32[] add(%by, %i)
  ROOT %t = (s32[], s32[]) tuple(%by, %sum)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%b, %a), direction=GT
}

%body ("""
    program = looped(0, 7, 2, "LT").replace("%body (", fused, 1)
    program = program.replace(
        "%next = s32[]{:T(128)} add(%i, %step)",
        "%both = (s32[], s32[]) fusion(%i, %step), kind=kLoop, calls=%bump\n"
        "  %next = s32[] get-tuple-element(%both), index=1",
    ).replace("compare(%i, %n), direction=LT", "fusion(%i, %n), kind=kLoop, calls=%less")
    cost = hlo.analyse(program)
    assert (cost.unknown_trips, cost.opaque_calls) == (0, {"tpu_custom_call": 4})


def test_what_a_kernel_says_of_itself_on_several_lines_ends_nothing():
    """Splash attention's block sizes stand between line breaks; a brace that begins a line is not the body's."""
    sizes = '"xprof_metadata":"{\\"block_q\\": 1024, \\"x\\": null}"'
    said = f"frontend_attributes={{kernel_metadata={{\n{sizes}\n}}}}, metadata="
    plain = looped(0, 5, 1, "LT")
    program = plain.replace(
        'custom_call_target="tpu_custom_call", metadata=', f'custom_call_target="tpu_custom_call", {said}'
    )
    assert program.count("\n") == plain.count("\n") + 2
    assert hlo.analyse(program) == hlo.analyse(plain)


def test_a_text_cut_short_is_an_error():
    with pytest.raises(ValueError, match="without a result"):
        hlo.analyse(LOOPED.replace("  ROOT %t = (s32[]{:T(128)}, bf16", "  %t = (s32[]{:T(128)}, bf16"))

"""The decision, row by row. Bytes are written by hand from sizes of published models, not by the module's formulas."""

import dataclasses

import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding, allowed
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import CallShape, ContextConfig, Promises, decide, halo_length, megabytes
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo

MiB = 2**20
ALONE = Promises(document_multiple=0, unbroken=True)
PACKED = Promises(document_multiple=1)
AUTO = ContextConfig()


def scout(parts, length, **changes):
    """Llama 4 Scout: 40 query heads, 8 key heads of 128, bfloat16; 4096 bytes of keys and values per token."""
    return CallShape(parts, length, length, query_heads=40, key_heads=8, width=128, itemsize=2, **changes)


def choose(mask, shape, kind="contiguous", promises=ALONE, config=AUTO):
    return decide(mask, shape, kind and ContextLayout(kind, shape.parts), promises, config)


# mask, devices, tokens, layout, promises -> kind, halo, hops, forward bytes, backward bytes
TABLE = [
    # chunks that divide what a device holds cost nothing; zigzag holds two runs and needs twice the length
    (Chunked(8192), 8, 65_536, "contiguous", ALONE, "local", 0, 0, 0, 0),
    (Chunked(8192), 8, 131_072, "zigzag", ALONE, "local", 0, 0, 0, 0),
    (Chunked(8192), 64, 1_048_576, "zigzag", ALONE, "local", 0, 0, 0, 0),
    (Chunked(8192), 8, 131_072, "zigzag", Promises(8192), "local", 0, 0, 0, 0),
    (Chunked(8192), 8, 131_072, "zigzag", Promises(16_384), "local", 0, 0, 0, 0),
    (Chunked(8192, by="row"), 8, 131_072, "zigzag", PACKED, "local", 0, 0, 0, 0),
    # a chunk of two runs: the second of them looks one run back, 4096 tokens of 4 KiB
    (Chunked(8192), 8, 65_536, "zigzag", ALONE, "halo", 4096, 1, 32 * MiB, 32 * MiB),
    # a chunk of four pieces: three pieces of 2048 tokens come from three hops
    (Chunked(8192), 64, 131_072, "contiguous", ALONE, "halo", 6144, 3, 24 * MiB, 24 * MiB),
    # 10M tokens on 512 devices: 20480 = 2.5 chunks a device, so that every second border cuts a chunk in the middle
    (Chunked(8192), 512, 10_485_760, "contiguous", ALONE, "halo", 4096, 1, 16 * MiB, 16 * MiB),
    # borders unknown: documents may start anywhere, so a chunk may reach back its size less the query itself
    (Chunked(8192), 8, 131_072, "contiguous", PACKED, "halo", 8191, 1, 8191 * 4096, 8191 * 4096),
    (Chunked(8192), 8, 131_072, "contiguous", Promises(4096), "halo", 8191, 1, 8191 * 4096, 8191 * 4096),
    # a shift by 3 leaves 3 tokens of a chunk on the device before
    (Chunked(8192, by="row", shift=3), 8, 131_072, "contiguous", PACKED, "halo", 3, 1, 3 * 4096, 3 * 4096),
    # a window sends itself less the query, whatever the length; twice that in zigzag
    (Sliding(8192), 8, 131_072, "contiguous", PACKED, "halo", 8191, 1, 8191 * 4096, 8191 * 4096),
    (Sliding(8192), 64, 10_485_760, "contiguous", PACKED, "halo", 8191, 1, 8191 * 4096, 8191 * 4096),
    (Sliding(8192), 8, 131_072, "zigzag", PACKED, "halo", 8191, 1, 2 * 8191 * 4096, 2 * 8191 * 4096),
    (Sliding(1), 8, 131_072, "zigzag", PACKED, "local", 0, 0, 0, 0),
    # seeing all: 96 heads of 256 bytes of 16384 tokens, 7 of 8 leave; over 64 devices that and 7 hops of 64 MiB
    (Global(), 8, 131_072, "zigzag", ALONE, "all_to_all", 0, 0, 336 * MiB, 336 * MiB),
    (Global(), 64, 1_048_576, "zigzag", ALONE, "all_to_all", 0, 7, 784 * MiB, 336 * MiB + 3 * 448 * MiB),
    # a chunk as long as the sequence is the same as seeing all
    (Chunked(8192), 8, 8192, "contiguous", ALONE, "all_to_all", 0, 0, 21 * MiB, 21 * MiB),
    # one device
    (Global(), 1, 8192, "contiguous", PACKED, "local", 0, 0, 0, 0),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}x {row[2]} {row[3]}")
def test_table(row):
    mask, parts, length, kind, promises, *wanted = row
    found = choose(mask, scout(parts, length), kind, promises)
    assert [found.kind, found.halo, found.hops, found.forward_bytes, found.backward_bytes] == wanted
    assert found.why


def test_the_ring_by_hand():
    """Eight devices, 131072 tokens: 7 pieces of 16384 x 4 KiB = 64 MiB; backward again, with gradients of 128 MiB."""
    ring = choose(Global(), scout(8, 131_072), config=ContextConfig(far="ring"))
    assert (ring.kind, ring.hops) == ("ring", 7)
    assert (ring.forward_bytes, ring.backward_bytes) == (448 * MiB, (448 + 896) * MiB)
    short = choose(Global(), scout(8, 131_072), config=ContextConfig(far="ring", gradients="keys"))
    assert short.backward_bytes == 2 * 448 * MiB
    assert choose(Global(), scout(8, 131_072, batch=3), config=ContextConfig(far="ring")).forward_bytes == 3 * 448 * MiB
    gather = choose(Global(), scout(8, 131_072), config=ContextConfig(far="gather"))
    assert (gather.forward_bytes, gather.backward_bytes) == (448 * MiB, 448 * MiB)


def test_every_decision_says_what_an_all_gather_would_send():
    local = choose(Chunked(8192), scout(8, 131_072))
    assert (local.gather_forward_bytes, local.gather_backward_bytes) == (448 * MiB, 448 * MiB)


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "parts", "kind", "group"),
    [
        (4, 4, 8, "all_to_all", 4),  # as many key heads as query heads: 16/8 of kappa once beats 4 of 7 hops
        (8, 1, 8, "ring", 1),  # one key head cannot be shared out
        (8, 3, 8, "ring", 1),
        (32, 1, 8, "gather", 1),  # 16 gathered pieces of one head are half of 32 queries
        (16, 1, 8, "gather", 1),
        (8, 2, 2, "gather", 1),  # 8 = 2 x 2 x 2
        (40, 8, 4, "ring", 1),  # a tie: 3 x 3 x 16 heads of keys, or 2 x 96 x 3/4 of everything
    ],
)
def test_what_sees_all_takes_the_fewest_bytes(query_heads, key_heads, parts, kind, group):
    shape = CallShape(parts, 4096, 4096, query_heads, key_heads, width=64, itemsize=4)
    options = {
        way: choose(Global(), shape, config=ContextConfig(far=way))
        for way in ("ring", "gather", "all_to_all")
        if way != "all_to_all" or (key_heads % 2 == 0 and parts % 2 == 0)
    }
    found = choose(Global(), shape)
    assert (found.kind, found.group) == (kind, group)
    allowed = [d for way, d in options.items() if way != "gather" or 2 * parts * key_heads <= query_heads]
    assert found.total_bytes == min(d.total_bytes for d in allowed)


@pytest.mark.parametrize(("parts", "kind"), [(2, "gather"), (4, "ring"), (6, "all_to_all"), (8, "all_to_all")])
def test_scout_exchanges_heads_on_more_than_four_devices_if_gradients_are_short(parts, kind):
    """In heads of 128 per token: a ring sends 3 (P-1) 16, the exchange of all 2 x 96 (P-1)/P; equal at P = 4."""
    shape = scout(parts, 49_152 * parts)
    assert choose(Global(), shape, config=ContextConfig(gradients="keys")).kind == kind


def test_an_order_that_is_not_known_is_never_guessed():
    for mask in (Global(), Chunked(8), Sliding(8)):
        found = choose(mask, scout(8, 1024), kind=None)
        assert (found.kind, found.hops) == ("ring", 7) and "promise no order" in found.fell_back
        assert found.coordinate_bytes == 7 * 128 * 12
    with pytest.raises(ConfigError, match=r"context.near='halo': needs the order of the tokens"):
        choose(Sliding(8), scout(8, 1024), kind=None, config=ContextConfig(near="halo"))
    with pytest.raises(ConfigError, match=r"context.far='all_to_all': needs the order"):
        choose(Global(), scout(8, 1024), kind=None, config=ContextConfig(far="all_to_all"))


@pytest.mark.parametrize(
    ("mask", "promises", "tokens"),
    [(Global(), ALONE, 0), (Global(), PACKED, 4), (Chunked(8, by="row"), PACKED, 4), (Chunked(8), PACKED, 8)],
)
def test_coordinates_travel_only_where_they_cannot_be_computed(mask, promises, tokens):
    config = ContextConfig(near="ring", far="ring")
    assert choose(mask, scout(8, 1024), promises=promises, config=config).coordinate_bytes == 7 * 128 * tokens


@pytest.mark.parametrize(
    ("mask", "kind", "promises", "reason", "fix"),
    [
        (Chunked(8192), "zigzag", ALONE, "does not divide the run of 4096 rows", "set context.layout to contiguous"),
        (Chunked(8192), "contiguous", PACKED, "documents start at multiples of 1,", "start at multiples of 8192"),
        (Chunked(6144), "contiguous", ALONE, "does not divide the run of 8192 rows", "a multiple of 49152"),
        (Chunked(4096, shift=1), "contiguous", ALONE, "are shifted by 1", "use chunks without a shift"),
    ],
)
def test_a_chunk_that_is_not_local_says_why_and_what_it_costs(mask, kind, promises, reason, fix):
    found = choose(mask, scout(8, 65_536), kind, promises)
    assert found.kind == "halo" and reason in found.fell_back
    with pytest.raises(ConfigError, match=r"context\.near='local': impossible") as error:
        choose(mask, scout(8, 65_536), kind, promises, ContextConfig(near="local"))
    assert reason in str(error.value) and fix in str(error.value)


def test_a_halo_as_large_as_the_sequence_gives_way():
    found = choose(Sliding(4096), scout(8, 8192), "zigzag")
    assert found.kind == "all_to_all" and "as many as the whole sequence" in found.fell_back
    few = dataclasses.replace(scout(64, 8192), key_heads=1, query_heads=1)
    assert choose(Sliding(5000), few).kind == "halo"
    assert choose(Sliding(5000), few, config=ContextConfig(near="ring")).fell_back is None


def test_the_cheap_way_falls_back_on_nothing():
    for mask in (Chunked(8192), Sliding(8192), Global()):
        assert choose(mask, scout(8, 131_072), "zigzag").fell_back is None


def test_a_forced_exchange_needs_heads_to_share_out():
    shape = dataclasses.replace(scout(8, 1024), key_heads=5)
    for field, mask in (("far", Global()), ("near", Sliding(9))):
        with pytest.raises(ConfigError, match=f"context.{field}='all_to_all'.*8 and the 5 key heads"):
            choose(mask, shape, config=ContextConfig(**{field: "all_to_all"}))
    assert choose(Sliding(9), scout(8, 1024), config=ContextConfig(near="all_to_all")).group == 8
    assert choose(Sliding(9), scout(8, 1024), config=ContextConfig(near="gather")).kind == "gather"
    assert choose(Sliding(9), scout(8, 1024), config=ContextConfig(near="halo")).kind == "halo"


def test_a_length_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="zigzag layout over context=8 needs a multiple of 16"):
        choose(Global(), scout(8, 1032), "zigzag")


def test_decoding():
    """40 heads of 128 + 2 float32 numbers, sent twice 7/8: 36400 bytes per query of a Scout, at any length."""
    for length in (131_072, 1_048_576):
        step = dataclasses.replace(scout(8, length), q_length=1)
        found = choose(Global(), step, None, PACKED)
        assert (found.kind, found.forward_bytes, found.backward_bytes) == ("split_keys", 36_400, 0)
        assert found.gather_forward_bytes == 7 / 8 * length * 4096
    for mask in (Chunked(8192), Sliding(8192)):
        assert choose(mask, dataclasses.replace(scout(8, 8192), q_length=1), None, PACKED).kind == "local"
    assert choose(Sliding(8192), dataclasses.replace(scout(8, 16_384), q_length=1), None).kind == "split_keys"


def test_one_line_for_people():
    line = choose(Sliding(4096), scout(8, 131_072), "zigzag").describe()
    assert line == (
        "sliding 4096: halo of 4095 tokens, 33.5 MB per layer forward, as much backward "
        "(zigzag; contiguous would send half)"
    )
    assert choose(Chunked(8192), scout(8, 131_072)).describe() == "chunked 8192: local, nothing is sent"
    line = choose(Chunked(8192), scout(8, 65_536), "zigzag").describe()
    assert line.endswith("33.6 MB per layer forward, as much backward (zigzag; contiguous would send nothing)")
    line = choose(Global(), scout(64, 1_048_576), "zigzag").describe()
    assert line.startswith("global: all-to-all over 8 devices x ring over 8 groups, 822.1 MB per layer forward, 1.8 GB")
    assert choose(Global(), scout(8, 1024), None).describe().startswith("global: ring over 8 devices, 3.7 MB")
    assert megabytes(999) == "999 B"


@pytest.mark.parametrize("field", ["layout", "far", "near", "gradients"])
def test_a_misspelt_choice_is_refused(field):
    with pytest.raises(ConfigError, match="choose one of: "):
        ContextConfig(**{field: "rings"})


@pytest.mark.parametrize(
    "mask", [Sliding(5), Sliding(40), Chunked(6), Chunked(4, by="row", shift=3), Chunked(24)], ids=str
)
@pytest.mark.parametrize("run", [2, 4, 8, 16])
def test_a_halo_is_what_the_mask_itself_says(mask, run):
    """Counted on the drawing of the mask: for each run the first row that any of its queries sees."""
    info = TokenInfo.single(1, 32)
    seen = allowed(mask, info, info)[0]
    reach = max(first - int(seen[first : first + run].any(axis=0).argmax()) for first in range(0, 32, run))
    assert halo_length(mask, 32, run, document_multiple=0) == max(reach, 0)


def test_promises_of_two_are_what_both_promise():
    one, other = TokenInfo.single(1, 4), TokenInfo.single(1, 4).replace(document_multiple=6, unbroken=False)
    assert Promises.of(one, other) == Promises(6, False)
    assert Promises.of(one, one) == Promises(0, True)
    assert Promises.of(other, other.replace(document_multiple=4)) == Promises(2, False)

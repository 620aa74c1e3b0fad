"""GGUF files against the folder they were made from: order of rotated rows, quantised weights, tokenizer, refusals."""

import gguf
import jax
import numpy as np
import pytest
import tokenizers

from irope_jax.checkpoint import gguf as ours
from irope_jax.checkpoint.hf_names import LLAMA, LLAMA_GGUF
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.types import TokenInfo
from irope_jax.model.decoder import logits
from irope_jax.position.scaling import Linear, LongRoPE, Unscaled, YaRN
from irope_jax.transfer import read_source
from tests.checkpoint.test_hf_weights import CONFIG, MODEL, folder, tensors

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|start|>", "<|end|>", *ALPHABET, "th", "the", "Ġthe"]


def neighbours(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them, pair by pair."""
    heads = w.reshape(-1, head_dim, w.shape[-1])
    order = [half * (head_dim // 2) + i for i in range(head_dim // 2) for half in (0, 1)]
    return heads[:, order].reshape(w.shape)


def write(path, weights, *, permute=True, quantise=(), extra=(), arch="llama", tokens=True, rope_freqs=None):
    file = gguf.GGUFWriter(path, arch)
    file.add_context_length(64)
    file.add_embedding_length(CONFIG["hidden_size"])
    file.add_block_count(2)
    file.add_feed_forward_length(CONFIG["intermediate_size"])
    file.add_head_count(3)
    file.add_head_count_kv(1)
    file.add_key_length(8)
    file.add_value_length(8)
    file.add_rope_dimension_count(8)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    for add, *values in extra:
        getattr(file, add)(*values)
    if tokens:
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("smollm")
        file.add_token_list(TOKENS)
        file.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 2))
        file.add_token_merges(["t h", "th e", "Ġ the"])
        file.add_bos_token_id(0)
        file.add_eos_token_id(1)
    for row, theirs in zip(LLAMA, LLAMA_GGUF):
        for i in range(2) if row.per_layer else (0,):
            w = weights[row.name.format(i=i)]
            w = neighbours(w, 8) if row.rotated and permute else w
            if row.name in quantise:
                packed = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0)
                file.add_tensor(theirs.name.format(i=i), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                file.add_tensor(theirs.name.format(i=i), np.ascontiguousarray(w))
    if rope_freqs is not None:
        file.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def header(name: str, value):
    """A key below `llama.`, for `extra`."""
    types = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return "add_key_value", f"llama.{name}", value, types[type(value)]


def read(path):
    found = read_source(path)
    assert found.params  # what only the weights show is found when they are read
    return found


def test_a_gguf_file_is_the_folder_it_was_made_from(tmp_path):
    want = read(folder(tmp_path / "hf"))
    found = read(write(tmp_path / "model.gguf", tensors()))
    assert found.model == want.model and found.context == 64
    assert_equal_trees(found.params, want.params)


def test_rows_left_in_pairs_would_say_something_else(tmp_path):
    """The silent trap: the same shapes, other logits."""
    tokens, info = np.arange(20)[None] % 32, TokenInfo.single(1, 20)
    run = jax.jit(lambda p: logits(MODEL, p, tokens, info))
    right = run(read(write(tmp_path / "a.gguf", tensors())).params)
    wrong = run(read(write(tmp_path / "b.gguf", tensors(), permute=False)).params)
    assert np.abs(right - wrong).max() > 0.1


def test_quantised_tensors_are_dequantised(tmp_path):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((4, 64)).astype(np.float32)
    file = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for kind in ("Q8_0", "Q4_1", "Q4_0"):
        of = gguf.GGMLQuantizationType[kind]
        file.add_tensor(kind, gguf.quants.quantize(w, of), raw_dtype=of)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    found = ours.GgufFile(tmp_path / "q.gguf")
    for kind, error in (("Q8_0", 0.02), ("Q4_1", 0.25), ("Q4_0", 0.4)):
        assert found.tensor(kind).shape == (4, 64) and np.abs(found.tensor(kind) - w).max() < error


def test_the_tokenizer_comes_along(tmp_path):
    found = read(write(tmp_path / "model.gguf", tensors()))
    built = tokenizers.Tokenizer.from_str(found.tokenizer)
    assert found.special == {"bos": "<|start|>", "eos": "<|end|>"}
    text = "the 42 théthe\n"
    encoded = built.encode(text, add_special_tokens=False)
    assert encoded.tokens[:4] == ["the", "Ġ", "4", "2"] and built.decode(encoded.ids) == text
    assert built.token_to_id("<|end|>") == 1
    assert read(write(tmp_path / "none.gguf", tensors(), tokens=False)).tokenizer is None


def test_rotations_of_the_header(tmp_path):
    scaling = lambda **options: read(write(tmp_path / "s.gguf", tensors(), **options)).model.pattern[0].position.scaling
    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    assert scaling(extra=linear) == Linear(4.0)
    assert scaling(extra=linear[1:]) == Linear(4.0)  # a factor without a type
    assert scaling(extra=[header("rope.scale_linear", 4.0)]) == Linear(4.0)  # as old files have it
    none = [("add_rope_scaling_type", gguf.RopeScalingType.NONE), *linear[1:]]
    assert scaling(extra=none) == scaling() == Unscaled()
    yarn = [
        ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
        ("add_rope_scaling_factor", 4.0),
        ("add_rope_scaling_orig_ctx_len", 16),
    ]
    assert scaling(extra=yarn) == YaRN(4.0, 16)
    factors = (1.0, 1.0, 2.0, 8.0)  # as Llama 3's come
    found = scaling(rope_freqs=factors)
    assert found == LongRoPE(64, 1.0, factors, factors, attention_policy="none") and found.magnitude == 1.0


@pytest.mark.parametrize(
    ("name", "plain", "other"),
    [
        ("attention.sliding_window", 0, 16),
        ("attention.causal", True, False),
        ("expert_count", 0, 4),
        ("rope.scaling.attn_factor", 1.0, 0.5),
        ("rope.scaling.yarn_beta_fast", 32.0, 8.0),
        ("rope.scaling.yarn_log_multiplier", None, 0.1),
        ("logit_scale", None, 0.5),
        ("attention.scale", None, 0.5),
    ],
)
def test_keys_that_change_numbers_are_read_or_refused(tmp_path, name, plain, other):
    path = tmp_path / "m.gguf"
    if plain is not None:
        assert read(write(path, tensors(), extra=[header(name, plain)])).model == MODEL
    with pytest.raises(CheckpointError, match=rf"llama\.{name} is {other}"):
        read(write(path, tensors(), extra=[header(name, other)]))


def test_tokenizers_that_cannot_be_told_are_left_out_and_damaged_ones_refused(tmp_path):
    gpt2, tokens = ("add_tokenizer_model", "gpt2"), ("add_token_list", TOKENS)
    smollm, merges = ("add_tokenizer_pre", "smollm"), ("add_token_merges", ["t h"])
    types = ("add_token_types", [gguf.TokenType.NORMAL] * len(TOKENS))
    built = lambda *extra: read(write(tmp_path / "m.gguf", tensors(), tokens=False, extra=extra)).tokenizer
    assert built(gpt2, smollm, tokens, types, merges) is not None
    assert built(gpt2, tokens, types, merges) is None
    assert built(gpt2, ("add_tokenizer_pre", "default"), tokens, types, merges) is None
    for extra, message in (
        ((tokens, merges), "no token_type"),
        ((tokens, types), "no merges"),
        ((tokens, types, ("add_token_merges", ["zz yy"])), "zz"),
        ((("add_token_list", TOKENS[:-1] + TOKENS[:1]), types, merges), "twice"),
    ):
        with pytest.raises(CheckpointError, match=rf"its tokenizer cannot be built \(.*{message}"):
            built(gpt2, smollm, *extra)


def test_what_is_not_a_whole_llama_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", tensors())
    data = path.read_bytes()
    for name, content, message in (
        ("cut.gguf", data[: len(data) // 2], "not a whole GGUF file|cannot read"),
        ("zip.gguf", b"PK" + data[2:], "not a whole GGUF file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"architecture 'qwen2'"):
        read(write(tmp_path / "q.gguf", tensors(), arch="qwen2"))
    with pytest.raises(CheckpointError, match=r"turns 4 of 8 entries"):
        read(write(tmp_path / "p.gguf", tensors(), extra=[("add_rope_dimension_count", 4)]))
    with pytest.raises(CheckpointError, match=r"no matrix token_embd\.weight"):
        read(write(tmp_path / "e.gguf", tensors() | {"model.embed_tokens.weight": np.ones(12, np.float32)}))
    longrope = [("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE)]
    with pytest.raises(CheckpointError, match="'longrope' is not known"):
        read(write(tmp_path / "l.gguf", tensors(), extra=longrope))
    other = tensors() | {"model.norm.weight": np.ones(13, np.float32)}
    with pytest.raises(CheckpointError, match=r"output_norm.weight has shape \[13\]"):
        read(write(tmp_path / "n.gguf", other))

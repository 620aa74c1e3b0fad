"""GGUF files that are written: what the `gguf` library sees in them, what our reader gives back, what is refused."""

import json
from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES

from irope_jax import cli
from irope_jax.attention.mask import Chunked, Global
from irope_jax.checkpoint import gguf_tokenizer
from irope_jax.checkpoint.gguf_export import GgufWriting, model_to_gguf, write_gguf
from irope_jax.checkpoint.gguf_models import ARCHITECTURES
from irope_jax.checkpoint.gguf_tokenizer import tokenizer_fields, without_tokenizer
from irope_jax.checkpoint.hf_export import Writing
from irope_jax.checkpoint.hf_places import shapes_of
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.checkpoint.streams import gathered, nested
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.core.types import TokenInfo
from irope_jax.data.tokenizer import ByteTokenizer, TokenIds, TokenizerFile
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.decoder import logits
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import MoE
from irope_jax.model.routing import SoftmaxRouter
from irope_jax.position.encoding import RoPE
from irope_jax.position.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Unscaled, YaRN
from irope_jax.position.temperature import Constant
from irope_jax.transfer import read_source
from tests.checkpoint.test_hf_weights import MODEL, folder, tensors

DENSE, MIXTURE = SwiGLU(20), MoE(4, 12, top_k=2, shared=SwiGLU(12))


def model(ffn=DENSE, *, mixed=None, rope=None, qk_norm="rms", **changes) -> ModelConfig:
    """Four layers as Llama 4 has them, with halves paired unless `rope` says otherwise."""
    layers = [*irope_layers(8192, ffn, qk_norm=qk_norm)] * (3 if mixed else 1)
    if rope is not None:
        layers = [replace(one, position=rope) if isinstance(one.position, RoPE) else one for one in layers]
    layers = [replace(one, ffn=MIXTURE) if mixed and (i + 1) % mixed == 0 else one for i, one in enumerate(layers)]
    sizes = dict(vocab_size=288, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8)
    others = dict(pattern=tuple(layers), output_head="untied", attention="reference")
    return ModelConfig(**(sizes | others | changes))


LLAMA3 = RoPE(500_000.0, Llama3(16.0, 64, 1.0, 4.0), pairing="interleaved")
MAVERICK = replace(MIXTURE, num_experts=128)
MODELS = {
    "dense": model(),
    "unnormed": model(qk_norm="none", output_head="tied"),
    "interleaved": model(mixed=2),
    "every layer, Llama 3 scaling": model(MIXTURE, rope=LLAMA3),
    "odd depth": model(mixed=3, num_layers=7, head_dim=6),
}


class Stored:
    """An array as a checkpoint gives it."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        return Stored(self.values[index])

    def read(self):
        return self

    def result(self):
        return self.values


def parameters(config: ModelConfig) -> dict:
    rng = np.random.default_rng(0)
    return {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in shapes_of(config).items()}


def written(path, config: ModelConfig, *, dtype="float32", tokenizer=None, context=128, arrays=None) -> GgufWriting:
    header, there = model_to_gguf(config, context)
    arrays = {keys: Stored(values) for keys, values in (arrays or parameters(config)).items()}
    writing = Writing(arrays, config, there, ARCHITECTURES[header.arch].rows, dtype)
    what = GgufWriting(header, writing, "tiny", tokenizer or without_tokenizer(TokenIds(288)))
    assert write_gguf(path, what) == len(gguf.GGUFReader(path).tensors)
    return what


def read_back(path, config: ModelConfig) -> dict:
    found = read_source(path).weights
    return gathered(found.layouts(config), found.pieces(config))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(tmp_path, name):
    config, path = MODELS[name], tmp_path / "m.gguf"
    what = written(path, config)
    assert read_source(path).weights.there == what.writing.there
    assert_equal_trees(read_back(path, config), nested(parameters(config)))


def test_a_model_read_back_gives_the_same_logits(tmp_path):
    """Pairs are re-ordered on the way: halves here, neighbours there."""
    config = MODELS["interleaved"]
    written(tmp_path / "m.gguf", config)
    found = read_source(tmp_path / "m.gguf")
    assert config.layers[0].position.pairing == "half" and found.model.layers[0].position.pairing == "interleaved"
    tokens, info = np.arange(24)[None] % 288, TokenInfo.single(1, 24)
    run = lambda which, params: np.asarray(jax.jit(lambda p: logits(which, p, tokens, info))(params))
    ours, theirs = run(config, nested(parameters(config))), run(found.model, found.params)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())


def test_numbers_lie_where_the_graph_of_llama_cpp_reads_them(tmp_path):
    """Rows are outputs; neighbours of a head turn together where a layer turns; experts outermost."""
    config = MODELS["interleaved"]
    written(tmp_path / "m.gguf", config)
    file = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    ours = lambda i, *names: parameters(config)["periods", f"layer_{i}", *names][0]
    neighbours = [0, 4, 1, 5, 2, 6, 3, 7]
    for i in range(4):
        for name, where in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")):
            weight_DNH = ours(i, "attention", name)
            weight_DNH = weight_DNH[:, :, neighbours] if name != "value" and i != 3 else weight_DNH
            np.testing.assert_array_equal(file[f"blk.{i}.{where}.weight"], weight_DNH.reshape(16, -1).T)
        out_NHD = ours(i, "attention", "out")
        np.testing.assert_array_equal(file[f"blk.{i}.attn_output.weight"], out_NHD.reshape(32, 16).T)
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(file[f"blk.0.ffn_{name}.weight"], ours(0, "feed_forward", name).T)
        experts, shared = ours(1, "feed_forward", name), ours(1, "feed_forward", "shared", name)
        np.testing.assert_array_equal(file[f"blk.1.ffn_{name}_exps.weight"], experts.transpose(0, 2, 1))
        np.testing.assert_array_equal(file[f"blk.1.ffn_{name}_shexp.weight"], shared.T)
    np.testing.assert_array_equal(file["blk.1.ffn_gate_inp.weight"], ours(1, "feed_forward", "router").T)
    np.testing.assert_array_equal(file["blk.1.attn_norm.weight"], ours(1, "attention_norm", "scale"))
    np.testing.assert_array_equal(file["blk.1.ffn_norm.weight"], ours(1, "feed_forward_norm", "scale"))
    top = parameters(config)
    np.testing.assert_array_equal(file["token_embd.weight"], top["embedding",])
    np.testing.assert_array_equal(file["output.weight"], top["head",].T)


@pytest.mark.parametrize(
    ("dtype", "label", "kind"), [("float16", 1, "F16"), ("bfloat16", 32, "BF16"), ("float32", 0, "F32")]
)
def test_the_library_sees_the_tensors_that_the_loader_asks_for(tmp_path, dtype, label, kind):
    """Shapes as src/models/llama4.cpp asks for them, innermost first; `ffn_gate_inp` and vectors in float32."""
    written(tmp_path / "m.gguf", MODELS["interleaved"], dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    layer = {
        "attn_norm": [16], "attn_q": [16, 32], "attn_k": [16, 16], "attn_v": [16, 16], "attn_output": [32, 16],
        "ffn_norm": [16],
    }  # fmt: skip
    dense = {"ffn_gate": [16, 20], "ffn_up": [16, 20], "ffn_down": [20, 16]}
    mixed = {
        "ffn_gate_inp": [16, 4], "ffn_gate_exps": [16, 12, 4], "ffn_up_exps": [16, 12, 4], "ffn_down_exps": [12, 16, 4],
        "ffn_gate_shexp": [16, 12], "ffn_up_shexp": [16, 12], "ffn_down_shexp": [12, 16],
    }  # fmt: skip
    want = {"token_embd": [16, 288], "output_norm": [16], "output": [16, 288]}
    for i in range(4):
        want |= {f"blk.{i}.{name}": shape for name, shape in (layer | (mixed if i % 2 else dense)).items()}
    want = {f"{name}.weight": shape for name, shape in want.items()}
    assert {name: tensor.shape.tolist() for name, tensor in found.items()} == want
    known = {
        f"{TENSOR_NAMES[tensor].format(bid=i)}.weight" for tensor in MODEL_TENSORS[MODEL_ARCH.LLAMA4] for i in range(4)
    }
    assert want.keys() <= known
    for name, tensor in found.items():
        single = len(tensor.shape) == 1 or "ffn_gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if single else kind) and tensor.data_offset % 32 == 0
    assert reader.fields["general.file_type"].contents() == label


def header_of(config: ModelConfig) -> dict:
    header, _ = model_to_gguf(config, 128)
    return {key.removeprefix(f"{header.arch}."): value for key, value in header.fields.items()}


def test_keys_that_the_loader_requires(tmp_path):
    """`load_hparams` of src/llama-model.cpp and src/models/llama4.cpp; no sliding window, which 0 would turn off."""
    what = written(tmp_path / "m.gguf", MODELS["interleaved"])
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "llama4" and fields["general.name"] == "tiny"
    want = dict(context_length=128, embedding_length=16, block_count=4, feed_forward_length=20, vocab_size=288)
    want |= dict(expert_count=4, expert_used_count=2, expert_feed_forward_length=12, interleave_moe_layer_step=2)
    want |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    want |= {"attention.key_length": 8, "attention.value_length": 8, "rope.freq_base": 500_000.0}
    want |= {"attention.layer_norm_rms_epsilon": np.float32(1e-5), "rope.scaling.type": "none"}
    assert {key.removeprefix("llama4."): fields[key] for key in fields if key.startswith("llama4.")} == want
    assert what.header.fields.keys() <= fields.keys()
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [0, 0]
    assert fields["tokenizer.ggml.model"] == "no_vocab"  # the loader then takes vocab_size for granted


def test_a_dense_model_says_that_its_mixtures_come_after_its_last_layer():
    """The loader takes no Llama 4 without experts, and norms q and k unless there are 128."""
    for name, experts in (("dense", 1), ("unnormed", 128)):
        said = header_of(MODELS[name])
        assert (said["expert_count"], said["expert_used_count"], said["interleave_moe_layer_step"]) == (experts, 1, 5)
        assert said["expert_feed_forward_length"] == 20
    assert header_of(model(MAVERICK, qk_norm="none"))["expert_count"] == 128


def test_scalings_are_keys_or_factors(tmp_path):
    plain = LayerSpec(RoPE(10000.0), Global(), DENSE)

    def said(scaling, **changes):
        config = replace(MODELS["dense"], pattern=(replace(plain, position=RoPE(10000.0, scaling)),), **changes)
        header, _ = model_to_gguf(config, 128)
        return {k.removeprefix("llama.rope.scaling."): v for k, v in header.fields.items() if ".scaling." in k}, header

    assert said(Unscaled())[0] == {"type": "none"}
    assert said(Linear(4.0))[0] == {"type": "linear", "factor": 4.0}
    assert said(YaRN(4.0, 64))[0] == {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    for scaling in (Llama3(8.0, 64), NTK(2.0), YaRN(4.0, 64, beta_fast=8.0, attention_factor=1.0)):
        keys, header = said(scaling)
        want = RoPE(10000.0).frequencies(8).inv_freq / scaling.frequencies(8, 10000.0).inv_freq
        assert keys == {"type": "none"}
        np.testing.assert_allclose(header.factors, want, rtol=1e-7)
    # llama.cpp magnifies q and k by YaRN's factor and then norms them, so that there is none
    normed = lambda **options: model(rope=RoPE(500_000.0, YaRN(4.0, 64, **options)))
    assert header_of(normed(attention_factor=1.0))["rope.scaling.type"] == "yarn"
    with pytest.raises(ConfigError, match=r"pattern\.0\.position\.scaling\.attention_factor=1\.138.*only say 1\.0"):
        model_to_gguf(normed(), 128)
    written(tmp_path / "m.gguf", model(rope=LLAMA3))
    factors = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    assert factors.tensor_type.name == "F32" and factors.data.max() == 16.0


def changed(index: int, **fields) -> ModelConfig:
    pattern = list(MODELS["dense"].pattern)
    pattern[index] = replace(pattern[index], **fields)
    return replace(MODELS["dense"], pattern=tuple(pattern))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(0, mask=Chunked(4096)), r"pattern\.0\.mask\.size=4096: llama\.cpp's llama4 can only say 8192 here"),
        (changed(0, mask=Chunked(8192, by="row")), r"pattern\.0\.mask\.by='row'"),
        (changed(1, position=RoPE(10000.0)), r"pattern\.1\.position\.theta=10000\.0"),
        (changed(3, position=RoPE()), r"pattern\.3\.position\.kind='rope'"),
        (changed(3, temperature=Constant()), r"pattern\.3\.temperature\.kind='none'.*only say 'log_floor'"),
        (changed(0, qk_norm="learned"), r"pattern\.0\.qk_norm='learned'"),
        (changed(2, ffn=SwiGLU(24)), r"pattern\.2\.ffn\.hidden_dim=24"),
        (model(rope=RoPE(fraction=0.5)), r"pattern\.0\.position\.fraction=0\.5"),
        (model(rope=RoPE(scaling=DynamicNTK(2.0, 64))), r"pattern\.0\.position\.scaling\.kind='dynamic_ntk'"),
        (model(rope=RoPE(scaling=LongRoPE(64, 1.0, (2.0,) * 4))), r"position\.scaling\.kind='longrope'"),
        (model(MIXTURE, qk_norm="none"), r"pattern\.0\.qk_norm='none'.*only say 'rms'"),
        (model(replace(MIXTURE, shared=None)), r"pattern\.0\.ffn\.shared=None"),
        (model(replace(MIXTURE, shared=DENSE)), r"pattern\.0\.ffn\.shared\.hidden_dim=20"),
        (model(replace(MIXTURE, router=SoftmaxRouter())), r"pattern\.0\.ffn\.router\.kind='softmax'"),
        (model(logit_scale=0.5), r"config\.model\.logit_scale=0\.5"),
        (model(attention_bias="qkv"), r"config\.model\.attention_bias='qkv'"),
        (replace(MODELS["interleaved"], pattern=MODELS["interleaved"].pattern[::-1]), r"config\.model\.pattern\.0"),
        (replace(MODELS["dense"], pattern=(LayerSpec(RoPE(), Global(), MIXTURE),)), r"llama can only say 'swiglu'"),
    ],
)
def test_what_the_format_cannot_say_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        model_to_gguf(config, 128)


def test_other_families_have_no_file():
    with pytest.raises(ConfigError, match="--family='qwen3'"):
        model_to_gguf(MODELS["dense"], 128, "qwen3")


def test_headers_of_llama4_are_read_or_refused(tmp_path):
    path = tmp_path / "m.gguf"
    what = written(path, MODELS["dense"])

    def read(**keys):
        fields = what.header.fields | {f"llama4.{name.replace('__', '.')}": value for name, value in keys.items()}
        write_gguf(path, replace(what, header=replace(what.header, fields=fields)))
        return read_source(path)

    assert read(attention__sliding_window=8192, expert_gating_func=2, interleave_moe_layer_step=0).params
    for keys, message in (
        (dict(attention__sliding_window=0), "sliding_window is 0; only 8192"),
        (dict(expert_count=0), "expert_count is 0, expected a whole number, 1 or more"),
        (dict(expert_gating_func=1), "expert_gating_func is 1; only 2"),
        (dict(attention__temperature_scale=0.5), "temperature_scale is 0.5, a key whose meaning is not known"),
        (dict(interleave_moe_layer_step=2), "tensors that this model does not have: blk.1.ffn_down.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(**keys)


# Tokenizers.

TEXT = "It's  the 1234th café…\n\n\t“NAÏVE” isn't über; let's GO!  \r\nx=3.14<|end|> 的 \U0001f600\n"
CUTS = gguf_tokenizer._CUTS
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = {
    "llama-bpe": LLAMA3_REGEX,
    "dbrx": LLAMA3_REGEX,
    "qwen2": LLAMA3_REGEX.replace("{1,3}", ""),
    "llama4": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""As the files of those models have them."""


def bpe(path, pre_tokenizer, *, ignore_merges=False, words=("Ġthe", "12", "let"), normalizer=None, **added):
    """A tokenizer.json trained on nothing: all bytes, and the merges that lead to a few words."""
    vocabulary = {token: i for i, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    built.pre_tokenizer, built.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        built.normalizer = normalizer
    built.add_special_tokens(["<|start|>", "<|end|>"])
    built.add_tokens([tokenizers.AddedToken("@@", normalized=False, **added)])
    built.save(str(path))
    return TokenizerFile(str(path), bos="<|start|>", eos="<|end|>", num_symbols=4)


def hf_cut(name):
    """As tokenizer.json files have it."""
    pre = tokenizers.pre_tokenizers
    if name == "gpt-2":
        return pre.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    return pre.Sequence([pre.Split(tokenizers.Regex(REGEXES[name]), "isolated"), pre.ByteLevel(False, use_regex=False)])


def from_gguf(path) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer.from_str(read_source(path).tokenizer)
    built.encode_special_tokens = True
    return built


@pytest.mark.parametrize("name", CUTS)
def test_a_tokenizer_gives_the_same_ids_there(tmp_path, name):
    ours = bpe(tmp_path / "tokenizer.json", hf_cut(name), ignore_merges=CUTS[name][1])
    fields = tokenizer_fields(ours, 288, {})
    assert fields["tokenizer.ggml.pre"] == name
    written(tmp_path / "m.gguf", MODELS["dense"], tokenizer=fields)
    theirs = from_gguf(tmp_path / "m.gguf")
    assert theirs.encode(TEXT + "a@@b").ids == ours.encode(TEXT + "a@@b").tolist()
    assert theirs.get_vocab_size() == ours.vocab_size and theirs.token_to_id("<set>") == ours.marker("set")
    assert read_source(tmp_path / "m.gguf").special == {"bos": "<|start|>", "eos": "<|end|>", "pad": "<pad>"}
    kinds = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]))
    kind = gguf.TokenType
    assert (kinds["<|end|>"], kinds["@@"], kinds["a"]) == (kind.CONTROL, kind.USER_DEFINED, kind.NORMAL)
    assert kinds["[PAD287]"] == kind.UNUSED


def test_bytes_have_a_tokenizer_there_and_ids_have_none(tmp_path, caplog):
    ours = ByteTokenizer(num_symbols=16)
    fields = tokenizer_fields(ours, 288, {})
    assert len(fields["tokenizer.ggml.merges"]) == 1 and fields["tokenizer.ggml.add_bos_token"] is True
    written(tmp_path / "m.gguf", MODELS["dense"], tokenizer=fields)
    theirs = from_gguf(tmp_path / "m.gguf")
    assert theirs.encode(TEXT).ids == ours.encode(TEXT).tolist() and theirs.decode(ours.encode(TEXT).tolist()) == TEXT
    assert theirs.token_to_id("<k3>") == ours.symbols(3, 1)[0]
    fields = tokenizer_fields(TokenIds(288, bos=3, eos=4), 288, {})
    assert fields["tokenizer.ggml.model"] == "no_vocab" and "there is no tokenizer" in caplog.text
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (3, 4)


def test_tokenizers_that_have_no_name_are_refused(tmp_path, caplog):
    pre, path = tokenizers.pre_tokenizers, tmp_path / "tokenizer.json"
    said = lambda *args, **options: tokenizer_fields(bpe(path, *args, **options), 288, {})
    for cut, message in (
        (pre.ByteLevel(add_prefix_space=True), "cuts text by .*add_prefix_space"),
        (pre.Whitespace(), "cuts text by .*Whitespace"),
        (pre.Sequence([pre.Split(tokenizers.Regex("x+"), "isolated"), hf_cut("gpt-2")]), r"none is x\+ then"),
        (pre.Digits(individual_digits=True), "does not end in bytes"),
    ):
        with pytest.raises(ConfigError, match=rf"data\.tokenizer='file': .*{message}.*--no-tokenizer"):
            said(cut)
    with pytest.raises(ConfigError, match="NFKC"):
        said(hf_cut("gpt-2"), normalizer=tokenizers.normalizers.NFKC())
    assert said(hf_cut("qwen2"), normalizer=tokenizers.normalizers.NFC()) and "NFC" in caplog.text
    with pytest.raises(ConfigError, match="'@@' takes the space"):
        said(hf_cut("gpt-2"), lstrip=True)
    with pytest.raises(ConfigError, match="has the id 277, the model 270 tokens"):
        tokenizer_fields(bpe(path, hf_cut("gpt-2")), 270, {})
    # where merges lead to every token it does not matter whether they are asked
    assert said(hf_cut("llama4"), ignore_merges=True)["tokenizer.ggml.pre"] == "llama4"
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="no merges lead to the token 'let'"):
        tokenizer_fields(TokenizerFile(str(path), num_symbols=4), 288, {})


def test_prompts_begin_with_bos_as_documents_here_or_as_the_source_says(tmp_path):
    ours = bpe(tmp_path / "tokenizer.json", hf_cut("gpt-2"))
    adds = lambda kept: tokenizer_fields(ours, 288, kept)["tokenizer.ggml.add_bos_token"]
    assert adds({}) and not adds({"config.json": b"{}"})
    assert adds({"tokenizer_config.json": b'{"add_bos_token": true}'})
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    parts = [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|start|>": {"id": "<|start|>", "ids": [ours.bos_id], "tokens": ["<|start|>"]}}
    template = dict(type="TemplateProcessing", single=parts, pair=parts, special_tokens=tokens)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"post_processor": template}))
    ours = TokenizerFile(str(tmp_path / "tokenizer.json"), bos="<|start|>", eos="<|end|>")
    assert adds({"config.json": b"{}"})
    assert tokenizer_fields(ours, 288, {"chat_template.jinja": b"{{ x }}"})["tokenizer.chat_template"] == "{{ x }}"


# The verb.


def test_a_run_becomes_a_file_and_the_file_the_same_run(tmp_path, capfd):
    kept = {"tokenizer_config.json": b'{"add_bos_token": false, "chat_template": "{{ messages }}"}'}
    fields = tokenizer_fields(ByteTokenizer(num_symbols=16), 288, kept)
    written(tmp_path / "tiny.gguf", model(rope=LLAMA3), tokenizer=fields, context=4096)
    run, out = tmp_path / "tiny", tmp_path / "out"
    export = lambda name, *flags: cli.main(["export", str(run), str(out / name), *flags])
    assert cli.main(["import", str(tmp_path / "tiny.gguf"), str(run)]) == 0
    assert export("a.gguf", "--dtype=float32", "--verify") == 0
    assert "numbers read back are those of the run" in capfd.readouterr().out
    assert (out / "a.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert export("b.gguf", "--no-tokenizer", "--verify") == 0
    assert read_source(out / "b.gguf").tokenizer is None
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "b.gguf").tensors}
    assert kinds == {"F32", "BF16"}
    assert export("c.gguf", "--config.model.pattern.0.mask.size=4096") == 2
    assert "pattern.0.mask.size=4096: llama.cpp's llama4 can only say 8192" in capfd.readouterr().err
    assert export("folder", "--no-tokenizer") == 2
    assert sorted(path.name for path in out.iterdir()) == ["a.gguf", "b.gguf"]


def test_a_llama_is_one_there_and_a_failed_export_leaves_nothing(tmp_path, capfd):
    weights = tensors()
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = 1e6
    source, run, out = folder(tmp_path / "hf", weights), tmp_path / "model", tmp_path / "out"
    assert cli.main(["import", str(source), str(run)]) == 0
    assert cli.main(["export", str(run), str(out / "m.gguf"), "--dtype=float32", "--verify"]) == 0
    found = read_source(out / "m.gguf")
    assert_equal_trees(found.params, read_source(source).params)
    assert found.model == MODEL and found.context == 64
    assert cli.main(["export", str(run), str(out / "n.gguf"), "--dtype=float16"]) == 1
    assert "not finite as float16; choose another --dtype" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["m.gguf"]

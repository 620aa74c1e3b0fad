"""Out again: every imported model goes back as it came, models trained here as what can say them, or not at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from irope_jax import cli
from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.checkpoint import checksums, hf_names
from irope_jax.checkpoint.hf_config import context_length, model_from_hf
from irope_jax.checkpoint.hf_export import Writing, write_weights
from irope_jax.checkpoint.hf_families import FAMILIES
from irope_jax.checkpoint.hf_places import shapes_of
from irope_jax.checkpoint.hf_writers import model_to_hf
from irope_jax.checkpoint.native import CheckpointConfig, CheckpointError, Checkpoints
from irope_jax.checkpoint.streams import nested
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_equal_trees
from irope_jax.experiment import resolve, run_config
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.cost import abstract_params
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import Capacity, MoE
from irope_jax.model.routing import Balance, SoftmaxRouter
from irope_jax.position.absolute import Sinusoidal
from irope_jax.position.encoding import ALiBi
from irope_jax.position.rotary import RoPE
from irope_jax.position.scaling import NTK, Llama3, LongRoPE, YaRN
from irope_jax.position.temperature import LogFloor, LogN, SSMax
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings
from irope_jax.train.state import load_params
from irope_jax.transfer import read_source
from irope_jax.verify import plain_logits

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
ROPES = [f"llama_rope/{path.stem}" for path in sorted(GOLDEN.with_name("llama_rope").glob("*.json"))]
OF_THE_WRITER = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "pretraining_tp",
}
UNUSED = {
    "llama4_dense": {"intermediate_size", "num_local_experts", "router_aux_loss_coef"},
    "qwen3": {"max_window_layers"},
    "qwen3_moe": {"intermediate_size"},
    "mixtral": {"head_dim"},
}
"""Keys of which the model takes no number, or says it in another way, by what would hold them."""
FFN = SwiGLU(48)
MIXTURE = MoE(4, 24, shared=SwiGLU(24))


def source_of(name: str, folder: Path) -> Path:
    folder.mkdir()
    if name in ROPES:  # kinds of RoPE with the same weights
        config = GOLDEN.parent / f"{name}.json"
        weights = config.with_name("model.safetensors")
    else:
        config, weights = GOLDEN / name / "config.json", GOLDEN / name / "model.safetensors"
    shutil.copyfile(config, folder / "config.json")
    shutil.copyfile(weights, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def irope(**options) -> ModelConfig:
    layers = irope_layers(16, FFN, qk_norm="rms", temperature=LogFloor(floor_scale=16, attn_scale=0.3))
    values = dict(vocab_size=300, d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, pattern=layers)
    return ModelConfig(**values | options)


def changed(index: int, **options) -> ModelConfig:
    """iRoPE with one layer changed."""
    layers = list(irope().pattern)
    layers[index] = replace(layers[index], **options)
    return irope(pattern=tuple(layers))


def random_params(model: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    leaves = {keys: rng.standard_normal(leaf.shape, np.float32) for keys, leaf in shapes_of(model).items()}
    return nested(leaves)


@pytest.mark.parametrize("name", [*NAMES, *ROPES])
def test_what_was_imported_goes_back_as_it_came(name, tmp_path, monkeypatch, capfd):
    """In blocks so small that every tensor of two axes is cut."""
    monkeypatch.setattr(hf_names, "BLOCK_BYTES", 2000)
    src, run, dst = source_of(name, tmp_path / "src"), tmp_path / "run", tmp_path / "dst"
    assert cli.main(["import", str(src), str(run)]) == 0
    assert cli.main(["export", str(run), str(dst)]) == 0, capfd.readouterr().err
    for file in ("config.json", "generation_config.json"):
        assert json.loads((dst / file).read_text()) == json.loads((src / file).read_text())
    assert (dst / "chat_template.jinja").read_text() == "{{ messages }}"
    theirs, ours = load_file(src / "model.safetensors"), load_file(dst / "model.safetensors")
    assert_equal_trees(ours, theirs)

    config = json.loads((src / "config.json").read_text())
    model = model_from_hf(config)
    written, _ = model_to_hf(model, context_length(config), config["model_type"])  # from the model alone
    left_out = OF_THE_WRITER | UNUSED.get(name, set())
    assert_says(written, {key: value for key, value in config.items() if key not in left_out})


def assert_says(ours, theirs):
    """Everything they say, and perhaps more: parameters of a rotation that have a default."""
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_says(ours[key], value)
        else:
            assert ours[key] == value, key


def test_a_model_of_ours_becomes_llama_4(tmp_path, capfd):
    """Trained with pairs half a head apart, which its layers must then find as neighbours; the logits stay."""
    model = irope()
    assert model.pattern[0].position.pairing == "half"
    params = random_params(model)
    config, there = model_to_hf(model, 64)
    assert config["model_type"] == "llama4_text" and there.pattern[0].position.pairing == "interleaved"
    export(tmp_path / "dst", model, params, config, there)
    read = read_source(tmp_path / "dst")
    tokens = np.random.default_rng(1).integers(0, 300, (1, 40), np.int32)
    ours, theirs = plain_logits(model, params, tokens), plain_logits(read.model, read.params, tokens)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()
    unmoved = plain_logits(replace(model, pattern=there.pattern), params, tokens)
    assert np.abs(ours - unmoved).max() > 1e-2 * np.abs(ours).max()


class InMemory:
    """A parameter that is read as `Checkpoints.arrays` gives it."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        return InMemory(self.values[index])

    def read(self):
        return self

    def result(self):
        return np.asarray(self.values)


def writing_of(model, params, config, there, dtype="float32") -> Writing:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {tuple(key.key for key in keys): InMemory(leaf) for keys, leaf in leaves}
    return Writing(arrays, model, there, FAMILIES[config["model_type"]].tables[0], dtype)


def export(folder, model, params, config, there, dtype="float32", shard_bytes=10**9):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return write_weights(folder, writing_of(model, params, config, there, dtype), shard_bytes)


def test_shards_have_an_index_and_number_formats_are_told(tmp_path):
    model = irope(num_layers=8, pattern=changed(3, ffn=MIXTURE).pattern)
    params = random_params(model)
    config, there = model_to_hf(model, 64)
    count = export(tmp_path / "one", model, params, config, there)
    export(tmp_path / "many", model, params, config, there, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == count
    assert index["metadata"]["total_size"] == sum(
        w.nbytes for w in load_file(tmp_path / "one/model.safetensors").values()
    )
    one, many = read_source(tmp_path / "one"), read_source(tmp_path / "many")
    assert_equal_trees(many.params, one.params)

    export(tmp_path / "low", model, params, config, there, "bfloat16")
    low = read_source(tmp_path / "low").params
    as_low = jax.tree.map(lambda w: w.astype(jax.numpy.bfloat16).astype(np.float32), one.params)
    assert_equal_trees(low, as_low)
    params["final_norm"]["scale"][3] = 1e6
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds numbers that are not finite as float16"):
        export(tmp_path / "over", model, params, config, there, "float16")


def mixture(**options) -> ModelConfig:
    return changed(1, ffn=replace(MIXTURE, **options))


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        (changed(1, mask=Chunked(32)), None, r"pattern.1.mask.size=32: llama4_text .* only say 16"),
        (changed(1, mask=Chunked(16, by="row")), None, r"pattern.1.mask.by='row'"),
        (changed(2, mask=Chunked(16, shift=8)), None, r"pattern.2.mask.shift=8"),
        (changed(0, mask=Sliding(16)), None, r"pattern.0.mask.kind='sliding'"),
        (changed(3, temperature=SSMax(64)), None, r"pattern.3.temperature.kind='ssmax'"),
        (changed(3, temperature=LogN(64)), None, r"pattern.3.temperature.kind='log_n'"),
        (changed(3, temperature=LogFloor(16, 0.3, offset=0)), None, r"pattern.3.temperature.offset=0"),
        (changed(3, position=ALiBi()), None, r"pattern.3.position.kind='alibi'"),
        (changed(0, position=RoPE(blur="span")), None, r"pattern.0.position.blur='span'"),
        (changed(0, position=RoPE(scaling=NTK(4.0))), None, r"pattern.0.position.scaling.kind='ntk'.*theta="),
        (changed(0, position=RoPE(fraction=0.5)), None, r"pattern.0.position.fraction=0.5"),
        (changed(0, position=RoPE(theta=1e6)), None, r"position.theta"),
        (changed(2, qk_norm="learned"), None, r"pattern.2.qk_norm='learned'"),
        (mixture(dispatch=Capacity()), None, r"pattern.1.ffn.dispatch.kind='capacity'"),
        (mixture(router=SoftmaxRouter()), None, r"pattern.1.ffn.router.kind='softmax'"),
        (mixture(shared=None), None, r"pattern.1.ffn.shared=None"),
        (
            mixture(balance=Balance(bias_rate=0.1)),
            None,
            r"balance_bias'?: llama4_text of .* has no such",
        ),
        (irope(position_embedding=Sinusoidal()), None, r"model.position_embedding"),
        (irope(block="parallel"), None, r"model.block='parallel'"),
        (irope(), "llama", r"pattern.0.mask.kind='chunked': llama of Hugging Face can only say 'global'"),
        (irope(), "mixtral", r"pattern.0."),
        (irope(), "gpt2", r"--family='gpt2'"),
    ],
)
def test_what_no_family_can_say_is_named(model, family, message):
    with pytest.raises(ConfigError, match=message) as error:
        model_to_hf(model, 64, family)
    assert "\n" not in str(error.value)


def test_tokens_at_the_front_that_keep_their_frequencies_have_no_words():
    scaling = LongRoPE(16, 2.0, (1.0,) * 8, first_tokens=4)
    with pytest.raises(ConfigError, match=r"pattern.0.position.scaling.first_tokens=4"):
        model_to_hf(irope(pattern=(LayerSpec(RoPE(scaling=scaling), Global(), FFN),)), 64)


def test_training_choices_are_no_part_of_a_model():
    trained = irope(remat="full", init_std=0.1, residual_init_std=1e-3, attention="reference")
    eval_only = replace(trained.pattern[3], temperature=replace(trained.pattern[3].temperature, when="eval"))
    ffn = replace(MIXTURE, exchange="tokens", balance=Balance(loss=0.5), shared=SwiGLU(24, chunk=64))
    layers = (replace(trained.pattern[0], ffn=ffn), *trained.pattern[1:3], eval_only)
    config, there = model_to_hf(replace(trained, pattern=layers), 64)
    assert config["router_aux_loss_coef"] == 0.5 and config["initializer_range"] == 0.1
    assert there.pattern[3].temperature == trained.pattern[3].temperature


@pytest.mark.parametrize("scaling", [YaRN(4.0, 16), Llama3(8.0, 16, 1.0, 4.0)])
def test_transformers_of_both_generations_find_the_rotation(scaling):
    model = irope(pattern=(LayerSpec(RoPE(scaling=scaling), Global(), FFN),))
    config, _ = model_to_hf(model, 64)
    assert config["model_type"] == "llama" and config["rope_scaling"] == config["rope_parameters"]
    for gone in (("rope_parameters",), ("rope_scaling", "rope_theta")):
        read = model_from_hf({key: value for key, value in config.items() if key not in gone})
        assert read.pattern[0].position.frequencies(16).inv_freq == pytest.approx(
            model.pattern[0].position.frequencies(16).inv_freq
        )


def test_a_changed_import_says_what_it_is_now(tmp_path):
    config = json.loads((GOLDEN / "llama4_dense" / "config.json").read_text())
    model = model_from_hf(config)
    longer = replace(model.pattern[0], position=replace(model.pattern[0].position, scaling=YaRN(2.0, 512)))
    longer = replace(longer, qk_norm="none")
    written, _ = model_to_hf(replace(model, pattern=(longer,) * 3 + model.pattern[3:4]), 2048, kept=config)
    assert written["rope_parameters"]["rope_type"] == "yarn" and written["use_qk_norm"] is False
    assert written["bos_token_id"] == 1 and written["transformers_version"] == "5.23.0"  # what changes no number


def test_a_run_of_bytes_brings_its_tokenizer(tmp_path, capfd):
    """And is read back whole, by another mesh too."""
    import tokenizers

    model = irope()
    config, there = model_to_hf(model, 64)
    export(tmp_path / "src", model, random_params(model), config, there)
    run, dst = tmp_path / "run", tmp_path / "dst"
    given = "--config.data.tokenizer={'kind': 'bytes', 'num_symbols': 16}"
    assert cli.main(["import", str(tmp_path / "src"), str(run), given]) == 0
    assert cli.main(["export", str(run), str(dst), "--dtype=bfloat16", "--context=4096", "--verify"]) == 0
    assert "numbers read back are those of the run" in capfd.readouterr().out
    written = json.loads((dst / "config.json").read_text())
    assert (written["bos_token_id"], written["dtype"], written["max_position_embeddings"]) == (256, "bfloat16", 4096)
    tokenizer = resolve(run_config(run)).data.tokenizer
    built = tokenizers.Tokenizer.from_file(str(dst / "tokenizer.json"))
    text = "naïve — 你好\n\t\x00 <bos> 100%"
    encoded = built.encode(text, add_special_tokens=False)
    plain = tokenizers.Tokenizer.from_file(str(dst / "tokenizer.json"))
    plain.encode_special_tokens = True  # text that spells a special token stays text
    assert plain.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    assert encoded.ids.count(256) == 1 and built.token_to_id("<k3>") == tokenizer.symbols(3, 1)[0]
    assert built.decode(plain.encode("你好").ids) == "你好"

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    read = read_source(tmp_path / "src")
    placed, _ = load_params(run, read.model, mesh)
    shardings = tree_shardings(abstract_params(read.model), mesh)
    assert jax.tree.map(lambda w: w.sharding, placed) == shardings
    assert_equal_trees(jax.device_get(placed), read.params)


def test_what_fails_leaves_nothing_and_says_one_line(tmp_path, capfd):
    src, run = source_of("llama4_moe", tmp_path / "src"), tmp_path / "run"
    assert cli.main(["import", str(src), str(run)]) == 0
    dst = tmp_path / "out" / "dst"
    for code, message, arguments in (
        (2, "--dtype='int8'", ["--dtype=int8"]),
        (2, "mask.size=64", ["--config.model.pattern.1.mask.size=64"]),
        (2, "--shard-size=0.0", ["--shard-size=0"]),
        (2, "the changed model needs", ["--config.model.d_model=32"]),
        (1, "no checkpoint of step 7", ["--step=7"]),
    ):
        capfd.readouterr()
        assert cli.main(["export", str(run), str(dst), *arguments]) == code
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
        assert not dst.parent.exists()
    assert cli.main(["export", str(run), str(src)]) == 2
    assert "is there already" in capfd.readouterr().err
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        store = checkpoints.arrays()["final_norm", "scale"]
        store[3].write(np.float32(np.nan)).result()
    checksums.write_list(run / "checkpoints" / "0")
    assert cli.main(["export", str(run), str(dst)]) == 1
    assert "model.norm.weight: holds numbers that are not finite" in capfd.readouterr().err
    assert list(dst.parent.iterdir()) == []

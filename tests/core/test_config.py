"""Configuration: what is accepted, what each mistake says, and that overrides never lose anything silently."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from irope_jax.core.config import (
    ConfigError,
    Text,
    differences,
    fingerprint,
    from_dict,
    join,
    nearest,
    override,
    to_dict,
)


@dataclass(frozen=True)
class Global:
    kind: ClassVar[str] = "global"


@dataclass(frozen=True)
class Chunked:
    kind: ClassVar[str] = "chunked"
    size: int
    by: Literal["document", "row"] = "document"

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError("size", self.size, "must be at least 1")


@dataclass(frozen=True)
class Layer:
    mask: Global | Chunked = Global()
    width: int = 8


@dataclass(frozen=True)
class Model:
    layers: tuple[Layer, ...] = (Layer(), Layer(Chunked(4)))
    num_layers: int = 2
    theta: float = 1e4
    name: str = "tiny"
    tied: bool = True
    groups: Literal[1, 2, 4] = 1
    clip: float | None = None
    inner: Chunked | None = None
    pair: tuple[int, float] = (1, 2.0)
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | Literal["all"] = "all"
    label: int | str = 0
    number: int | float = 1
    either: Global | Chunked | int = 3
    anything: Any = None


@dataclass(frozen=True)
class Config:
    model: Model
    seed: int = 0


def error(data, cls=Config):
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def overridden(*assignments, base=None):
    start = to_dict(Config(Model()) if base is None else base)
    return from_dict(Config, override(start, [a.split("=", 1) for a in assignments]))


def override_error(*assignments):
    with pytest.raises(ConfigError) as caught:
        overridden(*assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- from_dict


def test_defaults_and_the_way_back():
    config = from_dict(Config, {"model": {}})
    assert config == Config(Model())
    assert from_dict(Config, to_dict(config)) == config
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(Config, config) is config
    assert to_dict(Chunked(4)) == {"kind": "chunked", "size": 4, "by": "document"}


def test_every_field_is_built():
    data = {
        "layers": [{"mask": {"kind": "chunked", "size": 2, "by": "row"}}, Layer(), {"mask": Global()}],
        "theta": 500000,
        "clip": 1,
        "inner": {"size": 3},
        "pair": [3, 4],
        "weights": {"a": 1, 2: 0.5},
        "groups": 4,
        "num_layers": 3.0,
        "anything": {"x": [1]},
    }
    model = from_dict(Model, data)
    assert model.layers == (Layer(Chunked(2, "row")), Layer(), Layer())
    assert model.inner == Chunked(3) and model.pair == (3, 4.0) and model.weights == {"a": 1.0, "2": 0.5}
    for value, kind in ((model.theta, float), (model.clip, float), (model.pair[1], float), (model.num_layers, int)):
        assert type(value) is kind
    assert model.anything == {"x": [1]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"modle": {}}, "config.modle={}: Config has no such field; did you mean 'model'?"),
        ({"model": {"num_layerz": 3}}, "config.model.num_layerz=3: Model has no such field; did you mean 'num_layers'"),
        ({"model": {}, "qqq": 1}, "config.qqq=1: Config has no such field; choose one of: model, seed"),
        ({}, "config.model: required by Config; give it a value"),
        ({"model": 3}, "config.model=3: expected a dictionary of Model fields, got int"),
        (None, "config=None: expected a dictionary of Config fields, got None"),
        ({"model": {"num_layers": "3"}}, "config.model.num_layers='3': expected int, got str"),
        ({"model": {"num_layers": 3.5}}, "config.model.num_layers=3.5: expected int, got float"),
        ({"model": {"num_layers": True}}, "config.model.num_layers=True: expected int, got bool"),
        ({"model": {"num_layers": None}}, "config.model.num_layers=None: expected int, got None"),
        ({"model": {"theta": True}}, "config.model.theta=True: expected float, got bool"),
        ({"model": {"theta": float("nan")}}, "config.model.theta=nan: expected a finite number"),
        ({"model": {"theta": 10**400}}, ": expected a finite number"),
        ({"model": {"tied": 1}}, "config.model.tied=1: expected bool, got int"),
        ({"model": {"name": 3}}, "config.model.name=3: expected str, got int"),
        ({"model": {"groups": 3}}, "config.model.groups=3: unknown choice; choose one of: 1, 2, 4"),
        ({"model": {"groups": True}}, "config.model.groups=True: unknown choice"),
        ({"model": {"groups": [1]}}, "config.model.groups=[1]: unknown choice"),
        ({"model": {"clip": "a"}}, "config.model.clip='a': expected float, got str"),
        ({"model": {"pair": [1]}}, "config.model.pair=[1]: expected 2 values, got 1"),
        ({"model": {"pair": [1, "x"]}}, "config.model.pair.1='x': expected float, got str"),
        ({"model": {"pair": "ab"}}, "config.model.pair='ab': expected a list, got str"),
        ({"model": {"layers": {}}}, "config.model.layers={}: expected a list, got dict"),
        ({"model": {"weights": [1]}}, "config.model.weights=[1]: expected a dictionary, got list"),
        ({"model": {"weights": {"a": "b"}}}, "config.model.weights.a='b': expected float, got str"),
        ({"model": {"layers": [{}, {"widht": 1}]}}, "config.model.layers.1.widht=1: Layer has no such field; did"),
        ({"model": {"layers": [{"mask": {"size": 4}}]}}, "layers.0.mask.kind: required; choose one of: global, "),
        ({"model": {"layers": [{"mask": {"kind": "chunk"}}]}}, "mask.kind='chunk': unknown kind; did you mean 'chun"),
        ({"model": {"layers": [{"mask": {"kind": ["x"]}}]}}, "mask.kind=['x']: unknown kind; choose one of"),
        ({"model": {"layers": [{"mask": "global"}]}}, "mask='global': expected a dictionary with a kind, one of: glob"),
        ({"model": {"layers": [{"mask": {"kind": "global", "size": 4}}]}}, "mask.size=4: Global has no such field; th"),
        ({"model": {"layers": [{"mask": {"kind": "chunked"}}]}}, "mask.size: required by Chunked; give it a value"),
        ({"model": {"layers": [{"mask": {"kind": "chunked", "size": 0}}]}}, "layers.0.mask.size=0: must be at least 1"),
        ({"model": {"inner": {"kind": "global", "size": 4}}}, "inner.kind='global': only 'chunked' is possible here"),
        ({"model": {"limit": "most"}}, "config.model.limit='most': expected int or Literal['all'], got str"),
        ({"model": {"label": 1.5}}, "config.model.label=1.5: expected int or str, got float"),
        ({"model": {"label": True}}, "config.model.label=True: expected int or str, got bool"),
        ({"model": {"either": {"kind": "x"}}}, "config.model.either.kind='x': unknown kind; choose one of: global"),
        ({"model": {"either": "x"}}, "config.model.either='x': expected Global or Chunked or int, got str"),
        ({"model": {"name": ["a\nb" * 60]}}, "...: expected str, got list"),
    ],
)
def test_each_mistake_says_where_what_and_the_fix(data, says):
    assert says in error(data)


def test_unions_of_scalars_keep_the_type_that_was_given():
    for key, value in (("label", "3"), ("label", 3), ("number", 1.0), ("number", 1), ("limit", 4), ("limit", "all")):
        built = getattr(from_dict(Model, {key: value}), key)
        assert built == value and type(built) is type(value)
    assert from_dict(Model, {"either": {"kind": "chunked", "size": 2}}).either == Chunked(2)
    assert from_dict(Model, {"either": Global()}).either == Global() and from_dict(Model, {"either": 7}).either == 7


def test_an_annotation_that_cannot_be_read_is_a_programming_error():
    bad = dataclasses.make_dataclass("Bad", [("x", list[int])])
    with pytest.raises(TypeError, match=r"config\.x: a config field cannot be annotated list\[int\]"):
        from_dict(bad, {"x": [1]})


# ---- override


@pytest.mark.parametrize(
    ("assignment", "path", "expected"),
    [
        ("seed=7", "seed", 7),
        ("model.num_layers=1_000", "model.num_layers", 1000),
        ("model.num_layers=1e3", "model.num_layers", 1000),
        ("model.theta=5", "model.theta", 5.0),
        ("model.theta= -2.5 ", "model.theta", -2.5),
        ("model.name=3", "model.name", "3"),
        ("model.name=a=b", "model.name", "a=b"),
        ("model.name=", "model.name", ""),
        ("model.name=None", "model.name", "None"),
        ("model.tied=false", "model.tied", False),
        ("model.tied=True", "model.tied", True),
        ("model.groups=2", "model.groups", 2),
        ("model.clip=0.5", "model.clip", 0.5),
        ("model.clip=none", "model.clip", None),
        ("model.pair=(7, 8)", "model.pair", (7, 8.0)),
        ("model.pair.0=7", "model.pair", (7, 2.0)),
        ("model.weights={'a': 1}", "model.weights", {"a": 1.0}),
        ("model.weights.b=2", "model.weights", {"b": 2.0}),
        ("model.limit=all", "model.limit", "all"),
        ("model.limit=12", "model.limit", 12),
        ("model.label=12", "model.label", 12),
        ("model.label=abc", "model.label", "abc"),
        ("model.number=1", "model.number", 1),
        ("model.number=1.5", "model.number", 1.5),
        ("model.either=9", "model.either", 9),
        ("model.inner={'size': 5}", "model.inner", Chunked(5)),
        ("model.inner.size=5", "model.inner", Chunked(5)),
        ("model.inner.kind=chunked", None, "inner.size: required by Chunked"),
        ("model.layers.1.mask.size=16", "model.layers", (Layer(), Layer(Chunked(16)))),
        ("model.layers.-1.width=9", "model.layers", (Layer(), Layer(Chunked(4), 9))),
        ("model.layers.1.mask.kind=global", "model.layers", (Layer(), Layer())),
        ("model.layers=[{'width': 3}]", "model.layers", (Layer(width=3),)),
    ],
)
def test_typed_text_takes_the_type_of_its_field(assignment, path, expected):
    if path is None:
        assert expected in override_error(assignment)
        return
    value = overridden(assignment)
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_assignments_apply_from_left_to_right():
    assert overridden("seed=1", "seed=2").seed == 2
    config = overridden("model.layers.0.mask.kind=chunked", "model.layers.0.mask.size=2", "model.layers.0.mask.by=row")
    assert config.model.layers[0].mask == Chunked(2, "row")
    assert overridden("model.inner={'size': 5}", "model.inner.by=row").model.inner == Chunked(5, "row")
    assert overridden("model.inner.by=row", "model.inner.size=5").model.inner == Chunked(5, "row")
    assert overridden("model.inner.size=5", "model.inner=none").model.inner is None
    twice = overridden("model.layers.0.mask.kind=chunked", "model.layers.0.mask.kind=global")
    assert twice.model.layers[0].mask == Global()


def test_choosing_another_kind_starts_from_its_defaults_and_the_same_kind_changes_nothing():
    base = Config(Model(layers=(Layer(Chunked(4, "row")),)))
    same = overridden("model.layers.0.mask.kind=chunked", base=base)
    assert same == base
    assert "mask.size: required" in override_error("model.layers.0.mask.kind=chunked")


def test_nothing_assigned_is_lost_by_a_kind_that_comes_later():
    says = override_error("model.layers.1.mask.size=8", "model.layers.1.mask.kind=global")
    assert says.startswith("config.model.layers.1.mask.kind=global: choose the kind before its fields")


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["model.num_layerz=3"], "config.model.num_layerz=3: Model has no such field; did you mean 'num_layers'?"),
        (["modle.num_layers=3"], "config.modle={'num_layers': '3'}: Config has no such field; did you mean 'model'?"),
        (["model.layers.2.width=3"], "config.model.layers.2=3: '2' is not an index of this list; use 0 to 1"),
        (["model.layers.x=3"], "config.model.layers.x=3: 'x' is not an index of this list; use 0 to 1"),
        (["model.layers.--1.width=3"], "'--1' is not an index of this list"),
        (["model.layers.².width=3"], "'²' is not an index of this list"),
        (["model.layers=[]", "model.layers.0.width=3"], "the list is empty; assign a whole list"),
        (["seed.x=3"], "config.seed.x=3: nothing can be set below the plain value 0"),
        (["seed=5", "seed.x=3"], "config.seed.x=3: nothing can be set below the plain value 5"),
        (["model.name=ab", "model.name.x=3"], "config.model.name=ab: expected a Python literal"),
        (["model.kind=iRoPE"], "config.model.kind=iRoPE: there is no choice of kinds here"),
        (["model.layers.0.mask.kind=chunkd"], "config.model.layers.0.mask.kind=chunkd: unknown kind; did you mean"),
        (["model.layers.0.mask.size=4"], "config.model.layers.0.mask.size=4: Global has no such field; there is "),
        (["model.layers.0.mask=global"], "mask=global: expected a Python literal such as (1, 2) or {'kind': 'global'}"),
        (["model.num_layers=many"], "config.model.num_layers=many: expected int"),
        (["model.num_layers=2.5"], "config.model.num_layers=2.5: expected int, got float"),
        (["model.num_layers=True"], "config.model.num_layers=True: expected int, got bool"),
        (["model.num_layers={[]: 1}"], "config.model.num_layers={[]: 1}: expected int"),
        (["model.tied=yes"], "config.model.tied=yes: expected true or false"),
        (["model.tied=1"], "config.model.tied=1: expected bool, got int"),
        (["model.theta=nan"], "config.model.theta=nan: expected float"),
        (["model.theta=1e999"], "config.model.theta=inf: expected a finite number"),
        (["model.groups=3"], "config.model.groups=3: unknown choice; choose one of: 1, 2, 4"),
        (["model.pair=1"], "config.model.pair=1: expected a list, got int"),
        (["model.pair=(1, 2"], "config.model.pair=(1, 2: expected a Python literal"),
        (["model.limit=most"], "config.model.limit=most: expected int or Literal['all'], got text"),
        (["=3"], "config=3: Config has no such field"),
    ],
)
def test_each_mistaken_override_says_so(assignments, says):
    assert says in override_error(*assignments)


def test_override_changes_nothing_it_was_given():
    data = to_dict(Config(Model()))
    before = json.dumps(data)
    changed = override(data, [("model.layers.0.width", "5"), ("model.layers.1.mask.kind", "global")])
    assert json.dumps(data) == before and changed != data


# ---- fingerprint, differences, errors


def test_fingerprints_differ_where_configs_do():
    base = Config(Model())
    assert fingerprint(base) == fingerprint(from_dict(Config, to_dict(base))) == fingerprint(to_dict(base))
    assert len(fingerprint(base)) == 12 and int(fingerprint(base), 16) >= 0
    others = [
        dataclasses.replace(base, seed=1),
        Config(Model(layers=(Layer(Chunked(4)), Layer()))),
        Config(Model(number=1.0)),
        Config(Model(label="0")),
    ]
    assert len({fingerprint(c) for c in (base, *others)}) == 5


def test_differences_name_every_path():
    old = {"a": 1, "b": {"c": [1, {"d": 2}], "gone": None}, "same": [1, 2]}
    new = {"a": 2, "b": {"c": [1, {"d": 3}], "new": "x"}, "same": [1, 2]}
    assert differences(old, new) == [
        "a: 1 -> 2",
        "b.c.1.d: 2 -> 3",
        "b.gone: None -> absent",
        "b.new: absent -> 'x'",
    ]
    assert differences(old, old) == []
    assert differences({"x": [1]}, {"x": [1, 2]}) == ["x: [1] -> [1, 2]"]


def test_differences_see_what_the_fingerprint_sees():
    for one, other in ((1, True), (1, 1.0), (0, False), ("1", 1)):
        assert fingerprint({"x": one}) != fingerprint({"x": other})
        assert differences({"x": one}, {"x": other}) == [f"x: {one!r} -> {other!r}"]
    assert differences({"x": (1, 2)}, {"x": [1, 2]}) == [] and fingerprint({"x": (1, 2)}) == fingerprint({"x": [1, 2]})


def test_an_error_is_one_line_and_can_be_placed():
    seen = ConfigError("size", "a\nb\r\nc", "too\nlong").within("mask").within("config.layers.0")
    assert seen.field == "config.layers.0.mask.size" and "\n" not in str(seen) and "\r" not in str(seen)
    assert str(ConfigError("x", Text("abc"), "no")) == "x=abc: no"
    assert str(ConfigError("x", "abc", "no")) == "x='abc': no"
    assert len(str(ConfigError("x", "y" * 500, "no"))) < 100
    assert str(ConfigError("x", ConfigError.ABSENT, "two\nlines")) == "x: two lines"
    assert isinstance(seen, ValueError)


def test_words():
    assert [join("a", "b"), join("", "b"), join("a", "")] == ["a.b", "b", "a"]
    assert nearest("tehta", ["theta", "name"]) == "did you mean 'theta'?"
    assert nearest("zzz", ["theta", "name"]) == "choose one of: theta, name"
    assert nearest("zzz", []) == "there is nothing to choose from"

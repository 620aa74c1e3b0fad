import pytest

from irope_jax.core.config import ConfigError
from irope_jax.study.grid import Axis, Cell, Study, axis, chained, plain_name, product, seeds, zipped


def study(*cells: Cell) -> Study:
    return Study(name="s", question="?", prediction="!", cells=cells)


def test_a_product_varies_every_cell_and_keeps_to_its_seed():
    start, arm = Cell(name="start", config="a.py"), Cell(name="arm", config="a.py", starts_from="start")
    cells = product([start, arm], axis("chunk", (16, 32), "model.chunk"), seeds(2))
    assert [cell.name for cell in cells] == [
        f"{name}/chunk={chunk}/seed={seed}" for name in ("start", "arm") for chunk in (16, 32) for seed in (0, 1)
    ]
    last = cells[-1]
    assert last.overrides == {"model.chunk": 32, "seed": 1, "data.seed": 1}
    assert last.starts_from == "start/chunk=32/seed=1" and last.arm == "arm/chunk=32" and last.seed == "seed=1"
    assert study(*cells).arms == ("start/chunk=16", "start/chunk=32", "arm/chunk=16", "arm/chunk=32")


def test_a_start_outside_of_the_product_is_shared():
    start = Cell(name="start", config="a.py")
    cells = product([Cell(name="arm", config="a.py", starts_from="start")], seeds(2))
    assert {cell.starts_from for cell in cells} == {"start"}
    assert len(study(start, *cells).cells) == 3


def test_seeds_may_start_from_those_of_another_study():
    cells = product([Cell(name="arm", config="a.py")], seeds(2, init_from="runs/other/start"))
    assert [cell.overrides["train.init_from"] for cell in cells] == [f"runs/other/start/seed={n}" for n in (0, 1)]
    assert cells[1].overrides["seed"] == cells[1].overrides["data.seed"] == 1 and cells[1].starts_from == ""


def test_a_label_as_a_name():
    assert plain_name("Llama 4's 0.1, in steps of 128") == "Llama_4s_0.1-in_steps_of_128"


def test_zipped_axes_go_together():
    cells = zipped([Cell(name="x", config="a.py")], axis("length", (1, 2), "l"), axis("batch", (8, 4), "b"))
    assert [dict(cell.overrides) for cell in cells] == [{"l": 1, "b": 8}, {"l": 2, "b": 4}]
    with pytest.raises(ConfigError, match="equally many"):
        zipped(cells, axis("a", (1,), "a"), axis("b", (1, 2), "b"))


def test_ways_without_a_name_are_called_by_their_label():
    (cell,) = product([Cell(name="x", config="a.py")], Axis("", {"pi": {"scaling.kind": "pi"}}))
    assert (cell.name, cell.arm) == ("x/pi", "x/pi")


def test_labels_say_what_was_varied_and_no_seeds():
    cells = product([Cell(name="irope", config="a.py", label="iRoPE")], axis("chunk", (16, 32), "c"), seeds(2))
    plain = Cell(name="rope", config="a.py")
    assert study(*cells, plain).labels() == {
        "irope/chunk=16": "iRoPE, chunk=16", "irope/chunk=32": "iRoPE, chunk=32", "rope": "rope",
    }  # fmt: skip


def test_a_chain_starts_each_from_the_one_before():
    cells = chained(*(Cell(name=name, config="a.py") for name in "abc"))
    assert [cell.starts_from for cell in cells] == ["", "a", "b"]


def test_a_choice_brings_what_it_starts_from():
    a, b = Cell(name="a", config="x.py"), Cell(name="b", config="x.py", starts_from="a", tags=("headline",))
    whole = study(*product([a, b, Cell(name="c", label="C, once", config="x.py")], seeds(2)))
    names = lambda *words: [cell.name for cell in whole.chosen(words)]
    assert names("headline") == ["a/seed=0", "a/seed=1", "b/seed=0", "b/seed=1"] == names("b")
    assert names("b/seed=1") == ["a/seed=1", "b/seed=1"]
    assert names("seed=1") == ["a/seed=1", "b/seed=1", "c/seed=1"]
    assert names("C, once") == ["c/seed=0", "c/seed=1"]
    assert len(names()) == 6
    with pytest.raises(ConfigError, match="did you mean 'headline'"):
        names("headlines")


@pytest.mark.parametrize(
    ("cells", "error"),
    [
        ([Cell(name="a", config="x.py")] * 2, "two cells have this name"),
        ([Cell(name="a", config="x.py", starts_from="b"), Cell(name="b", config="x.py")], "does not come before"),
        ([Cell(name="a", config="x.py", label="c"), Cell(name="c", config="x.py")], "arms a and c are both called so"),
        ([], "at least one cell"),
    ],
)
def test_what_cannot_be_run_is_refused(cells, error):
    with pytest.raises(ConfigError, match=error):
        study(*cells)


@pytest.mark.parametrize("name", ["", "a b", "../a", "/a", "a/"])
def test_names_are_folders_below_that_of_the_study(name):
    with pytest.raises(ConfigError, match="letters, digits"):
        Cell(name=name, config="x.py")

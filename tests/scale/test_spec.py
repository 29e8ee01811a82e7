"""What a spec asks for, and what is said of one that cannot be done."""

from pathlib import Path

import pytest

from bigram_circuits.scale.spec import read_spec, settings_of

SHARED = {"max_steps": 5, "model": "reference"}


def asked(spec):
    return [one.options for one in read_spec(spec).runs]


def test_a_grid_is_every_combination():
    found = asked({**SHARED, "grid": {"seed": [0, 1], "sparsity_weight": [1, 10.5, 3]}})
    expected = [{**SHARED, "seed": seed, "sparsity_weight": weight} for seed in (0, 1) for weight in (1, 10.5, 3)]
    assert found == expected


def test_a_list_is_each_of_its_tables_over_what_is_shared():
    assert asked({**SHARED, "run": [{"seed": 4}, {"max_steps": 7}]}) == [
        {**SHARED, "seed": 4},
        {"max_steps": 7, "model": "reference"},
    ]


def test_both_are_added_and_nothing_is_done_twice():
    spec = {**SHARED, "grid": {"seed": [0, 1, 1]}, "run": [{"seed": 1}, {"seed": 2}, {"sparsity_weight": 10.0}]}
    assert [one.get("seed", 0) for one in asked(spec)] == [0, 1, 2]  # 10 is the default weight, and 0 the seed


def test_without_either_it_is_one_run():
    assert asked(SHARED) == [SHARED]


def test_options_of_every_kind_are_read_from_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'recipe = "paper"\nlayers = [0, 1]\nanalysis = false\n'
        '[grid]\ngranularity = ["weight", {attn = "head", mlp = "neuron"}]\ntarget = ["ngram", "model"]\n'
        "[slurm]\npartition = 'short'\n"
    )
    spec = read_spec(path)
    first, *_, last = (one.request for one in spec.runs)
    assert (spec.name, spec.slurm, len(spec.runs)) == ("mine", {"partition": "short"}, 4)
    assert first.config.layers == (0, 1)
    assert first.config.max_steps == 15_000
    assert last.config.granularity == {"attn": "head", "mlp": "neuron"}
    assert last.inputs.target == "model"
    assert settings_of(last)["granularity"] == "attn=head,mlp=neuron"
    assert settings_of(last)["layers"] == "0,1"


def test_paths_are_relative_to_the_spec_and_the_key_of_a_run_does_not_depend_on_it(tmp_path):
    keys = []
    for name in ("here", "there"):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "text.txt").write_text("text")
        (folder / "spec.toml").write_text('model = "model"\ncorpus = "text.txt"\n')
        (run,) = read_spec(folder / "spec.toml").runs
        assert run.request.inputs.model == str(folder / "model")
        assert run.request.inputs.corpus == str(folder / "text.txt")
        keys.append((run.key, run.name))
    assert keys[0] == keys[1]


def test_names_that_are_no_paths_stay_names():
    (run,) = read_spec({"model": "EleutherAI/pythia-70m", "corpus": "wikitext:wikitext-2-raw-v1"}).runs
    assert (run.request.inputs.model, run.request.inputs.corpus) == (
        "EleutherAI/pythia-70m", "wikitext:wikitext-2-raw-v1",
    )  # fmt: skip


def test_runs_are_named_by_what_differs():
    names = [one.name for one in read_spec({**SHARED, "grid": {"seed": [0, 1], "layers": [[0], [0, 1]]}}).runs]
    assert [name.rpartition("-")[0] for name in names] == [
        "layers-0_seed-0", "layers-0-1_seed-0", "layers-0_seed-1", "layers-0-1_seed-1",
    ]  # fmt: skip
    assert len(set(names)) == 4
    assert all(Path(name).name == name for name in names)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"grid": {"seed": [0, -1]}}, r"run 2 of 2 \(seed=-1\): seed must be a whole number of at least 0, not -1"),
        ({"grid": {"sead": [0, 1]}}, r"run 1 of 2 \(sead=0\): there is no option 'sead': there are "),
        ({"grid": {"seed": 3}}, r"grid.seed must be a list of values, as in \[0, 1\], not 3"),
        ({"grid": {"seed": []}}, "grid.seed must be a list of values"),
        ({"grid": {"target": "ngram"}}, "grid.target must be a list of values"),
        ({"grid": [1]}, r"grid must be a table of lists of values, not \[1\]"),
        ({"run": {"seed": 1}}, r"run must be a list of tables of options \(\[\[run\]\]\)"),
        ({"slurm": 3}, "slurm must be a table of parameters, not 3"),
        ({"sparsity_weights": [1, 2]}, "run 1 of 1: sparsity_weights find a path in one run: vary sparsity_weight"),
        ({"run": [{"task": "t.jsonl", "order": 3}]}, "run 1 of 1: a task brings its own text and target"),
        ({"model": 3}, "run 1 of 1: model must be a name, since jobs read it on their own, not 3"),
    ],
)
def test_an_error_says_of_which_run_it_is(spec, error):
    with pytest.raises(ValueError, match=error) as found:
        read_spec(spec)
    assert "\n" not in str(found.value)


def test_a_file_that_is_no_spec(tmp_path):
    path = tmp_path / "spec.toml"
    with pytest.raises(FileNotFoundError):
        read_spec(path)
    path.write_text("seed = = 3")
    with pytest.raises(ValueError, match=r"spec.toml' is not a TOML file: Invalid value \(at line 1"):
        read_spec(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a TOML file: it is not UTF-8"):
        read_spec(path)

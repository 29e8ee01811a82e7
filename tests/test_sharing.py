import re
import shutil

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigram_circuits as bc
from bigram_circuits import cli, sharing
from bigram_circuits.models.identity import other_tensors
from bigram_circuits.recipe import Inputs
from bigram_circuits.runs import CorpusIdentity, ModelIdentity, Outcome, RunFolder, RunSettings, TargetIdentity
from tests.architectures import CONFIGS
from tests.conftest import save_tiny

TOKENS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama", "phi3", "gemma2"])
def model(request, tmp_path_factory):
    return bc.load_model(save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]()), device="cpu")


@pytest.fixture(scope="module")
def half(model):
    shapes = bc.Subnetwork.full(model).shapes
    generator = torch.Generator().manual_seed(5)
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    return bc.Subnetwork(masks, model_name=model.cfg.model_name, weight_hash=bc.weight_hash(model))


# --- a Hugging Face folder ---


def test_the_exported_folder_is_the_masked_model(model, half, tmp_path):
    folder = bc.export_huggingface(model, half, tmp_path / "new" / "masked")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), bc.masked(model, half):
        torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("some text", return_tensors="pt")
    assert torch.equal(tokens.input_ids[0, -9:], model.tokenizer("some text", return_tensors="pt").input_ids[0, -9:])
    written = plain.generate(**tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert written[0, tokens.input_ids.shape[1]] == plain(tokens.input_ids).logits[0, -1].argmax()
    again = bc.load_model(folder, device="cpu")
    for site in bc.weight_sites(again):
        assert torch.equal(site.weight != 0, half[site.name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["masked"]
    assert (folder.stat().st_mode & 0o777) == (tmp_path / "new").stat().st_mode & 0o777


def test_precision_and_present_weights_are_exported(tiny_folders, tmp_path):
    model = bc.load_model(tiny_folders["gpt2"], dtype="bfloat16", device="cpu")
    site = bc.weight_sites(model)[0]
    with torch.no_grad():
        site.original[0, 0] = 3.0
    folder = bc.export_huggingface(model, bc.Subnetwork.full(model), tmp_path / "masked")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.bfloat16
    assert plain.transformer.h[0].attn.c_attn.weight[0, 0] == 3.0


def test_a_folder_that_is_not_empty_or_a_file_is_refused(model, half, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        bc.export_huggingface(model, half, tmp_path / "there")
    with pytest.raises(ValueError, match="is a file, but a folder is needed"):
        bc.export_huggingface(model, half, tmp_path / "there" / "file")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["file"]


def test_an_export_that_fails_leaves_nothing(model, half, tmp_path, monkeypatch):
    def fail(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(sharing, "unhooked", fail)
    with pytest.raises(OSError, match="disk is full"):
        bc.export_huggingface(model, half, tmp_path / "masked")
    assert list(tmp_path.iterdir()) == []


def test_a_subnetwork_of_another_model_is_refused(model, reference_model, tmp_path):
    other = bc.Subnetwork.full(reference_model)
    for export in (bc.export_huggingface, bc.export_masks):
        with pytest.raises(ValueError, match="has shape"):
            export(model, other, tmp_path / "masks.npz")
    with pytest.raises(ValueError, match="has shape"):
        other.to_huggingface(model)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_folder_is_gone_can_still_be_exported(tiny_folders, tmp_path):
    shutil.copytree(tiny_folders["gpt2"], tmp_path / "model")
    model = bc.load_model(tmp_path / "model", device="cpu")
    shutil.rmtree(tmp_path / "model")
    folder = bc.export_huggingface(model, bc.Subnetwork.full(model), tmp_path / "masked")
    assert bc.weight_hash(bc.load_model(folder, device="cpu")) == bc.weight_hash(model)


def test_a_bridge_of_transformer_lens_is_exported_from_its_files(tiny_folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folders["gpt_neox"], folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu").eval()
    masked = bc.export_huggingface(bridge, bc.Subnetwork.full(bridge), tmp_path / "masked")
    assert bc.weight_hash(bc.load_model(masked, device="cpu")) == bc.weight_hash(bridge)
    shutil.copy(tiny_folders["gpt2"] / "config.json", folder)
    with pytest.raises(
        ValueError, match=r"cannot load the model .* again: its config.json is now that of another model"
    ):
        bc.export_huggingface(bridge, bc.Subnetwork.full(bridge), tmp_path / "other")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        bc.export_huggingface(bridge, bc.Subnetwork.full(bridge), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masked"]


def test_masks_are_written_as_npz_or_safetensors_only(model, half, tmp_path):
    with pytest.raises(ValueError, match=r"masks are written as \.npz or \.safetensors"):
        bc.export_masks(model, half, tmp_path / "masks.pickle")


# --- the hub (a stand-in for it) ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    root = tmp_path / "hub"

    def create_repo(self, repo_id, *, private, exist_ok):
        (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert "\n" not in commit_message
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, *, revision=None):
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, **_: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_whatever_tensor_is_edited_the_export_has_it_or_is_refused(model, half, tmp_path):
    names = list(other_tensors(model))
    parts = [name for name in names if name.endswith(("q.bias", "k.bias", "v.bias"))]
    for index, name in enumerate((names[0], names[len(names) // 2], names[-1], *parts[:1])):
        tensor = other_tensors(model)[name]
        place = (0,) * tensor.ndim
        with torch.no_grad():
            value = tensor[place].item()
            tensor[place] += 0.5
        try:
            with torch.no_grad(), bc.masked(model, half):
                expected = model(TOKENS)
            if "neox" in model.cfg.model_name and name in parts:  # copies of parts of the fused bias
                with pytest.raises(ValueError, match=r"not the plain model .*: their logits differ"):
                    bc.export_huggingface(model, half, tmp_path / "masked")
                continue
            folder = bc.export_huggingface(model, half, tmp_path / str(index))
        finally:
            with torch.no_grad():
                tensor[place] = value
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-5, rtol=0)
    config = model.original_model.config
    kept, config.max_position_embeddings = config.max_position_embeddings, 32
    with pytest.raises(ValueError, match="the configurations differ"):
        bc.export_huggingface(model, half, tmp_path / "masked")
    config.max_position_embeddings = kept
    assert not (tmp_path / "masked").exists()


def test_a_pushed_subnetwork_can_be_pulled(hub, model, half):
    address = bc.push_subnetwork(half, "someone/half", description="Half of the weights.")
    assert address == "https://huggingface.co/someone/half"
    assert sorted(path.name for path in (hub / "someone" / "half").iterdir()) == ["README.md", "subnetwork.safetensors"]
    assert bc.pull_subnetwork("someone/half", model) == half
    with torch.no_grad():
        bc.weight_sites(model)[0].original[0, 0] += 1
    with pytest.raises(ValueError, match=r"was made for .*, but .* is another model \(weights in float32 with hash"):
        bc.pull_subnetwork("someone/half", model)
    with torch.no_grad():
        bc.weight_sites(model)[0].original[0, 0] -= 1


def test_the_card_says_what_it_is_and_its_code_runs(hub, reference_model):
    subnetwork = bc.Subnetwork.full(reference_model).drop_layer(1)
    bc.push_subnetwork(subnetwork, "someone/part", description="Without a block.")
    card = (hub / "someone" / "part" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: bigram_circuits\n")
    assert f"{subnetwork.kept:,} of {subnetwork.total:,}" in card
    assert "Without a block." in card
    assert subnetwork.weight_hash in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    namespace = {}
    exec(code, namespace)
    assert namespace["subnetwork"] == subnetwork


def test_a_card_names_a_model_of_the_hub_but_not_a_folder(half):
    named = bc.Subnetwork(dict(half), model_name="EleutherAI/pythia-70m")
    assert "base_model: EleutherAI/pythia-70m" in sharing.model_card(named, "someone/x")
    assert "base_model" not in sharing.model_card(half, "someone/x")
    assert str(half.model_name) not in sharing.model_card(half, "someone/x")  # a path says nothing to others


@pytest.mark.parametrize(
    "name",
    [
        'x"); import os; os.system("true") #', "x\n```\n# A heading", "x: {y: z}", "a/b\nlicense: mit", "`x`", "x\\",
        "<script>", "a b", "", "\x1b[31m",
    ],
)  # fmt: skip
def test_a_hostile_name_reaches_neither_the_code_nor_the_header_of_a_card(half, name):
    named = bc.Subnetwork(dict(half), model_name=name, weight_hash=f"`{name}")
    plain = bc.Subnetwork(dict(half), model_name="./folder")
    assert sharing.model_card(named, "someone/x") == sharing.model_card(plain, "someone/x")
    assert sharing.model_card(plain, name) == sharing.model_card(plain, "user/name")


# --- checkpoints ---


def test_checkpoints_of_families_and_models():
    steps = bc.checkpoints("EleutherAI/pythia-70m")
    assert steps[:3] == ("step0", "step1", "step2")
    assert (steps[-1], len(steps)) == ("step143000", 154)
    assert bc.checkpoints("pythia") == steps == bc.checkpoints("EleutherAI/pythia-1.4b-deduped")
    assert bc.checkpoints("EleutherAI/pythia-14m-seed3") == steps
    assert bc.checkpoints("EleutherAI/pythia-70m-v0")[0] == bc.checkpoints("pythia-v0")[0] == "step1000"
    assert len(bc.checkpoints("EleutherAI/pythia-70m-deduped-v0")) == 143
    assert bc.checkpoints("stanford-crfm/alias-gpt2-small-x21")[-1] == "checkpoint-400000"


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-1b-capitals-first-ft", "reference", "", "pythia70"])
def test_checkpoints_of_other_models_are_not_guessed(name):
    with pytest.raises(ValueError, match="no training checkpoints of") as error:
        bc.checkpoints(name)
    assert repr(name) in str(error.value)


# --- out of range, and from another place: one line that says what there is ---


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s.drop_head(0, 4), "there is no head 4 in layer 0: it has heads 0 to 3"),
        (lambda s: s.keep_head(0, -1), "there is no head -1 in layer 0: it has heads 0 to 3"),
        (lambda s: s.drop_head(2, 0), "there is no layer 2: layers are 0 to 1"),
        (lambda s: s.keep_layer(-1), "there is no layer -1: layers are 0 to 1"),
        (lambda s: s.drop_neurons(1, [3, 40]), "there is no neuron 40 in layer 1: it has neurons 0 to 39"),
    ],
)
def test_what_is_out_of_range_is_said_with_the_range(tiny_model, edit, said):
    with pytest.raises(ValueError, match=said):
        edit(bc.Subnetwork.full(tiny_model))


# --- on the command line ---


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; gives (exit code, stdout, stderr)."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def finished_run(reference_model, tmp_path):
    """A run's folder as `find` leaves it, with a subnetwork that was not learned."""
    settings = RunSettings(ModelIdentity("reference"), CorpusIdentity(), TargetIdentity(), bc.SparsifyConfig())
    folder = RunFolder.open(tmp_path / "run", settings, rebuild=Inputs())
    folder.finish(bc.Subnetwork.full(reference_model).drop_layer(2), Outcome("decided", 0.0))
    return tmp_path / "run"


def test_the_commands_export_and_import(command, finished_run, reference_model):
    code, out, _ = command("export", finished_run, "--out", "masked", "--device", "cpu")
    assert (code, "written to masked" in out) == (0, True)
    plain = AutoModelForCausalLM.from_pretrained("masked", attn_implementation="eager")
    with torch.no_grad(), bc.masked(reference_model, bc.Subnetwork.full(reference_model).drop_layer(2)):
        torch.testing.assert_close(plain(TOKENS).logits, reference_model(TOKENS), atol=1e-4, rtol=0)
    assert command("export", finished_run, "--out", "masks.npz", "--device", "cpu")[0] == 0
    arguments = ["import-published", "masks.npz", "--model", "reference", "--out", "again.safetensors"]
    code, out, _ = command(*arguments, "--device", "cpu")
    assert (code, "written to again.safetensors" in out) == (0, True)
    again = bc.Subnetwork.load("again.safetensors", reference_model)
    assert again == bc.Subnetwork.load(finished_run / "subnetwork.safetensors")


def test_the_command_checkpoints(command):
    code, out, _ = command("checkpoints", "EleutherAI/pythia-70m")
    assert (code, out.split()) == (0, list(bc.checkpoints("pythia")))
    code, out, err = command("checkpoints", "gpt2")
    assert (code, out, err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("import-published nothing.pickle --model reference --out x.safetensors", 1, "there is no file"),
        ("import-published bad.pickle --model reference --out x.safetensors", 1, "is not a file of masks"),
        ("import-published bad.bin --model reference --out x.safetensors", 1, "should be a .pickle"),
        ("import-published small.npz --model reference --out x.safetensors", 1, "do not fit the model"),
        ("import-published small.npz --model ./none --out x.safetensors", 1, "no model folder"),
        ("import-published bad.pickle --model reference", 2, "--out"),
        ("import-published bad.pickle --out x.safetensors", 2, "--model"),
        ("export nowhere --out y", 1, "holds no run"),
        ("export RUN --out full", 1, "is not empty"),
        ("export RUN", 2, "--out"),
        ("checkpoints", 2, "model"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_written(command, finished_run, tmp_path, arguments, code, said):
    import numpy as np

    here = tmp_path / "here"
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    (here / "bad.pickle").write_bytes(b"\x80\x04]q.")
    (here / "bad.bin").touch()
    np.savez(here / "small.npz", **{"gpt_neox.layers.0.mlp.dense_h_to_4h.weight": np.ones((3, 3), bool)})
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    given = [str(finished_run) if word == "RUN" else word for word in arguments.split()]
    got, out, err = command(*given)
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    if code == 1:
        assert err.count("\n") == 1
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before

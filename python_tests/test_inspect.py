"""`vlmops inspect`: what it builds, prints and returns."""

import importlib.util
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import transformers

import vlmops
from vlmops import cli, survey
from vlmops.hf.report import PatchReport, Row

LAYERS = 3
TEXT = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": LAYERS}


@pytest.fixture
def run(capsys):
    def run(*argv):
        code = cli.main(["inspect", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    transformers.Qwen2VLConfig(text_config=TEXT).save_pretrained(tmp_path)
    return tmp_path


def text_sites(found):
    """Sites of mrope in the language model; the tower has others."""
    rows = [row for row in found["rows"] if row["path"] == "model.language_model"]
    return sum(row["sites"] for row in rows if (row["op"], row["status"]) == ("mrope", "patched"))


def test_inspect_builds_a_model_type_without_memory(run, monkeypatch):
    devices = []

    def spy(model):
        devices.extend(p.device.type for p in model.parameters())
        return patch(model)

    patch = vlmops.patch
    monkeypatch.setattr(vlmops, "patch", spy)
    code, out, _ = run("qwen2_vl")
    assert code == 0
    assert set(devices) == {"meta"}
    assert "vlmops: Qwen2VLForConditionalGeneration" in out
    assert re.search(r"mrope +Qwen2VLAttention \(model.language_model\) +80 .* patched", out)


@pytest.mark.parametrize("where", ["folder", "config.json"])
def test_inspect_reads_a_folder(run, folder, where):
    path = folder if where == "folder" else folder / "config.json"
    code, out, _ = run(str(path), "--json")
    found = json.loads(out)
    assert code == 0
    assert text_sites(found) == LAYERS
    assert (found["model_type"], found["config"]) == ("qwen2_vl", str(path))
    assert found.keys() == {"model_type", "config", "model", "counts", "rows"}


def test_inspect_reads_the_local_cache_and_no_network(run, tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    code, out, _ = run("some/model")
    assert code == 0
    assert "qwen2_vl (some/model, from the local cache)" in out
    code, _, err = run("some/other")
    assert code == 2
    assert "does not use the network; fetch it with: hf download some/other config.json" in err


def test_inspect_writes_json_besides_the_text(run, folder, tmp_path):
    path = tmp_path / "report.json"
    code, out, _ = run(str(folder), "--json", str(path))
    assert code == 0
    assert "status" in out
    assert text_sites(json.loads(path.read_text())) == LAYERS


@pytest.mark.parametrize("status", ["refused", "not present"])
def test_inspect_nothing_patched_is_exit_code_1(run, monkeypatch, status):
    row = Row("mrope", "Attention", "text", 2, "", status, "because")
    monkeypatch.setattr(vlmops, "patch", lambda _: PatchReport("Model", (row,)))
    code, out, _ = run("clip")
    assert code == 1
    assert f"{status}: because" in out


def test_inspect_says_why_a_model_cannot_be_built(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    code, out, _ = run(str(tmp_path))
    assert code == 1
    assert re.search(r"not built: AttributeError: .*\(modeling_chameleon.py:\d+\)", out)
    code, out, _ = run(str(tmp_path), "--json")
    assert "not built: AttributeError" in json.loads(out)["problem"]


def test_inspect_says_why_a_default_config_cannot_be_made(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("heads: 3 do not divide 32. See the documentation")

    monkeypatch.setattr(transformers.AutoConfig, "for_model", refuse)
    problem = survey.inspect("qwen2_vl").problem
    assert problem.startswith("not built: ValueError: heads: 3 do not divide 32 (test_inspect.py:")


@pytest.mark.parametrize("model_type", survey.COMPLETIONS)
def test_inspect_completes_what_default_configs_lack(model_type, tmp_path):
    """Both halves: a completion that is no longer needed is to be removed."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"not in transformers {transformers.__version__}")
    completed = survey.inspect(model_type)
    assert completed.report is not None, completed.problem
    assert survey.COMPLETIONS[model_type][1] in completed.config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert survey.inspect(str(tmp_path)).verdict == "not built"


@pytest.mark.parametrize(
    ("model", "built"),
    [
        ("evolla", "EvollaForProteinText2Text"),  # its config has two names in transformers
        ("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),
        ("clip", "CLIPModel"),
    ],
)
def test_inspect_chooses_the_class_that_generates(model, built):
    assert survey.inspect(model).report.model == built


def test_inspect_prefers_the_checkpoints_class(tmp_path):
    config = {"model_type": "clip", "architectures": ["NoSuchClass", "CLIPForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert survey.inspect(str(tmp_path)).report.model == "CLIPForImageClassification"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"expected a MODEL, or --all"),
        (["qwen2_vl", "--all"], r"expected a MODEL, or --all"),
        (["qwen2_vl", "--markdown"], r"expected a MODEL, or --all"),
        (["--json", "qwen2_vl"], r"--json takes the next word for its PATH"),
        (["qwn2_vl"], r"'qwn2_vl' is neither a model type .*; did you mean qwen2_vl or "),
        (["zzzzzz"], r"'zzzzzz' is neither .*; --all lists"),
        (["./no/such"], r"'./no/such' is neither a model type of transformers .* nor a folder"),
        (["/"], r"/ holds no config.json that can be read \(.*\)"),
        (["qwen2_vl_vision"], r"qwen2_vl_vision is a part of models: .* name a model that"),
        (["qwen2_vl", "--json", "/no/such/x.json"], r"--json: expected a file .*, got /no/such"),
    ],
)
def test_inspect_answers_a_wrong_command_in_one_line(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_inspect_says_that_transformers_is_missing(run, monkeypatch):
    def missing():
        raise ImportError("vlmops.patch needs transformers 5.17 or later: pip install it")

    monkeypatch.setattr("vlmops.hf.patch._require_transformers", missing)
    assert run("qwen2_vl") == (2, "", f"vlmops inspect: {_message(missing)}\n")


def _message(function):
    with pytest.raises(ImportError) as caught:
        function()
    return str(caught.value)


def test_inspect_all_takes_every_type_that_sees(run, monkeypatch):
    types = survey.model_types()
    assert {"qwen2_vl", "llava", "mllama", "blip-2"} <= set(types)
    assert "llama" not in types
    monkeypatch.setattr(survey, "model_types", lambda: ["git", "qwen2_vl"])
    code, out, _ = run("--all")
    assert code == 0
    assert re.search(r"^git +\w", out, re.MULTILINE)
    assert re.search(r"^qwen2_vl +mrope: \d+ patched", out, re.MULTILINE)
    code, out, _ = run("--all", "--json")
    assert [found["model_type"] for found in json.loads(out)] == ["git", "qwen2_vl"]
    monkeypatch.setattr(survey, "inspect_all", lambda: [_inspection("git")])
    assert run("--all")[0] == 1


def _inspection(model_type, *rows, problem=""):
    report = None if problem else PatchReport("Model", tuple(Row(*row) for row in rows))
    return survey.Inspection(model_type, "default config", report, problem, built=not problem)


MANY = [
    _inspection(
        "a",
        ("mrope", "A", "text", 2, "cpu", "patched"),
        ("mrope", "A", "audio", 3, "cpu", "patched"),
        ("mrope", "B", "tower", 4, "", "refused", "odd"),
        ("linear", "C", "", 5, "", "refused", "odd"),
    ),
    _inspection(
        "b", ("mrope", "", "", 0, "", "not present"), ("crops", "", "", 0, "", "not present")
    ),
    _inspection("c", problem="not built: TypeError: x (m.py:1)"),
    _inspection("d", ("mrope", "", "model.text", 0, "", "refused", "not found")),
]


def test_inspect_table_for_people():
    assert survey.table(MANY).splitlines() == [
        f"{'a':24}mrope: 5 patched, 4 refused (odd); linear: 5 refused (odd)",
        f"{'b':24}nothing to patch",
        f"{'c':24}not built: TypeError: x (m.py:1)",
        f"{'d':24}mrope: refused (not found)",
        "",
        f"4 model types of transformers {transformers.__version__}: "
        "1 patched, 1 refused, 1 nothing to patch, 0 patch failed, 1 not built",
    ]


def test_inspect_markdown_has_a_column_per_op():
    assert survey.markdown(MANY).splitlines()[2:] == [
        "| model type | linear | mrope |",
        "|---|---|---|",
        "| a | 5 refused (note 1) | 5 patched, 4 refused (note 1) |",
        "| d | - | refused (note 2) |",
        "",
        "- note 1: odd",
        "- note 2: not found",
        "- nothing to patch: b",
        "- c: not built: TypeError: x (m.py:1)",
    ]


def test_inspect_markdown_is_the_same_on_every_machine():
    def on(*linear):
        rope = ("mrope", "A", "text", 2, "cpu", "patched", "with q_norm")
        refused = ("linear", "L", "", 1, "", "refused", "odd")
        alone = _inspection("b", *linear)
        return survey.markdown([_inspection("a", rope, *linear, refused), alone])

    amd = on(("linear", "L", "", 5, "oneDNN", "patched", "n"), ("linear", "L", "", 2, "", *SLOWER))
    assert amd == on(("linear", "L", "", 7, "", *SLOWER))
    assert "2 patched, 0 refused, 0 nothing to patch" in amd
    assert "| a | 7 found, 1 refused (note 2) | 2 patched (note 1) |\n| b | 7 found | - |" in amd


SLOWER = ("left alone", "torch's own product is as fast here")


def test_inspect_tells_of_a_patch_that_raises_and_goes_on(run, monkeypatch):
    def fail(model):
        raise KeyError("no such thing")

    monkeypatch.setattr(survey, "model_types", lambda: ["git", "clip"])
    monkeypatch.setattr(vlmops, "patch", fail)
    code, out, _ = run("--all")
    assert code == 1
    assert out.count("patch failed: KeyError: 'no such thing' (test_inspect.py:") == 2
    assert "please report this" in out
    assert "0 nothing to patch, 2 patch failed, 0 not built" in out
    assert "- clip: patch failed" in run("--all", "--markdown")[1]


@pytest.fixture
def tables(monkeypatch, tmp_path):
    path = Path(__file__).parent.parent / "bench" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    monkeypatch.setattr(survey, "inspect_all", lambda: iter(MANY))
    return module


def test_inspect_table_of_the_readme_is_renewed_and_checked(tables, capsys):
    tables.README.write_text(f"# Title\n\n{tables.BEGIN}\n\n{tables.END}\n\nend\n")
    assert tables.main(["--check"]) == 1
    assert "+| a | 5 refused (note 1) |" in capsys.readouterr().err
    assert tables.main([]) == 0
    table = survey.markdown(MANY)
    wanted = f"# Title\n\n{tables.BEGIN}\n{table}\n{tables.END}\n\nend\n"
    assert tables.README.read_text() == wanted
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("text", ["", "{0}", "{1} {0}", "{0} {0} {1}", "{0} {1} {1}"])
def test_inspect_table_needs_its_markers(tables, text):
    written = text.format(tables.BEGIN, tables.END)
    tables.README.write_text(written)
    with pytest.raises(SystemExit, match="expected the lines"):
        tables.main([])
    assert tables.README.read_text() == written

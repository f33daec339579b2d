"""`vlmops demo` on a tiny model: what it prints, writes and returns."""

import contextlib
import dataclasses
import json
import math
import re

import pytest
import torch
from PIL import Image

import vlmops
from vlmops import cli, demo
from vlmops.demo import inputs, measure

BYTES = 256
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}" + IMAGE + "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}assistant: "
)


@pytest.fixture
def config():
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            "vocab_size": BYTES + 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        vision_start_token_id=BYTES,
        vision_end_token_id=BYTES + 1,
        video_token_id=BYTES + 2,
        image_token_id=BYTES + 3,
    )


@pytest.fixture
def checkpoint(tmp_path, config):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = TEMPLATE
    path = tmp_path / "checkpoint"
    fast.save_pretrained(path)
    inputs._qwen2_vl_processor()().save_pretrained(path)
    inputs.random_model(config, torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "gradient.png"
    row = torch.arange(90, dtype=torch.uint8)
    Image.fromarray((row[None] + row[:60, None]).numpy()).save(path)
    return str(path)


@pytest.fixture
def run(config, tmp_path, capsys):
    """Runs the demo on the tiny model and gives its exit code, stdout, stderr and JSON."""

    def run(*argv, config=config):
        path = tmp_path / "results.json"
        small = ["--image-size", "84", "--new-tokens", "5", "--repeat", "1", "--json", str(path)]
        code = demo.main([*small, "--dtype", "float32", *argv], config=config)
        out, err = capsys.readouterr()
        return code, out, err, json.loads(path.read_text())["runs"][0] if path.exists() else None

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_demo_photographs(run, dtype):
    code, out, err, results = run("--dtype", dtype)

    assert code == 0, out + err
    assert "astronaut 84x84, chelsea" in out
    counts = {"mrope": 2, "patch_embed": 1, "pixel_shuffle": 0, "hd_transform": 0}
    counts |= {"mlp_projector": 1, "linear": 0, "packed_attention": 1}
    counts |= {"gated_cross_attention": 0, "gated_residual": 0}
    counts |= {"add_norm": 0, "perceiver_attention": 0, "qformer_attention": 0}
    assert results["report"]["counts"] == counts
    agreement = results["agreement"]
    assert agreement["agree"]
    assert agreement["largest"] > 0.5
    assert agreement["worst"] <= agreement["tolerance"] < agreement["largest"] / 4
    if dtype == "float32":
        assert agreement["equal_tokens"] == agreement["tokens"] == agreement["argmax"] == 5
    stages = ["vision tower", "text prefill", "decode, per token", "whole generation"]
    for row in [*(results["stages"][name] for name in stages), *results["rope"].values()]:
        assert row["before"] > 0
        assert row["after"] > 0
    whole = results["stages"]["whole generation"]
    assert results["stages"]["first token, in all"]["before"] < whole["before"]
    assert results["rope"]["rope in the text prefill"]["before"] < whole["before"]
    assert "timing, round 1 of 1" in err


def test_demo_runs_in_both_dtypes(config, tmp_path, capsys):
    path = tmp_path / "results.json"
    small = ["--image-size", "84", "--new-tokens", "2", "--repeat", "1"]
    assert demo.main([*small, "--json", str(path)], config=config) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [run["dtype"] for run in runs] == ["float32", "bfloat16"]
    assert all(run["stages"]["decode, per token"]["after"] > 0 for run in runs)
    assert capsys.readouterr().out.count("Times: medians") == 2


def test_demo_takes_the_users_picture(run, picture):
    code, out, _, results = run("--image", picture, "--image", picture)

    assert code == 0
    assert "gradient.png 84x56, gradient.png 84x56" in results["images"]
    # 84 x 56 pixels are 3 x 2 tokens of 28 x 28.
    assert "12 of them from the images" in out


def test_demo_prints_json_and_keeps_text_off_stdout(config, capsys):
    small = ["--image-size", "84", "--new-tokens", "2", "--repeat", "1"]
    assert demo.main([*small, "--json"], config=config) == 0
    out, err = capsys.readouterr()
    runs = json.loads(out)["runs"]
    assert [run["dtype"] for run in runs] == ["float32", "bfloat16"]
    assert all(run["agreement"]["agree"] for run in runs)
    assert "Agreement: yes" in err


@pytest.mark.parametrize(("waiting", "busy"), [(0.001, False), (0.3, True)])
def test_demo_compares_no_times_of_a_busy_machine(waiting, busy):
    row = {"before": 2.0, "after": 1.0, "spread": 0.0}
    times = {"waiting": waiting, "repeats": 3, "rope": {}}
    assert demo._row(row, times).endswith("?" if busy else "2.00x")
    told = [line for line in demo._conclusions(times) if "waiting for a core 30%" in line]
    assert len(told) == busy


def test_demo_tokens_come_from_both_codes(config, monkeypatch):
    ran = []
    original = vlmops.hf.carry.mrope_

    def spy(*args, **kwargs):
        ran.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(vlmops.hf.carry, "mrope_", spy)
    shown = inputs.pictures([], 84)
    subject = inputs.random_subject(shown, 1, 1, torch.float32, config)
    measure.generate(subject, 3)
    assert not ran
    with vlmops.patched(subject.model):
        measure.generate(subject, 3)
    assert len(ran) == 4  # the tower once


def test_demo_loads_a_checkpoint(run, checkpoint):
    code, out, err, results = run("--model", str(checkpoint), "--prompt", "Who?", config=None)

    assert code == 0, out + err
    assert results["model"].startswith(f"{checkpoint}: Qwen2VLForConditionalGeneration")
    assert results["agreement"]["equal_tokens"] == 5
    assert "before    '" in out or 'before    "' in out


@pytest.mark.parametrize("change", ["logits", "nan"])
def test_demo_disagreement_is_exit_code_1(run, monkeypatch, change):
    patched = vlmops.patched

    @contextlib.contextmanager
    def spoiling(model):
        with patched(model) as report:
            saved = model.lm_head.weight.clone()
            with torch.no_grad():
                model.lm_head.weight[7] += 0.01 if change == "logits" else math.nan
            yield report
            with torch.no_grad():
                model.lm_head.weight.copy_(saved)

    monkeypatch.setattr(vlmops, "patched", spoiling)
    code, out, err, results = run()

    assert code == 1
    assert "Agreement: NO" in out
    assert "disagree" in err
    assert not results["agreement"]["agree"]
    assert "stages" not in results


def test_demo_nothing_patched_is_exit_code_2(run, monkeypatch):
    @contextlib.contextmanager
    def idle(model):
        yield vlmops.PatchReport("Idle", ())

    monkeypatch.setattr(vlmops, "patched", idle)
    code, _, err, _ = run()

    assert code == 2
    assert "nothing in this model could be patched" in err


def _write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (lambda tmp: ["--image", str(tmp / "none.png")], "there is no file .*none.png"),
        (lambda tmp: ["--image", _write(tmp / "a.png", b"text")], "cannot be read as a picture"),
        (lambda tmp: ["--image", _write(tmp / "a.jpg", b"")], "cannot be read as a picture"),
        (lambda tmp: ["--image", str(tmp)], "cannot be read as a picture"),
        (lambda tmp: ["--model", str(tmp / "none")], "there is no directory .*none"),
        (lambda tmp: ["--model", str(tmp)], "the configuration cannot be loaded"),
    ],
)
def test_demo_bad_input_is_one_line_and_exit_code_2(run, tmp_path, argv, message):
    code, out, err, results = run(*argv(tmp_path))

    assert code == 2
    assert out == ""
    assert results is None
    complaint = [line for line in err.splitlines() if not line.startswith("[")]
    assert len(complaint) == 1
    assert re.search(message, complaint[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "the tokenizer cannot be loaded"),
        (["preprocessor_config.json"], "processor cannot be loaded"),
        (["chat_template.jinja"], "failed on the prompt"),
        (["model.safetensors"], "the model cannot be loaded"),
    ],
)
def test_demo_incomplete_checkpoint_is_exit_code_2(run, checkpoint, damage, message):
    for name in damage:
        (checkpoint / name).unlink()
    code, _, err, _ = run("--model", str(checkpoint), config=None)

    assert code == 2
    assert message in err.splitlines()[-1]


def test_demo_model_without_images_is_exit_code_2(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err, _ = run("--model", str(tmp_path), config=None)

    assert code == 2
    assert "no image-text-to-text class for model type 'llama'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "0"], "expected a whole number from 1, got 0"),
        (["--layers", "2", "--model", "x"], "leave out --model"),
        (["--prompt", "hello"], "--prompt needs a tokenizer"),
        (["--json", "/no/such/folder/x.json"], "--json: expected a file that can be written"),
    ],
)
def test_demo_bad_option_is_one_line_and_exit_code_2(capsys, argv, message):
    assert cli.main(["demo", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def _generation(tokens, logits):
    zero = (0.0, 0.0)
    return measure.Generation(tokens, torch.tensor(logits), 1.0, 0.5, zero, zero, 1)


def test_demo_compares_up_to_the_first_difference():
    before = _generation([0, 1, 1], [[1.0, 0.0], [0.0, 0.01], [0.0, 1.0]])
    after = _generation([0, 0, 0], [[1.0, 0.0], [0.01, 0.0], [9.0, 0.0]])

    tie = measure.compare(before, after, tolerance=0.02)
    assert (tie.first_difference, tie.steps, tie.argmax, tie.equal_tokens) == (1, 2, 1, 1)
    assert tie.worst == pytest.approx(0.01)
    assert tie.margin == pytest.approx(0.01)
    assert tie.agree
    assert not dataclasses.replace(tie, margin=0.05).agree
    assert not measure.compare(before, after, tolerance=0.005).agree


def test_demo_random_model_has_no_uninitialised_weight(config):
    model = inputs.random_model(config, torch.float32)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
        if tensor.ndim > 1:
            spread = tensor.std().item()
            assert spread == pytest.approx(config.text_config.initializer_range, rel=0.1), name

"""Model folders that cannot be used end in one line before anything is written; what a run says, counts and leaves behind."""

import dataclasses
import json
import shutil
import struct

import pytest
from conftest import byte_tokenizer
from test_cli import GOOD_QUERIES, refused

from repro import cli
from repro.base.identity import config_hash
from repro.base.records import UserError, read_json, read_jsonl
from repro.experiment import load_experiment
from repro.models import embedded, files, hub, load

HASHES = {  # of the shipped experiments' settings, with batches of 32 prompts: of the paper's as they were when drop phrases were a default
    "exp1_dialogue/mini": "aeaa7b5e71a8c6e2", "exp1_dialogue/paper": "165ca505132355ea", "exp2_tldr/mini/weak": "50ce52a2e3f6f303",
    "exp2_tldr/mini/hand": "12728367bc232801", "exp2_tldr/paper/mistral-7b": "e7dd09e7ff6aec52",
    "exp2_tldr/paper/mixtral-8x7b": "fd4208a2159afb23", "exp3_diverse/mini": "b4bcd8c63200d01e",
    "exp3_diverse/paper/direct": "673d94553752a07a", "exp3_diverse/paper/cot": "a473b0695c17dfb9"}
WORDS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SPM = b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"


def gone(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def edited(file, **fields):
    def change(folder):
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in (data | fields).items() if v is not ...}))
    return change


def put(name, data, *, without=()):
    def change(folder):
        gone(*without)(folder)
        (folder / name).write_bytes(data)
    return change


def added(content, special=False, template=False):
    """A token that the model has no row for."""
    def change(folder):
        from tokenizers import AddedToken

        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([AddedToken(content, special=special)], special_tokens=special)
        tokenizer.chat_template = content * template + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
    return change


def padded(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def rows(count):
    """The model with `count` rows, those beyond the tokenizer the likeliest."""
    def change(folder):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(count, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[259:] *= 40
        model.save_pretrained(folder)
    return change


def as_float8(folder):
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in load_file(path).items()}, path, {"format": "pt"})


def less_one(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(path := folder / "model.safetensors")
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, path, {"format": "pt"})


def sharded(folder, keep=1):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    gone("model.safetensors")(folder)
    model.save_pretrained(folder, max_shard_size="40KB")
    for path in sorted(folder.glob("model-*.safetensors"))[keep:]:
        path.unlink()


def cut(folder, end=-100):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:end])


def of_kind(model_type, built="", **fields):
    data = {"model_type": model_type, "architectures": [built] if built else None, "vocab_size": 259} | fields
    return lambda folder: (folder / "config.json").write_text(json.dumps(data))


ADAPTER = put("adapter_config.json", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "o/base"}).encode())
QUANTISED = "quantised weights cannot be trained here"
FOLDERS = {
    "a pad token beyond the rows": (padded, "token '[PAD]' has id 259, and the model has 259 rows (ids 0 to 258)"),
    "a word beyond": (added("bread"), "token 'bread' has id 259"),
    "a control token beyond, in the template": (added("<extra>", special=True, template=True), "token '<extra>' has id 259"),
    "another model's tokenizer": (rows(5000), "the tokenizer has 259 tokens and the model 5000 rows: a tokenizer of another model"),
    "no tokenizer": (gone(*WORDS), "no tokenizer files: tokenizer.json is missing"),
    "its config alone": (gone("tokenizer.json"), "no tokenizer files: tokenizer.json is missing"),
    "SentencePiece": (put("tokenizer.model", SPM, without=WORDS[:1]), "tokenizer.model), which takes a package that is not installed"),
    "T5's name of it": (put("spiece.model", SPM, without=WORDS[:1]), "a SentencePiece file alone (spiece.model)"),
    "tiktoken": (put("tokenizer.model", b"IQ== 0\nIg== 1\n", without=WORDS[:1]), "a tiktoken file alone (tokenizer.model)"),
    "gptq": (edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), f"(gptq, 4 bits): {QUANTISED}"),
    "awq": (edited("config.json", quantization_config={"quant_method": "awq"}), f"(awq): {QUANTISED}"),
    "bitsandbytes": (edited("config.json", quantization_config={"quant_method": "bitsandbytes"}), QUANTISED),
    "compressed-tensors": (edited("config.json", quantization_config={"quant_method": "compressed-tensors"}), QUANTISED),
    "fp8": (edited("config.json", quantization_config={"quant_method": "fp8"}), QUANTISED),
    "an entry of another form": (edited("config.json", quantization_config="int4"), QUANTISED),
    "float8 without an entry": (as_float8, f"is stored as F8_E4M3: {QUANTISED}"),
    "an adapter beside weights": (ADAPTER, "adapter_config.json beside whole weights"),
    "an adapter alone": (lambda f: (ADAPTER(f), gone("model.safetensors", "config.json")(f)), "adapters without the weights"),
    "an adapter with a config": (lambda f: (ADAPTER(f), gone("model.safetensors")(f)), "that they belong to (o/base)"),
    "GGUF": (put("q4.gguf", b"GGUF", without=("model.safetensors",)), "q4.gguf: GGUF is not read"),
    "GGUF alone": (put("q4.gguf", b"GGUF", without=("model.safetensors", "config.json")), "GGUF alone (q4.gguf)"),
    "pytorch_model.bin": (put("pytorch_model.bin", b"", without=("model.safetensors",)), "pytorch_model.bin is no safetensors file"),
    "no weights": (gone("model.safetensors"), "no weights: neither model.safetensors nor"),
    "another name": (lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"), "consolidated.safetensors is not a"),
    "a missing shard": (sharded, "files that model.safetensors.index.json names are missing: model-00002"),
    "no bytes": (put("model.safetensors", b""), "model.safetensors: cut short (0 bytes)"),
    "cut": (cut, "model.safetensors: cut short ("),
    "Git LFS": (put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "no header": (put("model.safetensors", struct.pack("<Q", 2) + b"[]"), "its header is not that of a safetensors file"),
    "T5": (of_kind("t5", "T5ForConditionalGeneration", d_model=32), "t5 (T5ForConditionalGeneration) is an encoder-decoder"),
    "BART": (of_kind("bart", d_model=32), "bart is an encoder-decoder"),
    "ViT": (of_kind("vit", "ViTForImageClassification"), "vit (ViTForImageClassification) is no causal language model"),
    "LLaVA": (of_kind("llava", text_config={"model_type": "llama"}, vision_config={"model_type": "clip_vision_model"}),
              "kind that reads more than text"),
    "code of its own": (of_kind("new", auto_map={"AutoConfig": "a.B"}), "code that comes with the weights"),
}


@pytest.fixture
def made(tiny, tmp_path):
    return lambda change, name="model": (change(folder := shutil.copytree(tiny, tmp_path / name)), folder)[1]


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_written(capsys, tmp_path, made, what):
    change, reason = FOLDERS[what]
    folder = made(change)
    capsys.readouterr()
    assert reason in refused(capsys, tmp_path, "run", "exp1", "--model", str(folder))


def test_no_end_token_is_refused_and_one_of_the_config_is_taken(capsys, tmp_path, made):
    named = made(edited("tokenizer_config.json", eos_token=...), "named")
    assert load.load_tokenizer(str(named)).eos_token == "<|im_end|>"
    for file in ("config.json", "generation_config.json"):
        edited(file, eos_token_id=None)(named)
    assert "no end token" in refused(capsys, tmp_path, "run", "exp1", "--model", str(named))
    edited("tokenizer_config.json", eos_token="<|im_end|>")(named)  # what the line asks for
    assert load.load_tokenizer(str(named)).eos_token_id == 2


def test_baseline_and_local_writer_are_looked_at_too(capsys, tmp_path, tiny, made):
    folder, other = made(edited("config.json", quantization_config={"quant_method": "awq"})), made(padded, "other")
    assert QUANTISED in refused(capsys, tmp_path, "run", "exp2", "--variant", "weak", "--model", str(tiny), "--writer-model", str(folder))
    path = tmp_path / "mine.py"
    for place, reason in ((folder, QUANTISED), (other, "'[PAD]' has id 259")):
        path.write_text("import dataclasses\nfrom repro.config import ModelSpec\nfrom repro.experiment import load_experiment\n"
                        f"EXPERIMENTS = {{'mini': dataclasses.replace(load_experiment('exp1', 'mini')[0], baseline=ModelSpec(name={str(place)!r},"
                        " label='other'))}\n")
        assert reason in refused(capsys, tmp_path, "run", str(path), "--model", str(tiny))


def test_the_ways_out_that_a_line_names_work(tmp_path, made):
    from transformers import AutoModelForCausalLM

    folder = made(padded)
    with pytest.raises(UserError, match=r"resize_token_embeddings\(260\)"):
        load.load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(260)
    model.save_pretrained(folder)
    assert load.load_tokenizer(str(folder)).pad_token_id == 259
    ADAPTER(folder)
    with pytest.raises(UserError, match="move adapter_config.json elsewhere"):
        load.check_model(str(folder))
    (folder / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    load.check_model(str(folder))
    import torch

    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="AutoModelForCausalLM.from_pretrained"):
        load.check_model(str(folder))
    AutoModelForCausalLM.from_pretrained(str(folder)).save_pretrained(str(folder))
    load.check_model(str(folder))


def test_a_control_token_beyond_the_rows_that_nothing_writes_is_let_be(made):
    """As Gemma 3 1B's <image_soft_token>; whole shards too."""
    assert len(load.load_tokenizer(str(made(added("<image_soft_token>", special=True))))) == 260
    load.check_model(str(made(lambda folder: sharded(folder, keep=99), "shards")))


def test_rows_without_a_token_are_never_sampled_and_are_counted(capsys, tmp_path, made, unrendered):
    """448 rows, 259 tokens; unmasked, most of what is sampled has no text."""
    import torch

    from repro.sampling.local import sample_batch

    folder = made(rows(448))
    model, tokenizer = load.load_model(str(folder)), load.load_tokenizer(str(folder))
    assert files.unsaid(tokenizer, 448) == list(range(259, 448)) and files.unsaid(tokenizer, 259) == []
    prompts = [f"<|im_start|>user\nquestion {k}<|im_end|>\n" for k in range(4)]
    inputs = tokenizer(prompts, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs.input_ids.shape[1]:]
    assert (said >= 259).any()  # what is guarded against is real
    for temperature in (0.0, 1.0):
        for answer in sample_batch(model, tokenizer, prompts, max_new_tokens=8, temperature=temperature):
            again = tokenizer(answer["text"], add_special_tokens=False).input_ids
            assert answer["tokens"] and (answer["text"] or not again) and max(again, default=0) < 259
    queries = tmp_path / "queries.jsonl"
    queries.write_text(GOOD_QUERIES)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "exp1", "--model", str(folder), "--queries", str(queries), "--iterations", "1", "--batch-size", "2",
                  "--max-new-tokens", "6", "--judge", "rules", "--out", str(tmp_path / "out")])
    said, record = capsys.readouterr(), read_json(tmp_path / "out/exp1_dialogue/mini/run.json")
    assert stop.value.code == 0 and record["rows_without_token"] == {"model": 189} and "189 of the model" in said.err
    assert "sampled pairs to spare, by iteration:" in said.err and "or with 'The assistant' or 'sorry'" in said.err
    assert "pairs dropped before training: " in said.out
    texts = [row["text"] for row in read_jsonl(tmp_path / "out/exp1_dialogue/mini/responses/evaluation-0.jsonl")]
    assert all(texts)


@pytest.mark.parametrize("change, reason", [(less_one, "the weights lack 1 of the tensors that config.json asks for: model.layers.1.mlp"),
                                            (edited("config.json", vocab_size=300), "is (259, 32) in the weights and (300, 32) by config")])
def test_a_run_that_fails_before_its_first_stage_leaves_no_folder(capsys, tmp_path, made, change, reason):
    """transformers draws a tensor that is missing at random, and warns."""
    folder = made(change)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "exp1", "--model", str(folder), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and reason in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_run_that_was_begun_stays_and_verify_says_that_it_is_not_finished(capsys, tmp_path, tiny, monkeypatch, unrendered):
    from test_experiments import small

    from repro.stages import pipeline

    def stopped(run, iteration):
        raise UserError("no more")

    monkeypatch.setattr(pipeline, "train_iteration", stopped)
    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    with pytest.raises(UserError, match="no more"):
        pipeline.run(experiment, tmp_path, say=lambda line: None)
    folder = tmp_path / "exp1_dialogue/mini"
    assert "sample-1" in read_json(folder / "run.json")["stages"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", str(folder)])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "FAIL" not in said and "not finished; run the same command again" in said.splitlines()[-1]
    with pytest.raises(SystemExit) as stop:  # the folder of several, before all are done
        cli.main(["verify", str(folder.parent)])
    assert stop.value.code == 2 and str(folder) in capsys.readouterr().err
    monkeypatch.undo()
    pipeline.run(experiment, tmp_path, say=lambda line: None)  # the same command finishes it
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", str(folder)])
    assert stop.value.code == 0


def test_drop_phrases_are_off_by_default_and_the_shipped_experiments_keep_theirs(tiny):
    from repro.base.settings import SamplingSpec

    assert SamplingSpec().drop_phrases == ()
    runs = [e for name in ("exp1", "exp2", "exp3") for profile in ("mini", "paper") for e in load_experiment(name, profile)]
    as_it_was = {e.path: dataclasses.replace(e, sampling=dataclasses.replace(e.sampling, batch_size=32)) for e in runs}
    assert {path: config_hash(e, {})[:16] for path, e in as_it_was.items()} == HASHES
    args = cli.parse(["run", "exp1", "--drop-phrases", "]", "sorry"])
    assert cli.configure(args)[0].sampling.drop_phrases == ("]", "sorry")
    assert cli.configure(cli.parse(["run", "exp1"]))[0].sampling.drop_phrases == runs[0].sampling.drop_phrases != ()
    assert cli.configure(cli.parse(["run", "exp1", "--drop-phrases"]))[0].sampling.drop_phrases == ()


def test_too_few_pairs_say_why_and_what_to_change(tmp_path, tiny):
    from test_experiments import small

    from repro.stages.pipeline import run

    experiment = small(load_experiment("exp1", "mini")[0], tiny)
    experiment = dataclasses.replace(experiment, sampling=dataclasses.replace(experiment.sampling, drop_phrases=("e", "a", " ", "\ufffd", "i")))
    with pytest.raises(UserError) as refusal:
        run(experiment, tmp_path, say=lambda line: None)
    assert "were dropped (phrase" in str(refusal.value) and "or other --drop-phrases" in str(refusal.value)


def test_version_and_the_profile_of_a_users_file(capsys, tmp_path, tiny):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("sami-repro 0.1.")
    text = "from repro.experiment import load_experiment\ne = load_experiment('exp1', 'mini')[0]\n"
    (tmp_path / "mine.py").write_text(text + "EXPERIMENTS = {'large': e}\n")
    (tmp_path / "two.py").write_text(text + "EXPERIMENTS = {'small': e, 'big': e}\n")
    assert load_experiment(str(tmp_path / "mine.py"), None) == load_experiment("exp1", "mini")
    assert "give --profile: one of 'small', 'big'" in refused(capsys, tmp_path, "plan", str(tmp_path / "two.py"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tmp_path / "mine.py"), "--config", str(embedded.embedded_model() / "config.json")])
    assert stop.value.code == 0 and "exp1_dialogue/mini" in capsys.readouterr().out


def held(change, name="model.norm.weight"):
    """The folder after `change` has had its tensors, all of them but the one of `name`."""
    def edit(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(path := folder / "model.safetensors")
        tensor = state.pop(name)
        save_file(change(state, tensor), path, {"format": "pt"})
    return edit


LACKS = {
    "a norm": (held(lambda state, tensor: state), "lack 1 of the tensors that config.json asks for: model.norm.weight"),
    "a matrix transposed": (held(lambda state, tensor: state | {"model.layers.0.mlp.down_proj.weight": tensor.t().contiguous()},
                                 "model.layers.0.mlp.down_proj.weight"), "down_proj.weight is (48, 32) in the weights and (32, 48)"),
    "a layer": (edited("config.json", num_hidden_layers=3), "lack 9 of the tensors that config.json asks for: model.layers.2."),
    "the head of its own": (edited("config.json", tie_word_embeddings=False), "lack 1 of the tensors that config.json asks for: lm_head"),
    "rows": (edited("config.json", vocab_size=300), "model.embed_tokens.weight is (259, 32) in the weights and (300, 32)"),
    "an activation that is one": (edited("config.json", hidden_act="swoosh"), "config.json: no model can be made of it (KeyError: 'swoosh'"),
    "heads": (edited("config.json", num_attention_heads=0), "ZeroDivisionError"),
    "shards": (put("model.safetensors.index.json", b'{"weight_map": {}}', without=("model.safetensors",)), "an empty weight_map"),
    "a file": (lambda f: (gone("model.safetensors")(f), (f / "model.safetensors").symlink_to("../blobs/3f")),
               "model.safetensors is no file, but a link to ../blobs/3f, which is not there; copy the file itself (cp -L")}


@pytest.mark.parametrize("what", LACKS)
def test_weights_that_do_not_hold_what_the_config_asks_for_are_refused_for_every_model_of_a_run(capsys, tmp_path, tiny, made, what):
    """Of a baseline too, which is loaded when the policy has been evaluated."""
    change, reason = LACKS[what]
    folder, path = made(change), tmp_path / "mine.py"
    path.write_text("import dataclasses\nfrom repro.config import ModelSpec\nfrom repro.experiment import load_experiment\n"
                    f"EXPERIMENTS = {{'mini': dataclasses.replace(load_experiment('exp1', 'mini')[0], baseline=ModelSpec(name={str(folder)!r},"
                    " label='other'))}\n")
    capsys.readouterr()
    assert reason in refused(capsys, tmp_path, "run", str(path), "--model", str(tiny))


def test_tensors_under_other_names_are_left_to_loading(tmp_path, made):
    """Tied ones are stored under one name; older names transformers renames, as it does a base model's without prefix."""
    from safetensors.torch import load_file, save_file

    def renamed(folder):
        path = folder / "model.safetensors"
        save_file({k.removeprefix("model."): v for k, v in load_file(path).items()}, path, {"format": "pt"})

    for name, change in (("as saved", lambda folder: None), ("renamed", renamed)):
        folder = str(made(change, name))
        load.check_model(folder)
        load.load_model(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:3f\nsize 5\n"


@pytest.mark.parametrize("change, reason", [
    (put("tokenizer.json", LFS), "tokenizer.json is a pointer of Git LFS in the file's place (`git lfs pull` fetches it)"),
    (put("tokenizer.json", b""), "tokenizer.json is empty; copy or download it again"),
    (put("tokenizer.json", b'{"version": "1.0"'), "tokenizer.json is not valid JSON (Expecting"),
    (put("tokenizer_config.json", b"[]"), "tokenizer_config.json holds no JSON object"),
    (edited("tokenizer.json", model={"type": "Quantum", "vocab": {}}), "tokenizer.json is not of a form that the installed tokenizers reads")])
def test_a_tokenizers_file_that_cannot_be_read_is_named(capsys, tmp_path, made, change, reason):
    folder = made(change)
    capsys.readouterr()
    assert reason in refused(capsys, tmp_path, "run", "exp1", "--model", str(folder))


def test_a_bound_that_training_has_lowered_is_told_with_the_rate(tmp_path):
    from repro.base.records import write_json
    from repro.report.story import worsened

    def told(*values):
        write_json(tmp_path / "run.json", {"config": {"train": {"learning_rate": 0.01}}})
        write_json(tmp_path / "metrics.json", [
            {"metric": "mi", "estimator": estimator, "principle": None, "model": "m", "writer": "w", "cot": None, "subset": "helpful",
             "iteration": k, "value": value - (estimator == "raw") * 9 * k, "n": 7} for k, value in enumerate(values) for estimator in ("infonce", "raw")])
        return worsened(tmp_path)

    assert told(0.2, 0.4, 0.9) == [] and told(0.2, -0.4, 0.9) == []
    assert told(0.2, -0.5, -119.25, -3.0) == [
        "training lowered the bound on helpful, which it is there to raise, from 0.20 to -119.25 nats (n 7), first in iteration 1: most "
        "often the learning rate, here 0.01, is too high for the model; try a tenth of it (--learning-rate)"]


@pytest.mark.parametrize("rate, optimizer, large", [
    ("1e-2", "rmsprop", "moves each weight by about 0.1, 500% of a weight's usual size (initializer_range 0.02)"), ("2.1e-5", "rmsprop", "1% of a"),
    ("2e-5", "rmsprop", None), ("2e-4", "adamw", None), ("1e-3", "adamw", "5% of a weight's usual size"), ("5e-7", "rmsprop", None)])
def test_a_rate_whose_steps_are_large_for_the_model_is_told(tmp_path, made, rate, optimizer, large):
    """At the beginning, and, since the run keeps it, at its end and in its report."""
    from test_experiments import small

    from repro.report.story import worsened
    from repro.stages.run import Run

    folder = made(edited("config.json", initializer_range=0.02))
    base = small(load_experiment("exp1", "mini")[0], folder)
    said, experiment = [], dataclasses.replace(base, train=dataclasses.replace(base.train, learning_rate=float(rate), optimizer=optimizer))
    run = Run(experiment, tmp_path / "run", said.append)
    run.prepare()
    assert [line for line in said if "is large" in line] == ([run.record["large_step"]] if large else [])
    assert large is None or large in run.record["large_step"]
    (tmp_path / "run.json").write_text(json.dumps({"config": {}} | {k: v for k, v in run.record.items() if k == "large_step"}))
    (tmp_path / "metrics.json").write_text("[]")
    assert worsened(tmp_path) == ([run.record["large_step"]] if large else [])


def test_the_shipped_experiments_steps_are_small():
    """What the line about large steps says of them."""
    runs = [e for name in ("exp1", "exp2", "exp3") for profile in ("mini", "paper") for e in load_experiment(name, profile)]
    drawn = {"mini": hub.load_config(str(embedded.embedded_model())).initializer_range, "paper": 0.02}  # Mistral's, Mixtral's, Llama's
    assert max(e.train.learning_rate * (10 if e.train.optimizer == "rmsprop" else 1) / drawn[e.profile] for e in runs) <= 0.001 + 1e-9

"""A tiny random model with a byte-level tokenizer, made here: the tests need no download."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: a second thread only waits; children inherit it
if not shutil.which("nvidia-smi"):  # without a GPU the Triton kernels are tested in the interpreter; read on its import
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # with one: torch's deterministic mode asks for it

from pathlib import Path

import pytest

CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
                 "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer():
    """259 tokens: three control tokens and one for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: k for k, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                        pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A random 2-layer Llama whose byte preferences are strong enough that responses differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.4, bos_token_id=1,
                         eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def spare_the_collector(known=[0]) -> None:  # noqa: B006
    """A run collects garbage whenever it lets a model go, here once in a tenth of a second of work: what was imported since
    the last call, some million objects that stay, is no longer walked through each time. What a test makes still is."""
    if len(sys.modules) != known[0]:
        gc.collect()
        gc.freeze()
        known[0] = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    spare_the_collector()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    spare_the_collector()


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """No test here can see whether bytes have left the page cache: those of durability record the calls and cut what no fsync
    confirmed. A child process waits as always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: os.fstat(fd) and None)  # EBADF as always
        yield


@pytest.fixture
def forked_ranks(monkeypatch):
    """The ranks of a run are forked after one import of torch (ranks_forked.py), for runs whose torchrun others test."""
    _ranks_by(monkeypatch, "ranks_forked", lambda job: True)


@pytest.fixture(scope="session")
def ranks_server(tmp_path_factory):
    folder = Path(tempfile.mkdtemp())  # a socket's path is short
    here = Path(__file__).resolve().parent
    server = subprocess.Popen([sys.executable, here / "ranks_served.py", folder / "s"],
                              env=os.environ | {"PYTHONPATH": f"{here}:{here.parent}"})
    yield folder / "s"
    server.kill()
    server.wait()
    shutil.rmtree(folder)


@pytest.fixture
def served_ranks(monkeypatch, ranks_server):
    """As `forked_ranks`, from a process that has imported torch once for all (ranks_served.py)."""
    monkeypatch.setenv("RANKS_SERVER", str(_there(ranks_server)))
    _ranks_by(monkeypatch, "ranks_served", lambda job: True)


@pytest.fixture
def served_scoring(monkeypatch, ranks_server):
    """Scoring by `served_ranks`; training by torchrun."""
    monkeypatch.setenv("RANKS_SERVER", str(_there(ranks_server)))
    _ranks_by(monkeypatch, "ranks_served", lambda job: job.startswith("logprobs/"))


def _there(path: Path) -> Path:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    return path


def _ranks_by(monkeypatch, module: str, which) -> None:
    from repro.stages import jobs

    here, torchrun = Path(__file__).resolve().parent, jobs.torchrun
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")
    monkeypatch.setattr(jobs, "torchrun", lambda folder, job, ranks, nodes, node: [module, str(ranks), str(folder), job] if which(job)
                        else torchrun(folder, job, ranks, nodes, node))


@contextlib.contextmanager
def unrendered():
    """Figures are drawn and not rendered, which is a third of a tiny run: for runs at whose pictures nobody looks."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"not rendered"))
        yield


@pytest.fixture(name="unrendered")
def _unrendered():
    with unrendered():
        yield


LONGEST = ("test_paper.py", "test_experiments.py", "test_faults.py", "test_fsdp_worker.py", "test_variants.py", "test_fsdp.py",
           "test_serving.py", "test_seam.py", "test_plan.py", "test_judge.py", "test_judge_server.py", "test_doors.py")


def pytest_collection_modifyitems(items) -> None:
    """The longest files first, so that at the end no core waits for one."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))

"""A run directory: the inputs it is bound to, which stages are done, and where each file lies.

run.json holds the config and its hash, provenance, and per stage the sha256 of what it left. A stage is skipped when
the config, what it depends on, and its files all match; never by file time.
"""

import contextlib
import copy
import functools
import gc
import math
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date as Date
from importlib.metadata import version
from pathlib import Path

from repro import lora, models, seam, serving
from repro.config import Experiment, ModelSpec, config_hash, flatten, training_hash
from repro.constitutions import (
    Constitution,
    ConstitutionSet,
    Pool,
    check_control_tokens,
    constitutions_of,
    load_constitutions,
)
from repro.datasets import check_queries, disjoint, load_queries
from repro.endpoint import Endpoint
from repro.intake import unsaid
from repro.prompts import Form, marks
from repro.records import (
    MARKER,
    Query,
    UserError,
    checked,
    digest,
    file_sha256,
    read_json,
    read_jsonl,
    remove_folder,
    sealed,
    write_json,
    write_jsonl,
)
from repro.speaker import Speaker, told
from repro.writing import speaker_of_writer

BY_HAND = "by_hand.json"  # beside constitutions that a model wrote: those whose rules measure following
LARGE_STEP = 0.01  # of a weight's size: ten times what the shipped experiments' first steps are
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


def checkpoint(iteration: int) -> str:
    return f"checkpoints/iteration-{iteration}"


def training_file(iteration: int) -> str:
    return f"responses/training-{iteration}.jsonl"


def evaluation_file(iteration: int) -> str:
    return f"responses/evaluation-{iteration}.jsonl"


def logprob_file(iteration: int) -> str:
    return f"logprobs/evaluation-{iteration}.jsonl"


def rng(*keys) -> random.Random:
    """Randomness as a pure function of its position: seeded by the keys alone, so nothing needs to be saved."""
    return random.Random("/".join(map(str, keys)))


@dataclass(frozen=True)
class Item:
    """What is evaluated: a held-out query under constitutions [C], the first of which is judged. `subset`: of records."""

    query: Query
    subset: str
    constitutions: tuple[Constitution, ...]


@dataclass
class Run:
    """A run directory and what its stages share."""

    experiment: Experiment
    folder: Path
    say: Callable[[str], None]
    record: dict = field(default_factory=dict)
    endpoint: Endpoint | None = None  # where the LLM judge is, if there is one
    writer_endpoint: Endpoint | None = None  # where the principle writer is, if it is behind a server
    ranks: int = 1  # processes that train and score; no part of the config, since any number gives the same update
    nodes: int = 1  # machines that train, with that many each
    sampler_url: str | None = None  # a server to sample from that is already there; else the run starts its own
    tensor_parallel: int | None = None  # GPUs that hold a copy of the model together there; by default all
    _started: float = field(default_factory=time.monotonic)
    _told: set[str] = field(default_factory=set)

    def once(self, text: str) -> None:
        """Say it, unless it was said before."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    # ---- inputs, checked before any model loads

    def check(self) -> None:
        """Read and check every input, and write nothing."""
        spec = self.experiment
        serving.check(spec.sampling.engine, self.sampler_url)
        for name in filter(None, (spec.model.name, spec.baseline and spec.baseline.name,
                                  spec.writer.model if spec.writer and spec.writer.kind == "local" else None)):
            models.check_model(name)  # a licence that is missing is told before anything else
        if "openai" in spec.judge.judges:
            self.endpoint = self.endpoint or Endpoint(model=spec.judge.model)
            self.endpoint.check()
        if spec.writer and spec.writer.kind == "openai":
            self.writer_endpoint = self.writer_endpoint or Endpoint(model=spec.writer.model)
            self.writer_endpoint.check()
        self.constitutions = self.by_hand = load_constitutions(spec.constitutions)
        if spec.writer and isinstance(self.constitutions, Pool):
            raise UserError(f"--constitutions {spec.constitutions}: a pool; a writer writes a set of two principles, so "
                            "what stands in for it must be a set too")
        queries, self.dropped = load_queries(spec.data.source, spec=spec.data)
        self.place, self.tokenizer, self.form, self.speaker = self._speaker(spec.model)
        self.speakers = {"model": self.speaker}
        seam.check(self)
        queries = self._fit(queries)
        self.training = [q for q in queries if q.split == "train"]
        self.held_out = [q for q in queries if q.split == spec.data.evaluation_split]
        self.subsets = spec.data.subsets or tuple(dict.fromkeys(q.subset for q in queries))
        self._enough()
        self._places = {"model.name": self.place}
        self.unsaid = {"model": self._unsaid()}
        if spec.writer and spec.writer.kind == "local":
            self._places["writer.model"] = writer = models.resolve_model(spec.writer.model)
            tokenizer = models.load_tokenizer(writer)
            models.end_tokens(tokenizer, writer)
            self.speakers["writer"] = speaker_of_writer(tokenizer, spec.writer.label, self.date)
        if spec.baseline:
            other = self.answering_as(spec.baseline)
            self.speakers["baseline"] = other.speaker
            other._frame(self.constitutions)
            check_control_tokens(((q.where or q.id, q.text) for q in self.held_out), other.controls())
            other._said((q.where or q.id, q.text) for q in self.held_out)
            self._places["baseline.name"] = other.place
            self.unsaid["baseline"] = other._unsaid()
        self.unsaid = {which: count for which, count in self.unsaid.items() if count}

    def prepare(self) -> None:
        """Check every input; then bind the directory to this configuration."""
        self.check()
        queries = (*self.training, *self.held_out)
        self._bind({"data.source": digest([asdict(q) | {"where": ""} for q in queries]),
                    "constitutions": digest(self.constitutions.to_json()),
                    **{field: digest(models.fingerprint(Path(place))) if Path(place).is_dir() else place
                       for field, place in self._places.items()},
                    **({"date": self.date} if any(s.date for s in self.speakers.values()) else {})})
        if self.unsaid:
            self.record["rows_without_token"] = self.unsaid
            self.say("rows of the embedding that the tokenizer has no token for: " + ", ".join(
                f"{count} of the {which}" for which, count in self.unsaid.items()) + "; they are never sampled here, and "
                "decode to nothing in a server's answer")
        if large := self._large_step():
            self.record["large_step"] = large
            self.say(large)
        self.say(f"{len(self.training)} training and {len(self.held_out)} held-out queries"
                 + "".join(f"; dropped {n}: {why}" for why, n in sorted(self.dropped.items())))
        phrases = " or ".join(map(repr, self.experiment.sampling.drop_phrases))
        self.say(f"sampled pairs to spare, by iteration: {', '.join(self.spare)}; one with empty or identical responses"
                 + f", or with {phrases} in one," * bool(phrases)
                 + " is dropped, and the run stops where fewer are left than an iteration trains on")
        for line in told(self.record):
            self.say(line)
        write_jsonl(self.folder / "queries.jsonl", [{"id": q.id, "subset": q.subset, "split": q.split, "text": q.text}
                                                    for q in queries])

    def abandon(self) -> None:
        """Take back what `prepare` and `adopt` have written into a new folder, where nothing else is in it: a run that
        fails before its first stage leaves none. What was sampled or answered, and a server's log, stay."""
        written = [self.folder / name for name in ("run.json", "queries.jsonl", "constitutions.json", BY_HAND)]
        if {p for p in self.folder.rglob("*") if p.is_file()} <= {*written, self.folder / ".lock"}:
            for path in written:
                path.unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    remove_folder(path)

    @functools.cached_property
    def date(self) -> str:
        """What chat templates that print a date print for today: the day on which the run began."""
        path = self.folder / "run.json"
        began = read_json(path).get("inputs", {}).get("date") if path.exists() else None
        return began or Date.today().isoformat()

    def _speaker(self, spec: ModelSpec):
        """Where a model lies, its tokenizer, how it is prompted, and how it is spoken to (a baseline without reasoning)."""
        place = models.resolve_model(spec.name)
        tokenizer = models.load_tokenizer(place)
        models.end_tokens(tokenizer, place)  # a file that cannot be read is told now
        if self.sampler_url and self.experiment.sampling.engine == "server":
            serving.check_plain(place)
        form = Form(spec.prompt, self.experiment.task, bool(self.experiment.cot))
        if spec.prompt == "plain":
            return place, tokenizer, form, Speaker.plain(tokenizer)
        return place, tokenizer, form, Speaker.of(tokenizer, reasoning=self.experiment.sampling.reasoning, date=self.date,
                                                  name=spec.name)

    def _unsaid(self) -> int:
        """Rows of the model that its tokenizer has no token for."""
        return len(unsaid(self.tokenizer, models.rows_of(models.load_config(self.place)) or 0))

    def _large_step(self) -> str | None:
        """What is to say of a learning rate whose first step moves the weights by more than LARGE_STEP of their size. It
        moves each by the rate, whatever its gradient is, and torch's RMSprop (alpha 0.99) by ten times that; weights are
        about as large as they were drawn."""
        train, drawn = self.experiment.train, getattr(models.load_config(self.place), "initializer_range", None)
        if train.lora or not isinstance(drawn, float) or not drawn > 0:
            return None
        step = train.learning_rate * (10 if train.optimizer == "rmsprop" else 1)
        if step <= LARGE_STEP * drawn:
            return None
        return (f"learning rate {train.learning_rate:g} is large for this model: the first step moves each weight by about "
                f"{step:.2g}, {step / drawn:.0%} of a weight's usual size (initializer_range {drawn:g}); the shipped "
                "experiments' by 0.1% at most (--learning-rate)")

    def answering_as(self, spec: ModelSpec) -> "Run":
        """This run with another model in the policy's place, for a baseline's responses (without chain of thought)."""
        other = copy.copy(self)
        other.experiment = replace(self.experiment, model=spec, baseline=None, cot=None,
                                   sampling=replace(self.experiment.sampling, reasoning=False))
        other.place, other.tokenizer, other.form, other.speaker = other._speaker(spec)
        return other

    def controls(self) -> list[str]:
        """What no text of a user may hold: control tokens, and the marks that the chat template spells out (Llama 2's
        [INST] is no token)."""
        return list(dict.fromkeys([*models.control_tokens(self.tokenizer),
                                   *marks(str(self.tokenizer.chat_template or ""))]))

    def adopt(self, constitutions: ConstitutionSet | Pool) -> None:
        """Go on with these constitutions: those of the file, or what a writer wrote."""
        self.constitutions = constitutions
        self._frame(constitutions)
        write_json(self.folder / "constitutions.json", constitutions.to_json())
        if self.experiment.writer:
            write_json(self.folder / BY_HAND, self.by_hand.to_json())

    def _frame(self, constitutions: ConstitutionSet | Pool) -> int:
        """The tokens of the longest prompt without its query. Raises UserError for control tokens and for principles that
        are rendered otherwise than they are."""
        spec = self.experiment
        check_control_tokens(((f"{spec.constitutions}: principle {p.name}", s)
                              for p in constitutions.principles for s in (p.text, p.antithesis)), self.controls())
        if isinstance(constitutions, Pool):  # one that holds the longest sentences
            longest = sorted(constitutions.principles, key=lambda p: -max(len(p.text), len(p.antithesis)))
            longest = tuple(longest[:constitutions.size])
            every = [Constitution(principles=longest, sides=tuple(len(p.text) >= len(p.antithesis) for p in longest))]
        else:
            every = constitutions.constitutions
        self._said((f"{spec.constitutions}: principle {p.name}", s)
                   for p in constitutions.principles for s in (p.text, p.antithesis))
        frames = [self.prompt(c, None, sample=True, reason=self.form.cot) for c in every]
        frame = max(len(ids) for ids in self.tokenizer(frames, add_special_tokens=False).input_ids)
        context = models.context_of(models.load_config(self.place))
        if context - frame - self.response_tokens() - 8 < self.longest:
            raise UserError(f"{spec.constitutions}: the principles ({frame} tokens with the frame of the prompt) and "
                            f"{self.response_tokens()} response tokens leave no room in a context of {context}")
        return frame

    def response_tokens(self) -> int:
        """Tokens that a sample may have: of the response, of a chain of thought, of the model's own reasoning."""
        spec = self.experiment.sampling
        return spec.max_new_tokens + spec.reasoning_tokens * (self.form.cot + bool(self.speaker.closing))

    def _said(self, texts: Iterable[tuple[str, str]]) -> None:
        """texts: (where, text) pairs. Raises UserError where a prompt would not say one word for word."""
        for where, text in texts:
            try:
                self.form.render(self.speaker, (text,), text, sample=True)
            except UserError as e:
                raise UserError(f"{where}: {e}") from e

    def _fit(self, queries: list[Query]) -> list[Query]:
        """The queries as the model can take them: no control tokens, within the context. Decides the backend."""
        spec, config = self.experiment, models.load_config(self.place)
        if spec.train.lora:
            lora.check(config, self.ranks * self.nodes, spec.train.lora.rank)
        self.longest = 1
        frame = self._frame(self.constitutions)
        room = models.context_of(config) - frame - self.response_tokens() - 8
        queries = check_queries(queries, self.tokenizer, self.controls(), room=room, truncate=spec.data.truncate,
                                say=self.say)
        if spec.data.truncate:  # texts that differ only beyond the cut are now the same
            queries = disjoint(queries, spec.data, self.dropped)
        self._said((q.where or q.id, q.text) for q in queries)
        self.longest = max(len(self.tokenizer(q.text, add_special_tokens=False).input_ids) for q in queries)
        from repro.logprobs import way_for

        found = way_for(config, frame + self.longest + spec.sampling.max_new_tokens, spec.train.dropout)
        if found.way is None:
            raise UserError(f"--model {spec.model.name}: {found.refusal}")
        self.backend, refusal = ("reference", found.refusal) if found.way == "reference" else ("shared", None)
        if spec.train.dropout == "off" and (rates := ", ".join(models.dropouts(config))):
            self.say(f"dropout is off in training (of the model's config: {rates}); --dropout drawn switches it on")
        if refusal and self.ranks * self.nodes > 1:  # its forwards are as many as a text is long, and ranks need equal ones
            raise UserError(f"--ranks {self.ranks * self.nodes}: the reference path works on one rank alone, and this "
                            f"model needs it: {refusal}")
        if refusal:
            self.say(f"log-probs by the reference path, which is slower: {refusal}")
        return queries

    def _enough(self) -> None:
        """Every subset needs training and held-out queries, every iteration the queries of its steps."""
        spec = self.experiment
        for subset in self.subsets:
            counts = [sum(q.subset == subset for q in part) for part in (self.training, self.held_out)]
            if not all(counts):
                raise UserError(f"--queries {spec.data.source}: subset {subset!r} has {counts[0]} training and {counts[1]} "
                                f"{spec.data.evaluation_split} queries; both must be above 0")
        needs = [spec.train.queries_needed(k) for k in range(1, spec.iterations + 1)]
        self.spare = []
        for iteration, need in enumerate(needs, start=1):
            have = len(self.training_plan(iteration))
            if have < need:
                raise UserError(f"--queries {spec.data.source}: iteration {iteration} trains on {need} queries and its "
                                f"half of the training queries holds {have}; give at least {2 * max(needs)} training "
                                "queries for all iterations, or a smaller --batch-size")
            self.spare.append(f"{have - need} of {have}")

    def _bind(self, inputs: dict) -> None:
        fields = flatten(self.experiment.to_json()) | inputs
        hash = config_hash(self.experiment, inputs)
        path = self.folder / "run.json"
        packages = (*PACKAGES, "peft") if self.experiment.train.lora else PACKAGES
        here = {"packages": {name: version(name) for name in packages}, "python": platform.python_version(),
                "device": _device(), "threads": _threads()}
        if path.exists():
            self.record = read_json(path)
            if self.record.get("config_hash") != hash and self.record.get("stages"):
                there, here_ = flatten(self.record.get("config", {})), flatten(self.experiment.to_json())
                with contextlib.suppress(UserError):  # what an older version did not know was at its default
                    there = flatten(Experiment.from_json(self.record["config"]).to_json())
                theirs = there | self.record.get("inputs", {})
                differ = [f"{k} ({there.get(k)!r} there, {here_.get(k)!r} here)" if there.get(k) != here_.get(k)
                          else f"{k} (another content)"
                          for k in sorted(fields.keys() | theirs.keys(), key=lambda k: (k.startswith("judge."), k))
                          if fields.get(k) != theirs.get(k)]
                if not differ or not all(d.startswith("judge.") for d in differ):
                    raise UserError(f"{self.folder} holds a run of another config: {'; '.join(differ[:4])}; choose another "
                                    "OUT or --name, or delete the folder")
                self._judge_anew(hash, differ)
            if self.record.get("config_hash") == hash:
                changed = [key for key in here if self.record[key] != here[key]]
                if changed:
                    self.say(f"going on with another {', '.join(changed)}: what is still to do will not be byte-comparable")
                    self.record.setdefault("resumed_with", []).append(here)
                return
        self.record = {"config": self.experiment.to_json(), "config_hash": hash,
                       "training_hash": training_hash(self.experiment, inputs), "inputs": inputs, "commit": commit(),
                       **here, "seeds": [self.experiment.seed], "values": "measured", "backend": self.backend,
                       "spoken": {k: s.facts() for k, s in self.speakers.items() if s.cue},
                       "dropped_queries": dict(self.dropped), "not_run": [*self.experiment.not_run, *self._without_rule()],
                       "stages": {}}
        write_json(path, checked(self.record))

    def _judge_anew(self, hash: str, differ: list[str]) -> None:
        """Bind the folder to other judges: what was sampled and trained stays. The likelihood judge needs log-probs that
        an evaluation without it has not left."""
        had, stages = self.record["config"].get("judge", {}).get("judges", ()), self.record["stages"]
        again = [name for name in stages if name == "judge" or (
            name.startswith("evaluate-") and "likelihood" in self.experiment.judge.judges and "likelihood" not in had)]
        for name in again:
            del stages[name]
        self.say(f"other judges than before: {'; '.join(differ[:4])}; what was sampled and trained stays")
        kept = [line for line in self.record["not_run"] if not line.startswith("judge rule")]
        self.record |= {"config": self.experiment.to_json(), "config_hash": hash, "training_hash": self._bound_to(),
                        "not_run": [*kept, *self._without_rule()]}
        write_json(self.folder / "run.json", checked(self.record))

    def _bound_to(self) -> str:
        """What the stages' keys hold: the digest without the judges; in a folder that is older than it, the whole one."""
        return self.record.get("training_hash", self.record["config_hash"])

    def _without_rule(self) -> list[str]:
        """What the rule judge leaves out."""
        if "rule" not in self.experiment.judge.judges:
            return []
        without = [p.name for p in self.by_hand.principles if not p.rule]
        if len(without) == len(self.by_hand.principles):
            return ["judge rule: no principle has a rule"]
        return [f"judge rule on {', '.join(without)}: without a rule; it goes by the others"] if without else []

    def written(self) -> list[str]:
        """The stage that everything else depends on, where a model writes the principles."""
        return ["write"] if self.experiment.writer else []

    # ---- what trains, what is evaluated

    def training_plan(self, iteration: int) -> list[tuple[Query, tuple[Constitution, Constitution]]]:
        """Which queries an iteration samples, each with two constitutions.

        Two halves of the training queries alternate between iterations (arXiv 2404.14313, section 4); the order of
        a half is shuffled per iteration; subsets take turns. Of a set, the all-positive constitution stands against one
        of the negatives of the query's subset; of a pool, one drawn from the learned principles against its opposite.
        """
        spec = self.experiment
        want = math.ceil(spec.train.queries_needed(iteration) * (1 + spec.sampling.spare))
        halves = []
        for subset in self.subsets:
            queries = [q for q in self.training if q.subset == subset]
            rng(spec.seed, "halves", subset).shuffle(queries)
            half = queries[(iteration - 1) % 2:: 2]
            rng(spec.seed, iteration, "order", subset).shuffle(half)
            halves.append(half)
        turns = [q for k in range(max(map(len, halves))) for half in halves for q in half[k: k + 1]][:want]
        if isinstance(self.constitutions, Pool):
            return list(zip(turns, self.constitutions.deal("learned", len(turns), rng(spec.seed, iteration, "deal"))))
        return [(q, (self.constitutions.positive, rng(spec.seed, iteration, "negative", q.id).choice(
            self.constitutions.negatives(q.subset)))) for q in turns]

    def items(self) -> list[Item]:
        """Of a set: every held-out query under all its constitutions. Of a pool: every held-out query under constitutions
        drawn from the learned, then from the held-out principles, each with its opposite. The same for every iteration
        and seed."""
        if not isinstance(self.constitutions, Pool):
            return [Item(q, q.subset, self.constitutions.constitutions) for q in self.held_out]
        items = []
        for kind, draws in zip(self.constitutions.kinds, self.experiment.data.draws):
            hands = self.constitutions.deal(kind, draws * len(self.held_out), rng("evaluation", kind))
            items += [Item(self.held_out[k % len(self.held_out)], kind, hand) for k, hand in enumerate(hands)]
        return items

    def ruled(self, constitution: Constitution) -> Constitution | None:
        """The constitution whose rules judge a response under `constitution`: itself, or, since what a writer wrote has
        no rules, the hand-written all-positive one. None where it has no rule."""
        ruled = self.by_hand.positive if self.experiment.writer else constitution
        return ruled if any(p.rule for p in ruled.principles) else None

    # ---- stages

    def stage(self, name: str, outputs: list[str], inputs: list[str], *, again: bool = False) -> bool:
        """True if the stage is to be done (`again`: in any case); otherwise says that it is skipped."""
        done = self.record["stages"].get(name)
        if done and not again and done["key"] == self.key(inputs) and list(done["outputs"]) == sorted(outputs):
            wrong = [path for path, fact in done["outputs"].items() if not self._holds(path, fact)]
            if not wrong:
                self.say(f"{name}: done before, skipped")
                return False
            self.say(f"{name}: done again, since {', '.join(wrong)} is missing or altered")
        self._started = time.monotonic()
        return True

    def _holds(self, output: str, fact: str) -> bool:
        path = self.folder / output
        return (sealed(path) if path.is_dir() else path.is_file()) and self._fact(output) == fact

    def _fact(self, output: str) -> str:
        """sha256 of a file; of its marker, which holds those of its files, for a sealed folder."""
        path = self.folder / output
        return file_sha256(path / MARKER if path.is_dir() else path)

    def finish(self, name: str, outputs: list[str], inputs: list[str], **facts) -> None:
        """Record the stage as done: what it left, what it depended on, its seconds."""
        spent = time.monotonic() - self._started
        self.record["stages"][name] = {
            "key": self.key(inputs), "commit": commit(), "seconds": round(spent, 2), "peak_rss_gib": _peak_gib(), **facts,
            "outputs": {output: self._fact(output) for output in sorted(outputs)}}
        write_json(self.folder / "run.json", checked(self.record))
        for output in outputs:
            self.partial(self.folder / output).unlink(missing_ok=True)

    def partial(self, output: Path) -> Path:
        """Where the finished part of an unfinished output is kept."""
        return output.with_suffix(".partial.jsonl")

    def key(self, inputs: list[str]) -> str:
        """Names what the stage depends on: the config less its judges, whose own stage goes where they change (`_bind`),
        and the recorded outputs of the stages before it."""
        return digest([self._bound_to(),
                       {name: self.record["stages"][name]["outputs"] for name in inputs}])

    # ---- prompts

    def prompt(self, constitution: Constitution, query: Query | None, *keys, sample: bool, reason: bool = False) -> str:
        """The rendered prompt; the principles' order is a function of `keys`, query and constitution."""
        order = list(range(len(constitution.principles)))
        if query is not None:
            rng(*keys, query.id).shuffle(order)
        return self.form.render(self.speaker, constitution.statements(tuple(order)), query.text if query else "",
                                sample=sample, reason=reason)

    # ---- models

    def weights(self, iteration: int) -> str:
        """Where the weights after `iteration` iterations lie (0 = initial): a folder or a hub name."""
        return self.place if iteration == 0 else str((self.folder / checkpoint(iteration)).absolute())

    @contextlib.contextmanager
    def model(self, iteration: int, dtype: str) -> Iterator:
        """The model after `iteration` iterations (0 = initial) with weights in `dtype`; freed afterwards."""
        model = models.load_model(self.weights(iteration), dtype=dtype)
        try:
            yield model
        finally:
            del model
            gc.collect()


def open_run(folder: Path, say: Callable[[str], None]) -> Run:
    """A finished run as its files describe it. Raises UserError where there is none."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: no run.json; give the folder of a finished run, such as runs/exp1_dialogue/mini")
    record = read_json(folder / "run.json")
    if "metrics" not in record.get("stages", {}):
        raise UserError(f"{folder}: the run is not finished; run its command again to finish it first (with other judge "
                        "flags, where a judge is in its way)")
    run = Run(Experiment.from_json(record["config"]), folder, say, record)
    run.constitutions = constitutions_of(read_json(folder / "constitutions.json"), f"{folder / 'constitutions.json'}")
    by_hand = folder / BY_HAND
    run.by_hand = constitutions_of(read_json(by_hand), f"{by_hand}") if run.experiment.writer else run.constitutions
    split = run.experiment.data.evaluation_split
    run.held_out = [Query(**row) for _, row in read_jsonl(folder / "queries.jsonl") if row["split"] == split]
    return run


# ---- provenance

@functools.cache
def commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files differ; None outside a checkout or without git."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").strip() else "") or None
    except OSError:
        return None


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)

"""A run: its folder, its inputs, what is drawn from them, and its models; what the stages share."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from repro.base.records import UserError, read_json, read_jsonl, write_json, write_jsonl
from repro.base.settings import Experiment
from repro.models import load
from repro.models.hub import load_config
from repro.report.story import told
from repro.servers.endpoint import Endpoint
from repro.stages import draws
from repro.stages.draws import Item
from repro.stages.folder import BY_HAND, Folder, checkpoint
from repro.stages.inputs import Inputs, Voice, as_baseline, large_step, read_inputs
from repro.text.principles import Constitution, Constitutions, constitutions_of
from repro.text.queries import Query

ANSWERS = "sides followed by a text that answers"  # what following counts


@dataclass
class Run(Folder):
    """`inputs`, and the `voice` that samples, are there once they are checked; constitutions and held-out queries also of a
    run that is read from its files (`open_run`)."""

    endpoint: Endpoint | None = None  # where the LLM judge is, if there is one
    writer_endpoint: Endpoint | None = None  # where the principle writer is, if it is behind a server
    ranks: int = 1  # processes that train and score; no part of the config, since any number gives the same update
    nodes: int = 1  # machines that train, with that many each
    sampler_url: str | None = None  # a server to sample from that is already there; else the run starts its own
    sampler_as_is: bool = False  # whatever its answers are
    tensor_parallel: int | None = None  # GPUs that hold a copy of the model together there; by default all
    inputs: Inputs | None = None
    voice: Voice | None = None
    constitutions: Constitutions | None = None
    by_hand: Constitutions | None = None  # whose rules measure following: of the file, where a model writes
    held_out: list[Query] = field(default_factory=list)
    trains = True  # else it has no need of training queries

    def check(self) -> None:
        """Read and check every input, and write nothing."""
        spec, servers = self.experiment, []
        if "openai" in spec.judge.judges:
            self.endpoint = self.endpoint or Endpoint(model=spec.judge.model)
            servers.append(self.endpoint)
        if spec.writer and spec.writer.kind == "openai":
            self.writer_endpoint = self.writer_endpoint or Endpoint(model=spec.writer.model)
            servers.append(self.writer_endpoint)
        self.inputs = read_inputs(spec, date=self.date, say=self.say, ranks=self.ranks * self.nodes, servers=servers,
                                  sampler_url=self.sampler_url, trains=self.trains)
        self.voice, self.held_out = self.inputs.voice, self.inputs.held_out
        self.constitutions = self.by_hand = self.inputs.constitutions

    def prepare(self) -> None:
        """Check every input; then bind the directory to this configuration."""
        self.check()
        found = self.inputs
        self.bind(found.digests(self.date), backend=found.backend, counted=ANSWERS,
                  spoken={k: s.facts() for k, s in found.speakers.items() if s.cue},
                  dropped_queries=dict(found.dropped), not_run=[*self.experiment.not_run, *self._without_rule()])
        if found.unsaid:
            self.record["rows_without_token"] = found.unsaid
            self.say("rows of the embedding that the tokenizer has no token for: " + ", ".join(
                f"{count} of the {which}" for which, count in found.unsaid.items()) + "; they are never sampled here, and "
                "decode to nothing in a server's answer")
        if large := large_step(self.experiment.train, load_config(self.voice.place)):
            self.record["large_step"] = large
            self.say(large)
        self.say(f"{len(found.training)} training and {len(found.held_out)} held-out queries"
                 + "".join(f"; dropped {n}: {why}" for why, n in sorted(found.dropped.items())))
        phrases = " or ".join(map(repr, self.experiment.sampling.drop_phrases))
        if found.spare:
            self.say(f"sampled pairs to spare, by iteration: {', '.join(found.spare)}; one with empty or identical "
                     "responses" + f", or with {phrases} in one," * bool(phrases)
                     + " is dropped, and the run stops where fewer are left than an iteration trains on")
        for line in told(self.record):
            self.say(line)
        write_jsonl(self.folder / "queries.jsonl", [{"id": q.id, "subset": q.subset, "split": q.split, "text": q.text}
                                                    for q in (*found.training, *found.held_out)])

    def adopt(self, constitutions: Constitutions) -> None:
        """Go on with these constitutions: those of the file, or what a writer wrote."""
        self.constitutions = constitutions
        self.voice.frame(self.experiment, constitutions, self.inputs.longest)
        write_json(self.folder / "constitutions.json", constitutions.to_json())
        if self.experiment.writer:
            write_json(self.folder / BY_HAND, self.by_hand.to_json())

    def answering_as_baseline(self) -> "Run":
        """This run with the baseline in the policy's place, for its responses."""
        other = copy.copy(self)
        other.experiment, other.voice = as_baseline(self.experiment), self.inputs.baseline
        return other

    def response_tokens(self) -> int:
        """Tokens that a sample may have: of the response, of a chain of thought, of the model's own reasoning."""
        return self.voice.response_tokens(self.experiment.sampling)

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

    # ---- what is drawn

    def training_plan(self, iteration: int) -> list[tuple[Query, tuple[Constitution, Constitution]]]:
        """As of `draws`."""
        return draws.training_plan(self.experiment, self.constitutions, self.inputs.training, self.inputs.subsets,
                                   iteration)

    def items(self, iteration: int = 0) -> list[Item]:
        """What is answered at an iteration, as of `draws`: everything first and last, what is scored in between."""
        every = draws.items(self.experiment, self.constitutions, self.held_out)
        return every if iteration in (0, self.experiment.iterations) else [item for item in every if item.scored]

    def scored(self) -> list[Item]:
        """What gets log-probs: of `items` the first."""
        return [item for item in self.items() if item.scored]

    def ruled(self, constitution: Constitution) -> Constitution | None:
        """The constitution whose rules judge a response under `constitution`: itself, or, since what a writer wrote has
        no rules, the hand-written all-positive one. None where it has no rule."""
        ruled = self.by_hand.positive if self.experiment.writer else constitution
        return ruled if any(p.rule for p in ruled.principles) else None

    def asked(self, item: Item) -> str | None:
        """The query that a text has to answer for its principles to count as followed; None in a run that is older than
        that."""
        return item.query.text if self.record.get("counted") == ANSWERS else None

    # ---- models

    def weights(self, iteration: int) -> str:
        """Where the weights after `iteration` iterations lie (0 = initial): a folder or a hub name."""
        return self.voice.place if iteration == 0 else str((self.folder / checkpoint(iteration)).absolute())

    @contextlib.contextmanager
    def model(self, iteration: int, dtype: str) -> Iterator:
        """The model after `iteration` iterations (0 = initial) with weights in `dtype`; freed afterwards."""
        model = load.load_model(self.weights(iteration), dtype=dtype)
        try:
            yield model
        finally:
            del model
            load.release()


def open_run(folder: Path, say: Callable[[str], None], *, finished: bool = True) -> Run:
    """A run as its files describe it: a `finished` one, or else one that has its constitutions. Raises UserError where
    there is none."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: no run.json; give the folder of a finished run, such as runs/exp1_dialogue/mini")
    record = read_json(folder / "run.json")
    if finished and "metrics" not in record.get("stages", {}):
        raise UserError(f"{folder}: the run is not finished; run its command again to finish it first (with other judge "
                        "flags, where a judge is in its way)")
    run = Run(Experiment.from_json(record["config"]), folder, say, record)
    run.constitutions = constitutions_of(read_json(folder / "constitutions.json"), f"{folder / 'constitutions.json'}")
    by_hand = folder / BY_HAND
    run.by_hand = constitutions_of(read_json(by_hand), f"{by_hand}") if run.experiment.writer else run.constitutions
    split = run.experiment.data.evaluation_split
    run.held_out = [Query(**row) for row in read_jsonl(folder / "queries.jsonl") if row["split"] == split]
    return run

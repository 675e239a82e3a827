"""What a run reads, checked once before any model loads, and frozen."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from repro.base.checks import check_control_tokens
from repro.base.records import UserError, digest
from repro.base.settings import Experiment, ModelSpec
from repro.base.training import WITHOUT_CONSTITUTION, TrainSpec
from repro.core import lora
from repro.models import decoding, hub, load, template
from repro.models.files import unsaid
from repro.models.hub import load_config
from repro.models.marks import marks
from repro.models.speaker import Speaker
from repro.sampling import launch, server
from repro.sampling.writers import speaker_of_writer
from repro.servers.endpoint import Endpoint
from repro.stages import draws
from repro.text.principles import Constitutions, load_constitutions
from repro.text.prompts import Form
from repro.text.queries import Query, check_queries, disjoint, load_queries

LARGE_STEP = 0.01  # of a weight's size: ten times what the shipped experiments' first steps are


@dataclass(frozen=True)
class Voice:
    """A model as it is prompted: where it lies, its tokenizer, the form of its prompts, how it is spoken to."""

    spec: ModelSpec
    place: str
    tokenizer: object
    form: Form
    speaker: Speaker

    @classmethod
    def of(cls, spec: ModelSpec, experiment: Experiment, date: str, sampler_url: str | None) -> "Voice":
        """Raises UserError for a model's files that cannot be used."""
        place = hub.resolve_model(spec.name)
        tokenizer = load.load_tokenizer(place)
        decoding.end_tokens(tokenizer, place)  # a file that cannot be read is told now
        if sampler_url and experiment.sampling.engine == "server":
            server.check_plain(place)
        form = Form(spec.prompt, experiment.task, bool(experiment.cot))
        speaker = Speaker.plain(tokenizer) if spec.prompt == "plain" else Speaker.of(
            tokenizer, reasoning=experiment.sampling.reasoning, date=date, name=spec.name)
        return cls(spec, place, tokenizer, form, speaker)

    def response_tokens(self, sampling) -> int:
        """Tokens that a sample may have: of the response, of a chain of thought, of the model's own reasoning."""
        return sampling.max_new_tokens + sampling.reasoning_tokens * (self.form.cot + bool(self.speaker.closing))

    def controls(self) -> list[str]:
        """What no text of a user may hold: control tokens, and the marks that the chat template spells out (Llama 2's
        [INST] is no token)."""
        return list(dict.fromkeys([*template.control_tokens(self.tokenizer),
                                   *marks(str(self.tokenizer.chat_template or ""))]))

    def says(self, texts: Iterable[tuple[str, str]]) -> None:
        """texts: (where, text) pairs. Raises UserError where a prompt would not say one word for word."""
        for where, text in texts:
            try:
                self.form.render(self.speaker, (text,), text, sample=True)
            except UserError as e:
                raise UserError(f"{where}: {e}") from e

    def rows_unsaid(self) -> int:
        """Rows of the model that its tokenizer has no token for."""
        return len(unsaid(self.tokenizer, load.rows_of(load_config(self.place)) or 0))

    def frame(self, experiment: Experiment, constitutions: Constitutions, query: int) -> int:
        """The tokens of the longest prompt without its query, which has up to `query`. Raises UserError for control
        tokens and for principles that are rendered otherwise than they are."""
        check_control_tokens(((f"{experiment.constitutions}: principle {p.name}", s)
                              for p in constitutions.principles for s in (p.text, p.antithesis)), self.controls())
        self.says((f"{experiment.constitutions}: principle {p.name}", s)
                   for p in constitutions.principles for s in (p.text, p.antithesis))
        frames = [draws.prompt(self, c, None, sample=True, reason=self.form.cot) for c in constitutions.longest()]
        frame = max(len(ids) for ids in self.tokenizer(frames, add_special_tokens=False).input_ids)
        context = load.context_of(load_config(self.place))
        most = self.response_tokens(experiment.sampling)
        if context - frame - most - 8 < query:
            raise UserError(f"{experiment.constitutions}: the principles ({frame} tokens with the frame of the prompt) and "
                            f"{most} response tokens leave no room in a context of {context}")
        return frame


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`constitutions`: of the experiment's file. `training`, `held_out`: the queries that are left. `voice`, `baseline`:
    the policy and the model that it is judged against. `speakers`, `places`: of every model, by its part. `backend`: of
    log-probs. `longest`: tokens of the longest query. `spare`: pairs beyond those that train, by iteration. `unsaid`: rows
    without a token, by part."""

    constitutions: Constitutions
    training: list[Query]
    held_out: list[Query]
    subsets: tuple[str, ...]
    dropped: dict[str, int]
    voice: Voice
    baseline: Voice | None
    speakers: dict[str, Speaker]
    places: dict[str, str]
    backend: str
    longest: int
    spare: list[str] = field(default_factory=list)
    unsaid: dict[str, int] = field(default_factory=dict)

    def digests(self, date: str) -> dict:
        """Field of the experiment -> what names its content, wherever the files lie."""
        return {"data.source": digest([asdict(q) | {"where": ""} for q in (*self.training, *self.held_out)]),
                "constitutions": digest(self.constitutions.to_json()),
                **{name: digest(hub.fingerprint(Path(place))) if Path(place).is_dir() else place
                   for name, place in self.places.items()},
                **({"date": date} if any(s.date for s in self.speakers.values()) else {})}


def read_inputs(spec: Experiment, *, date: str, say: Callable[[str], None], ranks: int = 1,
                servers: Sequence[Endpoint] = (), sampler_url: str | None = None, trains: bool = True) -> Inputs:
    """Read and check all that a run of `spec` on `ranks` processes needs, `servers` included, and write nothing; `trains`
    False: only held-out queries are needed. Raises UserError."""
    launch.check(spec.sampling.engine, sampler_url)
    for name in filter(None, (spec.model.name, spec.baseline and spec.baseline.name,
                              spec.writer.model if spec.writer and spec.writer.kind == "local" else None)):
        load.check_model(name)  # a licence that is missing is told before anything else
    for endpoint in servers:
        endpoint.check()
    constitutions = load_constitutions(spec.constitutions)
    if spec.writer and constitutions.kinds:
        raise UserError(f"--constitutions {spec.constitutions}: a pool; a writer writes a set of two principles, so "
                        "what stands in for it must be a set too")
    if spec.train.objective in WITHOUT_CONSTITUTION and constitutions.kinds:
        raise UserError(f"--objective {spec.train.objective}: a pool of principles has no all-positive constitution "
                        f"(--constitutions {spec.constitutions})")
    queries, dropped = load_queries(spec.data.source, spec=spec.data)
    voice = Voice.of(spec.model, spec, date, sampler_url)
    speakers, places = {"model": voice.speaker}, {"model.name": voice.place}
    draws.check(voice, spec.sampling.engine)
    queries, backend, longest = _fit(spec, voice, constitutions, queries, dropped, ranks, say)
    training = [q for q in queries if q.split == "train"]
    held_out = [q for q in queries if q.split == spec.data.evaluation_split]
    subsets = spec.data.subsets or tuple(dict.fromkeys(q.subset for q in queries))
    spare = _enough(spec, constitutions, training, held_out, subsets) if trains else []
    unsaid_rows = {"model": voice.rows_unsaid()}
    if spec.writer and spec.writer.kind == "local":
        places["writer.model"] = writer = hub.resolve_model(spec.writer.model)
        tokenizer = load.load_tokenizer(writer)
        decoding.end_tokens(tokenizer, writer)
        speakers["writer"] = speaker_of_writer(tokenizer, spec.writer.label, date)
    baseline = None
    if spec.baseline:
        baseline = Voice.of(spec.baseline, as_baseline(spec), date, sampler_url)
        speakers["baseline"] = baseline.speaker
        baseline.frame(as_baseline(spec), constitutions, longest)
        check_control_tokens(((q.where or q.id, q.text) for q in held_out), baseline.controls())
        baseline.says((q.where or q.id, q.text) for q in held_out)
        places["baseline.name"] = baseline.place
        unsaid_rows["baseline"] = baseline.rows_unsaid()
    return Inputs(constitutions=constitutions, training=training, held_out=held_out, subsets=subsets, dropped=dropped,
                  voice=voice, baseline=baseline, speakers=speakers, places=places, backend=backend, longest=longest,
                  spare=spare, unsaid={which: count for which, count in unsaid_rows.items() if count})


def large_step(train: TrainSpec, config) -> str | None:
    """What is to say of a learning rate whose first step moves the weights by more than LARGE_STEP of their size. It moves
    each by the rate, whatever its gradient is, and torch's RMSprop (alpha 0.99) by ten times that; weights are about as
    large as they were drawn."""
    drawn = getattr(config, "initializer_range", None)
    if train.lora or not isinstance(drawn, float) or not drawn > 0:
        return None
    step = train.learning_rate * (10 if train.optimizer == "rmsprop" else 1)
    if step <= LARGE_STEP * drawn:
        return None
    return (f"learning rate {train.learning_rate:g} is large for this model: the first step moves each weight by about "
            f"{step:.2g}, {step / drawn:.0%} of a weight's usual size (initializer_range {drawn:g}); the shipped "
            "experiments' by 0.1% at most (--learning-rate)")


def as_baseline(spec: Experiment) -> Experiment:
    """The experiment with its baseline in the policy's place, for that one's responses: without chain of thought."""
    return replace(spec, model=spec.baseline, baseline=None, cot=None, sampling=replace(spec.sampling, reasoning=False))


def _fit(spec: Experiment, voice: Voice, constitutions: Constitutions, queries: list[Query], dropped: dict,
         ranks: int, say: Callable[[str], None]) -> tuple[list[Query], str, int]:
    """(the queries as the model can take them: no control tokens, within the context; the backend of log-probs; tokens of
    the longest query)."""
    config = load_config(voice.place)
    if spec.train.lora:
        lora.check(config, ranks, spec.train.lora.rank)
    frame = voice.frame(spec, constitutions, 1)
    room = load.context_of(config) - frame - voice.response_tokens(spec.sampling) - 8
    queries = check_queries(queries, voice.tokenizer, voice.controls(), room=room, truncate=spec.data.truncate,
                            say=say)
    if spec.data.truncate:  # texts that differ only beyond the cut are now the same
        queries = disjoint(queries, spec.data, dropped)
    voice.says((q.where or q.id, q.text) for q in queries)
    longest = max(len(voice.tokenizer(q.text, add_special_tokens=False).input_ids) for q in queries)
    from repro.core.logprobs import way_for

    found = way_for(config, frame + longest + spec.sampling.max_new_tokens, spec.train.dropout)
    if found.way is None:
        raise UserError(f"--model {spec.model.name}: {found.refusal}")
    backend, refusal = ("reference", found.refusal) if found.way == "reference" else ("shared", None)
    if spec.train.dropout == "off" and (rates := ", ".join(load.dropouts(config))):
        say(f"dropout is off in training (of the model's config: {rates}); --dropout drawn switches it on")
    if refusal and ranks > 1:  # its forwards are as many as a text is long, and ranks need equal ones
        raise UserError(f"--ranks {ranks}: the reference path works on one rank alone, and this "
                        f"model needs it: {refusal}")
    if refusal:
        say(f"log-probs by the reference path, which is slower: {refusal}")
    return queries, backend, longest


def _enough(spec: Experiment, constitutions: Constitutions, training: list[Query], held_out: list[Query],
            subsets: tuple[str, ...]) -> list[str]:
    """Every subset needs training and held-out queries, every iteration the queries of its steps. Returns the spare pairs
    of each iteration, in words."""
    for subset in subsets:
        counts = [sum(q.subset == subset for q in part) for part in (training, held_out)]
        if not all(counts):
            raise UserError(f"--queries {spec.data.source}: subset {subset!r} has {counts[0]} training and {counts[1]} "
                            f"{spec.data.evaluation_split} queries; both must be above 0")
    needs = [spec.train.queries_needed(k) for k in range(1, spec.iterations + 1)]
    spare = []
    for iteration, need in enumerate(needs, start=1):
        have = len(draws.training_plan(spec, constitutions, training, subsets, iteration))
        if have < need:
            raise UserError(f"--queries {spec.data.source}: iteration {iteration} trains on {need} queries and its "
                            f"half of the training queries holds {have}; give at least {2 * max(needs)} training "
                            "queries for all iterations, or a smaller --batch-size")
        spare.append(f"{have - need} of {have}")
    return spare

"""A plan in words and tables (Markdown), for a terminal and for results/plan.md."""

from collections.abc import Sequence

from repro.core.memory import GB, Step, peak
from repro.plan.estimate import Plan
from repro.plan.gpus import LORA_RANK, MOST_GPUS
from repro.plan.texts import QUERIES

MEANS = {
    "bf16": "bf16 weights (--precision bf16; at a rate of 5e-7 most of their updates round away)",
    "lora": f"LoRA (--lora {LORA_RANK}; a deviation from the paper)"}


MOMENTS = {"head": "when the logits are made", "layers": "in the backward", "update": "in the optimizer's step"}

READING = (  # before several plans
    "Made by `repro plan`. A column is what a lab has; a cell says whether the run trains there and in how many GB per "
    "GPU, or with which change, the mildest first; what else does not fit; and the time of its products with the first "
    "change (its last lines say what that leaves out). Below, each run in full.", "",
    "A training step has three moments that may be its peak: `head`, when all activations are kept and the logits are "
    "made; `layers`, in the backward; `update`, the optimizer's step. The largest must fit.")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that can be read as it is: the first column and texts to the left, numbers to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    right = [k > 0 and all(row[k][:1].isdigit() or row[k] in ("", "-") for row in rows) for k in range(len(header))]

    def line(cells):
        return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    return [line(header), rule, *map(line, rows)]


def gb(number: float) -> str:
    return f"{number / GB:.1f}"


def figure(number: float) -> str:
    """Three digits at least."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 2 else f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.1g} s"


def means(names: Sequence[str], step: Step) -> str:
    """A way to make a step fit, in words."""
    parts = [MEANS[n] for n in names if n in MEANS]
    parts += [f"{step.pack_tokens} tokens a pack (--pack-tokens {step.pack_tokens})"] if "pack" in names else []
    parts += [f"{step.ranks} GPUs"] if "gpus" in names else []
    return " and ".join(parts)


def setting(p: Plan) -> str:
    return f"{p.gpus} x {p.gpu.label}"


def verdict(p: Plan) -> list[str]:
    """What fits, and what makes the rest fit: one line for training, for sampling, for held-out log-probs."""
    moment, total = peak(p.phases)
    of = f"{gb(total)} of {p.gpu.gb:g} GB per GPU"
    alone = f"**Log-probs by the reference path**, which works on one GPU alone and makes all logits: {p.refusal}."
    if not p.ways and p.trained:
        text = f"**Training fits**: {of}"
        if p.step.lora:
            share = p.shape.adapters(p.step.lora) / p.shape.parameters
            text += f", LoRA of rank {p.step.lora} ({100 * share:.1f} % of the parameters)"
        text += ", with activation checkpointing, which the run switches on by itself" if p.step.checkpointing else (
            ", without activation checkpointing")
        if p.faster:
            text += (f". With {p.faster.pack_tokens} tokens a pack (--pack-tokens) it would fit without "
                     "checkpointing, which costs a third more FLOPs")
        lines = [text + "."]
    else:
        lines = [f"**Training does not fit**: {of} ({MOMENTS[moment]}, with activation checkpointing)."]
        if p.ways:
            lines[0] += " It fits with:"
            lines += [f"  - {means(names, step)}: {gb(need)} GB, checkpointing {'on' if step.checkpointing else 'off'}"
                      for names, step, need in p.ways]
        else:
            more = "No" if p.refusal else f"Neither up to {MOST_GPUS} such GPUs nor any"
            lines[0] += f" {more} change that is planned for makes it fit."
    server, tokens = p.server, p.texts.asking[1] + p.texts.response[1] + p.texts.reasoning
    need = f"{gb(server.weights)} GB of bf16 weights and {gb(server.cache)} GB of cache"
    where = f"on {server.gpus} GPUs{{each}} (tensor parallel {server.gpus})" if server.gpus > 1 else "on one GPU{each}"
    copies = f"{server.copies} server{'s' * (server.copies > 1)} " + where.format(each=" each" * (server.copies > 1))
    if server.copies and server.gpus <= p.gpus:
        lines.append(f"**Sampling fits**: {copies}: {need} per GPU for {server.slots} responses in flight of at most "
                     f"{tokens} tokens with their prompts.")
    elif server.gpus:
        instead = f"on those {p.trained.ranks} GPUs is room for {copies}" if server.copies else "or it stands elsewhere"
        lines.append(f"**Sampling does not fit**: a server takes {server.gpus} such GPUs (tensor parallel {server.gpus}: "
                     f"{need} per GPU); {instead}.")
    else:
        lines.append("**Sampling does not fit** on such GPUs: the server must stand elsewhere.")
    whole = sum(p.scoring.values())
    fits = whole <= p.memory
    more = f"; they would fit on {p.enough_for_scoring} (--ranks {p.enough_for_scoring})" \
        if not fits and p.enough_for_scoring else ""
    where = f"sharded over {p.scoring_gpus} GPUs as in training" if p.scoring_gpus > 1 else "one GPU holds the whole model"
    lines.append(f"**Held-out log-probs {'fit' if fits else 'do not fit'}**: {where}, {gb(whole)} of {p.gpu.gb:g} GB "
                 f"per GPU{more}.")
    return [alone] * bool(p.refusal) + lines


def bytes_table(p: Plan) -> list[str]:
    """Bytes per GPU by kind, of what would run (with the first way to make it fit, where it does not)."""
    server = {"weights": p.server.weights, "cache of keys and values": p.server.cache}
    columns = {**{f"training: {moment}": kinds for moment, kinds in p.phases.items()},
               "held-out log-probs": p.scoring, "sampling server": server}
    kinds = [k for k in dict.fromkeys(k for c in columns.values() for k in c) if any(c.get(k) for c in columns.values())]
    rows = [[kind, *(gb(c[kind]) if c.get(kind) else "-" for c in columns.values())] for kind in kinds]
    rows.append(["in all", *(gb(sum(c.values())) for c in columns.values())])
    return table([f"GB per GPU (of {p.gpu.gb:g}), as it is set", *columns], rows)


def stages_table(p: Plan) -> list[str]:
    rows = [[s.name, figure(s.tokens / 1e6), figure(s.flops / 1e15), "-" if s.hours is None else duration(s.hours), s.note]
            for s in p.stages]
    rows.append(["in all", figure(sum(s.tokens for s in p.stages) / 1e6), figure(sum(s.flops for s in p.stages) / 1e15),
                 duration(p.hours), "" if p.complete else "without what does not fit"])
    return table(["stage, all iterations", "million tokens", "PFLOP", "time", ""], rows)


def judged(p: Plan) -> str:
    j = p.judge
    cost = "at a price that is not known (--price tells it)" if j.usd is None else f"about {j.usd:.2f} USD"
    who = "The LLM judge" if j.asked else "An LLM judge (this run has none; `--judge openai` adds it)"
    return (f"{who}: {j.requests:,} requests, {cost} with {j.model} ({j.prompt_tokens / 1e6:.2g} million "
            f"prompt and {j.completion_tokens / 1e6:.2g} million completion tokens).")


def page(p: Plan, usd_per_gpu_hour: float | None = None) -> list[str]:
    """The plan of one run."""
    t, like = p.texts, p.trained or p.step
    gpus = max(p.gpus, like.ranks)
    lines = [f"## {p.run}: {p.model} ({p.shape.parameters / 1e9:.1f} billion parameters) on {setting(p)}", ""]
    lines += [line if line.startswith("  ") else f"- {line}" for line in verdict(p)]
    if p.trained:
        money = "" if usd_per_gpu_hour is None else f", {p.hours * gpus * usd_per_gpu_hour:.2f} USD"
        changes = [name for name in p.ways[0][0] if name != "gpus"] if p.ways else []
        change = f"; trained with {means(changes, like)}" if changes else ""
        lines.append(f"- {duration(p.hours)} on {gpus} GPU{'s' * (gpus > 1)}{money}"
                     + ("" if p.complete else ", without what does not fit") + change + ".")
    size = {what: gb(number) for what, number in p.disk.items()}
    lines += ["- " + judged(p), f"- Disk: {size['download']} GB of published weights, {size['iterations']} GB of "
              f"iterations' checkpoints, {size['steps']} GB of step checkpoints while an iteration trains. Memory of the "
              f"machine: {size['machine memory']} GB, where rank 0 reads and writes the weights.", "",
              *bytes_table(p), "", *stages_table(p), "",
              f"Texts: prompts of {t.prompt[0]} tokens (at most {t.prompt[1]}), responses of {t.response[0]:.0f} (at most "
              f"{t.response[1]}), {t.items} held-out items under {t.C} constitutions each; {like.pack_tokens} tokens a "
              "pack."]
    return [*lines, ""]


def assumptions(plans: Sequence[Plan]) -> list[str]:
    fractions = ", ".join(dict.fromkeys(f"{p.fraction:.0%}" for p in plans))
    rates = "; ".join(dict.fromkeys(f"{p.gpu.label} {p.gpu.bf16:g} TFLOP/s bf16, {p.gpu.memory:g} GB/s" for p in plans))
    queries = "; ".join(f"{name} {mean} tokens a query, at most {most}" for name, (mean, most) in QUERIES.items())
    return [
        f"Time is for {fractions} of the data sheet's rates ({rates}), an assumption, not a measurement; it is without "
        "loading and saving weights, starting servers and judging. GB are 10^9 bytes: what a GPU has beyond them (7 %) is "
        "left to CUDA's context, NCCL and fragmentation. Bytes are for the longest responses, FLOPs and time for mean ones "
        f"(samples of a base model: the longest). Lengths are estimates: {queries}. What one process takes is held against "
        "measured peaks (tests/perf/plan_check.py); sharding and the server are computed alone."]


def overview(plans: Sequence[Plan]) -> list[str]:
    """Runs by GPUs: whether each fits, with which change, and how long it takes."""
    settings = list(dict.fromkeys(map(setting, plans)))
    rows = []
    for run in dict.fromkeys(p.run for p in plans):
        mine = {setting(p): p for p in plans if p.run == run}
        rows.append([run, *(_cell(mine[s]) for s in settings)])
    return table(["run", *settings], rows)


def _cell(p: Plan) -> str:
    if p.trained is None:
        more = "the reference path works on one GPU" if p.refusal else f"up to {MOST_GPUS} GPUs do not make it fit"
        return f"no: training takes {gb(peak(p.phases)[1])} GB, and {more}"
    parts = []
    for names, step, need in p.ways:
        words = {"bf16": "bf16 weights", "lora": "LoRA", "pack": f"{step.pack_tokens} tokens a pack",
                 "gpus": f"{step.ranks} GPUs"}
        parts.append(" and ".join(words[n] for n in names) + f" ({gb(need)} GB)")
    text = "trains with " + ", or ".join(parts) if parts else f"trains ({gb(peak(p.phases)[1])} GB)"
    scoring = sum(p.scoring.values())
    server = f"sampling needs {p.server.gpus} GPUs" if p.server.gpus else "no sampling"
    lacking = [] if 0 < p.server.gpus <= p.gpus else [server]
    lacking += [] if scoring <= p.memory else [
        f"held-out log-probs take {gb(scoring)} GB on {p.scoring_gpus} GPU{'s' * (p.scoring_gpus > 1)}"]
    return "; ".join([text, *lacking, duration(p.hours) + ("" if p.complete else " without what does not fit")])


def document(plans: Sequence[Plan], usd_per_gpu_hour: float | None = None) -> str:
    """One run, or several after an overview."""
    lines = []
    if len(plans) > 1:
        lines += ["# What the runs take", "", *READING, "", *overview(plans), ""]
    for k, p in enumerate(plans):
        if len({setting(each) for each in plans}) > 1 and (k == 0 or setting(plans[k - 1]) != setting(p)):
            lines += [f"# On {setting(p)}", ""]
        lines += page(p, usd_per_gpu_hour)
    return "\n".join([*lines, *assumptions(plans)]) + "\n"

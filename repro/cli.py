"""The command line: `repro run | compare | probe | plan | judge | show | watch | export |
publish | verify | figures`. The Makefile calls it.

Every setting beyond these flags is Python or a file. Exit codes: 0 done; 1 a check failed (verify, judge
--strict); 2 an input that cannot be used (one line says which); 130 and 143 stopped by a signal.
"""

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path

from repro.base import commandline
from repro.base.records import UserError, read_json
from repro.base.settings import JudgeSpec, ModelSpec, prompt_for, safe_name
from repro.experiment import configure, load_experiment, only_variant, paper_models, shipped, told_of
from repro.flags import Compare, Export, Figures, Judge, Plan, Probe, Publish, Run, Show, Verify, Watch, endpoint, held
from repro.models.embedded import accept
from repro.report.changes import verdict
from repro.report.publish import changed, leaves, standing_alone
from repro.report.story import cut_answers, dropped_pairs, worsened


def summary(folder: Path) -> list[str]:
    """The last lines of a run: what training did, in words; what went wrong; where the page is."""
    lines, parts = [], leaves(folder)
    alone = standing_alone(parts)
    for leaf in parts:
        name = f"{leaf.name}, " if leaf != folder else ""
        own = changed([leaf] if leaf in alone else [])
        lines += [f"{name}{line.subset.replace('_', ' ')}: {sentence}" for found in own.values() for line in found
                  for sentence in verdict(line)]
        lines += [(f"{leaf.name}: " if leaf != folder else "") + line
                  for line in (*dropped_pairs(leaf), *cut_answers(leaf), *worsened(leaf))]
    stages = [s for leaf in parts for s in read_json(leaf / "run.json")["stages"].values()]
    return [*lines, f"{sum(s['seconds'] for s in stages) / 60:.1f} minutes of work in all, peak memory "
                    f"{max(s['peak_rss_gib'] for s in stages):.1f} GiB", f"report: {folder / 'report.html'}"]


def run_command(args: Run) -> None:
    runs = configure(args)  # before the imports: a mistake is told at once
    from repro.report.publish import gather
    from repro.stages.pipeline import check_together, run

    servers = [{"endpoint": endpoint(args, e.judge.model) if "openai" in e.judge.judges else None,
                "writer_endpoint": endpoint(args, e.writer.model, base_url=args.writer_url, flag="--writer-url")
                if e.writer and e.writer.kind == "openai" else None,
                "sampler_url": args.sampler_url, "sampler_as_is": args.sampler_as_is} for e in runs]
    if len(runs) > 1:
        check_together(runs, args.out, servers)
    folders = []
    for experiment, known in zip(runs, servers):
        if len(runs) > 1:
            print(f"--- {experiment.path}", file=sys.stderr)
        folders.append(run(experiment, args.out, ranks=args.ranks, nodes=args.nodes, tensor_parallel=args.tensor_parallel,
                           **known))
    for line in summary(gather(folders)):
        print(line)


def compare_command(args: Compare) -> None:
    runs = load_experiment(args.experiment, args.profile)
    by_hand = [e for e in runs if not e.writer] if args.variant is None else only_variant(
        runs, args.variant, args.experiment)
    if not by_hand:
        raise UserError(f"compare: {args.experiment} has no run whose principles are a person's")
    chosen = by_hand[0] if args.model is None else dataclasses.replace(by_hand[0], model=dataclasses.replace(
        by_hand[0].model, name=args.model, label=safe_name(Path(args.model).name),
        prompt=prompt_for(args.model, None) or by_hand[0].model.prompt))
    seeds = args.seeds or (0,)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: each at most once")
    with told_of(args):
        experiments = [dataclasses.replace(chosen, seed=seed, iterations=1 if args.iterations is None else args.iterations)
                       for seed in seeds]
    from repro.studies import comparison as page
    from repro.studies.compare import compare

    folder = args.out / "objectives"
    for experiment in experiments:
        print(compare(experiment, folder, objectives=args.objectives, rates=args.rates, path=args.path,
                      say=lambda text: print(text, file=sys.stderr, flush=True)))
    stem = "-".join(filter(None, (chosen.name, chosen.variant)))
    path = page.write_page(folder, stem)
    print(page.in_words(page.read(folder, stem)))
    print(f"page: {path}")


def probe_command(args: Probe) -> None:
    from repro.studies import probed
    from repro.studies.probe import probe

    prompt = prompt_for(args.model, args.prompt) or "chat"
    with told_of(args):
        model = ModelSpec(name=args.model, prompt=prompt, label=safe_name(Path(args.model).name))
        page = probe(args.principles, args.out, task=args.task, model=model, source=args.queries,
                     queries=args.probe_queries, max_new_tokens=args.max_new_tokens,
                     say=lambda text: print(text, file=sys.stderr, flush=True))
    print("\n".join(probed.in_words(read_json(page.with_suffix(".json")))))
    print(f"page: {page}")


PLANNED = ((8, "a100"), (1, "h200"), (1, "rtx4090"))  # what `repro plan all` is made for: GPUs and their kind


def plan_command(args: Plan) -> None:
    if args.usd_per_gpu_hour is not None and not 0 <= args.usd_per_gpu_hour < math.inf:
        raise UserError(f"--usd-per-gpu-hour {args.usd_per_gpu_hour:g}: must be a number of 0 or more")
    names = list(shipped()) if args.experiment == "all" else [args.experiment]
    runs = [e for name in names for e in only_variant(load_experiment(name, args.profile, "paper"), args.variant, name)]
    if args.model is not None:
        runs = [dataclasses.replace(e, model=dataclasses.replace(e.model, name=args.model, label=args.model)) for e in runs]
    if args.objective is not None:
        with told_of(args):
            runs = [dataclasses.replace(e, train=dataclasses.replace(e.train, objective=args.objective)) for e in runs]
    from repro.base.records import write_text
    from repro.plan import page
    from repro.plan.estimate import plan
    from repro.plan.gpus import gpu_of

    settings = [(8 if args.gpus is None else args.gpus, gpu_of(args.gpu, args.gpu_memory))]
    if args.experiment == "all" and (args.gpus, args.gpu, args.gpu_memory) == (None, None, None):
        settings = [(count, gpu_of(kind, None)) for count, kind in PLANNED]
    plans = [plan(e, gpu, count, fraction=args.fraction, config=args.config, lora=args.lora, price=args.price,
                  judge_model=args.judge_model, response_tokens=args.response_tokens)
             for count, gpu in settings for e in runs]
    text = page.document(plans, args.usd_per_gpu_hour)
    print(text, end="")
    if args.out:
        write_text(args.out, text)


def judge_command(args: Judge) -> int:
    if args.admit == (args.run is not None):
        raise UserError("judge: give the folder of a finished run, or --admit")
    if not args.model:
        raise UserError("judge: --model is missing: the model's name at its server")
    with told_of(args):
        spec = JudgeSpec(judges=("openai",), **held(args, JudgeSpec))
    server = endpoint(args, args.model)
    from repro.judges import standing
    from repro.paper import admission
    from repro.report.publish import gather
    from repro.stages import pipeline

    how = {"dry_run": args.dry_run, "reparse": args.reparse}
    if args.admit:
        record = admission.admit(spec, server, archive=args.archive, wanted=args.files, count=args.items, work=args.work,
                                 out=args.out or standing.ADMISSIONS, **how)
        for line in standing.plain_words(record) if record else ():
            print(line)
        missing = record["parsed_share"]["value"] < 1 or record["attacks"]["missing"] > 0 if record else False
    else:
        rows = [row for leaf in leaves(args.run) for row in pipeline.judge_run(leaf, spec, server, **how)]
        missing = not args.dry_run and any(row["score"] is None for row in rows)
        together = args.run if len(leaves(args.run)) > 1 else args.run.absolute().parent
        if not args.dry_run and len(leaves(together)) > 1:  # a run of several, or all of them
            gather(leaves(together))
        if not args.dry_run:
            print(f"judge {spec.label}: {args.run / 'judgments.jsonl'}, {args.run / 'report.html'}")
            print(standing.standing(spec.label))
    return int(args.strict and missing)


def publish_command(args: Publish) -> None:
    from repro.report.publish import again, is_published, publish

    if not args.runs:
        raise UserError("publish: name at least one run folder")
    published = [folder for folder in args.runs if is_published(folder)]
    if published and args.numbers_only:
        raise UserError(f"--numbers-only: {published[0]} is published already, with a page or without; leave it out")
    for folder in published:
        print(f"made again from what it holds: {again(folder)}")
    if runs := [folder for folder in args.runs if folder not in published]:
        print(f"published in {publish(runs, args.results, page=not args.numbers_only)}")


def show_command(args: Show) -> None:
    from repro.report.show import show

    if args.answers < 0:
        raise UserError(f"--answers {args.answers}: 0 or more")
    for line in show(args.run, args.answers):
        print(line)


def watch_command(args: Watch) -> None:
    from repro.studies.watch import watch

    if not args.every > 0:
        raise UserError(f"--every {args.every:g}: seconds, above 0")
    watch(args.run, args.every, lambda line: print(line, flush=True), args.trackio)


def export_command(args: Export) -> None:
    from repro.studies.export import export

    print(f"exported, with a model card: {export(args.run, args.folder, args.iteration)}")


def verify_run(folder: Path, *, strict: bool = False) -> int:
    """A run of ours against its own record and, where its models are the paper's by name, against the printed cells."""
    from repro.paper import cells
    from repro.stages import verify

    return verify.verify_run(folder, cells.verify_run, paper_models(), strict=strict)


def verify_command(args: Verify) -> int:
    from repro.paper import cells

    if args.run is not None:
        return verify_run(args.run, strict=args.strict)
    return cells.verify(args.archive, args.out, strict=args.strict, responses=args.responses)


def figures_command(args: Figures) -> None:
    from repro.paper.figures import draw

    written = draw(args.archive, args.out, list(args.run))
    print(f"{len(written)} files in {args.out}")


COMMANDS = {Run: run_command, Compare: compare_command, Probe: probe_command, Plan: plan_command, Judge: judge_command,
            Show: show_command, Watch: watch_command, Export: export_command, Publish: publish_command,
            Verify: verify_command, Figures: figures_command}


def parse(argv: list[str]):
    """The command of `argv`."""
    return commandline.parse(argv, {kind.__name__.lower(): kind for kind in COMMANDS})


def version() -> str:
    """The distribution's version, and the commit of a checkout."""
    from importlib import metadata

    from repro.base.identity import commit

    return f"sami-repro {metadata.version('sami-repro')}" + (f", commit {commit()}" if commit() else "")


def _terminate(signum, frame):
    raise SystemExit(128 + signum)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `repro` command."""
    before = signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale of ASCII alone ends no run at its last line
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's own threads warn after a fork
    argv = sys.argv[1:] if argv is None else argv
    try:
        if list(argv) == ["--version"]:
            print(version())
            raise SystemExit(0)
        args = parse(argv)
        if getattr(args, "accept_licence", None):
            accept(args.accept_licence)
        raise SystemExit(COMMANDS[type(args)](args) or 0)
    except UserError as e:
        print(f"repro: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:  # a path that the system does not take
        if e.filename is None:
            raise
        print(f"repro: {e.filename}: {e.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nrepro: stopped; run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as e:
        if e.code == 143:
            print("\nrepro: stopped; run the same command to go on", file=sys.stderr)
        raise
    finally:  # raised in an atexit callback (a second SIGTERM: make and `timeout` both send one) it would be a traceback
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


if __name__ == "__main__":
    main()

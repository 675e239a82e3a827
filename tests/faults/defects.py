"""Figure 10 of the scoreboard: defects planted one at a time in a scratch copy, each with the test that must fail."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from repro.base.records import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("experiments", "kernels", "repro", "tests", "pyproject.toml", "README.md", "Makefile", "results")

# what, file, old (found exactly once), new, test
DEFECTS = [
    ("step checkpoints overwrite each other in place", "repro/core/checkpoints.py",
     'folder = self.folder / f"step-{len(trace):06d}"', 'folder = self.folder / "step-000001"',
     "tests/test_fsdp.py::test_stopped_after_every_step_the_result_is_identical_to_the_bit"),
    ("files are written in place, without a rename", "repro/base/records.py",
     'tmp = path.with_name(f".{path.name}.tmp")', "tmp = path", "tests/test_records.py::test_write_is_old_or_new_whichever_call_fails"),
    ("a file is renamed before its bytes are synced", "repro/base/records.py",
     "                _write_all(fd, data)\n                os.fsync(fd)\n            finally:", "                _write_all(fd, data)\n            finally:",
     "tests/faults/test_faults.py::test_a_power_loss_leaves_the_old_state_or_the_new_one"),
    ("the name of a new file is not synced", "repro/base/records.py",
     "        _fsync(Path(path).parent)  # of a new file, the name must be durable too\n", "",
     "tests/faults/test_faults.py::test_a_power_loss_leaves_the_old_state_or_the_new_one"),
    ("a short write is taken for a whole one", "repro/base/records.py",
     "        view = view[os.write(fd, view):]", "        os.write(fd, view)\n        break", "tests/test_records.py::test_short_writes_are_continued"),
    ("a torn last line is kept", "repro/base/records.py",
     'if torn_tail and data and not data.endswith(b"\\n"):', "if False:", "tests/test_records.py::test_torn_tail_at_every_byte"),
    ("lines are split where Unicode does", "repro/base/records.py",
     'enumerate(data.split(b"\\n"), start=1)', 'enumerate((s.encode() for s in data.decode().splitlines()), start=1)',
     "tests/test_records.py::test_unicode_separators_do_not_split_a_record"),
    ("NaN is read as a number", "repro/base/records.py",
     "json.loads(text, parse_constant=no_constant, object_pairs_hook=no_duplicates)", "json.loads(text, object_pairs_hook=no_duplicates)",
     "tests/test_records.py::test_a_bad_line_names_file_and_line"),
    ("the check of an appended line is not looked at", "repro/base/records.py",
     "if torn_tail and (all_checked or CHECK in row) and _altered(row):",
     "if torn_tail and row.pop(CHECK, None) == 0:", "tests/test_records.py::test_an_altered_line_that_was_appended_is_refused"),
    ("a marker is believed without the sha256", "repro/base/records.py",
     "path.stat().st_size != size or file_sha256(path) != sha256", "path.stat().st_size != size",
     "tests/test_records.py::test_a_seal_notices_every_change"),
    ("no lock", "repro/base/records.py",
     "            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            pass\n",
     "tests/test_records.py::test_a_second_run_is_refused_and_a_killed_one_frees_the_folder"),
    ("a stage is skipped though its file has changed", "repro/stages/folder.py",
     "return (sealed(path) if path.is_dir() else path.is_file()) and self._fact(output) == fact", "return path.exists()",
     "tests/test_experiments.py::test_an_altered_file_is_made_again"),
    ("randomness depends on more than its position", "repro/base/identity.py",
     'return random.Random("/".join(map(str, keys)))', "return random.Random()",
     "tests/test_experiments.py::test_each_iteration_samples_with_the_model_before_it"),
    ("finished batches are sampled again", "repro/stages/sample.py", "batch_size=spec.batch_size, done=done, ends", "batch_size=spec.batch_size, done=(), ends",
     "tests/faults/test_faults.py::test_a_finished_batch_is_not_sampled_again"),
    ("a loss that is not finite is trained on", "repro/core/loop.py",
     "if not math.isfinite(total) or not math.isfinite(norm):", "if False:",
     "tests/test_training.py::test_a_loss_that_is_not_finite_stops_before_the_update"),
    ("SIGTERM ends a step without saving it", "repro/core/loop.py", "        asked.append(number)\n        noted", "        noted",
     "tests/test_fsdp.py::test_a_signal_stops_after_the_step_and_one_that_comes_too_late_is_not_lost"),
    ("a checkpoint is loaded though its marker does not confirm it", "repro/core/checkpoints.py",
     "if all(good for good, in engine.gather(complete)):", "if folder.is_dir():",
     "tests/faults/test_faults.py::test_an_index_that_would_run_code_is_not_loaded"),
    ("half a line stays where the disk refuses the rest", "repro/base/records.py",
     "                os.ftruncate(fd, before)  # else the next line of this process would join the torn one\n", "",
     "tests/test_records.py::test_an_append_that_the_disk_refuses_halfway_leaves_no_half_line_for_the_next_one"),
    ("workers outlive their pipeline", "repro/stages/rank.py", "    os._exit(1)\n", "    return\n",
     "tests/test_fsdp_worker.py::test_an_fsdp_rank_whose_stdin_ends_ends_at_once"),
    ("a failed request counts as answered", "repro/servers/client.py",
     "return len(answers) <= ASKED_AGAIN and not any(map(self.usable, answers))",
     "return key not in self.ledger.errors and not answers",
     "tests/test_judge_server.py::test_judge_loses_nothing_to_a_fault_that_passes[500]"),
    ("a refused key is tried again", "repro/servers/client.py",
     'return _Failed(f"the server refused the key in ${self.endpoint.key_env} ({said})", fatal=True)',
     'return _Failed(f"the server refused the key in ${self.endpoint.key_env} ({said})")',
     "tests/test_judge_server.py::test_judge_stops_at_a_fault_that_no_retry_mends"),
    ("a contradiction counts as a verdict", "repro/judges/verdicts.py",
     "if len({letter for _, letter in found}) > 1 or (rest", "if (rest",
     "tests/test_judge.py::test_judge_text_verdict_is_the_last_line_or_nothing"),
    ("nothing is reserved before a request", "repro/servers/client.py",
     "while not self.stopped and self.ledger.spent + self._reserved + most > self._cap:",
     "while not self.stopped and self.ledger.spent > self._cap:", "tests/test_judge_server.py::test_judge_never_exceeds_its_budget"),
    ("the client retries by itself", "repro/servers/client.py", "max_retries=0", "max_retries=2",
     "tests/test_judge_server.py::test_judge_loses_nothing_to_a_fault_that_passes[500]"),
    ("no deadline for a whole request", "repro/servers/client.py", "async with asyncio.timeout(self.endpoint.deadline_s):", "async with asyncio.timeout(None):",
     "tests/test_judge_server.py::test_judge_deadline_is_one_for_the_whole_request"),
    ("a server's words are written as they are", "repro/servers/client.py",
     'said = redact(f"HTTP {e.status_code}: {reason(text)}", key)', 'said = f"HTTP {e.status_code}: {reason(text)}"',
     "tests/test_judge_server.py::test_judge_key_is_in_no_file_and_no_output"),
    ("verdicts that disagree count as a win", "repro/judges/llm.py", 'outcome="win" if all(ours)', 'outcome="win" if any(ours)',
     "tests/test_judge_server.py::test_judge_a_against_b_and_b_against_a_add_up_to_one_hundred"),
    ("a query may hold control tokens", "repro/base/checks.py",
     "found = next((c for c in controls if c in text), None)", "found = None", "tests/test_cli.py::test_query_files"),
    ("a principle may be a template", "repro/text/principles.py",
     r'if re.search(r"[{}\0\ud800-\udfff]|[^\S ]", row[key]):', 'if "\\0" in row[key]:', "tests/test_constitutions.py::test_a_mistake_names_file_and_field"),
    ("a page shows a response as HTML", "repro/report/page.py",
     "Markup(html.escape(str(value)))", "Markup(str(value))",
     "tests/test_experiments.py::test_the_report_shows_responses_escaped_and_never_the_private_ones"),
]


def defects(work: Path, quick: bool, part: slice = slice(None)) -> dict:
    chosen = (DEFECTS[::4] if quick else DEFECTS)[part]
    detail, bad = {}, []
    for what, file, old, _, _ in DEFECTS:
        if (count := (ROOT / file).read_text().count(old)) != 1:
            raise UserError(f"{file}: {what!r}: the text to change occurs {count} times, not once")
    for what, file, old, new, test in chosen:
        text = (ROOT / file).read_text()
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            copy = Path(scratch) / "tree"
            copy.mkdir()
            for name in FOLDERS:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                elif (ROOT / name).exists():
                    shutil.copy(ROOT / name, copy / name)
            (copy / file).write_text(text.replace(old, new))
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test], cwd=copy, capture_output=True,
                                  text=True, env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}, timeout=280)
        failed = next((line for line in done.stdout.splitlines() if line.startswith("FAILED ")), "")
        caught = done.returncode == 1 and failed != ""
        detail[what] = [int(caught), 1]
        print(f"{'caught' if caught else 'NOT CAUGHT'}: {what}: {failed[:160]}", flush=True)
        if not caught:
            bad.append({"what": what, "rc": done.returncode, "tail": done.stdout[-600:]})
    return {"value": sum(a for a, _ in detail.values()), "of": len(detail), "detail": detail, "bad": bad,
            "counted": f"of {len(DEFECTS)} planted defects, one at a time in a scratch copy, those that the named test fails on",
            "not_counted": "defects that nobody thought of: this is the score of this list"}

"""Judges the pairs of a JSON file in a process of its own, so that it can be killed: PAIRS BASE_URL LEDGER OUT MAX_USD [IN_FLIGHT]."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from repro.base.records import UserError
from repro.base.settings import JudgeSpec
from repro.judges.llm import Pair, ask_judge
from repro.servers.endpoint import Endpoint


def main(pairs: str, base_url: str, ledger: str, out: str, max_usd: str, in_flight: str = "8") -> int:
    loaded = [Pair(**(row | {"principles": tuple(row["principles"])})) for row in json.loads(Path(pairs).read_text())]
    endpoint = Endpoint(model="judge-1", base_url=base_url, price=(3.0, 12.0), max_usd=float(max_usd), deadline_s=30.0,
                        backoff_s=0.02, concurrency=int(in_flight))
    spec = replace(JudgeSpec(judges=(), model="judge-1"), answer="text")
    try:
        verdicts, _ = ask_judge(spec, loaded, endpoint, Path(ledger), lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as e:
        print(f"repro: {e}", file=sys.stderr)
        return 2
    Path(out).write_text(json.dumps([v.to_json() for v in verdicts]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

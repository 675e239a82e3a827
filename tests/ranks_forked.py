"""In torchrun's place, for whole runs whose launch is not what is tested: the ranks are forked from one process that has imported
what they need, where torchrun starts an interpreter for itself and one for each. RANKS FOLDER JOB."""

import os
import socket
import sys


def imports() -> None:
    import torch.distributed.fsdp  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
    )

    from repro.core import engines, loop  # noqa: F401
    from repro.stages import rank  # noqa: F401


def main(ranks: int, *argv: str) -> int:
    imports()
    from repro.stages import rank

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    sys.argv[1:] = argv
    children = set()
    for k in range(ranks):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                rank.main()
                code = 0
            except SystemExit as e:
                code = e.code or 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            return 1  # the pipeline ends the rest of this process group
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))

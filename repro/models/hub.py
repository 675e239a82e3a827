"""Model names -> places: the embedded LM, a local folder, or a name on the hub, with the step that access to it needs."""

import difflib
import functools
import os
from pathlib import Path

from repro.base.records import MARKER, UserError, file_sha256, first_line
from repro.models import files
from repro.models.embedded import PACKAGES, embedded_model

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one of them is in any copy that we load


def resolve_model(name: str) -> str:
    """The place to load `name` from: a folder of the cache or the user's, or a hub name as it is, once the hub gives
    access to it (a model in the hub's cache on this machine needs none).

    Raises UserError for a name that is none of these, with the nearest that is; and with the step that is missing.
    """
    if name in PACKAGES:
        return str(embedded_model(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--model {name}: {files.other_format(folder)}")
        return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        if step := missing_step(name, "model"):
            raise UserError(f"--model {name}: {step}")
        return name
    near = difflib.get_close_matches(name, PACKAGES, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(map(repr, PACKAGES))
    raise UserError(f"--model {name!r}: unknown. Allowed: {known}, a folder, or a hub name owner/model{hint}")


@functools.cache
def missing_step(name: str, kind: str) -> str | None:
    """What stands between this machine and a hub repository ("model" or "dataset"), in words; None where nothing does.
    Asks the hub, once, which sends no weights."""
    from huggingface_hub import HfApi, get_token, try_to_load_from_cache
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    page, logged_in = f"{hub}/{'datasets/' * (kind == 'dataset')}{name}", bool(get_token())
    unknown = f"no such {kind} on the hub, or a private one" + (
        " that your account cannot see: check the name" if logged_in else ": check the name, or run `hf auth login`")

    def cached(file):
        return isinstance(try_to_load_from_cache(name, file), str)

    try:
        if kind == "model" and cached("config.json") and any(map(cached, WEIGHTS)):
            return None
        HfApi(endpoint=hub).auth_check(name, repo_type=kind)
        return None
    except GatedRepoError:
        if logged_in:
            return (f"gated, and your account has no access: accept the licence on {page} with the account that `hf auth "
                    "whoami` names (some owners grant it later)")
        return f"gated, and you are not logged in: accept the licence on {page}, then run `hf auth login`"
    except DisabledRepoError:
        return f"the hub has disabled it ({page})"
    except RepositoryNotFoundError:
        return unknown
    except HFValidationError as e:
        return f"not a hub name: {first_line(e)}"
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status == 401 and not logged_in:
            return unknown
        if status == 401:
            return "the hub refuses your token (expired or revoked): run `hf auth login`, or take it out of $HF_TOKEN"
        return f"the hub answers with status {status}" + ("; try again later" if status == 429 or status >= 500 else "")
    except Exception as e:  # no answer: the client's network errors are of kinds that change with its versions
        return (f"not on this machine, and {hub} cannot be reached ({first_line(e)}): connect, or give a folder with a "
                "copy")


def hub_errors(name, load):
    """Run `load`; what the hub or a file refuses becomes one line."""
    from huggingface_hub.errors import StrictDataclassError  # a field of config.json that has the wrong type
    from safetensors import SafetensorError

    try:
        return load()
    except StrictDataclassError as e:
        raise UserError(f"--model {name}: config.json: {' '.join(str(e).split())}") from e
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"--model {name}: {first_line(e)}") from e
    except (TypeError, KeyError, AttributeError, ArithmeticError) as e:  # JSON of another form than transformers expects
        raise UserError(f"--model {name}: not a model in Hugging Face format ({type(e).__name__}: {first_line(e)})") from e


def load_config(place: str):
    """The model's config (its text part, where it has several)."""
    from transformers import AutoConfig

    return hub_errors(place, lambda: AutoConfig.from_pretrained(place, trust_remote_code=False)).get_text_config()


def file_of(place: str, name: str) -> str | None:
    """Where a file of a model lies on this machine; None where the model has none of that name."""
    from transformers.utils import cached_file

    try:
        return cached_file(place, name)
    except OSError:
        return None


def fingerprint(folder: Path) -> dict[str, str]:
    """What identifies a model on this machine: the sha256 of each of its files (weights, config, tokenizer, chat
    template)."""
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MARKER}

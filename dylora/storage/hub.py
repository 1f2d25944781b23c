"""Repositories of a hub of models: fetched before a folder is opened, pushed once it verifies.

The hub is huggingface_hub's, with its own settings: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, Unpack

from dylora.storage.manifest import LOADED, MANIFEST, listed_files, verify, write_manifest
from dylora.storage.model_card import CARD, adapter_card, is_hub_name, merged_card, mixture_card
from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.safe_io import read_json
from dylora.storage.schema import EXPORT_FILE

RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pt", "trainer_state.json")
_REPLACED = ["peft_adapters/*", "*.safetensors", "*.json", "*.bin", "*.pt"]
"""Taken from the repository where an earlier push had more of them."""


class HubOptions(TypedDict, total=False):
    """How a folder is pushed."""

    private: bool | None  # of a repository that is made; none: as the account has it
    token: str | None  # none: the one that huggingface_hub knows
    revision: str | None  # a branch, which is made where it is not there
    commit_message: str | None


def local_folder(path: str | Path, revision: str | None = None) -> Path:
    """A folder of this machine, or a repository of the hub (user/name), fetched.

    Of a repository only what its manifest lists is fetched, or what a loader reads.
    Raises FileNotFoundError where there is neither, ValueError for a revision of a folder.
    """
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder here, which has no revision {revision}")
        return folder
    if not isinstance(path, str) or not is_hub_name(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        try:
            manifest = Path(hf_hub_download(path, MANIFEST, revision=revision))
            wanted = [MANIFEST, *listed_files(manifest.parent)]
        except RemoteEntryNotFoundError:
            wanted = sorted(LOADED)
        return Path(snapshot_download(path, revision=revision, allow_patterns=[*wanted, CARD]))
    except OSError as error:  # what the hub and the network raise is of this kind
        raise FileNotFoundError(
            f"checkpoint {path} is no folder here, and the hub does not give it "
            f"({_first_line(error)})"
        ) from error


def push_folder(folder: Path, repository: str, **options: Unpack[HubOptions]) -> str:
    """Upload a mixture, an adapter or a merged model; returns the address of the commit.

    The state of a run (moments, schedule, random state) stays here. A card is written where the
    folder has none. Raises ValueError for a folder that does not verify, and for what the hub
    refuses.
    """
    from huggingface_hub import HfApi

    if (folder / MANIFEST).exists():
        verify(folder)
    api, revision = HfApi(token=options.get("token")), options.get("revision")
    message = options.get("commit_message") or "Upload with dylora"
    with _for_others(folder) as shared:
        try:
            api.create_repo(repository, private=options.get("private"), exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=shared,
                revision=revision,
                commit_message=message,
                delete_patterns=_REPLACED,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} cannot be pushed to {repository} ({_first_line(error)}): log in with "
                "`hf auth login` or set HF_TOKEN, and give a name of yours, user/name"
            ) from error
    return str(commit.commit_url)


def push_saved(model: Any, repository: str, **options: Unpack[HubOptions]) -> str:
    """Push what `save_pretrained` of a model writes. Returns and raises as `push_folder`."""
    with TemporaryDirectory(prefix="dylora-push-") as temporary:
        model.save_pretrained(Path(temporary) / "mixture")
        return push_folder(Path(temporary) / "mixture", repository, **options)


def card_of(folder: Path) -> str:
    """The card that a folder without one gets. Raises ValueError for what we did not write."""
    if (folder / EXPORT_FILE).exists() and not (folder / CONFIG_FILE).exists():
        return merged_card(read_json(folder / EXPORT_FILE))
    if (folder / CONFIG_FILE).exists():
        return adapter_card(read_json(folder / CONFIG_FILE))
    if (folder / MANIFEST).exists():
        return mixture_card(read_json(folder / "config.json"))
    raise ValueError(f"{folder} is no mixture, no adapter and no model that export has written")


@contextmanager
def _for_others(folder: Path) -> Iterator[Path]:
    """The folder, or a copy with a card and without what only a resumed run needs."""
    text = None if (folder / CARD).exists() else card_of(folder)
    if text is None and not any((folder / name).exists() for name in RESUME_FILES):
        yield folder
        return
    with TemporaryDirectory(prefix="dylora-push-") as temporary:
        shared = Path(temporary) / folder.name
        shutil.copytree(folder, shared, ignore=shutil.ignore_patterns(*RESUME_FILES, MANIFEST))
        if text is not None:
            (shared / CARD).write_text(text, encoding="utf-8")
        if (folder / MANIFEST).exists():
            write_manifest(shared)
        yield shared


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

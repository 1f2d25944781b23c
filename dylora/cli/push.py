"""`dylora push`: a checkpoint, an expert or a merged model to the hub."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Push a checkpoint, an expert or a merged model to the hub."""

    folder: str = option(metavar="DIR", positional=True)
    """A checkpoint, a run (its best checkpoint), or what export wrote."""
    repository: str = option(metavar="USER/NAME", positional=True)
    """Where to; it is made if it is not there."""
    expert: int | None = option(None, least=0)
    """Push this expert of a checkpoint alone, as an adapter of peft."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """A branch of it, by default main."""
    message: str | None = None
    """Of the commit."""


def run(options: PushOptions, overrides: list[str]) -> None:
    """Push, and print the address."""
    from dylora.evaluation.loading import note
    from dylora.integrations.peft_export import export_peft
    from dylora.storage.checkpoint import Checkpoint
    from dylora.storage.folders import checkpoints
    from dylora.storage.hub import push_folder
    from dylora.storage.manifest import MANIFEST

    folder = Path(options.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist")
    if options.expert is not None or (not (folder / MANIFEST).exists() and checkpoints(folder)):
        folder = Checkpoint.open(folder, note).path
    with TemporaryDirectory(prefix="dylora-push-") as temporary:
        if options.expert is not None:
            (folder,) = export_peft(folder, temporary, options.expert)
        url = push_folder(
            folder,
            options.repository,
            private=options.private or None,
            revision=options.revision,
            commit_message=options.message,
        )
    print(url)

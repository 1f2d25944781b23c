"""`dylora submit`: a run on a machine of Google Cloud."""

from dataclasses import dataclass

import yaml

from dylora.cli.config_file import load_run_config
from dylora.cli.options import ConfigOptions
from dylora.fields import option
from dylora.integrations.vertex import Machine


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(ConfigOptions):
    """Train a config as a custom job of Vertex AI that resumes by itself (docs/scaling.md)."""

    machine: Machine
    """Its type: one A100 of 40 GB (a2-highgpu-1g), or one H100 of 80 GB (a3-highgpu-1g)."""
    spot: bool = False
    """Take a machine that may be taken away at any time, for less money."""
    image: str = option(metavar="URI")
    """Of the image that the Dockerfile makes, in a registry that the project reads."""
    bucket: str = option(metavar="gs://BUCKET/FOLDER")
    """Where the run lies; the bucket needs a hierarchical namespace, for renaming folders."""
    region: str = "us-central1"
    """Where the machine is."""
    project: str | None = None
    """Of Google Cloud; none: as the credentials say."""
    hours: float = option(24.0, above=0)
    """After so many the job is ended; its run can be submitted again, and goes on."""
    dry_run: bool = False
    """Print the job and the command that submits it; ask nobody for anything."""


def run(options: SubmitOptions, overrides: list[str]) -> None:
    from dylora.integrations import vertex

    config = load_run_config(options.config, overrides)
    spec = vertex.custom_job_spec(
        config,
        machine=options.machine,
        spot=options.spot,
        image=options.image,
        bucket=options.bucket,
        hours=options.hours,
    )
    region, project = options.region, options.project
    if options.dry_run:  # a file as gcloud reads it
        command = vertex.gcloud_command(config, region=region, project=project, file="job.yaml")
        print(f"# {command}")
        print(yaml.safe_dump(spec, sort_keys=False, width=100), end="")
        return
    job = vertex.submit(spec, name=config.name, region=region, project=project)
    print(f"submitted {job}")

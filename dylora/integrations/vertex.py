"""A run as a custom job of Vertex AI, which starts again by itself where its machine is taken away.

The job carries its settings, as they were read and checked here: nothing has to be built into the
image anew. Vertex AI sets AIP_CHECKPOINT_DIR to a folder of the job's bucket, the same after each
start, and mounts buckets under /gcs: the run writes there, and goes on from its latest checkpoint.
"""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from dylora.run_config import RunConfig, dump_run_config

Machine = Literal["a2-highgpu-1g", "a3-highgpu-1g"]
ACCELERATORS = {"a2-highgpu-1g": "NVIDIA_TESLA_A100", "a3-highgpu-1g": "NVIDIA_H100_80GB"}
MAX_ARGUMENT = 100_000  # characters of a container's arguments, a limit of Vertex AI
HUB_NAME = re.compile(r"(?!.*\.(json|jsonl|csv|parquet|txt|gz|zip)$)[\w-][\w.-]*(/[\w.-]+)?")
# $1 settings, $2 name of the run. exec: SIGTERM reaches the run, which saves at its next step.
SCRIPT = """\
printf %s "$1" > /tmp/run.yaml
runs="/gcs/${AIP_CHECKPOINT_DIR#gs://}"
set -- --config /tmp/run.yaml --output_dir "$runs" "$runs/$2"/checkpoint-*/manifest.json
if [ -e "$5" ]; then exec dylora train "${@:1:4}" --resume_from_checkpoint latest; fi
exec dylora train "${@:1:4}"
"""


def custom_job_spec(
    config: RunConfig, *, machine: Machine, spot: bool, image: str, bucket: str, hours: float
) -> dict[str, Any]:
    """The CustomJobSpec of Vertex AI's REST API that trains `config` on one GPU.

    Args:
        spot: take a machine that may be taken away at any time, for less money.
        image: of the Dockerfile, as a registry has it.
        bucket: gs://BUCKET/FOLDER; checkpoints lie in <bucket>/checkpoints/<name of the run>.
        hours: after which Vertex AI ends the job.

    Raises ValueError for what the job would not find or could not do.
    """
    if config.stages:
        raise ValueError("a run of stages is not submitted: a job resumes by a run's checkpoints")
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/]+)*/?", bucket):
        raise ValueError(f"--bucket is {bucket!r}, but must be gs://BUCKET/FOLDER")
    if machine == "a3-highgpu-1g" and not spot:
        raise ValueError(
            "a3-highgpu-1g is not to be had on demand: add --spot, or take a2-highgpu-1g"
        )
    check_reachable(config)
    settings = dump_run_config(config)
    if len(settings) > MAX_ARGUMENT:
        raise ValueError(
            f"the settings have {len(settings)} characters; a job takes {MAX_ARGUMENT}"
        )
    return {
        "workerPoolSpecs": [
            {
                "machineSpec": {
                    "machineType": machine,
                    "acceleratorType": ACCELERATORS[machine],
                    "acceleratorCount": 1,
                },
                "replicaCount": "1",
                "containerSpec": {
                    "imageUri": image,
                    "command": ["bash", "-c", SCRIPT, "dylora"],
                    "args": [settings, config.name],
                },
            }
        ],
        "scheduling": {
            "strategy": "SPOT" if spot else "STANDARD",
            "restartJobOnWorkerRestart": True,
            "timeout": f"{round(hours * 3600)}s",
        },
        "baseOutputDirectory": {"outputUriPrefix": bucket.rstrip("/")},
    }


def check_reachable(config: RunConfig) -> None:
    """Raises ValueError for files that only this machine has, and for more than one process."""
    from dylora.data.templates import NAMES  # it imports transformers, which takes seconds

    sources, template = config.data.sources, config.data.template
    on_hub = {f"the path of the source {one.name}": one.path for one in sources}
    on_hub |= {"model.base": config.model.base, "train.init_from": config.train.init_from}
    files = {
        f"the validation_path of the source {one.name}": one.validation_path for one in sources
    }
    files |= {"data.template": None if template in NAMES else template}
    files |= {
        f"eval.benchmark_files.{key}": file for key, file in config.eval.benchmark_files.items()
    }
    for what, given in (on_hub | files).items():
        for path in given if isinstance(given, list) else [given]:
            if path is None or path.startswith("/gcs/"):
                continue
            if what in files or not HUB_NAME.fullmatch(path) or Path(path).exists():
                raise ValueError(
                    f"{what} is {path}, which the job does not see: copy it into a bucket, and "
                    "give /gcs/BUCKET/…"
                )
    if (parallel := config.train.parallel) != "none":
        raise ValueError(
            f"train.parallel is {parallel}, but these machines have one GPU: leave it out"
        )


def gcloud_command(config: RunConfig, *, region: str, project: str | None, file: str) -> str:
    """The command of the Google Cloud CLI that submits a spec which lies in `file`."""
    words = ["gcloud", "ai", "custom-jobs", "create", f"--region={region}"]
    words += [f"--project={project}"] if project else []
    return shlex.join([*words, f"--display-name={config.name}", f"--config={file}"])


def submit(spec: dict[str, Any], *, name: str, region: str, project: str | None) -> str:
    """Create the job under the credentials of this machine; returns its resource name.

    Raises ValueError where the package is missing, no project is known, or Vertex AI refuses.
    """
    if find_spec("google") is None or find_spec("google.cloud.aiplatform_v1") is None:
        raise ValueError(
            "submitting needs google-cloud-aiplatform: pip install 'dylora[vertex]', or give "
            "--dry_run and submit with gcloud what it prints"
        )
    import google.auth
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import aiplatform_v1

    try:
        credentials, default = google.auth.default()
        if (project := project or default) is None:
            raise ValueError("no project is set: give --project")
        client = aiplatform_v1.JobServiceClient(
            credentials=credentials,
            client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"},
        )
        job_spec = aiplatform_v1.CustomJobSpec.from_json(json.dumps(spec))
        job = aiplatform_v1.CustomJob(display_name=name, job_spec=job_spec)
        parent = f"projects/{project}/locations/{region}"
        return client.create_custom_job(parent=parent, custom_job=job).name
    except (GoogleAuthError, GoogleAPICallError) as error:
        raise ValueError(f"Vertex AI did not take the job: {error}") from error

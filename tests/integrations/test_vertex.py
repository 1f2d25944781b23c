"""A run as a job of Vertex AI: what it asks for, what it starts, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.integrations import vertex
from dylora.run_config import RunConfig

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
GIVEN = {
    "machine": "a3-highgpu-1g",
    "spot": True,
    "image": "r/dylora:1",
    "bucket": "gs://mine/runs",
}
WORDS = ["--config", str(CONFIG), "--machine", "a3-highgpu-1g", "--spot"]
WORDS += ["--image", "r/dylora:1", "--bucket", "gs://mine/runs"]


def spec_of(*overrides: str, **changes: object) -> dict:
    config = load_run_config(CONFIG, overrides)
    return vertex.custom_job_spec(config, **{**GIVEN, "hours": 24, **changes})


def container(spec: dict) -> dict:
    return spec["workerPoolSpecs"][0]["containerSpec"]


def messages():
    """The messages of Vertex AI's own library."""
    return pytest.importorskip("google.cloud.aiplatform_v1.types")


@pytest.mark.parametrize(("machine", "spot"), [("a3-highgpu-1g", True), ("a2-highgpu-1g", False)])
def test_the_spec_is_one_of_vertex_ais_own_messages_and_nothing_is_lost(machine, spot):
    spec = spec_of(machine=machine, spot=spot)
    types = messages()
    from google.protobuf import json_format

    message = types.CustomJobSpec.from_json(json.dumps(spec))  # refuses unknown fields
    assert json_format.MessageToDict(types.CustomJobSpec.pb(message)) == spec
    assert message.scheduling.restart_job_on_worker_restart
    wanted = "SPOT" if spot else "STANDARD"
    assert message.scheduling.strategy == types.Scheduling.Strategy[wanted]
    [pool] = message.worker_pool_specs
    assert pool.machine_spec.accelerator_type == types.AcceleratorType[vertex.ACCELERATORS[machine]]
    with pytest.raises(Exception, match="typo"):
        types.CustomJobSpec.from_json(json.dumps(spec | {"typo": 1}))


@pytest.mark.parametrize("restarted", [False, True])
def test_the_container_trains_these_settings_in_the_checkpoint_folder_and_resumes(
    restarted, tmp_path
):
    """Its command, run with a program in dylora's place that tells its words."""
    spec = container(spec_of("train.seed=7"))
    assert "env" not in spec  # nothing secret, nothing at all
    mounted, runs = tmp_path / "gcs", tmp_path / "gcs/mine/runs/ckpt"
    (runs / "quickstart" / "checkpoint-5").mkdir(parents=True)
    if restarted:
        (runs / "quickstart" / "checkpoint-5" / "manifest.json").touch()
    program = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    (tmp_path / "dylora").write_text(program)
    (tmp_path / "dylora").chmod(0o755)
    script = spec["command"][2].replace("/tmp/run.yaml", str(tmp_path / "run.yaml"))
    script = script.replace("/gcs/", f"{mounted}/")
    ended = subprocess.run(
        [*spec["command"][:2], script, *spec["command"][3:], *spec["args"]],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "AIP_CHECKPOINT_DIR": "gs://mine/runs/ckpt/"},
        capture_output=True,
        text=True,
        check=True,
    )
    command, *words = json.loads(ended.stdout)
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert command == "train"
    assert given["--output_dir"] == f"{runs}/"
    assert given.get("--resume_from_checkpoint") == ("latest" if restarted else None)
    read = load_run_config(given["--config"])
    assert read == load_run_config(CONFIG, ["train.seed=7"])


def test_a_dry_run_prints_a_file_for_gcloud_and_the_command_that_takes_it(capsys):
    assert main(["submit", *WORDS, "--project", "p", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == (
        "# gcloud ai custom-jobs create --region=us-central1 --project=p "
        "--display-name=quickstart --config=job.yaml"
    )
    assert yaml.safe_load(printed) == spec_of()


def test_submitting_hands_the_same_spec_to_vertex_ai(monkeypatch, capsys):
    messages()
    import google.auth
    from google.cloud import aiplatform_v1

    asked = []

    class Client:
        def __init__(self, *, credentials, client_options):
            asked.append(client_options["api_endpoint"])

        def create_custom_job(self, *, parent, custom_job):
            asked.extend([parent, custom_job])
            return aiplatform_v1.CustomJob(name=f"{parent}/customJobs/1")

    monkeypatch.setattr(google.auth, "default", lambda: (None, "mine"))
    monkeypatch.setattr(aiplatform_v1, "JobServiceClient", Client)
    assert main(["submit", *WORDS, "--region", "europe-west4"]) == 0
    assert capsys.readouterr().out == (
        "submitted projects/mine/locations/europe-west4/customJobs/1\n"
    )
    endpoint, parent, job = asked
    assert endpoint == "europe-west4-aiplatform.googleapis.com"
    assert parent == "projects/mine/locations/europe-west4"
    assert job.job_spec == aiplatform_v1.CustomJobSpec.from_json(json.dumps(spec_of()))


def test_without_the_library_the_error_names_the_extra_and_the_way_without_it(monkeypatch, capsys):
    monkeypatch.setattr(vertex, "find_spec", lambda name: None)
    assert main(["submit", *WORDS]) == 2
    error = capsys.readouterr().err
    assert "pip install 'dylora[vertex]'" in error
    assert "--dry_run" in error


@pytest.mark.parametrize(
    ("overrides", "changes", "says"),
    [
        (["data.sources=[{name: mine, path: rows.jsonl}]"], {}, "give /gcs/BUCKET/"),
        (["data.sources=[{name: mine, path: /data/rows}]"], {}, "/data/rows, which the job"),
        (["model.base=./my_base"], {}, "model.base is ./my_base"),
        (
            ["data.sources=[{name: mine, path: o/n, validation_path: held.jsonl}]"],
            {},
            "the validation_path of the source mine is held.jsonl, which the job",
        ),
        (["data.template=mine.jinja"], {}, "data.template is mine.jinja, which the job"),
        (
            ["eval.benchmark_tasks=mbpp", "eval.benchmark_files.mbpp=mbpp.jsonl"],
            {},
            "eval.benchmark_files.mbpp is mbpp.jsonl, which the job",
        ),
        ([], {"bucket": "mine/runs"}, "must be gs://BUCKET/FOLDER"),
        ([], {"spot": False}, "add --spot, or take a2-highgpu-1g"),
    ],
)
def test_what_a_job_could_not_do_is_refused(overrides, changes, says):
    with pytest.raises(ValueError, match=says):
        spec_of(*overrides, **changes)


def test_names_of_the_hub_and_files_in_a_bucket_are_taken():
    for path in ("owner/name", "/gcs/mine/rows.jsonl"):
        spec_of(f"data.sources=[{{name: mine, path: {path}}}]", f"model.base={path}")
    held = "data.sources=[{name: mine, path: o/n, validation_path: /gcs/mine/held.jsonl}]"
    spec_of(held, "data.template=/gcs/mine/t.jinja")
    spec_of("data.template=chatml")
    vertex.check_reachable(RunConfig())


# The image


def test_the_image_is_pinned_is_not_roots_and_copies_what_there_is():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    words = [word for step in steps if step[0] == "FROM" for word in step[1:]]
    assert words[0].startswith("nvidia/cuda:")
    assert "runtime" in words[0]
    installs = [" ".join(step) for step in steps if "pip" in step]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    names = [step[0] for step in steps]
    users = [step[1] for step in steps if step[0] == "USER"]
    assert users == ["dylora"]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    copied = {word for step in steps if step[0] == "COPY" for word in step[1:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)

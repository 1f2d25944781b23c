"""The settings of a run, each default once: the sections of its YAML file beside the mixture's."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from dylora.config import OF_ROUTERS, MoELoraConfig, Quantization
from dylora.data_config import DataConfig, SourceConfig
from dylora.fields import FieldError, check_fields, option, require
from dylora.train_config import Schedule, TrainConfig

Precision = Literal["float32", "bfloat16", "float16"]
Service = Literal["wandb", "tensorboard", "trackio", "mlflow"]
MAX_NAME = 255
BenchmarkStrategy = Literal["none", "epoch", "final"]
OnKnown = Literal["skip", "continue", "new"]
Start = Literal["known", "fresh"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base."""

    base: str = "google/codegemma-2b"
    """A hub name, a folder, or tiny-code-llama (the embedded model)."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Precision = "bfloat16"
    """Precision of the base and its activations; experts and routers are float32 always."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu; or a torch device."""
    attn_implementation: str | None = None
    """Attention back end of transformers; none: its own choice."""
    quantization: Quantization = "none"
    """How the base's linear layers are stored (4 bit: nf4); all but none need dylora[quant]."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during and after training."""

    eval_steps: int | None = option(None, least=1)
    """Evaluate every so many steps; none: at the end only."""
    batch_size: int = option(8, least=1)
    """Examples in a forward pass."""
    eval_subset: int | None = option(None, least=1)
    """Use only this many validation rows of each set."""
    load_best_at_end: bool = False
    """After the last step take back the weights with the lowest validation loss: results.json, the
    table and the plots are theirs then, and the model that training gives back."""
    skill_answers: int = option(0, least=0)
    """Test answers of each embedded skill to generate and check before and after training."""
    benchmark_strategy: BenchmarkStrategy = "none"
    """When benchmark_tasks are run in training, each time after a save: final: after the last step;
    epoch: also after each step that ends a pass over the data (with a max_steps below one pass,
    after the last step alone)."""
    benchmark_tasks: list[str] = field(default_factory=list)
    """Suites, as --tasks of run.py benchmark names them."""
    benchmark_limit: int | None = option(None, least=1)
    """Only the first so many tasks of each suite."""
    benchmark_files: dict[str, str] = field(default_factory=dict)
    """Suites that are read from a local file instead of the hub."""

    def __post_init__(self) -> None:
        check_fields(self)
        named = self.benchmark_strategy == "none" or bool(self.benchmark_tasks)
        rule = "the names of suites, since benchmark_strategy asks for them"
        require(named, "benchmark_tasks", self.benchmark_tasks, rule)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells."""

    RENAMED: ClassVar[dict[str, str | None]] = {"wandb_project": "project"}

    logging_steps: int = option(10, least=1)
    """Steps between two lines of metrics."""
    collapse_steps: int = option(100, least=1)
    """Warn when a site has been collapsed for so many steps: see routing/metrics.py."""
    report_to: list[Service] = field(default_factory=list)
    """wandb (offline without a key), tensorboard, trackio, mlflow: services that the metrics are
    mirrored to, each by a process of its own that cannot stop a run; metrics.jsonl has all."""
    wandb: bool = False
    """As wandb in report_to."""
    project: str = "dylora"
    """The project, or experiment, of services that have such."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def services(self) -> list[str]:
        """Those that the metrics are mirrored to, each once."""
        return list(dict.fromkeys([*self.report_to, *(["wandb"] if self.wandb else [])]))


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a stream: its rows are judged, learned by one expert alone, and kept."""

    name: str
    """Of the stage, and of the skill that it teaches."""
    sources: list[SourceConfig] = option(accept=bool, rule="at least one source")
    """Its sets, as data.sources: rows of one skill."""
    on_known: OnKnown = "skip"
    """When its rows are of a known skill. skip: name the expert and learn nothing; continue: train
    that expert further; new: add another one."""
    start: Start = "known"
    """Where its new expert starts. known: at the share of a known expert's update, of its rank and
    alpha, that has the lowest loss on its rows; fresh: without an update."""
    shared: bool = False
    """Train the shared experts of moe.shared_experts instead, for all skills to come."""
    rank: int | None = option(None, least=1)
    """Of its expert; none: moe.r."""
    alpha: float | None = option(None, above=0)
    """Of its expert; none: that of moe for the same alpha / rank."""
    epochs: float | None = option(None, above=0)
    """This and the following, none: as in train. Passes over its data."""
    max_steps: int | None = option(None, least=1)
    """Optimizer steps; goes before epochs."""
    batch_size: int | None = option(None, least=1)
    """Examples in a forward pass."""
    learning_rate: float | None = option(None, above=0)
    """Of its expert; an expert alone has a gate of 1 and takes the rate of a single LoRA."""
    lr_scheduler_type: Schedule | None = None
    """Its schedule, from its first step to its last."""
    warmup_steps: int | None = option(None, least=0)
    """Steps over which the rate rises from 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_folder_name(self.name, MAX_NAME - 16)  # stage-<number>- stands before it
        require(self.name.isprintable(), "name", self.name, "printable")
        streams = [source.name for source in self.sources if source.stream_rows]
        require(not streams, "sources", streams, "without stream_rows in a stage")

    def settings(self, common: TrainConfig) -> TrainConfig:
        """The training of this stage, where `common` says what it leaves open."""
        names = ("epochs", "max_steps", "batch_size", "learning_rate", "lr_scheduler_type")
        given: Any = {name: getattr(self, name) for name in (*names, "warmup_steps")}
        given = {name: value for name, value in given.items() if value is not None}
        if "epochs" in given:
            given.setdefault("max_steps", None)
        return replace(common, **given, init_from=None)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: everything it writes lies under <output_dir>/<name>/."""

    name: str = "run"
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder of all runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoELoraConfig = field(default_factory=MoELoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stages: list[StageConfig] = field(default_factory=list)
    """Skills that are learned one after another, each as a run of its own; none: one run."""

    def __post_init__(self) -> None:
        check_fields(self)
        require_folder_name(self.name, MAX_NAME)
        asked = self.data.train_on_inputs and self.moe.routes_prompts
        rule = f"false with moe.router_scope {self.moe.router_scope}, which routes by what is asked"
        require(not asked, "data.train_on_inputs", asked, rule)
        streams = [source.name for source in self.data.sources if source.stream_rows]
        rule = f"without stream_rows with moe.router_scope {self.moe.router_scope}"
        require(not (streams and self.moe.routes_prompts), "data.sources", streams, rule)
        clusters = self.train.prompt_clusters
        fits = clusters is None or (self.moe.routes_prompts and not self.stages)
        rule = "unset unless moe.router_scope is prompt or running_mean, without stages"
        require(fits, "train.prompt_clusters", clusters, rule)
        least = self.moe.num_experts - self.moe.shared_experts
        rule = f"at least {least}, as many as there are routed experts"
        require(clusters is None or clusters >= least, "train.prompt_clusters", clusters, rule)
        for name, holds, value, rule in self._rules_of_stages() if self.stages else ():
            require(holds, name, value, rule)
        for index, stage in enumerate(self.stages):
            try:
                stage.settings(self.train)
            except FieldError as error:
                raise error.under(f"stages[{index}]") from None

    def check_acts(self) -> None:
        """Raises FieldError for a setting that nothing would follow.

        It is asked before a run begins. One that has begun goes on, and what it made is read.
        """
        for index, stage in enumerate(self.stages):
            try:
                stage.settings(self.train).check_acts()
            except FieldError as error:
                raise error.under(f"stages[{index}]") from None
        if not self.stages:
            try:
                self.train.check_acts()
            except FieldError as error:
                raise error.under("train") from None
        moe, plus = self.moe, self.train.optim == "lora_plus"
        rule = "another one with moe.adapter_type loha, whose matrices are no A and B"
        require(not plus or moe.adapter_type == "lora", "train.optim", "lora_plus", rule)
        rule = "another one with moe.freeze_A, which trains no A: learning_rate is of the B's then"
        require(not plus or not moe.freeze_A, "train.optim", "lora_plus", rule)
        # What a checkpoint brings of a router is as it was.
        if moe.use_moe_routing and moe.router_type == "fixed" and self.train.init_from is None:
            rules = moe.by_default(OF_ROUTERS, "with router_type fixed, which has no router")
            for name, holds, rule in rules:
                require(holds, f"moe.{name}", getattr(moe, name), rule)

    def _rules_of_stages(self) -> Iterator[tuple[str, bool, Any, str]]:
        """What a stream asks of a run: the field to name in an error, whether it holds, its value,
        what it must be."""
        names = [one.name for one in self.stages]
        shared, scope = [one.shared for one in self.stages], self.moe.router_scope
        yield "stages", len(names) == len(set(names)), names, "of different names"
        first = shared == sorted(shared, reverse=True)
        yield "stages", first, names, "in another order: those that are shared first"
        sources = [one.name for one in self.data.sources]
        yield "data.sources", not sources, sources, "empty with stages, which have their own"
        routed = self.moe.use_moe_routing and scope == "prompt"
        yield "moe.router_scope", routed, scope, "prompt with stages (and use_moe_routing true)"
        count, strategy = self.moe.shared_experts, self.eval.benchmark_strategy
        fits = any(shared) == (count > 0) or (count > 0 and self.train.init_from is not None)
        yield "moe.shared_experts", fits, count, "above 0 with a stage that is shared, else 0"
        rule = "none with stages: run.py benchmark takes any checkpoint of the stream"
        yield "eval.benchmark_strategy", strategy == "none", strategy, rule
        parallel = self.train.parallel
        yield "train.parallel", parallel == "none", parallel, "none with stages: one process"
        frozen = self.train.train_experts
        yield "train.train_experts", frozen is None, frozen, "unset with stages"


def require_folder_name(name: str, longest: int) -> None:
    """Raises FieldError unless `name` may be a folder's, of at most so many bytes."""
    plain = name not in ("", ".", "..") and not set(name) & set("/\\\0")
    require(plain, "name", name, "the name of a folder, without slashes")
    short = len(name.encode()) <= longest
    require(short, "name", name, f"of at most {longest} bytes, as file systems want it")


def dump_run_config(config: RunConfig) -> str:
    """All settings as YAML that `load_run_config` reads back as the same config."""
    import yaml  # comes with transformers

    values = asdict(config)
    values["moe"] = config.moe.to_dict()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)

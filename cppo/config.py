"""Settings of a run: frozen dataclasses, one a section; YAML in and out. Never imports torch.

The defaults suit a pretrained model. Where `model` is "builtin" the values of `BUILTIN` stand in
for them, so that `cppo train` alone does something worth watching on a plain CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where items come from, beside `data` itself.

    Args:
        images: Column of the images.
        question: Column of the question, with one <image> for each image.
        answer: Column of the answer.
        kind: Column to group results by; empty for none.
        eval_share: Share of the rows held out where the source has no split of its own.
        max_skipped_share: The run stops when more than this share of rows cannot be used.
        max_image_pixels: Larger images are skipped before they are decoded.
        instruction: Appended to every question; null for the method's own where it has one, as
            vision_sr1 and visionary_r1 do, else the model's own, as the built-in policy's, else a
            request to think and to box the answer.
        difficulty: Of the built-in task, 1 to 3.
    """

    images: str = "images"
    question: str = "problem"
    answer: str = "answer"
    kind: str = ""
    eval_share: float = 0.1
    max_skipped_share: float = 0.1
    max_image_pixels: int = 50_000_000
    instruction: str | None = None
    difficulty: int = 1


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How the model is loaded and what of it is trained.

    Args:
        max_prompt_tokens: Rows with a longer prompt, image tokens included, are skipped.
        min_pixels: Smaller images are scaled up to this many pixels; the model's own if null. Of
            Qwen families alone.
        max_pixels: Larger images are scaled down to this many pixels, or to as many in tiles; the
            model's own if null. Not of LLaVA-OneVision and Gemma 3.
        freeze_vision: Leave the vision tower as it is.
        gradient_checkpointing: Recompute activations instead of keeping them.
        lora_rank: Train adapters of this rank instead of the weights; 0 for the weights.
        lora_alpha: The adapters' scale, over the rank.
        lora_targets: Modules that get adapters, as peft takes them: all-linear, or a pattern of
            whole names, such as .*[qv]_proj.
    """

    max_prompt_tokens: int = 2048
    min_pixels: int | None = None
    max_pixels: int | None = None
    freeze_vision: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 64.0
    lora_targets: str = "all-linear"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled.

    Args:
        prompts: Prompts in a step, over all processes.
        responses: Responses for each prompt: the group.
        max_new_tokens: Longest response.
        temperature: Of sampling, and of every log-probability and entropy.
        top_p: Sample from the likeliest tokens that reach this share.
        batch_responses: Responses sampled side by side; bounds memory.
        compile: Sample with compiled code, by torch.compile: a token takes less time, but compiling
            a minute or more in the first step, and again, less long, for the first batch of another
            kind (of several prompts, of one, of one response to each). For models that attend in
            groups, in float32, or in 16 bits with adapters (training all weights keeps them in
            float32); else, and where it fails, the log says so and sampling goes on without.
        max_resamples: Rounds of new prompts in place of groups without spread, for methods that
            resample.
    """

    prompts: int = 32
    responses: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    batch_responses: int = 64
    compile: bool = False
    max_resamples: int = 3


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How responses are rewarded, beside `reward` itself.

    Args:
        timeout_seconds: Limit of one call of the reward function.
        workers: Processes that call it.
    """

    timeout_seconds: float = 5.0
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and how a step's rollouts are spent.

    Args:
        learning_rate: Peak rate.
        schedule: "constant", "linear" or "cosine", after the warm-up.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        max_grad_norm: Gradients are clipped to this norm.
        mini_batch_prompts: Prompts in one optimizer step; 0 for all of a rollout's.
        epochs: Passes over a step's rollouts.
        tokens_per_micro_batch: Tokens scored at once, a process: a prompt once for each view of it,
            its responses counted as long as the longest; bounds memory. A group that has more is
            cut, its prompt repeated.
        max_bad_steps: Non-finite steps in a row after which the run stops.
    """

    learning_rate: float = 1e-6
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    mini_batch_prompts: int = 0
    epochs: int = 1
    tokens_per_micro_batch: int = 16384
    max_bad_steps: int = 5


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation before, during and after training.

    Args:
        items: Held-out items before and after; fewer where the source has fewer.
        every: Steps between evaluations; 0 for none during training.
        items_during: Held-out items during training.
        k: Responses for each item.
        temperature: Of sampling.
    """

    items: int = 256
    every: int = 50
    items_during: int = 64
    k: int = 4
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        model: "builtin", a folder, or a Hub id of a supported family.
        data: "builtin", a file or folder (parquet, JSON lines, images), or a Hub id.
        method: The algorithm (grpo, dapo, dr_grpo, gspo, cppo, cppo_areal, papo, papo_dapo, vppo,
            pgpo, dvrp, noisy_rollout, vision_sr1, visionary_r1); `cppo methods` tells more.
        method_options: Options of the method, in place of its defaults; `cppo methods NAME` lists
            them.
        reward: "default", or "package.module:function". Of vision_sr1 and visionary_r1 "default",
            which is then their own.
        steps: Rollout-and-update steps.
        seed: Of everything random.
        output: Run folder; null makes one under runs/.
        backend: Hardware: auto, or a name that `cppo backends` lists.
        attention: Attention implementation; auto takes the backend's best. Flash attention serves
            the vision tower, and language models that cannot attend in groups; others do so
            through PyTorch's own.
        precision: float32, bfloat16, float16, or auto for the backend's best.
        deterministic: Only algorithms that give the same result each time; slower.
        timeout_minutes: Longest that one process waits for another, a whole rollout of it included.
        checkpoint_every: Steps between checkpoints; 0 for one at the end alone.
        samples_every: Steps between sample rollouts in the run folder; 0 for none.
    """

    model: str = "builtin"
    data: str = "builtin"
    method: str = "cppo"
    method_options: dict[str, Any] = field(default_factory=dict)
    reward: str = "default"
    steps: int = 500
    seed: int = 0
    output: str | None = None
    backend: str = "auto"
    attention: str = "auto"
    precision: str = "auto"
    deterministic: bool = False
    timeout_minutes: float = 120.0
    checkpoint_every: int = 50
    samples_every: int = 10
    dataset: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation.

    Args:
        model: "builtin", a folder, or a Hub id.
        data: "builtin", a file or folder, or a Hub id; its held-out rows are used.
        split: "eval" for the held-out rows, "train" for the others.
        k: Responses for each item.
        count: Items, at most.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens that reach this share.
        max_new_tokens: Longest response.
        batch_responses: Responses sampled side by side; bounds memory.
        compile: Sample with compiled code, as `rollout.compile` of a training run does; in 16 bits
            with adapters or without.
        reward: "default", or "package.module:function"; "vision_sr1" or "visionary_r1" for models
            that were trained so: their instruction, unless one is given, and their answers.
        seed: Of sampling.
        json: File for the results and every response; null for none.
        detector: Also score the perception-token detector, on the built-in data.
        backend: Hardware: auto, or a name that `cppo backends` lists.
        attention: Attention implementation; auto takes the backend's best.
        precision: float32, bfloat16, float16, or auto for the backend's best.
    """

    model: str = "builtin"
    data: str = "builtin"
    split: str = "eval"
    k: int = 8
    count: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    batch_responses: int = 64
    compile: bool = False
    reward: str = "default"
    seed: int = 0
    json: str | None = None
    detector: bool = False
    backend: str = "auto"
    attention: str = "auto"
    precision: str = "auto"
    dataset: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What a study measures, and on how much: the same in all of its runs.

    Args:
        every: Steps between points of the learning curves.
        curve_items: Held-out items at each point.
        puzzles: Reference solutions at each point that the detector is measured on.
        items: Held-out items at the end: as they are, and on each view.
        k: Responses for each item.
    """

    every: int = 10
    curve_items: int = 64
    puzzles: int = 64
    items: int = 256
    k: int = 4


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Variants of a run, compared over seeds on the built-in task.

    Args:
        variants: Name -> settings of `cppo train` in which it differs from the base.
        base: Settings of `cppo train` for all runs.
        seeds: Each variant runs once with each.
        baseline: The variant that the others are compared with; empty for the first.
        output: Folder of the study. What is done there is not done again.
        jobs: Runs side by side.
        threads: CPU threads of each run.
        timeout_minutes: Longest that one run may take.
        keep: Keep each run's own folder, with its model and checkpoint.
    """

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    baseline: str = ""
    output: str = "runs/study"
    jobs: int = 2
    threads: int = 1
    timeout_minutes: float = 60.0
    keep: bool = False
    measure: MeasureConfig = field(default_factory=MeasureConfig)


@dataclass(frozen=True, kw_only=True)
class PerturbConfig:
    """A contact sheet.

    Args:
        image: Path of the image.
        output: Path of the sheet; null for one named after the image, here.
        seed: Of the draws.
        draws: Draws of each perturbation.
    """

    image: str = ""
    output: str | None = None
    seed: int = 0
    draws: int = 3


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """One examination of a backend.

    Args:
        backend: Hardware: auto, or a name that `cppo backends` lists.
        processes: Processes to examine, each on a device of its own.
        json: File for the report, to attach to an issue; null for none.
    """

    backend: str = "auto"
    processes: int = 1
    json: str | None = None


BUILTIN: Mapping[str, Any] = {
    "steps": 60,
    # Many prompts and few responses: with 16 x 8 the policy learned its prompts by heart.
    "rollout.prompts": 64,
    "rollout.responses": 4,
    "rollout.max_new_tokens": 64,
    "rollout.batch_responses": 512,
    "optimizer.learning_rate": 5e-5,
    "optimizer.warmup_steps": 5,
    "evaluation.items": 512,
    "evaluation.every": 20,
    "evaluation.items_during": 128,
}


def check(config: TrainConfig | EvalConfig | StudyConfig | PerturbConfig | DoctorConfig) -> None:
    """Raises ValueError for values that contradict each other or make no sense."""
    for name, given in _flat(config):
        minimum = MINIMA.get(name.removeprefix("rollout."))
        if name in POSITIVE and not given > 0:
            raise ValueError(f"{name} is {given!r}; it must be above 0")
        if minimum is not None and given < minimum:
            raise ValueError(f"{name} is {given!r}; it must be at least {minimum}")
        if name.endswith("top_p") and not 0 < given <= 1:
            raise ValueError(f"{name} is {given!r}; it must be above 0, at most 1")
        if name == "dataset.max_skipped_share" and not 0 <= given <= 1:
            raise ValueError(f"{name} is {given!r}; it must be from 0 to 1")
        if name in SHARES and not 0 < given < 1:
            raise ValueError(f"{name} is {given!r}; it must be between 0 and 1")
        if name in CHOICES and given not in CHOICES[name]:
            raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(CHOICES[name])}")
    if isinstance(config, TrainConfig):
        prompts, given = config.rollout.prompts, config.optimizer.mini_batch_prompts
        if given > prompts:
            raise ValueError(
                f"optimizer.mini_batch_prompts is {given}; it must be 0 (all), or at most "
                f"rollout.prompts ({prompts})"
            )


# What `check` holds settings to; options of sampling have the same limits in every command.
MINIMA: Mapping[str, float] = {
    "steps": 0,
    "checkpoint_every": 0,
    "samples_every": 0,
    "k": 1,
    "count": 1,
    "draws": 1,
    "processes": 1,
    "prompts": 1,
    "responses": 2,  # a group
    "max_new_tokens": 1,
    "batch_responses": 1,
    "max_resamples": 0,
    "temperature": 0,
    "dataset.max_image_pixels": 1,
    "policy.max_prompt_tokens": 1,
    "policy.lora_rank": 0,
    "rewards.workers": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.mini_batch_prompts": 0,
    "optimizer.epochs": 1,
    "optimizer.tokens_per_micro_batch": 1,
    "optimizer.max_bad_steps": 1,
    "evaluation.items": 1,
    "evaluation.items_during": 1,
    "evaluation.every": 0,
    "evaluation.k": 1,
    "evaluation.temperature": 0,
    "jobs": 1,
    "threads": 1,
    "measure.every": 1,
    "measure.curve_items": 1,
    "measure.puzzles": 1,
    "measure.items": 1,
    "measure.k": 1,
}
POSITIVE = frozenset(
    {
        "rollout.temperature",
        "timeout_minutes",
        "rewards.timeout_seconds",
        "optimizer.learning_rate",
        "optimizer.max_grad_norm",
        "policy.lora_alpha",
    }
)
SHARES = frozenset({"dataset.eval_share", "optimizer.beta1", "optimizer.beta2"})
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "split": ("eval", "train"),
}


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from _flat(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value

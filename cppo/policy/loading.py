"""Loading a policy from a folder or the Hub, and saving it so that `from_pretrained` reads it."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cppo.attention import groups
from cppo.policy.batch import Row
from cppo.policy.families import Family, family_of
from cppo.policy.packed import obstacle, packed_tokens
from cppo.policy.padded import padded_tokens

logger = logging.getLogger(__name__)
INSTRUCTION = (
    "\nFirst think about what the image shows and reason inside <think> </think>. "
    "Then put the final answer in \\boxed{}."
)

Sight = tuple[int, ...]
# Adapters of weights that are read directly: by the scoring kernel, and by PatchProjection.
UNADAPTABLE = ("lm_head.lora_A", "patch_embed.proj.lora_A")


@dataclass(kw_only=True, eq=False)
class Policy:
    """A model with all that is needed to write prompts for it and to read its responses."""

    model: Any  # what is trained and saved; with LoRA, the model within its adapters
    family: Family
    tokenizer: Any
    image_processor: Any
    eos: tuple[int, ...]  # ids that end a response
    precision: torch.dtype  # that it computes in; weights may be wider
    attention: str  # as transformers names it
    source: str
    # What the vision tower has made of pixels without gradient, while they are held; see `sight`.
    features: MutableMapping[Tensor, dict[Sight, Tensor]] = field(
        default_factory=WeakTensorKeyDictionary
    )

    def __post_init__(self) -> None:
        if self.packs:  # for good: checkpointing recomputes a forward within the backward
            self.language.config._attn_implementation = groups.register(self.attention)

    @property
    def base(self) -> Any:
        """The transformers model itself, adapters active within it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def language(self) -> Any:
        return self.family.language_model(self.base)

    @property
    def packs(self) -> bool:
        """Whether a prompt is scored once for all its responses, or once for each."""
        return not obstacle(self.family, self.language.config)

    def count_tokens(self, rows: Sequence[Row]) -> int:
        """How many tokens pass the language model where rows are scored in one call."""
        return packed_tokens(rows) if self.packs else padded_tokens(rows)

    @property
    def sight(self) -> Sight:
        """Changes with what the vision tower makes of a picture: the versions, as PyTorch counts
        them, of the parameters that are trained there. Empty where none is, or where adapters are
        left out (peft then takes their gradients from them)."""
        learnt = [
            parameter
            for name, parameter in self.base.model.named_parameters()
            if parameter.requires_grad and name.split(".")[0] in self.family.vision
        ]
        return tuple(p._version for p in learnt)

    @property
    def instruction(self) -> str:
        """What to append to questions: the model's own, from its tokenizer's settings, if any."""
        return str(self.tokenizer.init_kwargs.get("instruction", INSTRUCTION))

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "get_base_model")

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def head(self) -> Tensor:
        """The output projection, (V, D)."""
        weight: Tensor = self.base.lm_head.weight
        return weight

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The starting policy, where LoRA trains only adapters."""
        assert self.has_adapters
        with self.model.disable_adapter():
            yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Computing in the policy's precision, whatever its weights are kept in."""
        if self.precision.itemsize != 2:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradient, in the policy's precision; training mode comes back after."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self.model.train(training)


def load(
    source: str,
    *,
    dtype: torch.dtype,
    attention: str,
    precision: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pixel_limits: Mapping[str, int] | None = None,
    freeze_vision: bool = False,
    gradient_checkpointing: bool = False,
    lora: Mapping[str, Any] | None = None,
) -> Policy:
    """Loads a folder or Hub id of a supported family.

    Args:
        dtype: Of the weights.
        attention: Attention implementation, as transformers names it.
        precision: To compute in; that of the weights if None.
        pixel_limits: `min_pixels`, `max_pixels` of an image, in place of the saved ones.
        freeze_vision: Keep the vision tower as it is.
        lora: Settings of peft's LoraConfig; None trains all weights.

    Raises ValueError where the source does not exist, lacks weights, or is not of a supported
    family; and where adapters are asked for on a weight that is read past them.
    """
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        AutoTokenizer,
        ProcessorMixin,
    )

    folder = Path(source).expanduser()
    is_path = folder.is_absolute() or source.startswith(".") or source.count("/") > 1
    if is_path and not folder.is_dir():
        raise ValueError(f"model {source!r} is no folder: give one that `save_pretrained` wrote")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"model {source!r} holds no config.json: give a folder that `save_pretrained` wrote, "
            "such as a run's model/"
        )
    source = str(folder) if folder.is_dir() else source
    try:
        config = AutoConfig.from_pretrained(source)
        family = family_of(config.model_type)
        if getattr(config.get_text_config(), "final_logit_softcapping", None):
            raise ValueError(
                f"model {source!r} caps its logits, and scores here are made of the head's weight "
                "alone: it cannot be used."
            )
        if not family.causal and "flash" in attention:
            logger.warning(
                "sdpa instead of %s, which has no mask for image tokens that attend to later ones",
                attention,
            )
            attention = "sdpa"
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Older models have their processor's template in a file that tokenizers do not read.
        if template := ProcessorMixin.get_processor_dict(source)[0].get("chat_template"):
            tokenizer.chat_template = template
        image_processor = family.load_image_processor(source, dict(pixel_limits or {}))
        model, report = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model {source!r} cannot be loaded: {error}. Give a folder that `save_pretrained` "
            "wrote, the id of a model on the Hub, or 'builtin'."
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(
            f"model {source!r} lacks {len(missing)} of its weights, {missing[0]} among them: its "
            "files are incomplete, copy or download them again."
        )
    family.prepare(model)
    place(model, device)
    if freeze_vision:
        for part in family.vision:
            getattr(model.model, part).requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        model = _adapt(model, lora, family.vision if freeze_vision else ())
    model.train()
    policy = Policy(
        model=model,
        family=family(config, tokenizer, image_processor),
        tokenizer=tokenizer,
        image_processor=image_processor,
        eos=_end_tokens(model, tokenizer),
        precision=precision or dtype,
        attention=attention,
        source=source,
    )
    if reason := obstacle(family, policy.language.config):
        logger.warning("a prompt is scored once for each of its responses: %s", reason)
    return policy


def place(model: Any, device: str | torch.device) -> None:
    """Moves a transformers model, what it shares between its parts still shared.

    On devices whose tensors PyTorch cannot put into parameters that exist, `to` makes new ones, an
    embedding and the head that is tied to it each their own.
    """
    model.to(device)
    model.tie_weights()


def save(policy: Policy, folder: Path) -> None:
    """Writes model, tokenizer, chat template and processors in Hugging Face format.

    LoRA adapters are merged into the weights of a copy, so that `from_pretrained` needs no peft.
    """
    model: Any = policy.model
    if policy.has_adapters:
        model = _merged(policy)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
    if settings := policy.family.processor_settings():
        (folder / "processor_config.json").write_text(json.dumps(dict(settings), indent=2) + "\n")


def frozen_copy(policy: Policy) -> Policy:
    """A copy that never changes, to measure how far the policy has moved."""
    import copy

    model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return Policy(**{**vars(policy), "model": model, "features": WeakTensorKeyDictionary()})


def _adapt(model: Any, lora: Mapping[str, Any], frozen: Sequence[str]) -> Any:
    """The model within adapters, none of them in the `frozen` parts of it."""
    from peft import LoraConfig, get_peft_model

    if frozen:
        lora = {**lora, "exclude_modules": rf".*\b({'|'.join(frozen)})\b.*"}
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    except ValueError as error:
        raise ValueError(f"policy.lora_targets is {lora['target_modules']!r}: {error}") from error
    for name, _ in adapted.named_modules():
        if name.endswith(UNADAPTABLE):
            raise ValueError(
                f"LoRA cannot adapt {name.removesuffix('.lora_A')}, whose weight is read past its "
                "adapters: leave it out of policy.lora_targets ('all-linear' does)."
            )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    logger.info("LoRA: %s trainable parameters", f"{trainable:,}")
    return adapted


def _merged(policy: Policy) -> Any:
    """A copy in the CPU's memory: the device's may be full with what training needs."""
    import copy

    tensors = itertools.chain(policy.model.parameters(), policy.model.buffers())
    copies: dict[int, Any] = {}
    for tensor in tensors:
        on_cpu = tensor.detach().to("cpu", copy=True)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        copies[id(tensor)] = torch.nn.Parameter(on_cpu, False) if is_parameter else on_cpu
    return copy.deepcopy(policy.model, copies).merge_and_unload()


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    given = model.generation_config.eos_token_id
    ends: Sequence[int] = given if isinstance(given, list) else [given]
    return tuple(sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None}))

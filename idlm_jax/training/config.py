"""What a training run is: frozen dataclasses, read from a YAML file in ``configs/train`` that says only what differs."""

from dataclasses import dataclass, field

from idlm_jax.backbone.adapter import TARGET_MODULES


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA of the modes ``lora`` and ``gated-lora``; names follow PEFT."""

    rank: int = 32
    # None: twice the rank, as LlamaFactory has it.
    alpha: float | None = None
    target_modules: tuple[str, ...] = tuple(TARGET_MODULES)
    use_rslora: bool = False
    # A PEFT directory to go on from instead of a fresh adapter.
    start_from: str | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 1e-5
    # Share of the steps over which the learning rate rises from zero, and the share of it that is left at the end.
    warmup: float = 0.03
    final: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    # On matrices only.
    weight_decay: float = 0.0
    # Largest global norm of the gradient; 0 is off.
    clip: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A part of the run with a loss of its own; the curriculum 1 → 2 → 3 is three of them."""

    steps: int
    # B, masks a group: trains strides up to B + 1.
    block_size: int = 3
    # "ce", "kl" or "tv" on noisy rows.
    noisy_loss: str = "ce"
    # α of the clean loss, a number or "auto" (method.md 2.4); not used in gated-lora.
    clean_weight: float | str = 0.2
    # "aligned" (official) or "random" group starts, and noisy rows a clean token.
    starts: str = "random"
    density: float = 1.0


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; -1 (at most once) takes those that are left."""

    data: int = 1
    fsdp: int = -1
    tp: int = 1


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run."""

    # Steps between checkpoints; one is always written at the end.
    every: int = 500
    keep_last: int = 2
    # Also kept: the checkpoints with the best held-out acceptance.
    keep_best: int = 1


@dataclass(frozen=True)
class EvaluationSettings:
    """Measuring on documents that are never trained on."""

    # Documents held out of the data; 0 is off.
    documents: int = 256
    # Steps between measurements; one is always taken at the end.
    every: int = 500


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    # Checkpoint to start from: whatever ``idlm generate`` takes.
    model: str
    # Token store made by ``idlm data``.
    data: str
    # Directory of everything that the run writes.
    output: str
    # "full", "lora", "gated-lora", or "ar" for plain fine-tuning.
    mode: str = "gated-lora"
    stages: tuple[Stage, ...] = ()
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    # True: warm-up and cosine run anew in every stage, as when each stage is a run of its own (official).
    schedule_by_stage: bool = False
    # Text or id of the mask token, for a model that names none.
    mask_token: str | None = None
    # Tokens a row, rows a step (of all processes), and parts a step is computed in.
    length: int = 2048
    batch_size: int = 8
    accumulation: int = 1
    seed: int = 0
    # Weights that stay as they are: patterns over names as `idlm train --dry-run` prints them, "embed_tokens.*".
    freeze: tuple[str, ...] = ()
    # Of the forward and backward pass; trained weights are kept in float32.
    dtype: str = "bfloat16"
    # What the backward pass computes again: "none", "dots" or "block".
    remat: str = "block"
    # Attention: "auto", "xla" or "cudnn".
    attention: str = "auto"
    # Rows of a sequence whose logits are held at a time.
    loss_chunk: int = 256
    # Losses of method.md 2.4: which noisy rows ("masked", official, or "answer"), whether prompts are learnt too, and
    # whether every document counts the same (None: yes for aligned starts, as in the official code).
    noisy_targets: str = "masked"
    learn_prompts: bool = False
    by_document: bool | None = None
    # The run stops when the smoothed loss exceeds its lowest value by this factor; 0 is off.
    divergence: float = 3.0
    mesh: MeshSettings = field(default_factory=MeshSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    # Also write TensorBoard event files.
    tensorboard: bool = False

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

"""`mpma pretrain`: from settings and a prepared store to a model directory."""

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from mpma_train.checkpoints import find_checkpoint, remove_run
from mpma_train.data.collator import PairCollator
from mpma_train.data.dataset import PairDataset
from mpma_train.data.store import Store
from mpma_train.model_card import write_model_card
from mpma_train.models import MpmaConfig, MpmaForPreTraining, MpmaProcessor
from mpma_train.output_paths import require_writable_directory
from mpma_train.settings import (
    MpmaTrainingArguments,
    Settings,
    changed_settings,
    parse_settings,
    save_settings,
)
from mpma_train.trainer import MpmaTrainer
from mpma_train.weights.load import check_directory, load_model
from mpma_train.weights.vocabulary import token_settings


def run(argv: Sequence[str]) -> int:
    """Train, and leave model, processor, settings, log and model card in `output_dir`.

    Args:
        argv: `CONFIG.yaml --setting value …`.

    Raises:
        ValueError, OSError: settings, data or an output directory that do not fit.
        FloatingPointError: the loss or its gradient stopped being finite.
        RuntimeError: training itself failed, which no setting is known to cause.
    """
    # Bars of a second for each saved file would cut through the log.
    disable_progress_bar()
    settings = parse_settings(argv)
    output_dir = _output_directory(settings.training.get("output_dir"))
    store = open_store(settings)
    checkpoint = find_checkpoint(
        output_dir,
        settings.training.get("resume_from_checkpoint"),
        overwrite=settings.data.overwrite_output_dir,
    )
    args = settings.training_arguments()

    trainer = build_trainer(settings, store, args)
    if trainer.is_world_process_zero():
        if checkpoint is None:
            remove_run(output_dir)
        values = settings.effective(trainer.model.config)
        _say_what_starts(store, trainer, checkpoint)
        if checkpoint:
            for change in changed_settings(values, Path(checkpoint).parent / "settings.yaml"):
                print(f"  not as before: {change}", flush=True)
        save_settings(values, output_dir / "settings.yaml")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        # Settings and data were checked before: this one needs its traceback.
        raise RuntimeError(f"training failed: {error}") from error
    trainer.save_model()
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        write_model_card(output_dir, store, settings, steps=steps, seed=args.seed)
        print(f"model written to {output_dir}")
    return 0


def open_store(settings: Settings) -> Store:
    """The store that the settings name.

    Raises:
        ValueError: they name none.
        OSError: it is not there.
    """
    if settings.data.data is None:
        raise ValueError("data: expected the directory of a prepared store (--data DIR), got none")
    return Store(settings.data.data)


def build_trainer(settings: Settings, store: Store, args: MpmaTrainingArguments) -> MpmaTrainer:
    """Model, data and optimiser of a run, seeded.

    Raises:
        ValueError, OSError: settings that do not fit the store, each other or the device.
    """
    set_seed(args.seed)
    model, processor = build_model(settings, store)
    dataset = _dataset(store, "train", model.config, settings, args)
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = _dataset(store, "validate", model.config, settings, args)
    if args.ddp_find_unused_parameters is None:
        # Transformers would search in every step; without its loss the fusion alone is unused.
        args.ddp_find_unused_parameters = not model.config.report_active
    trainer = MpmaTrainer(
        model=model,
        args=args,
        data_collator=PairCollator(processor, max_length=settings.data.max_length),
        train_dataset=dataset,
        eval_dataset=evaluated,
        processing_class=processor,
        text_learning_rate=settings.data.text_learning_rate,
    )
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp: accelerate shards on accelerators only and would leave it out in silence on "
            f"{args.device.type}; leave it out for plain data parallelism"
        )
    return trainer


def build_model(settings: Settings, store: Store) -> tuple[MpmaForPreTraining, MpmaProcessor]:
    """A new model for the store's tokenizer, or the one that `model_name_or_path` names.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a setting of the model is wrong, the named model has another vocabulary or
            weights that do not fit the settings, or the store's images have another size.
    """
    tokenizer = store.tokenizer()
    token_ids = token_settings(tokenizer)
    start = settings.data.model_name_or_path
    if start is None:
        config = MpmaConfig(**settings.model, **token_ids)
    else:
        check_directory(start, setting="model_name_or_path")
        config = MpmaConfig.from_pretrained(start, **settings.model)
        differing = [name for name, value in token_ids.items() if getattr(config, name) != value]
        if differing:
            raise ValueError(
                f"model_name_or_path: {start} has another tokenizer than {store.path} "
                f"({', '.join(differing)} differ); prepare the data with the model's tokenizer"
            )
    if store.side != config.target_size:
        raise ValueError(
            f"data: expected images of side {config.target_size} (image_size {config.image_size} × "
            f"target_scale {config.target_scale}), {store.path} was made for {store.side}; "
            f"prepare it again with --side {config.target_size}"
        )
    if settings.data.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length: expected at most max_position_embeddings, "
            f"{config.max_position_embeddings}, got {settings.data.max_length}"
        )
    if start is None:
        model = MpmaForPreTraining(config)
    else:
        model = load_model(start, config, setting="model_name_or_path")
    processor = MpmaProcessor.from_store(store, config)
    # Evaluations cut reports where training did.
    processor.tokenizer.model_max_length = settings.data.max_length
    return model, processor


def _dataset(
    store: Store, split: str, config: MpmaConfig, settings: Settings, args: MpmaTrainingArguments
) -> PairDataset:
    training = split == "train"
    data = settings.data
    dataset = PairDataset(
        store,
        split,
        shuffle_sentences=training and data.shuffle_sentences,
        augment=training and data.augment,
        # One pixel of what the encoder sees.
        max_shift=config.target_scale,
        shuffle_pairs=training and data.shuffle_pairs,
        seed=args.seed,
    )
    kind = "train" if training else "eval"
    batch = getattr(args, f"{kind}_batch_size") * args.world_size
    if args.dataloader_drop_last and dataset.num_studies < batch:
        raise ValueError(
            f"per_device_{kind}_batch_size: a batch of {batch} pairs needs as many studies, the "
            f"split {split} has {dataset.num_studies}"
        )
    return dataset


def _output_directory(path: str | None) -> Path:
    """Make it, once it is known to take files."""
    if path is None:
        raise ValueError("output_dir: expected a directory to write the run to, got none")
    directory = Path(path).expanduser()
    require_writable_directory("output_dir", directory)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _say_what_starts(store: Store, trainer: MpmaTrainer, checkpoint: str | None) -> None:
    args, dataset = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = math.ceil(dataset.num_studies // batch * args.num_train_epochs)
    steps = args.max_steps if args.max_steps > 0 else steps
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{len(dataset)} training pairs of {dataset.num_studies} studies from {store.path}, "
        f"{parameters / 1e6:.1f} M parameters, about {steps} steps of {batch} pairs on "
        f"{args.world_size} × {args.device.type}, seed {args.seed}"
        + (f", resumed from {checkpoint}" if checkpoint else ""),
        flush=True,
    )

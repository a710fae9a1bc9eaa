"""The README.md that a trained model, or an encoder exported from one, carries with it."""

from pathlib import Path

from mpma_train.data.store import Store
from mpma_train.settings import Settings

_LIMITS = """\
## Limits

For research. Not a medical device, not for diagnosis, not evaluated for any patient group.

The tokenizer of this model may have been trained on the reports, and weights can hold what they
were trained on. A tokenizer or weights trained on credentialed data such as MIMIC-CXR must not be
shared beyond what its data-use agreement allows."""

_CARD = """\
---
library_name: mpma
tags: [medical, radiology, vision-language, masked-autoencoder]
---

# MPMA, pretrained by `mpma pretrain`

An image encoder, a text encoder and their fusion, pretrained on pairs of radiographs and reports by
masked reconstruction and alignment, as far as the settings of the run switch them on.

| | |
|---|---|
| Data | {source}: {pairs} training pairs of {studies} studies |
| Split | {split_hash} |
| Initial weights | {initial} |
| Steps | {steps} |
| Seed | {seed} |
| Control | {control} |

All settings stand in `settings.yaml`, the log in `metrics.jsonl`.

## Use

```python
from mpma_train.models import MpmaForPreTraining, MpmaProcessor

model = MpmaForPreTraining.from_pretrained("DIR")
processor = MpmaProcessor.from_pretrained("DIR")
```

{limits}{licence}
"""

_EXPORT_CARD = """\
---
library_name: {library}
tags: [medical, radiology]
---

# The {encoder} encoder of an MPMA model

Written by `mpma export` from `{source}`, for plain {library}.

| | |
|---|---|
{rows}

```python
{code}
```

{limits}
"""


def write_model_card(
    output_dir: Path, store: Store, settings: Settings, *, steps: int, seed: int
) -> None:
    """Write `README.md` beside the model: its data, split, initial weights and limits."""
    start = settings.data.model_name_or_path
    train = store.pairs.iloc[store.rows("train")]
    card = _CARD.format(
        source=store.meta["source"],
        pairs=len(train),
        studies=train["study_id"].nunique(),
        split_hash=store.meta["hashes"]["split"],
        initial=f"`{start}`" if start else "random",
        steps=steps,
        seed=seed,
        limits=_LIMITS,
        control="trained on shuffled pairs" if settings.data.shuffle_pairs else "no",
        licence=f"\nThe initial weights' own licence applies too: see `{start}`." if start else "",
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")


def write_export_card(
    out: Path, source: Path, *, library: str, encoder: str, facts: dict[str, str], code: str
) -> None:
    """Write `README.md` beside an exported encoder: what it takes, how it pools, its limits.

    Args:
        out: the exported directory.
        source: the model's.
        library: what reads it.
        encoder: "image" or "text".
        facts: rows of its table, such as how MPMA pools its states.
        code: how to read it.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    names = {"library": library, "encoder": encoder, "source": source, "code": code}
    card = _EXPORT_CARD.format(rows=rows, limits=_LIMITS, **names)
    (out / "README.md").write_text(card, encoding="utf-8")

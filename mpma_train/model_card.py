"""The README.md that a trained model carries with it."""

from pathlib import Path

from mpma_train.data.store import Store
from mpma_train.settings import Settings

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

## Limits

For research. Not a medical device, not for diagnosis, not evaluated for any patient group.

The tokenizer of this model may have been trained on the reports, and weights can hold what they
were trained on. A tokenizer or weights trained on credentialed data such as MIMIC-CXR must not be
shared beyond what its data-use agreement allows.{licence}
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
        control="trained on shuffled pairs" if settings.data.shuffle_pairs else "no",
        licence=f"\nThe initial weights' own licence applies too: see `{start}`." if start else "",
    )
    (output_dir / "README.md").write_text(card, encoding="utf-8")

"""Question-answer pairs on a scene, in the form of VQA-RAD: closed (yes, no) and open ones."""

from __future__ import annotations

import numpy as np

from .scene import NO_FINDING, SINGLE_SHARES, Scene

NAMES = {
    "Lung Opacity": "an opacity",
    "Pleural Effusion": "a pleural effusion",
    "Cardiomegaly": "cardiomegaly",
    "Pneumothorax": "a pneumothorax",
    "Lung Lesion": "a nodule",
    "Atelectasis": "atelectasis",
    "Support Devices": "a support device",
}


def ask(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions on one scene: `question`, `answer`, `answer_type` (OPEN, CLOSED) and kind."""

    def entry(kind: str, question: str, answer: str) -> dict[str, str]:
        closed = answer in ("yes", "no")
        return {
            "question": question,
            "answer": answer,
            "answer_type": "CLOSED" if closed else "OPEN",
            "question_type": kind,
        }

    absent = [name for name in SINGLE_SHARES if name not in (*scene.labels, NO_FINDING)]
    asked = absent[int(rng.integers(len(absent)))]
    entries = [entry("presence", f"Is there {NAMES[asked]}?", "no")]
    for finding in scene.findings:
        name = NAMES[finding.label]
        entries.append(entry("presence", f"Is there {name}?", "yes"))
        if finding.side:
            entries.append(entry("side", f"On which side is {name}?", finding.side))
        if finding.zone:
            entries.append(entry("position", f"In which part of the lung is {name}?", finding.zone))
        if finding.size:
            entries.append(entry("size", f"How large is {name}?", finding.size))
        if finding.device:
            entries.append(entry("device", "Which device is seen?", finding.device))
    entries.append(entry("volume", "How are the lung volumes?", scene.inspiration))
    return entries

"""What one made-up study shows, drawn before any pixel or word: findings, build, exposure.

Both the image and the report are rendered from the same `Scene`, so what the report states (side,
zone, degree, device, depth of inspiration ...) is what the image shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES = ("right", "left")
ZONES = ("upper", "mid", "lower")
SIZES = ("small", "moderate", "large")
DEVICES = ("endotracheal tube", "central line", "pacemaker", "nasogastric tube", "chest tube")

NO_FINDING = "No Finding"

# Single findings and their shares. They are spread evenly, so that knowing the name of a finding
# says little about which of the pairs it is.
SINGLE_SHARES = {
    "Lung Opacity": 0.13,
    "Pleural Effusion": 0.13,
    "Cardiomegaly": 0.11,
    "Pneumothorax": 0.12,
    "Lung Lesion": 0.12,
    "Atelectasis": 0.11,
    "Support Devices": 0.12,
    NO_FINDING: 0.08,
}

# Few combinations, each common enough to stay ambiguous by name alone.
COMBINATION_SHARES = {
    ("Cardiomegaly", "Pleural Effusion"): 0.04,
    ("Support Devices", "Lung Opacity"): 0.04,
}


@dataclass(frozen=True)
class Finding:
    """One finding. `side` and `zone` are the patient's and empty where they mean nothing."""

    label: str
    side: str = ""
    zone: str = ""
    size: str = ""
    device: str = ""


@dataclass(frozen=True)
class Build:
    """What stays the same over the studies of one patient. Lengths in units of half a thorax."""

    width: float
    height: float
    scoliosis: float
    aortic_knob: float
    sex: str
    age: int


@dataclass(frozen=True)
class Scene:
    """One study: findings, the patient's build and how the picture was taken."""

    findings: tuple[Finding, ...]
    build: Build
    view: str
    heart_ratio: float
    inspiration: str
    rotation: str
    elevated_diaphragm: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the findings, `No Finding` if there is none."""
        return tuple(finding.label for finding in self.findings) or (NO_FINDING,)

    @property
    def heart_word(self) -> str:
        """Size of the heart as the report would call it."""
        if "Cardiomegaly" in self.labels:
            return "enlarged"
        return "borderline" if self.heart_ratio >= 0.5 else "normal"


def _choice(rng: np.random.Generator, options, shares=None):
    return options[int(rng.choice(len(options), p=shares))]


def sample_build(rng: np.random.Generator) -> Build:
    """Draws the build of one patient."""
    has_curve, has_knob = rng.random(2) < (0.18, 0.2)
    return Build(
        width=float(rng.uniform(0.94, 1.07)),
        height=float(rng.uniform(0.94, 1.06)),
        scoliosis=float(rng.choice((-1, 1)) * rng.uniform(0.06, 0.1)) if has_curve else 0.0,
        aortic_knob=float(rng.uniform(0.09, 0.13)) if has_knob else float(rng.uniform(0, 0.03)),
        sex=_choice(rng, ("man", "woman")),
        age=int(rng.integers(19, 90)),
    )


def _sample_finding(rng: np.random.Generator, label: str) -> Finding:
    side, zone, size = (_choice(rng, options) for options in (SIDES, ZONES, SIZES))
    if label in ("Lung Opacity", "Lung Lesion"):
        return Finding(label, side, zone, size)
    if label == "Atelectasis":
        return Finding(label, side, _choice(rng, ("mid", "lower")), size)
    if label == "Pleural Effusion":
        return Finding(label, _choice(rng, (*SIDES, "bilateral"), (0.4, 0.4, 0.2)), "", size)
    if label == "Pneumothorax":
        return Finding(label, side, _choice(rng, ("apical", "lateral")), size)
    if label == "Cardiomegaly":
        return Finding(label, size={"small": "mild", "large": "severe"}.get(size, size))
    device = _choice(rng, DEVICES)
    sided = device in ("central line", "pacemaker", "chest tube")
    return Finding(label, side if sided else "", device=device)


def sample_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draws the findings of one study: mostly one, sometimes none or two."""
    options = [(label,) for label in SINGLE_SHARES] + list(COMBINATION_SHARES)
    shares = np.array([*SINGLE_SHARES.values(), *COMBINATION_SHARES.values()])
    labels = _choice(rng, options, shares / shares.sum())
    return tuple(_sample_finding(rng, label) for label in labels if label != NO_FINDING)


def sample_scene(rng: np.random.Generator, build: Build) -> Scene:
    """Draws one study of a patient."""
    findings = sample_findings(rng)
    ratio = rng.uniform(0.39, 0.45) if rng.random() < 0.75 else rng.uniform(0.5, 0.52)
    for finding in findings:
        if finding.label == "Cardiomegaly":
            ratio = {"mild": 0.575, "moderate": 0.64, "severe": 0.715}[finding.size]
            ratio += rng.uniform(-0.015, 0.015)
    sided = rng.random() < 0.2
    return Scene(
        findings=findings,
        build=build,
        view=_choice(rng, ("PA", "AP"), (0.55, 0.45)),
        heart_ratio=float(ratio),
        inspiration=_choice(rng, ("low", "normal", "deep"), (0.25, 0.55, 0.2)),
        rotation=_choice(rng, ("", "right", "left"), (0.6, 0.2, 0.2)),
        elevated_diaphragm=_choice(rng, SIDES) if sided else "",
    )

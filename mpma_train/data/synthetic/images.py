"""Draws a scene as a frontal radiograph: attenuation in body coordinates, exposure, noise.

Body coordinates: x from -1 (the patient's right, at the left of the image) to 1, y from -1 (neck)
to 1 (abdomen). Everything is a vectorised expression on two coordinate grids, so one image takes a
few milliseconds. Bright is dense, as in MONOCHROME2.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from .scene import Finding, Scene

Field = np.ndarray

ZONE_DEPTHS = {"upper": (0.2, 0.34), "mid": (0.45, 0.58), "lower": (0.7, 0.84)}


def _ramp(distance: Field, softness: float) -> Field:
    """0 to 1 over `softness` around a signed distance of 0."""
    return np.clip(0.5 + distance / softness, 0.0, 1.0)


def _bump(squared: Field) -> Field:
    return np.exp(-squared)


@dataclass
class _Lung:
    """One lung: `across` from the midline outwards, `depth` from 0 (apex) to 1 (base)."""

    across: Field
    depth: Field
    distance: Field
    medial: float
    apex: float
    base: float
    width: float

    def lateral(self, depth):
        return self.width * (0.36 + 0.48 * (1 - (1 - np.clip(depth, 0, 1)) ** 2.2))

    def point(
        self, rng: np.random.Generator, zone: str, least_across: float
    ) -> tuple[float, float]:
        """A place (across, y) in a zone, clear of the chest wall and of the heart."""
        depth = rng.uniform(*ZONE_DEPTHS[zone])
        inner = max(self.medial + 0.07, least_across)
        outer = float(self.lateral(depth)) - 0.12
        across = rng.uniform(inner, max(outer, inner + 0.02))
        return across, self.apex + depth * (self.base - self.apex)


class _Canvas:
    """Coordinate grids, anatomy and the attenuation they add up to, for one scene."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.scene, self.rng = scene, rng
        height, width = int(rng.integers(224, 257)), int(rng.integers(224, 257))
        self.shape = (height, width)
        angle = np.deg2rad(rng.normal(0, 0.8))
        scale = rng.uniform(1.02, 1.08) * min(height, width) / 2
        rows = (np.arange(height, dtype=np.float32) - height / 2)[:, None] / scale
        columns = (np.arange(width, dtype=np.float32) - width / 2)[None, :] / scale
        rows = rows - np.float32(rng.uniform(-0.02, 0.02))
        columns = columns - np.float32(rng.uniform(-0.02, 0.02))
        cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        self.x = (columns * cosine + rows * sine) / np.float32(scene.build.width)
        self.y = (rows * cosine - columns * sine) / np.float32(scene.build.height)
        self.pixel = 1.0 / scale
        self._lay_out()

    def _lay_out(self) -> None:
        scene, rng = self.scene, self.rng
        turn = {"": 0.0, "right": -0.07, "left": 0.07}[scene.rotation]
        curve = scene.build.scoliosis * np.sin(np.pi * np.clip((self.y + 1) / 1.8, 0, 1))
        self.midline = self.x - (turn * 0.9 + curve)
        base = {"low": 0.3, "normal": 0.5, "deep": 0.68}[scene.inspiration] + rng.uniform(
            -0.04, 0.04
        )
        self.lungs = {}
        for side, sign in (("right", -1.0), ("left", 1.0)):
            raised = 0.2 if scene.elevated_diaphragm == side else 0.0
            lung_base = base - raised + (0.04 if side == "left" else -0.02)
            width = 1.0 + sign * turn * 1.3 + rng.uniform(-0.03, 0.03)
            self.lungs[side] = self._lung(np.float32(sign) * self.midline, lung_base, width)
        self.heart_base = base + 0.02
        thorax = 2 * 0.84
        self.heart_width = scene.heart_ratio * thorax
        self.heart_x = 0.12 * self.heart_width - 0.01 + turn * 0.5
        self.heart_left = self.heart_x + self.heart_width / 2

    def _lung(self, across: Field, base: float, width: float) -> _Lung:
        apex = -0.8
        depth = (self.y - apex) / (base + 0.12 - apex)
        lung = _Lung(across, depth, across, 0.13, apex, base, width)
        dome = base + 0.5 * (across - 0.36 * width) ** 2 - 0.02
        top = apex + 0.9 * (across - 0.36 * width) ** 2
        lung.distance = np.minimum(
            np.minimum(across - lung.medial, lung.lateral(depth) - across),
            np.minimum(dome - self.y, self.y - top),
        )
        return lung

    def clouds(self, cells: int) -> Field:
        """Smooth noise of unit variance with about `cells` cells along the image."""
        coarse = self.rng.standard_normal((cells + 2, cells + 2)).astype(np.float32)
        size = (self.shape[1], self.shape[0])
        return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))

    def anatomy(self) -> Field:
        """Attenuation of a body without findings, about 0 (air) to 1 (dense)."""
        rng, x, y = self.rng, self.x, self.y
        wall = rng.uniform(0.98, 1.08)
        neck = np.clip((-0.62 - y) / 0.3, 0, 1)
        body = _ramp(wall - 0.55 * neck**1.5 - np.abs(x) + 0.08 * np.clip(y, 0, 1), 0.06)
        fat = rng.uniform(0.45, 0.55)
        density = fat * body
        self.air = np.maximum(*(_ramp(lung.distance, 0.07) for lung in self.lungs.values()))
        aeration = rng.uniform(0.3, 0.36)
        density -= aeration * self.air
        density += rng.uniform(0.1, 0.2) * _bump((self.midline / 0.1) ** 2)
        upper = _ramp(0.17 - np.abs(self.midline), 0.08) * _ramp(0.15 - y, 0.5)
        knob = self.scene.build.aortic_knob
        size = 0.06 + knob
        upper += _ramp(size - np.hypot(self.midline - 0.13, y + 0.36), 0.05) * (knob > 0.05)
        density += 0.14 * np.minimum(upper, 1) * body
        heart = np.hypot(
            (self.midline - self.heart_x) / (self.heart_width / 2),
            (y - self.heart_base + 0.24) / (0.3 + 0.12 * self.heart_width),
        )
        self.heart = _ramp(1 - heart, 0.12) * body
        density += 0.26 * self.heart * np.maximum(self.air, 0.15)
        density += self._bones(body)
        hilum = sum(
            _bump(((lung.across - 0.2) / 0.16) ** 2 + ((y + 0.06) / 0.24) ** 2)
            for lung in self.lungs.values()
        )
        vessels = np.maximum(self.clouds(34), 0) * (0.01 + 0.02 * hilum) + 0.03 * hilum
        density += vessels * self.air
        density += (0.016 * self.clouds(5) + 0.012 * self.clouds(12)) * body
        bubble = np.hypot((x - 0.4) / 0.17, (y - self.heart_base - 0.32) / 0.09)
        density -= rng.choice((0, 0.18)) * _ramp(1 - bubble, 0.4)
        return density

    def _bones(self, body: Field) -> Field:
        rng, y = self.rng, self.y
        across = np.abs(self.midline)
        slope = rng.uniform(0.2, 0.4)
        phase = rng.uniform(0, 1)
        posterior = np.cos(2 * np.pi * (rng.uniform(4.2, 5.2) * (y - slope * across**2) + phase))
        anterior = np.cos(2 * np.pi * (3.4 * (y + 0.55 * across) + rng.uniform(0, 1)))
        ribs = np.maximum(posterior - 0.25, 0) * 0.085 + np.maximum(anterior - 0.5, 0) * 0.05
        cage = _ramp(0.92 - across, 0.1) * _ramp(y + 0.85, 0.2) * _ramp(0.75 - y, 0.3)
        tilt = 0.12 * rng.uniform(0.4, 1.6)
        clavicle = np.abs(y + 0.66 + tilt * (0.5 - across)) + 10 * np.maximum(across - 0.8, 0)
        bones = ribs * cage * rng.uniform(0.3, 0.6)
        return (bones + 0.09 * _bump((clavicle / 0.045) ** 2) * (across > 0.06)) * body


def _opacity(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    lung, rng = canvas.lungs[finding.side], canvas.rng
    across, y = lung.point(rng, finding.zone, _clear_of_heart(canvas, finding))
    radius = {"small": 0.13, "moderate": 0.2, "large": 0.3}[finding.size] * rng.uniform(0.92, 1.08)
    shape = rng.uniform(0.8, 1.25)
    far = np.hypot((lung.across - across) * shape, (canvas.y - y) / shape) / radius
    ragged = far + 0.16 * canvas.clouds(18)
    cloud = _bump(ragged**2 * 0.9) * np.maximum(canvas.air, 0.1)
    return rng.uniform(0.5, 0.6) * cloud * (1 + 0.2 * canvas.clouds(30)), cloud > 0.4


def _lesion(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    lung, rng = canvas.lungs[finding.side], canvas.rng
    across, y = lung.point(rng, finding.zone, _clear_of_heart(canvas, finding))
    radius = {"small": 0.075, "moderate": 0.11, "large": 0.16}[finding.size]
    radius *= rng.uniform(0.92, 1.08)
    ball = _ramp(radius - np.hypot(lung.across - across, canvas.y - y), 0.03)
    return rng.uniform(0.6, 0.7) * ball, ball > 0.5


def _atelectasis(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    lung, rng = canvas.lungs[finding.side], canvas.rng
    across, y = lung.point(rng, finding.zone, _clear_of_heart(canvas, finding))
    length = {"small": 0.14, "moderate": 0.21, "large": 0.28}[finding.size]
    thick = {"small": 0.045, "moderate": 0.058, "large": 0.072}[finding.size]
    lean = rng.uniform(-0.5, 0.5)
    along = lung.across - across + lean * (canvas.y - y)
    away = canvas.y - y - lean * (lung.across - across)
    band = _bump((away / thick) ** 2) * _ramp(length - np.abs(along), 0.06) * (canvas.air > 0.2)
    return rng.uniform(0.6, 0.7) * band, band > 0.4


def _effusion(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    rng = canvas.rng
    total = np.zeros(canvas.shape, np.float32)
    for side in ("right", "left") if finding.side == "bilateral" else (finding.side,):
        lung = canvas.lungs[side]
        rise = {"small": 0.1, "moderate": 0.3, "large": 0.58}[finding.size] + rng.uniform(
            -0.03, 0.03
        )
        level = lung.base + 0.06 - rise
        meniscus = level - 0.5 * np.maximum(lung.across - 0.42, 0) ** 1.5 * (0.5 + rise)
        fluid = _ramp(canvas.y - meniscus, 0.08)
        if finding.size == "small":
            fluid = fluid * _ramp(lung.across - 0.42, 0.2)
        fluid = fluid * _ramp(lung.distance, 0.07)
        total = np.maximum(total, fluid)
    return rng.uniform(0.36, 0.42) * total * (1 - 0.7 * canvas.heart), total > 0.5


def _pneumothorax(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    lung, rng = canvas.lungs[finding.side], canvas.rng
    gap = {"small": 0.12, "moderate": 0.21, "large": 0.34}[finding.size] * rng.uniform(0.93, 1.07)
    lateral = lung.lateral(lung.depth) - lung.across
    apical = canvas.y - lung.apex - 0.9 * (lung.across - 0.36 * lung.width) ** 2
    if finding.zone == "apical":
        inward = apical - 1.5 * gap + 0.35 * (lung.across - 0.3)
    else:
        inward = lateral - gap + 0.5 * np.maximum(0.25 - lung.depth, 0)
    inside = _ramp(lung.distance, 0.05)
    gas = _ramp(-inward, 0.03) * inside
    line = _bump((inward / 0.022) ** 2) * inside
    collapse = 0.1 * {"small": 0.4, "moderate": 0.8, "large": 1.3}[finding.size]
    shrunk = inside * (1 - gas)
    return 0.17 * line + collapse * shrunk - rng.uniform(0.26, 0.3) * gas, (gas > 0.5)


def _stroke(canvas: _Canvas, points: list[tuple[float, float]], width: float) -> Field:
    """A polyline in (midline, y) coordinates."""
    nearest = np.full(canvas.shape, np.inf, np.float32)
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        along = ((canvas.midline - x0) * dx + (canvas.y - y0) * dy) / (dx * dx + dy * dy)
        along = np.clip(along, 0, 1)
        squared = (canvas.midline - x0 - along * dx) ** 2 + (canvas.y - y0 - along * dy) ** 2
        nearest = np.minimum(nearest, squared)
    return _ramp(width - np.sqrt(nearest), canvas.pixel * 1.5)


def _device(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    rng = canvas.rng
    sign = -1.0 if finding.side == "right" else 1.0
    shift = rng.uniform(-0.04, 0.04)
    if finding.device == "endotracheal tube":
        drawn = _stroke(canvas, [(shift, -1.3), (shift / 2, -0.32 + shift)], 0.034)
    elif finding.device == "nasogastric tube":
        way = [(shift, -1.3), (0.03, 0.1), (0.1, canvas.heart_base + 0.1)]
        drawn = _stroke(canvas, [*way, (0.42 + shift, canvas.heart_base + 0.3)], 0.028)
    elif finding.device == "central line":
        way = [(sign * 0.36, -1.05), (sign * 0.3, -0.7), (-0.1, -0.45)]
        drawn = _stroke(canvas, [*way, (-0.13, 0.0 + 2 * shift)], 0.028)
    elif finding.device == "chest tube":
        high = rng.uniform(-0.5, -0.25)
        way = [(sign * 1.05, 0.28), (sign * 0.66, 0.12), (sign * 0.46, high)]
        drawn = _stroke(canvas, way, 0.036)
    else:
        x, y = sign * (0.56 + shift), -0.52 + shift
        box = np.maximum(np.abs(canvas.midline - x) / 0.14, np.abs(canvas.y - y) / 0.1)
        way = [(x, y), (sign * 0.2, -0.6), (-0.1, -0.4), (-0.12, 0.0)]
        lead = _stroke(canvas, [*way, (0.22, canvas.heart_base - 0.1)], 0.024)
        drawn = np.maximum(_ramp(1 - box, 0.25), lead)
    return rng.uniform(0.6, 0.7) * drawn, drawn > 0.5


def _cardiomegaly(canvas: _Canvas, finding: Finding) -> tuple[Field, Field]:
    # The heart itself is drawn with the anatomy, from the scene's heart_ratio.
    return np.zeros(canvas.shape, np.float32), canvas.heart > 0.5


def _clear_of_heart(canvas: _Canvas, finding: Finding) -> float:
    if finding.side == "left" and finding.zone != "upper":
        return min(canvas.heart_left + 0.05, 0.6)
    return 0.0


_DRAWINGS = {
    "Lung Opacity": _opacity,
    "Lung Lesion": _lesion,
    "Atelectasis": _atelectasis,
    "Pleural Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
    "Support Devices": _device,
    "Cardiomegaly": _cardiomegaly,
}


def _expose(canvas: _Canvas, density: Field) -> np.ndarray:
    """Turns attenuation into grey values as different tubes, tables and windows would."""
    rng = canvas.rng
    tilt = rng.normal(0, 0.03, 2)
    density = density + tilt[0] * canvas.x + tilt[1] * canvas.y + 0.02 * canvas.clouds(3)
    low = rng.uniform(-0.06, 0.0)
    high = rng.uniform(1.0, 1.1)
    grey = np.clip((density - low) / (high - low), 0, 1) ** rng.uniform(0.9, 1.15)
    grain = rng.uniform(0.005, 0.02)
    grey += grain * rng.standard_normal(canvas.shape, dtype=np.float32)
    bright, floor = rng.uniform(0.85, 1.0), rng.uniform(0, 0.08)
    grey = floor + (bright - floor) * grey
    if rng.random() < 0.25:
        edges = rng.integers(0, 14, 4)
        grey[: edges[0]], grey[:, : edges[1]] = 0, 0
        grey[canvas.shape[0] - edges[2] :], grey[:, canvas.shape[1] - edges[3] :] = 0, 0
    return np.clip(np.rint(grey * 255), 0, 255).astype(np.uint8)


def draw(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws one radiograph of a scene.

    Returns the image, uint8 (H, W) with sides of 224 to 256 pixels, and one bool (H, W) mask for
    each of `scene.findings`, in their order.
    """
    canvas = _Canvas(scene, rng)
    density = canvas.anatomy()
    masks = []
    for finding in scene.findings:
        added, mask = _DRAWINGS[finding.label](canvas, finding)
        density = density + added
        masks.append(mask)
    return _expose(canvas, density), masks

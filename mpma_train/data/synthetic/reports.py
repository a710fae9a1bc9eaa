"""Words a scene as a free-text radiology report, from a small grammar.

A report states each finding with its side, zone and degree at least once, denies some absent
findings, describes some of the patient's build and of how the picture was taken, and adds sentences
that no picture could settle. The labels returned beside it follow what the report says, as a
labeller of reports would.
"""

from __future__ import annotations

import numpy as np

from .scene import NO_FINDING, Finding, Scene

SIZE_WORDS = {
    "small": ("small", "tiny", "minimal"),
    "moderate": ("moderate", "medium", "intermediate"),
    "large": ("large", "extensive", "considerable"),
    "mild": ("mild", "slight", "minor"),
    "severe": ("severe", "marked", "massive"),
}
ZONE_WORDS = {
    "upper": ("upper lung zone", "upper lobe", "upper lung"),
    "mid": ("mid lung zone", "mid lung", "middle lung zone"),
    "lower": ("lower lung zone", "lower lobe", "lung base"),
}

FINDING_SENTENCES = {
    "Lung Opacity": (
        "There is {size} hazy opacity in the {side} {zone}.",
        "{Size} area of increased opacification projects over the {side} {zone}.",
        "{Size} ill-defined airspace opacity is seen in the {side} {zone}.",
        "Patchy opacity in the {side} {zone}, {size} in extent.",
        "New {size} {side} {zone} opacity.",
    ),
    "Lung Lesion": (
        "Nodule of {size} size in the {side} {zone}.",
        "{Size} round, well circumscribed lesion is seen in the {side} {zone}.",
        "{Size} nodular density projecting over the {side} {zone}.",
        "In the {side} {zone}, pulmonary nodule of {size} size.",
        "{Side} {zone} nodule, {size} in size.",
    ),
    "Atelectasis": (
        "There is {size} linear atelectasis in the {side} {zone}.",
        "{Size} band of plate-like atelectasis in the {side} {zone}.",
        "{Size} streaky density in the {side} {zone} is compatible with atelectasis.",
        "{Side} {zone} subsegmental atelectasis, {size}.",
        "Discoid atelectasis of {size} extent is present in the {side} {zone}.",
    ),
    "Pleural Effusion": (
        "Pleural effusion on the {side}, {size} in amount.",
        "{Size} {side} pleural effusion.",
        "{Side} costophrenic angle is obscured by {size} effusion.",
        "{Size} amount of pleural fluid is present on the {side}.",
        "{Size} layering effusion, {side}.",
    ),
    "Pneumothorax": (
        "There is {size} {side} {zone} pneumothorax.",
        "{Size} {zone} pneumothorax on the {side}.",
        "A pleural line is seen, consistent with {size} {side} pneumothorax, mostly {zone}.",
        "{Side} {zone} pneumothorax, {size}.",
        "The {side} lung is partly collapsed by {size} {zone} pneumothorax.",
    ),
    "Cardiomegaly": (
        "There is {size} cardiomegaly.",
        "{Size} enlargement of the cardiac silhouette.",
        "The heart is enlarged, {size} in degree.",
        "Cardiac silhouette shows {size} enlargement.",
    ),
}
DEVICE_SENTENCES = {
    "endotracheal tube": (
        "Endotracheal tube ends above the carina.",
        "An endotracheal tube is in standard position.",
        "ET tube tip terminates in the mid trachea.",
    ),
    "nasogastric tube": (
        "Nasogastric tube courses below the diaphragm into the stomach.",
        "An enteric tube ends in the stomach.",
        "NG tube tip is below the left hemidiaphragm.",
    ),
    "central line": (
        "A {side} internal jugular central line ends in the superior vena cava.",
        "{Side} central venous catheter tip is at the cavoatrial junction.",
        "Central line from the {side} terminates in the SVC.",
    ),
    "pacemaker": (
        "A {side} chest wall pacemaker has its lead in the right ventricle.",
        "{Side} pectoral pacemaker with intact lead.",
        "Pacer generator overlies the {side} chest.",
    ),
    "chest tube": (
        "A {side} chest tube is in place.",
        "{Side} pleural drain directed towards the apex.",
        "Thoracostomy tube on the {side} is unchanged.",
    ),
}
SHORT_NAMES = {
    "Lung Opacity": ("opacity", "airspace opacity"),
    "Lung Lesion": ("pulmonary nodule", "nodule"),
    "Atelectasis": ("atelectasis", "linear atelectasis"),
    "Pleural Effusion": ("pleural effusion", "effusion"),
    "Pneumothorax": ("pneumothorax",),
    "Cardiomegaly": ("cardiomegaly", "enlarged heart"),
    "Support Devices": ("support device", "line or tube"),
}
NEGATIONS = {
    "Pleural Effusion": ("No pleural effusion.", "There is no effusion.", "No pleural fluid."),
    "Pneumothorax": ("No pneumothorax.", "There is no evidence of pneumothorax."),
    "Lung Opacity": ("No focal opacity.", "No airspace opacity is seen."),
    "Lung Lesion": ("No pulmonary nodule.", "No suspicious nodule or mass."),
    "Atelectasis": ("No atelectasis.", "There is no atelectasis."),
    "Cardiomegaly": ("No cardiomegaly.", "The heart is not enlarged."),
    "Support Devices": ("No lines or tubes.", "No support devices are seen."),
    "Fracture": ("No acute fracture.", "No displaced rib fracture is identified."),
    "Edema": ("No pulmonary edema.", "There is no vascular congestion."),
    "Pneumonia": ("No evidence of pneumonia.",),
}
UNCERTAIN_PNEUMONIA = (
    "Pneumonia cannot be excluded.",
    "This could represent early pneumonia.",
    "Pneumonia is in the differential.",
)
INSPIRATION = {
    "low": ("Lung volumes are low.", "Poor inspiratory effort.", "Low lung volumes."),
    "normal": ("Lung volumes are normal.", "Adequate inspiration."),
    "deep": ("The lungs are hyperinflated.", "Hyperexpanded lungs.", "Lung volumes are large."),
}
HEART = {
    "normal": ("Heart size is normal.", "The cardiac silhouette is normal in size."),
    "borderline": ("Heart size is borderline.", "The heart is at the upper limits of normal."),
}
ROTATION = (
    "The patient is rotated to the {side}.",
    "Patient rotation towards the {side}.",
)
DIAPHRAGM = (
    "The {side} hemidiaphragm is elevated.",
    "Elevation of the {side} hemidiaphragm.",
)
SCOLIOSIS = ("Scoliosis convex to the {side}.", "{Side} convex curvature of the spine.")
KNOB = ("The aortic knob is prominent.", "Prominent aortic contour.")
IRRELEVANT = (
    "Comparison is made to the prior study of ___.",
    "Clinical correlation is recommended.",
    "The study is otherwise unremarkable.",
    "Followup is advised as clinically indicated.",
    "Upper abdomen is unremarkable.",
    "Soft tissues are unremarkable.",
    "No significant interval change.",
    "Degenerative changes are noted in the shoulders.",
    "As compared to the previous radiograph of ___, the technique differs.",
)
CLEAR_IMPRESSIONS = (
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "The lungs are clear.",
    "No acute intrathoracic abnormality.",
    "No acute disease.",
)
VAGUE_IMPRESSIONS = (
    "{Name} as described above.",
    "{Name}, see findings.",
    "Persistent {name}.",
    "{Name} is the main finding.",
)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _fill(rng: np.random.Generator, template: str, finding: Finding) -> str:
    size = _pick(rng, SIZE_WORDS[finding.size]) if finding.size else ""
    zone = _pick(rng, ZONE_WORDS[finding.zone]) if finding.zone in ZONE_WORDS else finding.zone
    words = {"size": size, "side": finding.side, "zone": zone}
    words |= {name.capitalize(): _capital(value) for name, value in words.items()}
    return template.format(**words)


def _state(rng: np.random.Generator, finding: Finding) -> str:
    templates = (
        DEVICE_SENTENCES[finding.device] if finding.device else FINDING_SENTENCES[finding.label]
    )
    return _fill(rng, _pick(rng, templates), finding)


def _describe_build(rng: np.random.Generator, scene: Scene) -> list[str]:
    """What differs between patients and pictures; the unusual is mentioned more often."""

    def sided(templates, side):
        return _pick(rng, templates).format(side=side, Side=_capital(side))

    said = []
    if rng.random() < (0.35 if scene.inspiration == "normal" else 0.9):
        said.append(_pick(rng, INSPIRATION[scene.inspiration]))
    if scene.heart_word in HEART and rng.random() < (0.5 if scene.heart_word == "normal" else 0.9):
        said.append(_pick(rng, HEART[scene.heart_word]))
    if scene.rotation and rng.random() < 0.9:
        said.append(sided(ROTATION, scene.rotation))
    if scene.elevated_diaphragm and rng.random() < 0.95:
        said.append(sided(DIAPHRAGM, scene.elevated_diaphragm))
    if scene.build.scoliosis and rng.random() < 0.9:
        said.append(sided(SCOLIOSIS, "left" if scene.build.scoliosis > 0 else "right"))
    if scene.build.aortic_knob > 0.05 and rng.random() < 0.85:
        said.append(_pick(rng, KNOB))
    return said


def _impression(rng: np.random.Generator, scene: Scene, sentences: list[str]) -> list[str]:
    if not scene.findings:
        return [_pick(rng, CLEAR_IMPRESSIONS)]
    said = []
    for finding, sentence in zip(scene.findings, sentences, strict=True):
        if rng.random() < 0.3:
            said.append(sentence)
        else:
            name = _pick(rng, SHORT_NAMES[finding.label])
            said.append(_pick(rng, VAGUE_IMPRESSIONS).format(name=name, Name=_capital(name)))
    return said


def write_report(
    scene: Scene, rng: np.random.Generator
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Words a scene.

    Returns the sentences of the report by section (`findings`, `impression`; one may be missing)
    and the labels the report supports: 1.0 stated, 0.0 denied, -1.0 left open; others are not
    mentioned.
    """
    labels = {label: 1.0 for label in scene.labels}
    stated = [_state(rng, finding) for finding in scene.findings]
    body = _describe_build(rng, scene)
    absent = [name for name in NEGATIONS if name not in labels]
    if scene.heart_word == "borderline":
        absent.remove("Cardiomegaly")
    for name in rng.permutation(absent)[: int(rng.integers(2, 4))]:
        body.append(_pick(rng, NEGATIONS[name]))
        labels[str(name)] = 0.0
    if "Lung Opacity" in scene.labels and "Pneumonia" not in labels and rng.random() < 0.25:
        body.append(_pick(rng, UNCERTAIN_PNEUMONIA))
        labels["Pneumonia"] = -1.0
    body.extend(rng.permutation(IRRELEVANT)[: int(rng.integers(0, 2))])
    body = [str(sentence) for sentence in rng.permutation(body)]
    place = int(rng.integers(0, len(body) + 1))
    findings = body[:place] + stated + body[place:]
    if NO_FINDING in labels or rng.random() < 0.55:
        return {"findings": findings, "impression": _impression(rng, scene, stated)}, labels
    name = "impression" if rng.random() < 0.5 else "findings"
    return {name: findings}, labels

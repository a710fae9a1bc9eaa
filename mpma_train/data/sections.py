"""Takes the impression and the findings out of a free-text radiology report.

The rules, each counted under its name:

    impression_findings   both were found: impression first, then findings
    impression, findings  one of them was found
    last_paragraph        neither: the last paragraph that is not a header's own (indication, technique ...)
    whole_text            a text without any header, where the caller allows it
    empty                 nothing was left

and beside them `repeated_section` (the last section of a name wins), `addendum_dropped`,
`notification_dropped`, `header_without_colon`, `findings_by_view_header`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .names import PLACEHOLDER

# Header names, lower case. What a section is called differs between hospitals and typists.
_KINDS = {
    "impression": "impression impressions conclusion conclusions opinion summary".split(),
    "findings": ["findings", "finding", "report", "findings and impression", "findings/impression"],
    "addendum": ["addendum", "addenda"],
    "start": ["final report", "final addendum", "preliminary report"],
    "notification": ["notification", "notifications", "communication", "wet read", "attestation"],
    "other": [
        *(
            "exam examination history indication indications technique comparison comparisons".split()
        ),
        *(
            "reason procedure study clinical recommendation recommendations recommendation(s)".split()
        ),
        *("signed dictated electronically date view views".split()),
        *("type of examination", "type of exam", "reason for exam", "reason for examination"),
        *("clinical history", "clinical information", "clinical indication", "study date"),
        *("comparison study", "comparison is made to", "reference exam"),
    ],
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}

_COLON_HEADER = re.compile(r"^[ \t]*([A-Za-z][A-Za-z0-9 /,&()'_.-]{1,70}?)[ \t]*:[ \t]*", re.M)
_BARE_HEADER = re.compile(r"^[ \t]*([A-Za-z][A-Za-z /()]{3,30}?)[ \t]*$", re.M)
_INLINE_HEADER = re.compile(r"^[ \t]*(ADDENDUM|WET READ)\b[ \t]*", re.M)
_VIEW_HEADER = re.compile(r"\b(chest|views?|radiographs?|x-?ray)\b", re.I)
_SENTENCE_END = re.compile(r"(?<!\bdr)(?<!\bdrs)(?<!\bmr)(?<!\bms)(?<=[.!?])\s+", re.I)
_NOTIFICATION = re.compile(
    r"\b(discussed|communicated|conveyed|relayed|reported|telephoned|called|paged|notified|informed)\b"
    r".*\b(dr|drs|doctor|physician|nurse|team|telephone|phone|by)\b"
    r"|\b(dr|drs)\b\.?\s.*\b(was|were|is)\s+(notified|informed|paged|called|aware)\b"
    r"|\b(dictated|electronically signed|reviewed and signed)\b",
    re.I | re.S,
)
_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True)
class Extract:
    """The text of a report that is kept ("" if none), and the rules that were used."""

    text: str
    rules: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    start: int
    end: int
    kind: str
    rule: str = ""


def extract(report: str, *, whole_text: bool = False) -> Extract:
    """Extracts impression and findings from a report.

    With `whole_text`, a report without any header is taken as it is instead of its last paragraph.
    """
    report = report.replace("\r\n", "\n").replace("\r", "\n")
    headers = sorted(_headers(report), key=lambda header: header.start)
    if whole_text and not headers:
        text = clean(report)
        return Extract(text, ("whole_text",)) if _WORD.search(text) else Extract("", ("empty",))
    rules = [header.rule for header in headers if header.rule]
    sections, rest = _split(report, headers, rules)
    kept = []
    for name in ("impression", "findings"):
        text, told = _without_notifications(clean(sections.get(name, "")))
        if told:
            rules.append("notification_dropped")
        if _WORD.search(text):
            kept.append((name, text))
    if kept:
        rules.append("_".join(name for name, _ in kept))
        return Extract(" ".join(text for _, text in kept), _unique(rules))
    for paragraph in reversed(rest):
        text, _ = _without_notifications(clean(paragraph))
        if _WORD.search(text):
            return Extract(text, _unique([*rules, "last_paragraph"]))
    return Extract("", _unique([*rules, "empty"]))


def clean(text: str) -> str:
    """One line, single blanks, list numbers removed, every run of underscores written as `___`."""
    text = re.sub(r"_{2,}", PLACEHOLDER, text)
    text = re.sub(r"^\s*(\d{1,2}[.)]|[-*•])\s+", "", text, flags=re.M)
    return " ".join(text.split())


def _unique(rules: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rules))


def _headers(report: str) -> Iterator[_Header]:
    taken = set()
    for match in _COLON_HEADER.finditer(report):
        name = " ".join(match.group(1).lower().split())
        shouted = match.group(1).upper() == match.group(1)
        kind, rule = _KIND_OF.get(name, ""), ""
        if not kind and name.startswith("addendum"):
            kind = "addendum"
        if not kind and shouted:
            kind = "findings" if _VIEW_HEADER.search(name) else "other"
            rule = "findings_by_view_header" if kind == "findings" else ""
        if kind:
            taken.add(report.count("\n", 0, match.start(1)))
            yield _Header(match.start(), match.end(), kind, rule)
    for pattern in (_INLINE_HEADER, _BARE_HEADER):
        for match in pattern.finditer(report):
            line = report.count("\n", 0, match.start(1))
            kind = _KIND_OF.get(" ".join(match.group(1).lower().split()), "")
            if kind and line not in taken:
                taken.add(line)
                rule = "" if kind == "start" else "header_without_colon"
                yield _Header(match.start(), match.end(), kind, rule)


def _split(
    report: str, headers: list[_Header], rules: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Sections by kind, and the paragraphs that may stand in for them."""
    has_later_start = [
        any(h.kind == "start" for h in headers[i + 1 :]) for i in range(len(headers))
    ]
    sections: dict[str, str] = {}
    from_view: set[str] = set()
    rest = [report[: headers[0].start]] if headers else re.split(r"\n\s*\n", report)
    in_addendum = False
    for index, header in enumerate(headers):
        end = headers[index + 1].start if index + 1 < len(headers) else len(report)
        body = report[header.end : end]
        if header.kind == "addendum":
            rules.append("addendum_dropped")
            # An addendum before the report ends where the report starts; one after it ends the report.
            in_addendum = has_later_start[index] or bool(sections)
            continue
        if header.kind == "start":
            in_addendum = False
        if in_addendum:
            continue
        if header.kind == "notification":
            rules.append("notification_dropped")
        elif header.kind in ("impression", "findings"):
            by_view = bool(header.rule == "findings_by_view_header")
            # A true header outranks the name of a view; among equals the last one wins.
            if header.kind in sections and by_view and header.kind not in from_view:
                continue
            if sections.get(header.kind, "").strip() and _WORD.search(body):
                rules.append("repeated_section")
            if _WORD.search(body) or header.kind not in sections:
                sections[header.kind] = body
                (from_view.add if by_view else from_view.discard)(header.kind)
        else:
            # The first paragraph after a header is that header's own.
            paragraphs = re.split(r"\n\s*\n", body)
            rest.extend(paragraphs if header.kind == "start" else paragraphs[1:])
    return sections, rest


def _without_notifications(text: str) -> tuple[str, bool]:
    sentences = _SENTENCE_END.split(text)
    kept = [sentence for sentence in sentences if not _NOTIFICATION.search(sentence)]
    return " ".join(kept), len(kept) < len(sentences)

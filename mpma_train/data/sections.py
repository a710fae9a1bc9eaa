"""Takes the impression and the findings out of a free-text radiology report.

The outcome, counted for every report:

    impression_findings     both were found: impression first, then findings
    impression, findings    one of them was found
    last_paragraph          neither: the last paragraph that belongs to no other header
    whole_text              a text without any header, where the caller allows it
    empty                   nothing was left

and what was met on the way: `repeated_section` (the last section of a name wins),
`addendum_dropped`, `notification_dropped`, `header_without_colon`, `findings_by_view_header`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .names import PLACEHOLDER

# What a section is called differs between hospitals, years and typists. Lower case.
_KINDS = {
    "impression": {"impression", "impressions", "conclusion", "conclusions", "opinion", "summary"},
    "findings": {"findings", "finding", "report"},
    "both": {"findings and impression", "findings/impression", "impression and findings"},
    "addendum": {"addendum", "addenda"},
    "start": {"final report", "final addendum", "preliminary report"},
    "notification": {"notification", "notifications", "communication", "wet read", "attestation"},
    "other": {
        *("exam", "examination", "type of exam", "type of examination", "study", "study date"),
        *("procedure", "technique", "view", "views", "comparison", "comparisons", "date"),
        *("history", "clinical history", "clinical information", "clinical indication"),
        *("indication", "indications", "reason for exam", "reason for examination"),
        *("recommendation", "recommendations", "recommendation(s)", "dictated by", "signed by"),
    },
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}

_COLON_HEADER = re.compile(
    r"^[ \t]*([A-Za-z][A-Za-z0-9 /,&()'_.-]{1,70}?)[ \t]*:(?!\d)[ \t]*", re.M
)
_BARE_HEADER = re.compile(r"^[ \t]*([A-Za-z][A-Za-z /()]{3,30}?)[ \t]*$", re.M)
_INLINE_HEADER = re.compile(r"^[ \t]*(ADDENDUM|WET READ)\b[ \t]*", re.M)
# Tables often hold a report as one line: there a header follows the end of a sentence, and the two
# that matter, in capitals, may follow anything.
_HEADER_WITHIN_LINE = re.compile(
    r"(^\s*(?:final|preliminary) report|(?<=[.!?:_])|(?=\s+(?-i:FINDINGS|IMPRESSION)\s*:))\s+"
    rf"({'|'.join(map(re.escape, sorted(_KIND_OF, key=len, reverse=True)))})\s*:(?!\d)",
    re.I,
)
_VIEW = re.compile(r"\b(chest|views?|radiographs?|x-?ray)\b")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
# A sentence does not end after a title, and after a.m. or p.m. only before a capital.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?i:(?<!\bdr\.)(?<!\bdrs\.)(?<!\bmr\.)(?<!\bms\.))"
    r"(?:(?i:(?<![ap]\.m\.)) |(?i:(?<=[ap]\.m\.)) (?=[A-Z]))"
)
_PERSON = r"(drs?|doctors?|physicians?|nurse|team|telephone|phone)"
_TOLD = (
    r"(discussed|communicated|conveyed|relayed|reported|telephoned|called|paged|notified|informed)"
)
_NOTIFICATION = re.compile(
    rf"\b{_TOLD}\b.*\b{_PERSON}\b"
    rf"|\b{_PERSON}\b.*\b(was|were|is|has been)\s+({_TOLD}|aware)\b"
    r"|\b(dictated by|electronically signed|reviewed and signed)\b",
    re.I,
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

    With `whole_text`, a report without any header is taken as it is, not by its last paragraph.
    """
    report = report.replace("\r\n", "\n").replace("\r", "\n").strip()
    if "\n" not in report:
        report = _HEADER_WITHIN_LINE.sub(r"\1\n\2:", report)
    headers = sorted(_headers(report), key=lambda header: header.start)
    if whole_text and not headers:
        text = clean(report)
        return Extract(text, ("whole_text",)) if _WORD.search(text) else Extract("", ("empty",))
    rules = [header.rule for header in headers if header.rule]
    sections, rest = _split(report, headers, rules)
    kept: dict[str, str] = {}
    for name in ("impression", "findings"):
        text = _without_notifications(sections.get(name, ""), rules)
        if _WORD.search(text):
            kept[name] = text
    if kept:
        return Extract(" ".join(kept.values()), _unique([*rules, "_".join(kept)]))
    for paragraph in reversed(rest):
        text = _without_notifications(paragraph, rules)
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
        kind, rule = _KIND_OF.get(name, ""), ""
        if name.startswith("addendum"):
            kind = "addendum"
        if not kind and match.group(1).isupper():
            # Old reports name the view instead of saying FINDINGS; other capitals are a header too.
            kind = "findings" if _VIEW.search(name) else "other"
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
    sections: dict[str, str] = {}
    named_by_view: set[str] = set()
    rest = _PARAGRAPH.split(report[: headers[0].start] if headers else report)
    last_start = max((i for i, header in enumerate(headers) if header.kind == "start"), default=-1)
    in_addendum = False
    for index, header in enumerate(headers):
        end = headers[index + 1].start if index + 1 < len(headers) else len(report)
        body = report[header.end : end]
        if header.kind == "addendum":
            rules.append("addendum_dropped")
            # An addendum ahead of the report ends where the report starts; one behind ends it.
            in_addendum = index < last_start or bool(sections)
            continue
        in_addendum = in_addendum and header.kind != "start"
        if in_addendum:
            continue
        if header.kind == "notification":
            rules.append("notification_dropped")
        elif header.kind in ("impression", "findings", "both"):
            name = "findings" if header.kind == "both" else header.kind
            by_view = header.rule == "findings_by_view_header"
            outranked = by_view and name in sections and name not in named_by_view
            if not _WORD.search(body) or outranked:
                continue
            if name in sections:
                rules.append("repeated_section")
            sections[name] = body
            (named_by_view.add if by_view else named_by_view.discard)(name)
        else:
            # The first paragraph after another header belongs to that header.
            paragraphs = _PARAGRAPH.split(body)
            rest.extend(paragraphs if header.kind == "start" else paragraphs[1:])
    return sections, rest


def _without_notifications(body: str, rules: list[str]) -> str:
    sentences = _SENTENCE_END.split(clean(body))
    kept = [sentence for sentence in sentences if not _NOTIFICATION.search(sentence)]
    if len(kept) < len(sentences):
        rules.append("notification_dropped")
    return " ".join(kept)

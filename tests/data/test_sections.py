import pytest

from mpma_train.data.sections import clean, extract

FULL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old man with dyspnea  // r/o CHF

 COMPARISON:  Chest radiograph dated ___.

 FINDINGS:

 The lungs are clear.
 Heart size is normal.

 IMPRESSION:

 No acute process.
"""


def test_impression_comes_first_then_findings():
    found = extract(FULL)
    assert found.text == "No acute process. The lungs are clear. Heart size is normal."
    assert found.rules == ("impression_findings",)


@pytest.mark.parametrize(
    "change", [str.lower, str.title, lambda text: text.replace("IMPRESSION", "CONCLUSION")]
)
def test_cases_and_variants_of_headers(change):
    assert extract(change(FULL)).text.lower() == extract(FULL).text.lower()


def test_windows_line_ends_change_nothing():
    assert extract(FULL.replace("\n", "\r\n")) == extract(FULL)


def test_headers_without_colon_are_found_and_counted():
    found = extract("FINAL REPORT\n\nFINDINGS\n Clear lungs.\n\nIMPRESSION\n Normal.\n")
    assert found.text == "Normal. Clear lungs."
    assert set(found.rules) == {"header_without_colon", "impression_findings"}


@pytest.mark.parametrize(
    "report",
    [
        "INDICATION: Cough. COMPARISON: FINDINGS: Clear lungs. IMPRESSION: Normal.",
        "Comparison: None. Findings: Clear lungs. Impression: Normal.",
        "INDICATION: Cough FINDINGS: Clear lungs. IMPRESSION: Normal.",
        "FINAL REPORT FINDINGS: Clear lungs. IMPRESSION: Normal.",
    ],
)
def test_headers_within_a_report_of_one_line(report):
    assert extract(report, whole_text=True).text == "Normal. Clear lungs."


def test_line_breaks_make_no_difference():
    assert extract(" ".join(FULL.split()), whole_text=True) == extract(FULL)


def test_a_colon_within_a_sentence_of_one_line_is_no_header():
    text = "Clear lungs with normal findings: none. Seen at 10:30."
    assert extract(text, whole_text=True).text == text


def test_last_of_two_findings_sections_wins():
    found = extract(
        "FINDINGS: First reading.\n\nIMPRESSION: Normal.\n\nFINDINGS: Second reading.\n"
    )
    assert found.text == "Normal. Second reading."
    assert "repeated_section" in found.rules


def test_an_empty_later_section_does_not_win():
    assert extract("FINDINGS: Clear lungs.\n\nFINDINGS:\n\n").text == "Clear lungs."


@pytest.mark.parametrize("header", ["ADDENDUM:", "ADDENDUM", "ADDENDUM by Dr. ___:"])
def test_addendum_before_the_report_is_dropped_with_its_sections(header):
    addendum = f" {header}  Revised.\n\n IMPRESSION: Large mass.\n\n"
    found = extract(addendum + FULL)
    assert found.text == extract(FULL).text
    assert "addendum_dropped" in found.rules


def test_addendum_after_the_report_is_dropped_with_its_sections():
    found = extract(FULL + "\n ADDENDUM: Mass was missed.\n\n IMPRESSION: Large mass.\n")
    assert found.text == extract(FULL).text


def test_addendum_that_opens_a_report_without_final_report_ends_at_the_next_header():
    found = extract(
        "ADDENDUM: Typing error corrected.\n\nFINDINGS: Clear.\n\nIMPRESSION: Normal.\n"
    )
    assert found.text == "Normal. Clear."


def test_notifications_are_dropped_as_section_and_as_sentence():
    told = "Findings were discussed with Dr. ___ by telephone at 3:10 p.m. on ___."
    found = extract(f"IMPRESSION: New pneumothorax.  {told}\n\nNOTIFICATION: Dr. ___ was paged.\n")
    assert found.text == "New pneumothorax."
    assert "notification_dropped" in found.rules


@pytest.mark.parametrize(
    "sentence",
    [
        "Dr. ___ was notified of the findings at 10 am.",
        "These findings were communicated to the nurse by phone.",
        "The critical result was telephoned to Dr. ___ at 5 pm.",
    ],
)
def test_kinds_of_notification(sentence):
    assert extract(f"IMPRESSION: Clear lungs. {sentence} No effusion.").text == (
        "Clear lungs. No effusion."
    )


def test_sentences_that_only_look_like_notifications_stay():
    kept = "As reported previously, the effusion is small. No physician was needed."
    assert extract(f"IMPRESSION: {kept}").text == kept


def test_view_header_stands_for_findings_but_a_true_header_outranks_it():
    assert extract("PORTABLE AP CHEST:  Clear lungs.\n").text == "Clear lungs."
    found = extract("FINDINGS: True ones.\n\nTWO VIEWS OF THE CHEST: Other ones.\n")
    assert found.text == "True ones."


def test_a_time_of_day_is_no_header():
    report = "FINAL REPORT\n AP CHEST, 8:15 A.M., ___\n\n HISTORY: Fever.\n\n Lungs are clear.\n"
    assert extract(report).text == "Lungs are clear."


def test_falls_back_to_the_last_paragraph_that_is_no_header_s_own():
    report = "FINAL REPORT\n\n Clear lungs.\n\n HISTORY: Cough.\n\n TECHNIQUE: Single view.\n"
    found = extract(report)
    assert found == type(found)("Clear lungs.", ("last_paragraph",))


@pytest.mark.parametrize("report", ["", "  \n\t\n ", "FINAL REPORT\n\n INDICATION: cough\n", "___"])
def test_nothing_left_is_empty_not_an_error(report):
    assert extract(report).text == ""
    assert extract(report).rules[-1] == "empty"


def test_whole_text_is_kept_only_without_headers():
    assert extract("One.\n\nTwo.", whole_text=True).text == "One. Two."
    assert extract("One.\n\nTwo.").text == "Two."
    assert extract("History: x\n\nImpression: Two.", whole_text=True).text == "Two."


def test_clean_makes_one_placeholder_and_drops_list_numbers():
    assert (
        clean("1. Small\n effusion since _____.\n 2) ____-year")
        == "Small effusion since ___. ___-year"
    )

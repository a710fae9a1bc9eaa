"""Profiles of the random tests: `--hypothesis-profile=long` is what `make fuzz` runs."""

from hypothesis import settings

# The same examples on every run, so that a change is to blame for what fails.
settings.register_profile("usual", max_examples=500, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("usual")

"""A made-up set of radiograph-like images and worded reports, written in a published raw layout."""

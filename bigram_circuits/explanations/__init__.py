"""What an explanation of a prediction is, and how it is drawn: values, pages, files of other viewers; no model."""
